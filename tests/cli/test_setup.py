"""Set-up, Makefile and .ci/run, with stand-ins for Python, pip and make."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

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
    mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;;
  "-m pip install"*) printf '%s\\n' "$*" >>"$LOG"; [ -z "$PIP_FAILS" ] ;;
esac
"""


class Project:
    """A copy of what set-up needs, in a folder with a space in its name."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a project"
        for name in ("scripts", ".ci", "src", "tests"):
            (self.root / name).mkdir(parents=True)
        for name in ("pyproject.toml", "Makefile", "scripts/setup.sh", ".ci/run"):
            shutil.copy(ROOT / name, self.root / name)
        self.programs = folder / "bin"
        self.programs.mkdir()
        self.program("python3", FAKE_PYTHON)
        self.log = folder / "log"

    def program(self, name: str, text: str) -> None:
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def logged(self) -> list[str]:
        """What was recorded since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines

    def call(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        dropped = ("PYTHON", "VENV", "ARGS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
        kept = {key: value for key, value in os.environ.items() if key not in dropped}
        path = f"{self.programs}:{kept['PATH']}"
        return subprocess.run(
            command,
            cwd=self.root,
            env={**kept, "PATH": path, "LOG": str(self.log), **variables},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            {"OLD": "3.9"},
            "python3 is Python 3.9, and 3.11 or newer is needed: sudo apt install python3.11 "
            "python3.11-venv, then repeat the command with PYTHON=python3.11\n",
        ),
        ({"LACKS_VENV": "1"}, "python3 lacks the venv module: sudo apt install python3-venv\n"),
        (
            {"PYTHON": "python3.99"},
            "there is no python3.99 that runs: sudo apt install python3.99 python3.99-venv\n",
        ),
    ],
)
def test_an_unusable_python_gives_one_sentence(
    project: Project, variables: dict[str, str], sentence: str
) -> None:
    done = project.call("scripts/setup.sh", **variables)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", sentence)
    assert project.logged() == []


