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
TESTS=tests/router_replay/masks
mkdir -p "$FOLDER/$TESTS"
cp "$TESTS"/*.py "$FOLDER/$TESTS/"
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
    "$TESTS"/test_{ops,rank,codec,registry,corruption,container,routing_masks,gpu}.py
