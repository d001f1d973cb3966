#!/usr/bin/env bash
# Runs tests beside the packages of constraints/verl.lock: scripts/verl.sh TEST...
# They are in a folder of their own under build/, which no other test sees.
set -euo pipefail
cd "$(dirname "$0")/.."
unset UV_SYSTEM_PYTHON VIRTUAL_ENV PYTHONHOME

lock=constraints/verl.lock
# Another lock is another folder: tests that run beside this one keep theirs.
packages=$PWD/build/verl-$(sha256sum "$lock" | cut -c1-16)

# Two at once would undo each other's work: the second waits.
mkdir -p build
exec 9>build/verl.lock
flock 9
if [ ! -d "$packages" ]; then
    uv=$(command -v uv || echo .tools/uv/bin/uv)
    rm -rf "$packages.new"
    # One of them is a source distribution, which the environment's own setuptools builds: another's would have no hash.
    "$uv" pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --require-hashes \
        --target "$packages.new" -r "$lock" >&2
    # TransferQueue's wheel also holds its own tests and scripts, which would stand in front of ours.
    (cd "$packages.new" && rm -rf tests scripts recipe tutorial)
    mv "$packages.new" "$packages"
fi
exec 9>&-

exec env OMP_NUM_THREADS=1 PYTHONPATH="$packages" .venv/bin/pytest -p no:cacheprovider "$@"
