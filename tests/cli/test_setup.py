"""Set-up and Makefile, with stand-ins for Python and pip."""

import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from shells import ROOT

# Answers the questions that scripts/setup.sh asks; what it is told to install goes to $LOG.
FAKE_PYTHON = """\
#!/bin/sh
case "$*" in
  *"import venv"*) [ -z "$LACKS_VENV" ] ;;
  *"< (3, 11)"*) [ -z "$OLD" ] ;;
  *"print("*) echo "${OLD:-3.12}" ;;
  *find_spec*) [ -n "$HAS_TORCH" ] ;;
  "-m venv"*) printf '%s\\n' "$*" >>"$LOG"; for last; do :; done
    mkdir -p "$last/bin" "$last/lib/python3/site-packages/one.dist-info"
    cp "$0" "$last/bin/python" ;;
  "-m pip install"*) printf '%s\\n' "$*" >>"$LOG"; sleep "${PIP_TAKES:-0}"
    echo "Collecting one"; echo "ERROR: pip's reason"; [ -z "$PIP_FAILS" ] ;;
  "-m dart_llm.native.build") printf '%s\\n' "$PYTHONPATH $*" >>"$LOG"
    [ -z "$NO_KERNELS" ] || { echo "no compiler is here"; exit 1; } ;;
esac
"""
PIP = "-m pip install --disable-pip-version-check --no-input --progress-bar off"
TOOLS, INSTALL = f"{PIP} ninja pyyaml setuptools>=77", f"{PIP} --no-build-isolation -e .[all]"
KERNELS = "src -m dart_llm.native.build"


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)


class Project:
    """A copy of what set-up needs, in a folder with a space in its name."""

    def __init__(self, folder):
        self.root = folder / "a project"
        for name in ("scripts", "src", "tests"):
            (self.root / name).mkdir(parents=True)
        for name in ("pyproject.toml", "Makefile", "scripts/setup.sh"):
            shutil.copy(ROOT / name, self.root / name)
        self.programs = folder / "bin"
        self.programs.mkdir()
        program(self.programs / "python3", FAKE_PYTHON)
        self.log = folder / "log"

    def logged(self):
        """What was recorded since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines

    def call(self, *command, **variables):
        dropped = ("PYTHON", "VENV", "ARGS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
        kept = {key: value for key, value in os.environ.items() if key not in dropped}
        kept |= {"PATH": f"{self.programs}:{kept['PATH']}", "LOG": str(self.log), **variables}
        return subprocess.run(command, cwd=self.root, env=kept, capture_output=True, text=True)

    def set_up(self, *arguments, **variables):
        """The log of a set-up that works, without the compiling, which may be last or second."""
        done = self.call("scripts/setup.sh", *arguments, **variables)
        assert (done.returncode, done.stderr) == (0, "")
        assert ("PyTorch from PyPI" in done.stdout) <= ("HAS_TORCH" not in variables)
        assert done.stdout.count("\n") <= 7 and "\ninstalled in " in done.stdout
        lines = self.logged()
        lines.remove(KERNELS)
        return lines


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_what_stops_a_set_up_is_one_sentence(project):
    old = "python3 is Python 3.9, and 3.11 or newer is needed: sudo apt install python3.11 "
    old += "python3.11-venv, then repeat the command with PYTHON=python3.11"
    none = "python3.99 does not run: sudo apt install python3.99 python3.99-venv"
    for name, value, sentence in (
        ("OLD", "3.9", old),
        ("LACKS_VENV", "1", "python3 lacks the venv module: sudo apt install python3-venv"),
        ("PYTHON", "python3.99", none),
    ):
        done = project.call("scripts/setup.sh", **{name: value})
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{sentence}\n")
        assert project.logged() == []
    done = project.call("scripts/setup.sh", "demo", NO_KERNELS="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "no compiler is here"
    project.logged()
    done = project.call("scripts/setup.sh", PIP_FAILS="1")
    assert done.returncode == 1
    assert done.stderr == (
        "Collecting one\nERROR: pip's reason\n"
        "the installation failed for the reason that pip gives above (complete output: "
        ".venv/pip.log): fix it and repeat the command\n"
    )
    project.logged()
    assert project.set_up() == [f"{TOOLS} torch", INSTALL]  # it is repeated


def test_installs_once_until_the_project_changes(project):
    both = [f"{TOOLS} torch", INSTALL]
    assert project.set_up() == ["-m venv .venv", *both]
    second = project.call("scripts/setup.sh")
    assert (second.returncode, second.stdout, project.logged()) == (0, "", [])
    with (project.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert project.set_up() == both
    assert project.set_up("dev") == [both[0], INSTALL.replace("[all]", "[dev]")]
    project.root = project.root.rename(project.root.parent / "moved")
    assert project.set_up() == both
    given = project.set_up(HAS_TORCH="1", VENV="some where")  # a torch that is there is kept
    assert given == ["-m venv --system-site-packages some where", TOOLS, INSTALL]


def test_the_kernels_compile_before_the_other_packages_are_installed():
    given = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = [re.split(r"[>=<]", name)[0].replace("-", "_") for name in given]
    missing = [name for name in names if name not in ("torch", "pyyaml", "filelock", "jinja2")]
    assert "transformers" in missing and "numpy" in missing
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing!r})); import dart_llm.native.build"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
