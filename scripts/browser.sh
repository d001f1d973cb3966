#!/usr/bin/env bash
# Makes sure that Chromium and its driver are there, in which tests look at the report. Does nothing where they are.
set -euo pipefail

say() { printf 'browser: %s\n' "$*"; }

if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi

BY_HAND="install Chromium and ChromeDriver so that 'chromium' and 'chromedriver' are on the PATH"
command -v apt-get >/dev/null || { say "error: $BY_HAND" >&2; exit 1; }
AS_ROOT=()
if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || { say "error: $BY_HAND (sudo apt-get install chromium chromium-driver)" >&2; exit 1; }
    AS_ROOT=(sudo -n)
fi
say "installing the packages chromium and chromium-driver (some 100 MB are downloaded)"
LOG=$(mktemp)
trap 'rm -f "$LOG"' EXIT
install() {
    "${AS_ROOT[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium chromium-driver
}
# The list of packages may be old, or missing.
install >"$LOG" 2>&1 || { "${AS_ROOT[@]}" apt-get update >"$LOG" 2>&1 && install >>"$LOG" 2>&1; } ||
    { tail -20 "$LOG" >&2; say "error: $BY_HAND" >&2; exit 1; }
say "done"
