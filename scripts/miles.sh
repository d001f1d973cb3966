#!/usr/bin/env bash
# Puts the Python package of miles under build/, and nothing else of its wheel; prints the folder to import it from.
# The wheel also holds a megatron/ and a sglang/, which would stand in front of the engines.
set -euo pipefail
cd "$(dirname "$0")/.."

version=0.0.2
sha256=452c5c0d8b7fc3729f225e63194f16fa7bbe587b6936386c6501793fce7cf820
folder=$PWD/build/miles-$version

# Two at once would undo each other's work: the second waits.
mkdir -p build
exec 9>build/miles.lock
flock 9
if [ ! -d "$folder" ]; then
    uv=$(command -v uv || echo .tools/uv/bin/uv)
    rm -rf "$folder.whole" "$folder.new"
    "$uv" pip install --quiet --python .venv/bin/python --no-deps --only-binary :all: --require-hashes \
        --target "$folder.whole" -r - <<<"miles-rl==$version --hash=sha256:$sha256" >&2
    mkdir "$folder.new"
    mv "$folder.whole/miles" "$folder.whole/miles_rl-$version.dist-info" "$folder.new"
    rm -rf "$folder.whole"
    mv "$folder.new" "$folder"
fi
echo "$folder"
