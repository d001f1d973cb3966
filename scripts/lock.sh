#!/usr/bin/env bash
# Writes requirements.lock: every package of the extras and the dev group, with the engines of constraints/engines.txt.
# Versions in the present lock are kept where they still fit; arguments go to uv, e.g. `scripts/lock.sh --upgrade`.
set -euo pipefail
cd "$(dirname "$0")/.."
UV=$(command -v uv || echo .tools/uv/bin/uv)

# SGLang's wheels need glibc 2.34.
UV_CUSTOM_COMPILE_COMMAND="make lock" "$UV" pip compile pyproject.toml \
    --all-extras --group dev --constraint constraints/engines.txt \
    --python-version 3.12 --python-platform x86_64-manylinux_2_34 \
    --generate-hashes --no-emit-index-url --no-emit-find-links \
    --output-file requirements.lock --quiet "$@"
