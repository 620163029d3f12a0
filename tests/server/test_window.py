"""The window's files, past runs and recordings, read without a browser."""

import base64
import hashlib
import io
import json
import re

import pytest

from dart_llm.errors import ConfigError
from dart_llm.experiments.store import ResultLine
from dart_llm.server.app import CONTENT_POLICY
from dart_llm.server.window import IMPORT, STATIC, page, read_records
from html_page import Page
from lm_cases import call
from serve_cases import running
from window_cases import QUESTION, past_run, records, write

SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(STATIC.glob("*.js"))}
TEXT = (STATIC / "index.html").read_text(encoding="utf-8")
EXPORT = re.compile(r"^export (?:(?:async )?function\*?|class|const) (\w+)", re.MULTILINE)
TOP = re.compile(r"^(?:export )?(?:(?:async )?function\*?|class|const|let) (\w+)", re.MULTILINE)
PAGE = Page(TEXT)
IDS = [attributes["id"] or "" for _, attributes in PAGE.seen if "id" in attributes]
OWN_ADDRESS = "http://www.w3.org/2000/svg"


def test_the_policy_holds_for_the_page():
    assert "script-src 'self'; style-src 'self'" in CONTENT_POLICY
    module = r"<script(?! type=\"module\" src=\"/static/\w+\.js\"></script>)"
    assert not re.search(rf"<style|{module}", TEXT)
    names = {name for _, attributes in PAGE.seen for name in attributes}
    assert "style" not in names and not [name for name in names if name.startswith("on")]
    writes = r"innerHTML|outerHTML|insertAdjacentHTML|\beval\(|Function\(|document\.write"
    for text in SCRIPTS.values():
        assert not re.search(rf"{writes}|setAttribute\(\"style\"", text)
    for path in STATIC.iterdir():  # no address of another host
        addresses = re.findall(r"https?://[^\s\"'<>)]+|//[\w-]+\.\w+/", path.read_text("utf-8"))
        assert {*addresses} <= {OWN_ADDRESS}, path.name


def test_names_lead_somewhere():
    named = set(re.findall(r'(?:href|src)="/static/([\w.]+)"', TEXT))
    for script, text in SCRIPTS.items():
        for names, other in IMPORT.findall(text):
            named.add(other)
            exported = set(EXPORT.findall(SCRIPTS[other]))
            assert {name.strip() for name in names.split(",")} <= exported
        assert set(re.findall(r'byId\("([\w-]+)"\)', text)) <= {*IDS, "records"}, script
    names = [name for text in SCRIPTS.values() for name in TOP.findall(text)]
    assert len(names) == len(set(names))  # a recording is one script of all of them
    others = {"index.html", "prompts.json", "greeting.json"}
    assert named | others == {path.name for path in STATIC.iterdir()}
    assert len(IDS) == len(set(IDS))


def test_runs_are_opened_below_their_folder_alone(tmp_path):
    root, outside = tmp_path / "results", tmp_path / "20260101-130000"
    run = root / "sky/20260101-120000"
    line = ResultLine(label="griffin@0.5", method="griffin", model="m", task="t", metric="acc")
    line = line.model_copy(update={"value": 0.25, "achieved": 0.48, "remasks": 3})
    files = {"generation_jsonl": '{"text": "a"}\n{"text": "b"}\n'}
    files |= {"rows_jsonl": line.model_dump_json() + "\n{broken", "compare_md": "# Comparison"}
    past_run(run, drift_csv="step,similarity\n1,0.5\n", **files)
    too_wide = "step\n" + "1" * 200_000 + "\n"  # beyond csv's field limit
    past_run(root / "sky/20260101-110000", drift_csv=too_wide)
    past_run(outside)
    (root / "20260101-140000").symlink_to(outside)
    (run / "masks.json").symlink_to(outside / "config.json")
    with running(results_dir=str(root)) as server, server.client() as client:
        listed = [run["name"] for run in client.get("/api/runs").json()["runs"]]
        opened = client.get("/api/runs/sky/20260101-120000").json()
        assert client.get("/api/runs/sky/20260101-110000").json()["drift"] == []
        for name in ("../20260101-130000", "%2e%2e/20260101-130000", "20260101-140000", "sky", "x"):
            assert client.get(f"/api/runs/{name}").status_code == 404
    assert sorted(listed) == ["sky/20260101-110000", "sky/20260101-120000"]
    assert opened["generation"] == [{"text": "a"}, {"text": "b"}]
    assert opened["drift"] == [{"step": "1", "similarity": "0.5"}]
    assert (opened["masks"], opened["config"]["kind"]) == (None, "run")
    assert opened["rows"] == [line.model_dump()] and opened["tables"] == "# Comparison"


