#!/usr/bin/env bash
# Builds a wheel and an sdist and fails on warnings.  Installs the wheel in a new environment that
# uses the packages of PYTHON, and checks that the program and the package's data are there.
# Usage: scripts/try_build.sh PYTHON
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python="$1"
dist=build/dist
rm -rf "$dist" && mkdir -p "$dist"

env -u PYTHONDONTWRITEBYTECODE "$python" -m build --outdir "$dist" . >"$dist/log" 2>&1 || { cat "$dist/log" >&2; exit 1; }
if grep -iE 'warning|deprecat' "$dist/log" >&2; then
  echo "the build gave warnings: see above" >&2
  exit 1
fi

"$python" -m venv --without-pip "$dist/clean"
clean="$PWD/$dist/clean/bin/python"
site="$("$clean" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
"$python" -m pip --disable-pip-version-check --quiet --python "$clean" install --no-deps "$dist"/*.whl
# Dependencies come from PYTHON's environment; dart_llm does not, because the new wheel comes first.
"$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
  >"$site/outer.pth"

cd "$dist"
"$(dirname "$clean")/dart-llm" --version
"$clean" - "$site" <<'EOF'
import sys
from importlib.resources import files
from pathlib import Path

import dart_llm

assert Path(dart_llm.__file__).is_relative_to(sys.argv[1]), dart_llm.__file__
WANTED = {
    "native/csrc": ".cpp",
    "server/static": ".js",
    "reporting/templates": ".html",
    "data/shipped/texts": ".txt",
    "data/shipped/drift": "",
}
for folder, suffix in WANTED.items():
    names = [path.name for path in files("dart_llm").joinpath(folder).iterdir()]
    assert any(name.endswith(suffix) for name in names), f"{folder} lacks its {suffix} files"
assert files("dart_llm").joinpath("py.typed").is_file()
print("package data:", ", ".join(WANTED))
EOF
"$(dirname "$clean")/dart-llm" methods >methods
echo "built and tried: $(ls ./*.whl ./*.tar.gz | tr '\n' ' ')"
