#!/usr/bin/env bash
# Writes requirements.lock: every package of the extras and the dev group, with the engines of constraints/engines.txt;
# and constraints/verl.lock. Versions in the present locks are kept where they still fit; arguments go to uv, e.g.
# `scripts/lock.sh --upgrade`.
set -euo pipefail
cd "$(dirname "$0")/.."
UV=$(command -v uv || echo .tools/uv/bin/uv)

compile() {
    # SGLang's wheels need glibc 2.34.
    UV_CUSTOM_COMPILE_COMMAND="make lock" "$UV" pip compile --python-version 3.12 \
        --python-platform x86_64-manylinux_2_34 --generate-hashes --no-emit-index-url --no-emit-find-links --quiet "$@"
}

compile pyproject.toml --all-extras --group dev --constraint constraints/engines.txt \
    --output-file requirements.lock "$@"
compile constraints/verl.txt --no-deps --output-file constraints/verl.lock "$@"
