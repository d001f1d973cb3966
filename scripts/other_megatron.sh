#!/usr/bin/env bash
# Runs the trainer's tests with another release of Megatron-Core: scripts/other_megatron.sh VERSION [pytest's arguments].
# The release is unpacked under build/, in front of the environment's own; its dependencies are the locked ones.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?usage: scripts/other_megatron.sh VERSION [pytest arguments]}
shift

folder=$PWD/build/megatron-$version
if [ ! -d "$folder/megatron" ]; then
    uv=$(command -v uv || echo .tools/uv/bin/uv)
    rm -rf "$folder.new"
    "$uv" pip install --quiet --python .venv/bin/python --no-deps --target "$folder.new" "megatron-core==$version"
    rm -rf "$folder"
    mv "$folder.new" "$folder"
fi
tests=tests/megatron_router_replay
# Left out are tests of one release's settings and of HybridModel, which is new in 0.18; the ledger is held by
# `make contract`. Of the parallel layouts PP 2, EP 2 and TP 2 are run, without interleaved stages.
exec env PYTHONPATH="$folder" OMP_NUM_THREADS=1 .venv/bin/pytest -p no:cacheprovider \
    $tests/test_replay_{routes,router,gradient,mtp,recompute,torch_checkpoint,mistakes}.py \
    $tests/test_{live_model,router_settings}.py $tests/parallel/test_replay.py \
    -k "not other_checkpoint and (not test_replayed_step or ((pp2 or ep2 or tp2) and not hybrid and not cp2 and not vpp2)) and not would_choose" "$@"
