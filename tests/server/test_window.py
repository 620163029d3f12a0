"""The window's files, past runs and recordings, read without a browser."""

import base64
import hashlib
import io
import json
import re
from pathlib import Path

import pytest

import dart_llm
from dart_llm.errors import ConfigError
from dart_llm.server.security import CONTENT_POLICY
from dart_llm.server.window import EXPORT, IMPORT, page, read_records, static_files
from html_page import Page
from lm_cases import call
from serve_cases import running
from window_cases import QUESTION, records, write

STATIC = Path(dart_llm.__file__).parent / "server" / "static"
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(STATIC.glob("*.js"))}
TEXT = (STATIC / "index.html").read_text(encoding="utf-8")
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
        found = set(re.findall(r"https?://[^\s\"'<>)]+|//[\w-]+\.\w+/", path.read_text("utf-8")))
        assert found <= {OWN_ADDRESS}, path.name


def test_names_lead_somewhere():
    named = set(re.findall(r'(?:href|src)="/static/([\w.]+)"', TEXT))
    for script, text in SCRIPTS.items():
        assert text.startswith("// ") and len(text.splitlines()) <= 300
        for names, other in IMPORT.findall(text):
            named.add(other)
            exported = {name for _, name in EXPORT.findall(SCRIPTS[other])}
            for name in map(str.strip, names.split(",")):
                assert name in exported and len(re.findall(rf"\b{name}\b", text)) > 1, name
        assert set(re.findall(r'byId\("([\w-]+)"\)', text)) <= {*IDS, "records"}, script
    served = set(static_files())
    assert (
        served
        == named | {"index.html", "prompts.json", "greeting.json"}
        == {p.name for p in STATIC.iterdir()}
    )
    assert len(IDS) == len(set(IDS))
    for _, attributes in PAGE.seen:
        for name in ("for", "aria-labelledby", "aria-describedby"):
            assert set((attributes.get(name) or "").split()) <= set(IDS)
        link = attributes.get("href") or ""
        assert not link.startswith("#") or link[1:] in IDS


# past runs


def a_run(folder, config, **files):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"status": "complete", **config}))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_runs_are_opened_below_their_folder_alone(tmp_path):
    root, outside = tmp_path / "results", tmp_path / "20260101-130000"
    run = root / "sky/20260101-120000"
    lines = '{"text": "a"}\n{"text": "b"}\n'
    table = "step,similarity\n1,0.5\n"
    a_run(run, {"kind": "run"}, generation__jsonl=lines, drift__csv=table)
    broken = "step\n" + "1" * 200_000 + "\n"  # beyond csv's field limit
    a_run(root / "sky/20260101-110000", {"kind": "run"}, drift__csv=broken)
    a_run(outside, {"secret": 1})
    (root / "20260101-140000").symlink_to(outside)
    (run / "masks.json").symlink_to(outside / "config.json")
    with running(results_dir=str(root)) as server, server.client() as client:
        listed = [one["name"] for one in client.get("/api/runs").json()["runs"]]
        opened = client.get("/api/runs/sky/20260101-120000").json()
        assert client.get("/api/runs/sky/20260101-110000").json()["drift"] == []
        for name in ("../20260101-130000", "%2e%2e/20260101-130000", "20260101-140000", "sky", "x"):
            assert client.get(f"/api/runs/{name}").status_code == 404
    assert sorted(listed) == ["sky/20260101-110000", "sky/20260101-120000"]
    assert opened["generation"] == [{"text": "a"}, {"text": "b"}]
    assert opened["drift"] == [{"step": "1", "similarity": "0.5"}]
    assert (opened["masks"], opened["config"]["kind"]) == (None, "run")