@pytest.mark.contract("every parser round-trips")
def test_recordings_are_read(tmp_path):
    recorded, file = records(), tmp_path / "records.jsonl"
    write(file, recorded)
    stream = "".join(f"data: {json.dumps(record)}\n\n" for record in recorded)
    (tmp_path / "events").write_text(f": ping\n\n{stream}data: [DONE]\n\n", encoding="utf-8")
    assert read_records(str(file)) == read_records(str(tmp_path / "events")) == recorded
    wrong = [
        (b"\n{nothing", "line 2 is not a JSON record"),
        (b'{"kind": "start", "method": NaN}', "line 1 is not a JSON record"),
        (b"[1]", "line 1 is not a JSON record"),
        (b'{"kind": "x"}', "line 1 is not a JSON record"),
        (b'{"kind": "done"}', "does not begin with a start record"),
        (b"\xff\xfe\x00", "it is not UTF-8 text"),
    ]
    for content, problem in wrong:
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=problem):
            read_records(str(file))
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
        read_records(str(tmp_path / "none"))


def between(text, opening, closing):
    return text.partition(opening)[2].partition(closing)[0]


def test_a_recording_as_one_page(tmp_path, monkeypatch):
    """The window's page, which sends no requests; no record ends its element."""
    recorded = records()
    recorded[0]["model"] = "</title><script>alert(1)</script>"
    text = page(recorded)
    assert "<title>DART for LLMs: &lt;/title&gt;&lt;script&gt;" in text
    assert set(re.findall(r"https?://[^\s\"'<>)]+", text)) == {OWN_ADDRESS}
    parsed = Page(re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))
    links = [attributes["href"] or "" for _, attributes in parsed.seen if "href" in attributes]
    assert links and all(link.startswith("#") for link in links)
    assert not re.findall(r"@import|url\((?!#)|^\s*(?:import|export)\b", text, re.MULTILINE)
    assert parsed.attributes("html") == [{"lang": "en", "data-mode": "replay"}]
    policy = between(text, 'Content-Security-Policy" content="', '">')
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert parts["default-src"] == "'none'"
    for name, opening, closing in (
        ("script-src", '<script type="module">', "</script>"),
        ("style-src", "<style>", "</style>"),
    ):
        digest = hashlib.sha256(between(text, opening, closing).encode()).digest()
        assert parts[name] == f"'sha256-{base64.b64encode(digest).decode()}'"
    data = between(text, '<script type="application/json" id="records">', "</script>")
    assert json.loads(data) == recorded
    assert "<" not in data and QUESTION not in text and text.count("</script>") == 2
    file, other = write(tmp_path / "records.jsonl", records()), tmp_path / "other.html"
    done = call("replay", file)
    assert (done.code, done.out.strip()) == (0, str(tmp_path / "records.html"))
    monkeypatch.setattr("sys.stdin", io.StringIO(file.read_text("utf-8")))
    assert call("replay", "-", "--out", other).code == 0
    assert other.read_text("utf-8") == page(records())
    done = call("replay", other)
    assert done.code == 2 and "is the file with the records" in done.err
