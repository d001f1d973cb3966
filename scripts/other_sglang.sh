#!/usr/bin/env bash
# Runs the engine's tests with another release of SGLang: scripts/other_sglang.sh VERSION [pytest's arguments].
# The release brings a torch of its own, so it gets an environment of its own, under build/ (some 10 GB).
set -euo pipefail
cd "$(dirname "$0")/.."
unset UV_SYSTEM_PYTHON VIRTUAL_ENV PYTHONHOME
version=${1:?usage: scripts/other_sglang.sh VERSION [pytest arguments]}
shift

environment=$PWD/build/sglang-$version
if [ ! -f "$environment/.complete" ]; then
    uv=$(command -v uv || echo .tools/uv/bin/uv)
    "$uv" venv --quiet --clear --python "$(.venv/bin/python -c 'import sys; print(sys.executable)')" "$environment"
    # 0.5.20 pins a pre-release of it, whose wheels are not on the package index; nothing on the CPU calls it.
    "$uv" pip install --quiet --overrides <(echo "cuda-tile>=1.7") --python "$environment/bin/python" \
        "sglang==$version" hypothesis psutil pytest pytest-timeout "setuptools>=77"
    # The kernels keep to torch's stable interface, so those of .venv would do; built here, they prove it.
    ROUTING_MASKS_KERNELS=cpu "$uv" pip install --quiet --python "$environment/bin/python" --no-build-isolation --no-deps .
    touch "$environment/.complete"
fi

tests=tests/sglang_router_capture
exec env OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest -p no:cacheprovider \
    $tests/test_{capture,recorder_order,retracted_rows,answer}.py "$@"
