#!/usr/bin/env bash
# Makes the environment and installs this project into it; does nothing when that is done already.
# Usage: [PYTHON=python3.12] [VENV=.venv] scripts/setup.sh [all|dev|gpu]
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

extra="${1:-all}"
python="${PYTHON:-python3}"
venv="${VENV:-.venv}"

fail() {
  printf '%s\n' "$1" >&2
  exit 1
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

has_torch() {
  "$1" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
}

# Each way of lacking a usable Python ends in one sentence with the command that mends it.
check_python() {
  local package="python3"
  [[ ${python##*/} =~ ^python3\.[0-9]+$ ]] && package="${python##*/}"
  "$python" -c '' 2>/dev/null ||
    fail "there is no $python that runs: sudo apt install $package $package-venv"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is Python $(version_of "$python"), and 3.11 or newer is needed: sudo apt install \
python3.11 python3.11-venv, then repeat the command with PYTHON=python3.11"
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python lacks the venv module: sudo apt install $package-venv"
}

# A torch that $python has already is kept: a system's, a user's or another environment's.
make_environment() {
  local options=() keep=no outer inner
  check_python
  if has_torch "$python"; then
    keep=yes
    options=(--system-site-packages)
    echo "keeping the PyTorch of $python"
  fi
  echo "creating the environment $venv with Python $(version_of "$python")"
  "$python" -m venv ${options[@]+"${options[@]}"} "$venv"
  if [[ $keep == yes ]] && ! has_torch "$venv/bin/python"; then
    # $python belongs to an environment, whose packages --system-site-packages does not show.
    outer="$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')"
    inner="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')"
    printf '%s\n' "$outer" >"$inner/outer-environment.pth"
  fi
  : >"$venv/.dart-llm-created" # make clean removes only what was created here
}

announce_torch() {
  if [[ "$(uname -sm)" == "Linux x86_64" ]]; then
    cat <<EOF
PyTorch is not installed yet.  Its default build for this system has CUDA inside: about 3 GB to
download.  Without an NVIDIA GPU stop here (Ctrl-C), install the CPU build, about 0.2 GB, with
$venv/bin/pip as https://pytorch.org/get-started/locally says, and repeat the command: a PyTorch
that is there is kept.
EOF
  else
    echo "PyTorch is not installed yet: about 0.1 to 0.2 GB to download on most systems."
  fi
}

if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
  make_environment
elif [[ -n ${PYTHON:-} && "$(version_of "$python")" != "$(version_of "$venv/bin/python")" ]]; then
  fail "$venv holds Python $(version_of "$venv/bin/python"), not that of $python: run make clean, \
or choose another place with VENV=path"
fi

# What an installation depends on: it is repeated when this changes, or when a folder was moved.
stamp="$venv/.dart-llm-$extra"
state="$(cksum <pyproject.toml) $PWD $(cd -- "$venv" && pwd)"
[[ -f $stamp && "$(<"$stamp")" == "$state" ]] && exit 0
has_torch "$venv/bin/python" || announce_torch
"$venv/bin/python" -m pip install --disable-pip-version-check --no-input -e ".[$extra]" ||
  fail "the installation failed for the reason that pip gives above: mend it and repeat the command"
printf '%s\n' "$state" >"$stamp"
