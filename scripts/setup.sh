#!/usr/bin/env bash
# Creates the environment and installs this project into it, unless that has been done already.
# Compiles the native kernels (about a minute) while pip fetches and unpacks the packages.
# Usage: [PYTHON=python3.12] [VENV=.venv] scripts/setup.sh [demo|all|dev|gpu]
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

extra="${1:-all}"
python="${PYTHON:-python3}"
venv="${VENV:-.venv}"
# Approximate number of packages and time; the extras that include these packages.
case "$extra" in
  demo) count=62 long="about a minute" within="all dev" ;;
  all) count=115 long="about two minutes" within="dev" ;;
  dev) count=190 long="about three minutes" within="" ;;
  *) count=50 long="about a minute" within="" ;;
esac

fail() {
  printf '%s\n' "$1" >&2
  exit 1
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

has_torch() {
  "$1" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
}

# Without a usable Python, prints one sentence with the command that fixes it.
check_python() {
  local package="python3"
  [[ ${python##*/} =~ ^python3\.[0-9]+$ ]] && package="${python##*/}"
  "$python" -c '' 2>/dev/null ||
    fail "$python does not run: sudo apt install $package $package-venv"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is Python $(version_of "$python"), and 3.11 or newer is needed: sudo apt install \
python3.11 python3.11-venv, then repeat the command with PYTHON=python3.11"
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python lacks the venv module: sudo apt install $package-venv"
}

# If $python already has torch (of the system, the user or another environment), it is used.
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

if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
  make_environment
elif [[ -n ${PYTHON:-} && "$(version_of "$python")" != "$(version_of "$venv/bin/python")" ]]; then
  fail "$venv has Python $(version_of "$venv/bin/python"), not that of $python: run make clean, \
or choose another folder with VENV=path"
fi

# The installation is repeated when this changes: the dependencies or the paths of the folders.
state="$(cksum <pyproject.toml) $PWD $(cd -- "$venv" && pwd)"
for installed in $extra $within; do
  stamp="$venv/.dart-llm-$installed"
  [[ -f $stamp && "$(<"$stamp")" == "$state" ]] && exit 0
done

log="$venv/pip.log" kernels_log="$venv/kernels.log"
set -m # each background job becomes a process group, which the next line ends
trap 'for job in $(jobs -p); do kill -- "-$job"; done 2>/dev/null || true' EXIT

last_line=0 # seconds at the last progress line

# Waits for the job $1; every 14 seconds runs $2, which prints a line.
wait_for() {
  local job="$1"
  while kill -0 "$job" 2>/dev/null; do
    sleep 0.1
    ((SECONDS - last_line < 14)) || { "$2" && last_line=$SECONDS; }
  done
  wait "$job"
}

packages_so_far() {
  local fetched placed
  fetched="$(grep -c '^Collecting ' "$log")"
  placed="$(find "$venv"/lib/python*/site-packages -maxdepth 1 -name '*.dist-info' | wc -l)"
  echo "still installing: $fetched of about $count packages fetched, $((placed)) in place"
}

kernels_so_far() { echo "still compiling the CPU kernels (about half a minute in all)"; }

install() {
  "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@" \
    >>"$log" 2>&1 </dev/null &
  wait_for $! packages_so_far || {
    tail -n 15 "$log" >&2
    fail "the installation failed for the reason that pip gives above (complete output: $log): \
fix it and repeat the command"
  }
}

torch=()
if ! has_torch "$venv/bin/python"; then
  torch=(torch)
  if [[ "$(uname -sm)" == "Linux x86_64" && ! -e /dev/nvidiactl ]]; then
    echo "PyTorch comes with CUDA (3 GB): without a GPU stop (Ctrl-C) and install its CPU build into $venv first"
  fi
fi
echo "installing about $count packages, $long"
SECONDS=0
: >"$log"
install ninja pyyaml 'setuptools>=77' ${torch[@]+"${torch[@]}"} # what compiling the kernels and building the project need
PYTHONPATH=src nice "$venv/bin/python" -m dart_llm.native.build >"$kernels_log" 2>&1 </dev/null &
kernels=$!
install --no-build-isolation -e ".[$extra]"
echo "installed in $SECONDS s"
last_line=$SECONDS
wait_for "$kernels" kernels_so_far || tail -n 1 "$kernels_log" # why they could not be compiled
printf '%s\n' "$state" >"$venv/.dart-llm-$extra"
