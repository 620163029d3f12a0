"""Every command of README.md and docs/ runs, and prints what its page shows.

tests/doc_commands.yaml says how each is run.  What is not run is listed, with its reason, at the
end of pytest's report.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import typer

from conftest import NOT_RUN
from dart_llm.cli.app import app
from doc_commands import ROOT, Command, Shown, commands, logical_lines, names, shown
from doc_outputs import differences, missing
from doc_place import Done, Place, make_place
from doc_rules import SECTIONS, Rule, names_a_test, read_table, rule_of, stages

SECONDS = 300.0
"""The longest that a command may take; it is a few seconds where nothing else runs."""
LINK = re.compile(r"http://127\.0\.0\.1:\d+/(?= \(Ctrl-C ends\))")
COMMANDS, RULES, SHOWN = commands(), read_table(), shown()
RUN = [
    (command, rule)
    for command in COMMANDS
    if (rule := rule_of(RULES, command)) and rule.section != "not_here"
]


def short_name(command: Command) -> str:
    return f"{command.where} {textwrap.shorten(command.text, 60)}"


def parameters(*sections: str) -> pytest.MarkDecorator:
    found = [pair for pair in RUN if pair[1].section in sections]
    marks = [[pytest.mark.smollm2] if rule.real else [] for _, rule in found]
    cases = [
        pytest.param(*pair, marks=mark, id=short_name(pair[0]))
        for pair, mark in zip(found, marks, strict=True)
    ]
    return pytest.mark.parametrize(("command", "rule"), cases)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = make_place(tmp_path_factory.mktemp("docs"))
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def server(place: Place) -> Iterator[str]:
    """The address of a server that runs until the last test here is done."""
    with_server = Serving(place, "dart-llm serve --sparsity 0.3 --port 0")
    try:
        yield with_server.link.rstrip("/")
    finally:
        with_server.end()


class Serving:
    """A command that serves until it is told to end."""

    def __init__(self, place: Place, text: str) -> None:
        self.log = place.root / f"served-{time.monotonic_ns()}.log"
        self.process = place.start(text, self.log)
        deadline = time.monotonic() + SECONDS
        while not (found := LINK.search(self.printed())):
            assert self.process.poll() is None and time.monotonic() < deadline, self.printed()
            time.sleep(0.05)
        self.link = found[0]

    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def end(self) -> int:
        """Ctrl-C, which a terminal sends to all processes of the command."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(SECONDS)


def block_of(command: Command) -> Shown | None:
    return next((one for one in SHOWN if one.after == command.text), None)


def check_output(command: Command, rule: Rule, printed: str) -> None:
    block = block_of(command)
    if block is None:
        return
    if rule.talk or rule.section == "server":  # the page shows a part
        wrong = missing(block.text, printed)
    else:
        wrong = differences(block.text, printed, rule.varies)
    assert wrong == [], f"{block.page}:{block.line}\n{printed}"


def run(place: Place, command: Command, rule: Rule) -> Done:
    text = rule.shortened(command.text)
    if command.kind == "python":
        block = place.root / "block.py"
        block.write_text(f"{rule.before}{text}\n", encoding="utf-8")
        text = "python block.py"
    elif rule.before:
        text = f"{rule.before}\n{text}"
    block_text = block_of(command)
    stdin = rule.stdin
    if rule.talk and block_text:
        typed = [line[2:] for line in block_text.text.splitlines() if line.startswith("> ")]
        stdin = "\n".join(typed) + "\n"
    variables = {"DART_CACHE": os.environ.get("DART_CACHE", "")} if rule.real else {}
    return place.bash(text, SECONDS, stdin, **variables)


@parameters("short", "as_it_stands")
def test_runs(place: Place, command: Command, rule: Rule) -> None:
    done = run(place, command, rule)
    assert done.code == 0, done.printed
    check_output(command, rule, done.printed)


@parameters("server")
def test_serves(place: Place, command: Command, rule: Rule) -> None:
    serving = Serving(place, rule.shortened(command.text))
    try:
        page = httpx.get(serving.link, trust_env=False, timeout=SECONDS)
        assert page.status_code == 200 and "<title>DART for LLMs" in page.text
    finally:
        code = serving.end()
    printed, mark, _ = serving.printed().rpartition("ended\n")
    assert mark and (code == 0 or command.text.startswith("make")), serving.printed()
    check_output(command, rule, printed)


