#!/usr/bin/env bash
# Installs the wheel in dist/ beside a release of torch, in an environment of its own, and runs the tests of the ops
# there, without building anything: scripts/test_wheel.sh 2.10.0. Some GB are downloaded for each release.
set -euo pipefail
cd "$(dirname "$0")/.."
unset UV_SYSTEM_PYTHON VIRTUAL_ENV PYTHONHOME PYTHONPATH
TORCH=${1:?usage: scripts/test_wheel.sh TORCH_VERSION}
UV=$(command -v uv || echo .tools/uv/bin/uv)
WHEELS=(dist/rollout_routing_replay-*.whl)
[ -f "${WHEELS[0]}" ] || { echo "no wheel in dist/: run make wheel first" >&2; exit 1; }

FOLDER=build/wheel-with-torch-$TORCH
rm -rf "$FOLDER/tests"
[ -x "$FOLDER/venv/bin/python" ] || "$UV" venv --quiet --python .venv/bin/python "$FOLDER/venv"
"$UV" pip install --python "$FOLDER/venv/bin/python" --quiet \
    "torch==$TORCH" hypothesis pytest setuptools --reinstall-package rollout-routing-replay "${WHEELS[0]}"

# The tests alone: beside them the source tree would be found before the wheel.
mkdir -p "$FOLDER/tests/masks"
cp tests/router_replay/masks/*.py "$FOLDER/tests/masks/"
cd "$FOLDER"
venv/bin/python - <<'PYTHON'
import torch
import router_replay.masks
from router_replay.masks.codecs.ops import MISSING_KERNELS

print(f"torch {torch.__version__}, {router_replay.masks.__file__}")
print("kernels missing:", MISSING_KERNELS or "none")
PYTHON
GPU="not gpu"
if venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then GPU=""; fi
PYTHONPATH=. venv/bin/python -m pytest -q -c /dev/null --rootdir . --import-mode importlib -p no:cacheprovider -m "$GPU" \
    -W ignore::pytest.PytestUnknownMarkWarning \
    tests/router_replay/masks/test_ops.py tests/router_replay/masks/test_rank.py tests/router_replay/masks/test_codec.py tests/router_replay/masks/test_corruption.py \
    tests/router_replay/masks/test_container.py tests/router_replay/masks/test_routing_masks.py tests/router_replay/masks/test_gpu.py