def test_installs_once_until_the_project_changes(project: Project) -> None:
    first = project.call("scripts/setup.sh")
    assert first.returncode == 0, first.stderr
    install = "-m pip install --disable-pip-version-check --no-input -e .[all]"
    assert project.logged() == ["-m venv .venv", install]
    assert "PyTorch is not installed yet" in first.stdout
    second = project.call("scripts/setup.sh")
    assert (second.returncode, second.stdout, project.logged()) == (0, "", [])
    with (project.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert project.call("scripts/setup.sh").returncode == 0
    assert project.logged() == [install]
    assert project.call("scripts/setup.sh", "dev").returncode == 0
    assert project.logged() == [install.replace("[all]", "[dev]")]
    project.root = project.root.rename(project.root.parent / "moved")
    assert project.call("scripts/setup.sh").returncode == 0
    assert project.logged() == [install]


def test_keeps_a_torch_that_is_there(project: Project) -> None:
    done = project.call("scripts/setup.sh", HAS_TORCH="1", VENV="some where")
    assert done.returncode == 0, done.stderr
    assert project.logged()[0] == "-m venv --system-site-packages some where"
    assert "PyTorch is not installed yet" not in done.stdout


def test_a_failed_installation_is_repeated(project: Project) -> None:
    done = project.call("scripts/setup.sh", PIP_FAILS="1")
    assert done.returncode == 1
    assert done.stderr.startswith("the installation failed for the reason that pip gives above")
    project.logged()
    assert project.call("scripts/setup.sh").returncode == 0
    assert len(project.logged()) == 1


def test_another_python_than_the_environment_has_is_refused(project: Project) -> None:
    assert project.call("scripts/setup.sh").returncode == 0
    project.program("python3.13", FAKE_PYTHON.replace(":-3.12", ":-3.13"))
    done = project.call("scripts/setup.sh", PYTHON="python3.13")
    assert done.returncode == 1
    assert done.stderr == (
        ".venv holds Python 3.12, not that of python3.13: run make clean, or choose another place "
        "with VENV=path\n"
    )


def test_make_runs_the_program_of_the_environment(project: Project) -> None:
    project.call("scripts/setup.sh")
    command = project.root / ".venv/bin/dart-llm"
    command.write_text('#!/bin/sh\necho "ran: $*"\n')
    command.chmod(0o755)
    done = project.call("make", "demo")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "ran: demo\nnext: . .venv/bin/activate\n"
    done = project.call("make", "window", "ARGS=--sparsity 0.5")
    assert (done.returncode, done.stdout) == (0, "ran: serve --port 0 --sparsity 0.5\n")


@pytest.fixture
def bare(tmp_path: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Runs scripts/browser.sh where only these programs exist, and some that record their calls."""

    def run(names: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path / "only"
        folder.mkdir()
        for name in names.split():
            (folder / name).write_text(f'#!/bin/sh\necho "{name} $*"\n')
            (folder / name).chmod(0o755)
        (folder / "id").write_text("#!/bin/sh\necho 1000\n")
        (folder / "id").chmod(0o755)
        script = str(ROOT / "scripts/browser.sh")
        bash = shutil.which("bash") or "bash"
        environment = {"PATH": str(folder)}
        return subprocess.run(
            [bash, script], env=environment, capture_output=True, text=True, check=False
        )

    return run


@pytest.mark.parametrize(
    ("names", "code", "said"),
    [
        ("chromium chromedriver", 0, ""),
        ("chromium", 1, "there is no chromium with chromedriver: install both"),
        ("chromium apt-get", 1, "as root run apt-get install chromium chromium-driver"),
        (
            "apt-get sudo",
            0,
            "sudo apt-get install -y -qq --no-install-recommends chromium chromium",
        ),
    ],
)
def test_the_browser_is_installed_where_it_is_missing(
    bare: Callable[[str], subprocess.CompletedProcess[str]], names: str, code: int, said: str
) -> None:
    done = bare(names)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert bool(said) == bool(done.stdout + done.stderr)


def test_make_clean_removes_only_an_environment_made_here(project: Project) -> None:
    other = project.root / "other"
    other.mkdir()
    assert project.call("make", "clean", "VENV=other").returncode == 0 and other.is_dir()
    project.call("scripts/setup.sh")
    assert project.call("make", "clean").returncode == 0
    assert not (project.root / ".venv").exists()


FAKE_MAKE = """\
#!/bin/sh
echo "$2" >>"$LOG"
[ "$2" != "$FAILS" ] || exit 2
"""
STAGES = {
    "set-up": "setup-dev",
    "browser": "browser",
    "format": "format-check",
    "lint": "style",
    "types": "types",
    "tests": "test",
    "docs": "docs",
    "build": "build",
}


@pytest.mark.parametrize("failing", [None, "set-up", "types", "docs"])
def test_ci_stops_at_the_first_failure(project: Project, failing: str | None) -> None:
    project.program("make", FAKE_MAKE)
    done = project.call("bash", ".ci/run", FAILS=STAGES.get(failing or "", ""))
    names = list(STAGES)
    reached = names[: names.index(failing) + 1] if failing else names
    assert done.returncode == (2 if failing else 0)
    assert project.logged() == [STAGES[name] for name in reached]
    printed = [line[3:] for line in done.stdout.splitlines() if " passed" not in line]
    assert printed == reached
    assert done.stdout.endswith("== all stages passed\n") == (failing is None)


def test_every_ci_stage_is_a_target_of_the_makefile(project: Project) -> None:
    project.call("scripts/setup.sh")
    for target in STAGES.values():
        assert project.call("make", "-n", target).returncode == 0
    planned = project.call("make", "-n", "test", "ARGS=-k name").stdout
    assert "-m pytest -n 2 --dist loadfile -k name" in planned and "|" not in planned
