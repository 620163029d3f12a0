#!/usr/bin/env bash
# Makes a wheel and an sdist without a warning, installs the wheel beside the packages of PYTHON in an
# environment of its own, and looks whether the program and the package's data are there.
# Usage: scripts/try_build.sh PYTHON
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python="$1"
place=build/dist
rm -rf "$place" && mkdir -p "$place"

env -u PYTHONDONTWRITEBYTECODE "$python" -m build --outdir "$place" . >"$place/log" 2>&1 || { cat "$place/log" >&2; exit 1; }
if grep -iE 'warning|deprecat' "$place/log" >&2; then
  echo "the build warns: see above" >&2
  exit 1
fi

"$python" -m venv --without-pip "$place/clean"
clean="$PWD/$place/clean/bin/python"
site="$("$clean" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
"$python" -m pip --disable-pip-version-check --quiet --python "$clean" install --no-deps "$place"/*.whl
# Its dependencies are those of PYTHON; the package itself is not, for the clean one comes first.
"$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
  >"$site/outer.pth"

cd "$place"
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
    names = [one.name for one in files("dart_llm").joinpath(folder).iterdir()]
    assert any(name.endswith(suffix) for name in names), f"{folder} lacks its {suffix} files"
assert files("dart_llm").joinpath("py.typed").is_file()
print("package data:", ", ".join(WANTED))
EOF
"$(dirname "$clean")/dart-llm" methods >methods
echo "built and tried: $(ls ./*.whl ./*.tar.gz | tr '\n' ' ')"
