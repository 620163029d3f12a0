"""What the server says of faults, what it logs, and which files it opens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dart_llm.errors import ConfigError
from serve_cases import CHAT, FakeEngine, Running, events, running

CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(max_tokens=50, sparsity=0.25, methods="dart") as found:
        yield found


@pytest.mark.contract("no text in logs unless asked")
def test_a_fault_is_told_without_its_insides(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(fault=ValueError("secret prompt"), fault_at=0)
    with running(engine) as server, server.client() as client:
        response = client.post(CHAT_URL, json=CHAT)
        assert response.status_code == 500
        error = response.json()["error"]
        assert error["code"] == "internal_error"
        assert response.headers["x-request-id"] in error["message"]
        assert "secret" not in response.text
        engine.fault_at = 2
        late = client.post(CHAT_URL, json={**CHAT, "stream": True})
        assert late.status_code == 200
        assert events(late.text)[-1]["error"]["code"] == "internal_error"
        assert "secret" not in late.text
        late = client.post("/api/events", json=CHAT)
        assert events(late.text)[-1]["kind"] == "error"
        assert "secret" not in late.text
        engine.fault = None
        assert client.post(CHAT_URL, json=CHAT).status_code == 200
    assert response.headers["x-request-id"] in caplog.text
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text


def test_what_the_engine_refuses_is_told() -> None:
    engine = FakeEngine(fault=ConfigError("this does not fit: drop it"))
    with running(engine) as server, server.client() as client:
        response = client.post(CHAT_URL, json=CHAT)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "this does not fit: drop it"


@pytest.mark.contract("no text in logs unless asked")
def test_prompts_are_logged_only_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    body = {"messages": [{"role": "user", "content": "my secret"}], "max_tokens": 1}
    caplog.set_level("INFO", "dart_llm.serve")
    with running(verbose=True) as server, server.client() as client:
        client.post(CHAT_URL, json=body)
        client.post(CHAT_URL, json={**body, "my secret": 1})
        client.get("/my secret")
    assert f"POST {CHAT_URL} 200" in caplog.text
    assert "secret" not in caplog.text
    with running(log_prompts=True) as server, server.client() as client:
        client.post(CHAT_URL, json=body)
    assert "my secret" in caplog.text


def test_runs_are_opened_below_their_folder_alone(tmp_path: Path) -> None:
    root = tmp_path / "results"
    run = root / "sky/20260101-120000"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"status": "complete", "kind": "run"}))
    (run / "generation.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (run / "drift.csv").write_text("step,similarity\n1,0.5\n")
    outside = tmp_path / "20260101-130000"
    outside.mkdir()
    (outside / "config.json").write_text(json.dumps({"status": "complete", "secret": 1}))
    (root / "20260101-140000").symlink_to(outside)
    (run / "masks.json").symlink_to(outside / "config.json")
    with running(results_dir=str(root)) as server, server.client() as client:
        listed = client.get("/api/runs").json()["runs"]
        assert [one["name"] for one in listed] == ["sky/20260101-120000"]
        opened = client.get("/api/runs/sky/20260101-120000").json()
        for name in ("../20260101-130000", "%2e%2e/20260101-130000", "20260101-140000", "sky", "x"):
            assert client.get(f"/api/runs/{name}").status_code == 404
    assert opened["generation"] == [{"text": "a"}, {"text": "b"}]
    assert opened["drift"] == [{"step": "1", "similarity": "0.5"}]
    assert opened["masks"] is None
    assert opened["config"]["kind"] == "run"


def test_what_a_run_measured_is_told_whatever_its_kind(tmp_path: Path) -> None:
    line = {
        "label": "griffin@0.5",
        "status": "done",
        "cell": {"model": "m", "method": "griffin", "sparsity": 0.5, "task": "arc_easy"},
        "measurement": {
            "task": "arc_easy",
            "protocol": "decode",
            "metric": "acc",
            "metrics": {"acc": 0.25},
            "accounting": {"achieved_sparsity": 0.48, "dense_token_share": 0.04, "remasks": 3},
        },
    }
    mean = {"label": "dart", "method": "dart", "cells": 2, "loss": {"after": {"mean": 4.5}}}
    summary = {"mode": "forced", "rows": [{**mean, "achieved_sparsity": 0.4, "remasks": 1}]}
    written: dict[str, dict[str, str]] = {
        "run": {"general_nlp.json": json.dumps({"rows": [line]})},
        "eval": {"results.jsonl": json.dumps(line)},
        "sweep": {"results.jsonl": json.dumps(line), "compare.md": "# Comparison"},
        "drift": {"summary.json": json.dumps(summary), "summary.md": "# Drift"},
        "detect": {"results.jsonl": "{}", "detection.md": "# Detection"},
        "inspect": {"inspect.json": "{}", "inspect.md": "# Inspection"},
        "quality": {"results.jsonl": "{}", "quality.md": "# Quality"},
        "speed": {"results.jsonl": "{}", "speed.md": "# Speed"},
    }
    for kind, files in written.items():
        folder = tmp_path / f"{kind}/20260101-120000"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"status": "complete", "kind": kind}))
        for name, text in files.items():
            (folder / name).write_text(text)
    with running(results_dir=str(tmp_path)) as server, server.client() as client:
        found = {kind: client.get(f"/api/runs/{kind}/20260101-120000").json() for kind in written}
    measured = {"label": "griffin@0.5", "asked": 0.5, "task": "arc_easy", "protocol": "decode"}
    measured |= {"model": "m", "status": "done", "metric": "acc", "value": 0.25, "items": 0}
    measured |= {"achieved": 0.48, "dense_share": 0.04, "remasks": 3}
    for kind in ("run", "eval", "sweep"):
        assert found[kind]["rows"] == [measured]
    (drift,) = found["drift"]["rows"]
    assert (drift["label"], drift["value"], drift["achieved"]) == ("dart", 4.5, 0.4)
    for kind, files in written.items():
        page = next((text for name, text in files.items() if name.endswith(".md")), "")
        assert found[kind]["tables"] == page
    assert found["detect"]["rows"] == []


def test_a_table_that_is_none_is_left_out(tmp_path: Path) -> None:
    run = tmp_path / "20260101-120000"
    run.mkdir()
    (run / "config.json").write_text('{"status": "complete", "kind": "run"}')
    (run / "drift.csv").write_text("step\n" + "1" * 200_000 + "\n")  # beyond csv's field limit
    with running(results_dir=str(tmp_path)) as server, server.client() as client:
        opened = client.get("/api/runs/20260101-120000")
    assert (opened.status_code, opened.json()["drift"]) == (200, [])
