#!/usr/bin/env bash
# Runs tests beside the packages that verl imports and requirements.lock does not have: scripts/verl.sh TEST...
# They are put into a folder of their own without what they depend on, which the lock has: hydra-core asks for an older
# omegaconf than it.
set -euo pipefail
cd "$(dirname "$0")/.."
script=scripts/$(basename "$0")
unset UV_SYSTEM_PYTHON VIRTUAL_ENV PYTHONHOME

packages=$PWD/build/verl-packages
# Of this script: other packages are installed anew.
if ! cmp -s "$script" "$packages/.complete"; then
    rm -rf "$packages"
    uv=$(command -v uv || echo .tools/uv/bin/uv)
    "$uv" pip install --quiet --python .venv/bin/python --target "$packages" --no-deps hydra-core==1.3.8 \
        antlr4-python3-runtime==4.9.3 cachetools==8.0.2 peft==0.21.2 accelerate==1.15.0 torchdata==0.11.0 pylatexenc==2.11
    cp "$script" "$packages/.complete"
fi

exec env OMP_NUM_THREADS=1 PYTHONPATH="$packages" .venv/bin/pytest -p no:cacheprovider "$@"
