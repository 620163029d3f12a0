"""Set-up, Makefile and .ci/run, with stand-ins for Python, pip and make."""

import os
import shutil
import subprocess

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
INSTALL = "-m pip install --disable-pip-version-check --no-input -e .[all]"


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)


class Project:
    """A copy of what set-up needs, in a folder with a space in its name."""

    def __init__(self, folder):
        self.root = folder / "a project"
        for name in ("scripts", ".ci", "src", "tests"):
            (self.root / name).mkdir(parents=True)
        for name in ("pyproject.toml", "Makefile", "scripts/setup.sh", ".ci/run"):
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
        """What a set-up that works installs."""
        done = self.call("scripts/setup.sh", *arguments, **variables)
        assert done.returncode == 0, done.stderr
        assert ("PyTorch is not installed yet" in done.stdout) == ("HAS_TORCH" not in variables)
        return self.logged()


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_what_stops_a_set_up_is_one_sentence(project):
    old = "python3 is Python 3.9, and 3.11 or newer is needed: sudo apt install python3.11 "
    old += "python3.11-venv, then repeat the command with PYTHON=python3.11"
    none = "there is no python3.99 that runs: sudo apt install python3.99 python3.99-venv"
    for name, value, sentence in (
        ("OLD", "3.9", old),
        ("LACKS_VENV", "1", "python3 lacks the venv module: sudo apt install python3-venv"),
        ("PYTHON", "python3.99", none),
    ):
        done = project.call("scripts/setup.sh", **{name: value})
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{sentence}\n")
        assert project.logged() == []
    done = project.call("scripts/setup.sh", PIP_FAILS="1")
    assert done.returncode == 1
    assert done.stderr.startswith("the installation failed for the reason that pip gives above")
    project.logged()
    assert project.set_up() == [INSTALL]  # it is repeated
    program(project.programs / "python3.13", FAKE_PYTHON.replace(":-3.12", ":-3.13"))
    done = project.call("scripts/setup.sh", PYTHON="python3.13")
    assert (done.returncode, done.stderr) == (
        1,
        ".venv holds Python 3.12, not that of python3.13: run make clean, or choose another place "
        "with VENV=path\n",
    )


def test_installs_once_until_the_project_changes(project):
    assert project.set_up() == ["-m venv .venv", INSTALL]
    second = project.call("scripts/setup.sh")
    assert (second.returncode, second.stdout, project.logged()) == (0, "", [])
    with (project.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert project.set_up() == [INSTALL]
    assert project.set_up("dev") == [INSTALL.replace("[all]", "[dev]")]
    project.root = project.root.rename(project.root.parent / "moved")
    assert project.set_up() == [INSTALL]
    given = project.set_up(HAS_TORCH="1", VENV="some where")  # a torch that is there is kept
    assert given[0] == "-m venv --system-site-packages some where"


def test_make(project):
    """It runs the program of the environment, and removes only one that was made here."""
    (project.root / "other").mkdir()
    assert project.call("make", "clean", "VENV=other").returncode == 0
    assert (project.root / "other").is_dir()
    project.set_up()
    program(project.root / ".venv/bin/dart-llm", '#!/bin/sh\necho "ran: $*"\n')
    done = project.call("make", "demo")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "ran: demo\nnext: . .venv/bin/activate\n"
    done = project.call("make", "window", "ARGS=--sparsity 0.5")
    assert (done.returncode, done.stdout) == (0, "ran: serve --port 0 --sparsity 0.5\n")
    for target in STAGES.values():
        assert project.call("make", "-n", target).returncode == 0
    planned = project.call("make", "-n", "test", "ARGS=-k name").stdout
    assert "-m pytest -n 2 --dist loadfile -k name" in planned and "|" not in planned
    assert project.call("make", "clean").returncode == 0
    assert not (project.root / ".venv").exists()


@pytest.mark.parametrize(
    ("names", "code", "said"),
    [
        ("chromium chromedriver", 0, ""),
        ("chromium", 1, "there is no chromium with chromedriver: install both"),
        ("chromium apt-get", 1, "as root run apt-get install chromium chromium-driver"),
        ("apt-get sudo", 0, "sudo apt-get install -y -qq --no-install-recommends chromium chromi"),
    ],
)
def test_the_browser_is_installed_where_it_is_missing(tmp_path, names, code, said):
    for name in names.split():
        program(tmp_path / name, f'#!/bin/sh\necho "{name} $*"\n')
    program(tmp_path / "id", "#!/bin/sh\necho 1000\n")
    command = [shutil.which("bash") or "bash", str(ROOT / "scripts/browser.sh")]
    environment = {"PATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    told = done.stdout + done.stderr
    assert done.returncode == code and said in told and bool(said) == bool(told)


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
def test_ci_stops_at_the_first_failure(project, failing):
    program(project.programs / "make", FAKE_MAKE)
    done = project.call("bash", ".ci/run", FAILS=STAGES.get(failing or "", ""))
    names = list(STAGES)
    reached = names[: names.index(failing) + 1] if failing else names
    assert done.returncode == (2 if failing else 0)
    assert project.logged() == [STAGES[name] for name in reached]
    printed = [line[3:] for line in done.stdout.splitlines() if " passed" not in line]
    assert printed == reached
    assert done.stdout.endswith("== all stages passed\n") == (failing is None)
