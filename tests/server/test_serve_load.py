"""Many clients on one model: nothing leaks from one request into another, nor out of the server."""

from __future__ import annotations

from typing import Any

from dart_llm.engine.engine import Engine
from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.engine.requests import Sampling
from dart_llm.pruning.config import PruneConfig
from engine_cases import tokenizer
from serve_cases import benchmark, running_model
from tiny import tiny, tokens

load = benchmark("serve_load")
REQUESTS, CLIENTS = 60, 8
DARTS: list[dict[str, Any]] = [
    {"method": "dense"},
    {"method": "griffin", "sparsity": 0.5},
    {"method": "griffin", "sparsity": 0.7, "drift": "interval 4"},
]
BODIES = [
    {
        "prompt": tokens(1, 24, seed)[0].tolist(),
        "max_tokens": 12,
        "temperature": 0,
        "dart": dart,
    }
    for seed in range(2)
    for dart in DARTS
]


def test_many_clients() -> None:
    model, words = tiny(), tokenizer()
    expected = load.expected_texts(model, words, BODIES)
    assert len(set(expected)) > 2
    with running_model(model, words, method="griffin", max_waiting=4) as server:
        found = load.measure(server.url, lambda: 1, BODIES, expected, REQUESTS, CLIENTS)
        alive = server.service.worker.alive
    assert found["wrong"] == [] and found["errors"] == []
    assert found["completed"] + found["cancelled"] == REQUESTS
    assert found["cancelled"] >= REQUESTS // 4  # some texts end before their half
    assert found["sent_away_429"] > 0
    assert found["passed"] and alive


def test_after_the_server_the_model_is_what_it_was() -> None:
    model, words = tiny(), tokenizer()
    state = {name: id(part) for name, part in model.named_modules()}
    ids = tuple(BODIES[0]["prompt"])
    with Engine(model, words) as engine:
        before = engine.run(Ask(ids, Sampling(max_tokens=8))).tokens
    with running_model(model, words, method="griffin") as server, server.client() as client:
        for dart in DARTS:
            body = {"prompt": list(ids), "max_tokens": 8, "dart": dart}
            assert client.post("/v1/completions", json=body).status_code == 200
    assert {name: id(part) for name, part in model.named_modules()} == state
    assert not any("forward" in vars(part) for part in model.modules())
    with Engine(model, words) as engine:
        assert engine.run(Ask(ids, Sampling(max_tokens=8))).tokens == before
        pruned = engine.run(Ask(ids, Sampling(max_tokens=8), PruneConfig.build("griffin")))
    assert pruned.report.method == "griffin"
