"""``dart-llm replay``: recordings as read, and the one file that plays them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dart_llm.cli.app import app
from dart_llm.errors import ConfigError
from dart_llm.server.window import page, read_records
from html_page import Page
from window_cases import QUESTION, records, write


def between(text: str, opening: str, closing: str) -> str:
    start = text.index(opening) + len(opening)
    return text[start : text.index(closing, start)]


@pytest.fixture(scope="module")
def text() -> str:
    return page(records())


def test_json_lines_and_server_sent_events_are_the_same(tmp_path: Path) -> None:
    found = records()
    lines = write(tmp_path / "records.jsonl", found)
    stream = "".join(f"data: {json.dumps(record)}\n\n" for record in found)
    events = tmp_path / "events.sse"
    events.write_text(f": ping\n\n{stream}data: [DONE]\n\n", encoding="utf-8")
    assert read_records(str(lines)) == read_records(str(events)) == found


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "does not begin with a start record"),
        ('{"kind": "token", "index": 0, "text": "", "phase": "dense"}', "does not begin with a"),
        ("\n{nothing", "line 2 is no JSON"),
        ('{"kind": "start", "method": NaN}', "line 1 is no JSON"),
        ("[1]", "line 1 is no record: its kind must be one of start, token"),
        ('{"kind": ["start"]}', "line 1 is no record"),
        ('{"kind": "start", "method": "dart"}', "a start record needs layers, neurons, prompt"),
    ],
)
def test_what_is_no_recording(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_records(str(file))


def test_a_recording_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="no text in UTF-8"):
        read_records(str(file))
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
        read_records(str(tmp_path / "none"))


def test_the_page_asks_nothing_of_anybody(text: str) -> None:
    assert set(re.findall(r"https?://[^\s\"'<>)]+", text)) == {"http://www.w3.org/2000/svg"}
    parsed = Page(re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))
    names = {name for _, attributes in parsed.seen for name in attributes}
    assert not names & {"src", "srcset", "style", "data"}
    assert not [name for name in names if name.startswith("on")]
    links = [attributes["href"] for _, attributes in parsed.seen if "href" in attributes]
    assert links and all(link and link.startswith("#") for link in links)
    assert not re.findall(r"@import|url\((?!#)", text)


def test_the_policy_allows_its_own_script_and_style_alone(text: str) -> None:
    policy = between(text, 'Content-Security-Policy" content="', '">')
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert parts["default-src"] == "'none'"
    blocks = {
        "script-src": between(text, '<script type="module">', "</script>"),
        "style-src": between(text, "<style>", "</style>"),
    }
    for name, block in blocks.items():
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert parts[name] == f"'sha256-{digest}'"


def test_the_records_are_in_it_and_cannot_end_their_element(text: str) -> None:
    data = between(text, '<script type="application/json" id="records">', "</script>")
    assert json.loads(data) == records()
    assert "<" not in data
    assert text.count("</script>") == 2
    assert QUESTION not in text


def test_it_is_the_same_page(text: str) -> None:
    parsed = Page(re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))
    assert parsed.attributes("html") == [{"lang": "en", "data-mode": "replay"}]
    ids = {attributes.get("id") for _, attributes in parsed.seen}
    assert {"turns", "drift-plot", "neurons", "count-sparsity", "play", "position"} <= ids
    assert "<title>DART for LLMs: tiny</title>" in text
    assert not re.findall(r"^\s*(?:import|export)\b", text, re.MULTILINE)


def test_a_name_of_a_model_is_no_markup() -> None:
    found = records()
    found[0]["model"] = "</title><script>alert(1)</script>"
    assert "<title>DART for LLMs: &lt;/title&gt;&lt;script&gt;" in page(found)


def test_the_command_writes_beside_the_recording(tmp_path: Path) -> None:
    file = write(tmp_path / "records.jsonl", records())
    done = CliRunner().invoke(app, ["replay", str(file)])
    assert (done.exit_code, done.stdout.strip()) == (0, str(tmp_path / "records.html"))
    assert (tmp_path / "records.html").read_text(encoding="utf-8") == page(records())
    other = tmp_path / "other.html"
    lines = file.read_text(encoding="utf-8")
    done = CliRunner().invoke(app, ["replay", "-", "--out", str(other)], input=lines)
    assert done.exit_code == 0
    assert other.read_text(encoding="utf-8") == page(records())


def test_what_the_command_refuses(tmp_path: Path) -> None:
    file = write(tmp_path / "records.html", records())
    for arguments, said in (
        (["replay", "-"], "give --out FILE: standard input"),
        (["replay", str(file)], "is the recording itself"),
        (["replay", str(file), "--out", str(tmp_path / "no" / "x.html")], "cannot write"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, ConfigError)
        assert said in str(done.exception)
    assert read_records(str(file)) == records()
