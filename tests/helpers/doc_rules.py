"""tests/doc_commands.yaml: how each command of the documentation is run, or why it is not."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from doc_commands import ROOT, Command

TABLE = Path(__file__).with_suffix("").with_name("doc_commands.yaml")
SECTIONS = ("not_here", "server", "to_server", "as_it_stands", "short")
WHY_NOT = {
    "stage": "the stage {} of .ci/run does it",
    "test": "run by {}",
    "same": "the same as {}",
    "installs": "installs {}",
    "hub": "needs the hub: {}",
    "gpu": "needs a GPU: {}",
    "browser": "needs a browser: {}",
}
"""All reasons for not running a command."""
CHANGES = ("add", "replace", "before", "stdin", "real", "talk", "varies")


@dataclass(frozen=True)
class Rule:
    """One entry of the table."""

    section: str
    match: str
    add: str = ""
    replace: dict[str, str] = field(default_factory=dict)
    before: str = ""
    stdin: str = ""
    real: bool = False
    """With SmolLM2 itself, not its stand-in."""
    talk: bool = False
    """What is typed, and what is answered, are the output block's lines."""
    varies: str = ""
    """Of its output, what is not compared."""
    why: tuple[str, str] = ("", "")
    """A key of ``WHY_NOT`` and what stands in its place there."""

    def fits(self, text: str) -> bool:
        return re.search(self.match, text) is not None

    def shortened(self, text: str) -> str:
        """The command as it is run."""
        for old, new in self.replace.items():
            assert old in text, f"{old} is not in {text}"
            text = text.replace(old, new)
        return f"{text} {self.add}".rstrip()

    def reason(self) -> str:
        key, what = self.why
        return WHY_NOT[key].format(what)


def read_table(path: Path = TABLE) -> list[Rule]:
    """All entries, in order; anything that the table may not say is an error."""
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert list(table) == list(SECTIONS)
    return [_rule(section, entry) for section in SECTIONS for entry in table[section]]


def _rule(section: str, entry: dict[str, Any]) -> Rule:
    given = {key: value for key, value in entry.items() if key != "match"}
    if section == "not_here":
        ((key, what),) = given.items()
        assert key in WHY_NOT, f"{key} is no reason: {', '.join(WHY_NOT)}"
        return Rule(section, entry["match"], why=(key, str(what)))
    allowed = CHANGES if section in ("short", "server") else ()
    assert set(given) <= set(allowed), f"{section} takes {allowed}, not {sorted(given)}"
    assert given or section != "short", f"{entry['match']} is not short: it stands as it is"
    return Rule(section, entry["match"], **given)


def rule_of(rules: list[Rule], command: Command) -> Rule | None:
    """The first entry whose pattern is found in the command."""
    return next((rule for rule in rules if rule.fits(command.text)), None)


def stages(root: Path = ROOT) -> list[str]:
    """The stages of .ci/run."""
    text = (root / ".ci/run").read_text(encoding="utf-8")
    return re.findall(r"^stage (\S+) ", text, re.MULTILINE)


def names_a_test(what: str, root: Path = ROOT) -> bool:
    """Whether ``tests/FILE.py::NAME`` is there."""
    file, _, name = what.partition("::")
    path = root / file
    return path.is_file() and f"\ndef {name}(" in path.read_text(encoding="utf-8")
