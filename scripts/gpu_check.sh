#!/usr/bin/env bash
# Everything that only a GPU can tell: `bash scripts/gpu_check.sh [NAME]`, offline, stopped after eight minutes.
#
# Parts 1 to 4 need nvcc and the packages of NEEDED: torch >= 2.10 with CUDA, setuptools >= 77, pytest >= 8.3. Part 5
# runs where SGLang is installed, part 6 where Megatron-Core is, and needs transformers beside it. compute-sanitizer and
# ncu, of the CUDA toolkit, are used where they are on the PATH. PYTHON names the interpreter.
#
# Writes benchmarks/results/gpu-NAME-DATE.md with every part's outcome and the end of its output. Exit status: 0 where
# all parts that ran succeeded; 1 where one failed, or the time was up before it; 2 where there is no GPU or a package is
# missing, and nothing was checked.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
LIMIT=480
# To build; to import router_replay; to test; to measure. As pip names them.
NEEDED=(torch setuptools numpy packaging pybase64 safetensors pytest pytest-timeout hypothesis orjson rich typer)

# find_spec, since the import of torch alone takes seconds.
missing=$("$PYTHON" -c 'import sys; from importlib.util import find_spec
print(*(name for name in sys.argv[1:] if find_spec(name.replace("-", "_")) is None))' "${NEEDED[@]}") || exit 2
if [ -n "$missing" ]; then
  echo "gpu_check: $PYTHON has no $missing, so nothing was checked: $PYTHON -m pip install $missing" >&2
  exit 2
fi
device=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || exit 1
if [ -z "$device" ]; then
  echo "gpu_check: torch sees no CUDA device, so nothing was checked: run this on a machine with a GPU" >&2
  exit 2
fi
name=${1:-$(echo "$device" | tr -cs 'A-Za-z0-9' '-' | sed 's/^-//; s/-$//')}
mkdir -p benchmarks/results build
report=benchmarks/results/gpu-$name-$(date +%Y%m%d-%H%M).md
partial=$report.partial log=$(mktemp)
trap 'rm -f "$partial" "$log"' EXIT
failed=0

# part TITLE SECONDS COMMAND...
part() {
  local title=$1 seconds=$2 start=$SECONDS outcome=ok status
  shift 2
  [ "$seconds" -le $((LIMIT - SECONDS)) ] || seconds=$((LIMIT - SECONDS))
  if [ "$seconds" -le 0 ]; then
    failed=1
    skipped "$title" "the $LIMIT seconds were up"
    return
  fi
  timeout "$seconds" "$@" >"$log" 2>&1
  status=$?
  [ "$status" -eq 0 ] || { failed=1; outcome="exit status $status"; }
  [ "$status" -ne 124 ] || outcome="stopped after $seconds s"
  echo "$title: $outcome ($((SECONDS - start)) s)"
  { printf '\n## %s\n\n`%s`: %s, %s s\n\n```\n' "$title" "$*" "$outcome" $((SECONDS - start))
    tail -n 60 "$log"; printf '```\n'; } >>"$partial"
}

skipped() {
  echo "$1: not run, $2"
  printf '\n## %s\n\nNot run: %s.\n' "$1" "$2" >>"$partial"
}

{ printf '# GPU check: %s, %s\n\n```\n' "$device" "$(date -u +%Y-%m-%dT%H:%MZ)"
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader 2>&1
  nvcc --version 2>&1 | tail -n 2
  "$PYTHON" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
  git log -1 --format='commit %h %cs' 2>/dev/null; printf '```\n'; } >"$partial"

# For this device alone: the other architectures of a wheel take minutes.
arch=$("$PYTHON" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
part "1. Build" 240 env ROUTING_MASKS_KERNELS=cuda TORCH_CUDA_ARCH_LIST="$arch" "$PYTHON" setup.py build_ext --inplace

gpu_tests=("$PYTHON" -m pytest -m gpu -q -p no:cacheprovider)
# The conftest of all tests imports what starts the engines' servers, and these use nothing of it.
alone=("${gpu_tests[@]}" --noconftest)
part "2. Kernels against the reference" 150 "${alone[@]}" \
  tests/router_replay/masks/test_gpu.py tests/router_replay/masks/test_batch.py \
  tests/router_replay/replay/test_microbatch.py \
  --deselect tests/router_replay/masks/test_gpu.py::test_compute_sanitizer
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    part "3. compute-sanitizer, $tool" 90 "${alone[@]}" \
      "tests/router_replay/masks/test_gpu.py::test_compute_sanitizer[$tool]"
  done
else
  skipped "3. compute-sanitizer" "it is not on the PATH"
fi

benchmark=("$PYTHON" -m benchmarks.mask_codec --tokens 32768)
part "4. Benchmark" 150 "${benchmark[@]}" --rounds 5
if command -v ncu >/dev/null; then
  # The launches of the first round, behind those that make the rows to read: every way of each codec once.
  part "4. Benchmark, as ncu sees it" 90 ncu --kernel-name regex:'(pack|unpack)_kernel' \
    --launch-skip 9 --launch-count 27 \
    --metrics dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__throughput.avg.pct_of_peak_sustained_elapsed,gpu__time_duration.sum \
    "${benchmark[@]}" --rounds 1 --speed-tokens 16
else
  skipped "4. Benchmark, as ncu sees it" "ncu is not on the PATH"
fi

if "$PYTHON" -c "import sglang" 2>/dev/null; then
  part "5. Recorder on CUDA" 120 "${alone[@]}" \
    tests/sglang_router_capture/test_recorder_order.py tests/sglang_router_capture/test_follow_hicache.py
else
  skipped "5. Recorder on CUDA" "sglang is not installed"
fi
if "$PYTHON" -c "import megatron.core" 2>/dev/null; then
  # Their own conftest and not that of all tests, which asks for SGLang.
  part "6. Trainer's end on CUDA" 120 "${gpu_tests[@]}" --confcutdir=tests/megatron_router_replay \
    tests/megatron_router_replay/test_no_waiting_gpu.py
else
  skipped "6. Trainer's end on CUDA" "megatron-core is not installed"
fi
mv "$partial" "$report"
echo "$report"
exit "$failed"
