"""Runs copies of the two shell scripts, with a recording ``dart-llm`` or the real one on PATH."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import typer

from dart_llm.cli.app import COMMANDS, app
from dart_llm.settings import merge

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT, DRIFT = "run_experiment.sh", "run_knowledge_drift.sh"
SCRIPTS = (EXPERIMENT, DRIFT)

# Both scripts list exactly these, in this order.
VARIABLES = """
METHOD MODEL CACHE_DIR DEVICE LAYER_TOPK TOTAL_PRUNE_PERCENT MASKING_STEP RELEASE_STEP
EMA_DECAY RANKING_METHOD PRUNE_STRATEGY KNOWLEDGE_DRIFT PROMPT_TYPE PROMPT_SUBJECT
CUSTOM_PROMPT_TEXT PROMPT_LENGTH GENERATION EVAL_PERPLEXITY PPL_DATASETS PPL_SUBJECTS
PPL_MAX_SAMPLES EVAL_MMLU MMLU_DATASETS MMLU_SHOTS MMLU_MAX_SAMPLES EVAL_GENERAL_NLP
GENERAL_NLP_DATASETS GENERAL_NLP_MAX_SAMPLES EVAL_SUMMARIZATION SUMMARIZATION_DATASETS
SUMMARIZATION_MAX_SAMPLES SUMMARIZATION_MAX_OUTPUT SEED VERBOSE SAVE_ACTIVATIONS
EXPERIMENT_NAME RESULTS_DIR
""".split()

_RECORD = """\
import json, os, sys
from pathlib import Path
with Path(os.environ["RECORD"]).open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
raise SystemExit(int(os.environ.get("STUB_EXIT", "0")))
"""


@dataclass
class Desk:
    """A folder with a space in its name, copies of the scripts, and a ``dart-llm`` on PATH."""

    root: Path
    environment: dict[str, str]

    def edit(self, name, values):
        """Write ``values`` as the defaults in the list at the top of a script."""
        path = self.root / name
        text = path.read_text()
        for variable, value in values.items():
            line = re.compile(rf'^: "\$\{{{variable}:=[^"]*\}}"', re.MULTILINE)
            text, count = line.subn(f': "${{{variable}:={value}}}"', text)
            assert count == 1, variable
        path.write_text(text)

    def bash(self, text, **variables):
        how = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "check": False}
        environment = {**self.environment, **variables}
        return subprocess.run(["bash", "-c", text], cwd=self.root, env=environment, **how)

    def run(self, name, *arguments, **variables):
        (self.root / "record.json").unlink(missing_ok=True)
        return self.bash(f"./{name} {shlex.join(arguments)}", **variables)

    def commands(self):
        """The arguments of every ``dart-llm`` that the last script called."""
        lines = (self.root / "record.json").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def recorded(self, command="run"):
        """The arguments of the only ``dart-llm COMMAND``, without its name."""
        (arguments,) = (found[1:] for found in self.commands() if found[0] == command)
        return arguments

    def settings(self, command="run"):
        """What the real command line makes of the recorded arguments."""
        return parse(command, self.recorded(command))

    def configs(self):
        """config.json of every results folder, oldest first."""
        paths = sorted((self.root / "results").glob("*/*/config.json"), key=lambda p: p.parent.name)
        return [json.loads(path.read_text()) for path in paths]


def parse(name, arguments):
    """The settings of ``dart-llm NAME ARGUMENTS``, by the command line's own parser."""
    group = typer.main.get_command(app)
    context = group.commands[name].make_context(name, list(arguments))
    kind = next(command.settings for command in COMMANDS if command.name == name)
    flags = {key: context.params[key] for key in kind.model_fields if key in context.params}
    return merge(kind, flags, environment={})


def make_desk(folder, real=False):
    """Copies of the scripts in ``folder``; ``real``: ``dart-llm`` is this installation's."""
    root = folder / "a desk"
    (root / "scripts").mkdir(parents=True)
    for name in (*SCRIPTS, "scripts/run_common.sh"):
        shutil.copy(ROOT / name, root / name)
    programs = root / "bin"
    programs.mkdir()
    (programs / "record.py").write_text(_RECORD)
    command = [sys.executable, "-m", "dart_llm"]
    if not real:
        command = [sys.executable, "-S", str(programs / "record.py")]
    (programs / "dart-llm").write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    (programs / "dart-llm").chmod(0o755)
    # What the person running the tests has exported must not leak into them.
    kept = {k: v for k, v in os.environ.items() if k not in VARIABLES and k[:5] != "DART_"}
    kept |= {"PATH": f"{programs}:/usr/bin:/bin", "RECORD": str(root / "record.json")}
    return Desk(root, kept)