def test_what_a_run_measured_is_told_whatever_its_kind(tmp_path):
    found = {"task": "arc_easy", "protocol": "decode", "metric": "acc", "metrics": {"acc": 0.25}}
    found["accounting"] = {"achieved_sparsity": 0.48, "dense_token_share": 0.04, "remasks": 3}
    cell = {"model": "m", "method": "griffin", "sparsity": 0.5, "task": "arc_easy"}
    line = {"label": "griffin@0.5", "status": "done", "cell": cell, "measurement": found}
    mean = {"label": "dart", "method": "dart", "cells": 2, "loss": {"after": {"mean": 4.5}}}
    summary = {"mode": "forced", "rows": [{**mean, "achieved_sparsity": 0.4, "remasks": 1}]}
    written = {
        "run": {"general_nlp__json": json.dumps({"rows": [line]})},
        "sweep": {"results__jsonl": json.dumps(line), "compare__md": "# Comparison"},
        "drift": {"summary__json": json.dumps(summary), "summary__md": "# Drift"},
        "detect": {"results__jsonl": "{}", "detection__md": "# Detection"},
    }
    for kind, files in written.items():
        a_run(tmp_path / kind / "20260101-120000", {"kind": kind}, **files)
    with running(results_dir=str(tmp_path)) as server, server.client() as client:
        shown = {kind: client.get(f"/api/runs/{kind}/20260101-120000").json() for kind in written}
    measured = {"label": "griffin@0.5", "asked": 0.5, "task": "arc_easy", "protocol": "decode"}
    measured |= {"model": "m", "status": "done", "metric": "acc", "value": 0.25, "items": 0}
    measured |= {"achieved": 0.48, "dense_share": 0.04, "remasks": 3}
    assert [shown[kind]["rows"] for kind in ("run", "sweep")] == [[measured]] * 2
    (drift,) = shown["drift"]["rows"]
    assert (drift["label"], drift["value"], drift["achieved"]) == ("dart", 4.5, 0.4)
    for kind, files in written.items():
        (text,) = [text for name, text in files.items() if name.endswith("__md")] or [""]
        assert shown[kind]["tables"] == text


# recordings


@pytest.mark.contract("every parser round-trips")
def test_recordings_are_read(tmp_path):
    found, file = records(), tmp_path / "records.jsonl"
    write(file, found)
    stream = "".join(f"data: {json.dumps(record)}\n\n" for record in found)
    (tmp_path / "events").write_text(f": ping\n\n{stream}data: [DONE]\n\n", encoding="utf-8")
    assert read_records(str(file)) == read_records(str(tmp_path / "events")) == found
    token = b'{"kind": "token", "index": 0, "text": "", "phase": "dense"}'
    wrong = [
        (token, "does not begin with a start record"),
        (b"\n{nothing", "line 2 is no JSON"),
        (b'{"kind": "start", "method": NaN}', "line 1 is no JSON"),
        (b"[1]", "line 1 is no record: its kind must be one of start, token"),
        (b'{"kind": "start", "method": "dart"}', "a start record needs layers, neurons, prompt"),
        (b"\xff\xfe\x00", "no text in UTF-8"),
    ]
    for content, said in wrong:
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=re.escape(said)):
            read_records(str(file))
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
        read_records(str(tmp_path / "none"))


def between(text, opening, closing):
    return text.partition(opening)[2].partition(closing)[0]


def test_a_recording_as_one_page():
    """The window's page, which asks nothing of anybody; no record ends its element."""
    found = records()
    found[0]["model"] = "</title><script>alert(1)</script>"
    text = page(found)
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
    assert json.loads(data) == found
    assert "<" not in data and QUESTION not in text and text.count("</script>") == 2


def test_the_command(tmp_path, monkeypatch):
    file, other = tmp_path / "records.jsonl", tmp_path / "other.html"
    write(file, records())
    done = call("replay", file)
    assert (done.code, done.out.strip()) == (0, str(tmp_path / "records.html"))
    monkeypatch.setattr("sys.stdin", io.StringIO(file.read_text("utf-8")))
    assert call("replay", "-", "--out", other).code == 0
    assert other.read_text("utf-8") == page(records())
    done = call("replay", other)
    assert done.code == 2 and "is the recording itself" in done.err