@parameters("to_server")
def test_asks_a_server(place: Place, server: str, command: Command, rule: Rule) -> None:
    there = Command(
        command.text.replace("http://127.0.0.1:8000", server), *command_place(command), command.kind
    )
    assert there.text != command.text
    done = run(place, there, rule)
    assert done.code == 0, done.printed
    assert "error" not in done.printed.lower()


def command_place(command: Command) -> tuple[str, int]:
    return command.page, command.line


def test_every_command_is_in_the_table_and_every_entry_is_used() -> None:
    unknown = [short_name(one) for one in COMMANDS if rule_of(RULES, one) is None]
    assert unknown == [], "say in tests/doc_commands.yaml how these are run"
    used = {id(rule_of(RULES, one)) for one in COMMANDS}
    assert [rule.match for rule in RULES if id(rule) not in used] == []
    assert len(COMMANDS) > 150


def test_every_output_block_follows_a_command_that_is_run() -> None:
    texts = {command.text: rule for command, rule in RUN}
    missing = [f"{one.page}:{one.line}" for one in SHOWN if one.after not in texts]
    assert missing == ["docs/examples.md:21"]  # printed by another example than the one above it
    assert len(SHOWN) >= 5


def test_reasons_hold(request: pytest.FixtureRequest) -> None:
    texts = {command.text for command, _ in RUN}
    for command in COMMANDS:
        rule = rule_of(RULES, command)
        if rule is None or rule.section != "not_here":
            continue
        key, what = rule.why
        assert key != "stage" or what in stages()
        assert key != "test" or names_a_test(what)
        assert key != "same" or what in texts
        line = f"{command.where}: {textwrap.shorten(command.text, 70)}: {rule.reason()}"
        request.config.stash[NOT_RUN].append(line)


def test_names_of_commands_exist() -> None:
    group = typer.main.get_command(app)
    for name in names():
        first, *rest = name.text.split()
        if first == "dart-llm":
            found = group
            while rest and hasattr(found, "commands"):
                found = found.commands[rest.pop(0)]
        elif "/" in first:
            assert os.access(ROOT / first, os.X_OK), name


def test_commands_are_cut_as_a_shell_cuts_them() -> None:
    body = "a --b '# no' # yes\n# all of it\nc \\\n  --d  # yes\ne '\n# kept\n' f\n"
    assert [text for _, text in logical_lines(body)] == [
        "a --b '# no'",
        "c --d",
        "e '\n# kept\n' f",
    ]
    with pytest.raises(AssertionError, match="unfinished"):
        list(logical_lines("a 'b\n"))
    assert all(shlex.split(one.text) for one in COMMANDS if one.kind == "shell")


def test_an_output_that_differs_is_noticed() -> None:
    page = "loading x\n│ a  │ 12.5 % │\n--- dense ---\nA text.\ndart: 3 of 4\n"
    assert differences(page, "│ a │ 7 % │\n--- dense ---\nAnother\none.\ndart: 1 of 9\n") == []
    assert differences(page, "│ b │ 7 % │\n--- dense ---\ndart: 1 of 9\n") == [
        "the page shows 'a # %', printed was 'b # %'"
    ]
    assert differences("a: 1\n", "a: 2\nb: 3\n") == ["the page shows 'nothing', printed was 'b: #'"]
    assert differences("one ...\n", "another\n") == []
    assert differences("(1); this\n", "(2); that\n", r"(?<=\)); .*") == []
    assert differences("a: 1\n…\nc: 3\n", "a: 2\nb: 3\nc: 4\n") == []
    assert differences("a: 1\n…\nc: 3\n", "a: 2\nd: 4\n") == ["the page shows 'c: #'"]
    assert missing("> hello\nAn answer. ...\n24 tokens\n", "ready\nWell.\n3 tokens\n") == []
    assert missing("> hello\n24 tokens\nbye\n", "bye\n3 tokens\n") == ["bye"]


def test_the_table_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "table.yaml"
    rest = "".join(f"{name}: []\n" for name in SECTIONS[1:])
    path.write_text(f"not_here: [{{match: x, lazy: yes}}]\n{rest}", encoding="utf-8")
    with pytest.raises(AssertionError, match="lazy is no reason"):
        read_table(path)
    path.write_text(f"not_here: []\n{rest}".replace("short: []", "short: [{match: x}]"))
    with pytest.raises(AssertionError, match="x is not short"):
        read_table(path)
