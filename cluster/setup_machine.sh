#!/usr/bin/env bash
# Prepares this machine for raycon: a virtual environment in $VENV with everything the machine can use.
# Called by `make setup` (which skips it when nothing has changed) and by the images in this folder.
# Environment: PYTHON (default python3), VENV (default .venv), RAYCON_EXTRAS (default: chosen below).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
say() { printf 'setup: %s\n' "$*"; }

command -v "$PYTHON" >/dev/null || { say "no '$PYTHON' here; install Python 3.10-3.13 or call: make setup PYTHON=/path/to/python3"; exit 1; }
"$PYTHON" - <<'PY' || exit 1
import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"setup: Python {sys.version.split()[0]} is not supported; use 3.10, 3.11, 3.12 or 3.13 (make setup PYTHON=...)")
PY

# System packages: through apt where that is possible, else say what is missing and go on.
SUDO=none
if [ "$(id -u)" = 0 ]; then SUDO=""; elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then SUDO="sudo -n"; fi
updated=no
apt_get() {  # apt_get PACKAGE...: 0 when installed
    command -v apt-get >/dev/null && [ "$SUDO" != none ] || return 1
    if [ $updated = no ]; then $SUDO apt-get update -qq || true; updated=yes; fi
    DEBIAN_FRONTEND=noninteractive $SUDO apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

if ! "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    apt_get "python$version-venv" || apt_get python3-venv || { say "Python's venv module is missing: apt-get install python$version-venv"; exit 1; }
fi
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
python="$VENV/bin/python"
"$python" -m pip install -q --upgrade 'pip>=25' 'setuptools>=77' wheel

accelerator=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then accelerator=gpu; fi
extras=${RAYCON_EXTRAS:-$accelerator,ray,tune,fast,wandb,tensorboard,report,eval,timm,export,dev}
say "installing raycon[$extras] into $VENV (the first time this fetches about 3 GB)"
"$python" -m pip install -q -c constraints.txt -e ".[$extras]"

# FFCV is built from source: a compiler, pkg-config, OpenCV and libturbojpeg headers, Python headers.
ffcv_packages=(g++ pkg-config libopencv-dev libturbojpeg0-dev)
has_headers() { command -v g++ >/dev/null && pkg-config --exists opencv4 libturbojpeg 2>/dev/null; }
if "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("ffcv") is None)'; then
    say "ffcv is there"
elif [ "${RAYCON_FFCV:-yes}" = no ]; then
    say "RAYCON_FFCV=no: going on without FFCV; the torch loader is used instead"
else
    has_headers || apt_get "${ffcv_packages[@]}" || true
    if ! has_headers; then
        say "FFCV left out: it needs ${ffcv_packages[*]} (apt-get install them, then: make setup FORCE=1). The torch loader is used instead."
    elif "$python" -m pip install -q -c constraints.txt -e '.[ffcv]' >"$VENV/ffcv-build.log" 2>&1; then
        say "ffcv is built"
    else
        say "FFCV did not build; the torch loader is used instead. The log is $VENV/ffcv-build.log; its last lines:"
        tail -n 5 "$VENV/ffcv-build.log"
    fi
fi
say "ready"
