#!/usr/bin/env bash
# Puts the Python package of a stack under build/, and nothing else of its wheel: scripts/stack_package.sh miles|areal
# Prints the folder to import it from. What it imports and requirements.lock does not have is beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
script=scripts/$(basename "$0")

case ${1:-} in
miles)
    release=0.0.2
    # The wheel also holds a megatron/ and a sglang/, which would stand in front of the engines.
    packages=(miles)
    requirements="miles-rl==$release --hash=sha256:452c5c0d8b7fc3729f225e63194f16fa7bbe587b6936386c6501793fce7cf820"
    ;;
areal)
    release=1.0.4
    packages=(areal aiofiles antlr4 colorlog hydra tenacity torchdata)
    requirements="areal==$release --hash=sha256:7d7cfab10d9ec0990d9263290a9472366827783b9ad5fce22f56a1add416bdd9
aiofiles==25.1.0 --hash=sha256:abe311e527c862958650f9438e859c1fa7568a141b22abcd015e120e86a85695
antlr4-python3-runtime==4.9.3 --hash=sha256:f224469b4168294902bb1efa80a8bf7855f24c99aef99cbefc1bcd3cce77881b
colorlog==6.12.0 --hash=sha256:30d392604e9110045a2c2aeefc27d7a017abbab63f3a8aee594eac0801df784e
hydra-core==1.3.8 --hash=sha256:d5f184c291691cba835c7f04bc4e36270ad88b1d7e394a3712f5af084c30b394
tenacity==9.2.1 --hash=sha256:9e56f17539296baab7beabb08b92f6ee3d7be92d8be72d763360677c2ad6580e
torchdata==0.11.0 --hash=sha256:52b940fbbe0e00fb21cabddf528449d1bec5bfb0d0823b7487b15f951658ee33"
    ;;
*)
    echo "usage: $script miles|areal" >&2
    exit 2
    ;;
esac
folder=$PWD/build/$1-$release

# Two at once would undo each other's work: the second waits.
mkdir -p build
exec 9>"build/$1.lock"
flock 9
# Of this script: other requirements are installed anew.
if ! cmp -s "$script" "$folder/.complete"; then
    uv=$(command -v uv || echo .tools/uv/bin/uv)
    rm -rf "$folder" "$folder.whole" "$folder.new"
    # antlr4-python3-runtime has no wheel, and is built by the setuptools of the environment.
    "$uv" pip install --quiet --python .venv/bin/python --no-deps --only-binary :all: \
        --no-binary antlr4-python3-runtime --no-build-isolation --require-hashes --target "$folder.whole" \
        -r - <<<"$requirements" >&2
    mkdir "$folder.new"
    mv "${packages[@]/#/$folder.whole/}" "$folder.whole"/*.dist-info "$folder.new"
    rm -rf "$folder.whole"
    cp "$script" "$folder.new/.complete"
    mv "$folder.new" "$folder"
fi
echo "$folder"
