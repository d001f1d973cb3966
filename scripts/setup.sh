#!/usr/bin/env bash
# Makes .venv from requirements.lock and installs this project into it, editable. Does nothing where that is done.
set -euo pipefail
cd "$(dirname "$0")/.."
unset UV_SYSTEM_PYTHON VIRTUAL_ENV PYTHONHOME

UV_VERSION=0.13.9
STAMP=.venv/.setup-stamp

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

runs_3_12() { [ "$("$1" -c 'import sys; print(sys.version_info[:2] == (3, 12))' 2>/dev/null </dev/null)" = True ]; }

inputs_hash() {
    # The folder is part of it: the scripts of a moved .venv point to the old place.
    # So is nvcc, with which the kernels are built for CUDA, too.
    { pwd; nvcc --version 2>/dev/null || true; echo "${ROUTING_MASKS_KERNELS:-} ${TORCH_CUDA_ARCH_LIST:-}"
      cat requirements.lock pyproject.toml setup.py router_replay/masks/limits.py csrc/*; } |
        sha256sum | cut -d' ' -f1
}

find_uv() {
    local uv
    for uv in "$(command -v uv || true)" .tools/uv/bin/uv; do
        if [ -n "$uv" ] && "$uv" --version >/dev/null 2>&1; then UV=$uv; return; fi
    done
    say "no uv on the PATH: installing uv $UV_VERSION into .tools/uv"
    rm -rf .tools/uv
    python3 -m venv .tools/uv || fail "python3 cannot make a virtual environment; install uv, or Python's venv module"
    .tools/uv/bin/python -m pip install --quiet --disable-pip-version-check --no-input "uv==$UV_VERSION"
    UV=.tools/uv/bin/uv
}

# A python3.12 on the PATH may be a pyenv shim that only prints an error, so each candidate has to run.
find_python() {
    local candidate pyenv_root
    if [ -n "${PYTHON:-}" ]; then
        runs_3_12 "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.12 that runs"
        PYTHON_3_12=$PYTHON
        return
    fi
    pyenv_root=${PYENV_ROOT:-$(pyenv root 2>/dev/null || echo "${HOME:-/nonexistent}/.pyenv")}
    for candidate in python3.12 "$pyenv_root"/versions/3.12*/bin/python3.12 python3; do
        if runs_3_12 "$candidate"; then PYTHON_3_12=$(command -v "$candidate"); return; fi
    done
    say "no Python 3.12 found: leaving it to uv, which downloads one if need be"
    PYTHON_3_12=3.12
}

[ "$(uname -s) $(uname -m)" = "Linux x86_64" ] ||
    fail "requirements.lock is for Linux on x86_64, this is $(uname -s) on $(uname -m); install with pip, see pyproject.toml"

# Two runs at once would undo each other's work: the second waits.
mkdir -p .tools
exec 9>.tools/setup.lock
flock 9

WANTED=$(inputs_hash)
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$WANTED" ] && runs_3_12 .venv/bin/python; then
    exit 0
fi

find_uv
# Without a stamp a run before this one did not finish, and may have left a package half unpacked.
if ! [ -f "$STAMP" ] || ! runs_3_12 .venv/bin/python; then
    find_python
    say "making .venv with $PYTHON_3_12"
    # uv clears only what is a virtual environment.
    [ -f .venv/pyvenv.cfg ] || rm -rf .venv
    "$UV" venv --clear --quiet --python "$PYTHON_3_12" .venv
fi
rm -f "$STAMP"
say "installing $(grep -c '==' requirements.lock) pinned packages (the first time several GB are downloaded)"
# Byte code is compiled once here: SGLang starts three processes, and an environment that forbids them to write it
# (PYTHONDONTWRITEBYTECODE) would compile some thousand modules in each of them.
"$UV" pip sync --python .venv/bin/python --require-hashes --compile-bytecode requirements.lock
say "installing this project, editable, with its kernels (compiled here: a minute or two)"
# Those of another CUDA would stay beside the new ones.
rm -f router_replay/masks/codecs/_kernels_*.so
"$UV" pip install --python .venv/bin/python --quiet --no-deps --no-build-isolation --editable .
echo "$WANTED" >"$STAMP"
say "done"
