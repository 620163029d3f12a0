"""lm-eval's own client scores multiple choice through the server as lm-eval's own model does."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine_cases import tokenizer
from lm_cases import QUESTIONS
from serve_cases import running_model
from tiny import tiny

TASK = {
    "task": "questions",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "q: {{question}}\na:",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task over a file of its own, and the tokenizer as lm-eval's client wants it."""
    made = tmp_path_factory.mktemp("tasks")
    rows = "\n".join(map(json.dumps, QUESTIONS))
    (made / "questions.jsonl").write_text(rows, encoding="utf-8")
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(made / "questions.jsonl")}}}
    (made / "questions.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    tokenizer().save_pretrained(made / "tokenizer")
    return made


def scores(folder: Path, model: Any, **options: Any) -> tuple[dict[str, float], list[Any]]:
    """The task's metrics, and per question the (log-likelihood, greedy or not) of its answers."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = simple_evaluate(
        model=model, tasks=["questions"], task_manager=manager, bootstrap_iters=0, **options
    )
    metrics = {name: found["results"]["questions"][f"{name},none"] for name in ("acc", "acc_norm")}
    samples = sorted(found["samples"]["questions"], key=lambda one: one["doc_id"])
    return metrics, [[tuple(one[0]) for one in sample["resps"]] for sample in samples]


@pytest.fixture(scope="module")
def direct(folder: Path) -> Any:
    """By lm-eval's model around transformers, of the untouched model."""
    from lm_eval.models.huggingface import HFLM

    return scores(folder, HFLM(tiny(), tokenizer=tokenizer(), batch_size=1, device="cpu"))


def through(folder: Path, url: str, batch_size: int = 1, **more: Any) -> Any:
    arguments = {
        "model": "tiny",
        "base_url": f"{url}/v1/completions",
        "tokenizer": str(folder / "tokenizer"),
        "tokenizer_backend": "huggingface",
        "max_length": 500,
        "max_retries": 1,
        **more,
    }
    return scores(folder, "local-completions", model_args=arguments, batch_size=batch_size)


@pytest.mark.parametrize(
    ("batch_size", "more"),
    [(1, {}), (2, {}), (2, {"num_concurrent": 3}), (1, {"tokenized_requests": False})],
)
def test_multiple_choice(folder: Path, direct: Any, batch_size: int, more: dict[str, Any]) -> None:
    model = tiny()
    with running_model(model, tokenizer(), method="dense") as server:
        name = server.service.facts.name
        metrics, found = through(folder, server.url, batch_size, model=name, **more)
        assert server.service.worker.alive
    wanted_metrics, wanted = direct
    assert metrics == wanted_metrics
    assert [len(row) for row in found] == [3] * len(QUESTIONS)
    for row, wanted_row in zip(found, wanted, strict=True):
        for (score, greedy), (wanted_score, wanted_greedy) in zip(row, wanted_row, strict=True):
            assert score == pytest.approx(wanted_score, abs=2e-5)
            assert greedy == wanted_greedy


def test_scores_of_a_pruned_model_are_refused(folder: Path) -> None:
    """The prompt runs dense, so they would be those of the dense model under another's name."""
    from requests import HTTPError

    with running_model(tiny(), tokenizer(), method="griffin", sparsity=0.5) as server:
        with server.client() as client:
            body = {"prompt": "one two", "echo": True, "logprobs": 1, "max_tokens": 1}
            response = client.post("/v1/completions", json=body)
            dense = client.post("/v1/completions", json={**body, "dart": {"method": "dense"}})
        with pytest.raises(HTTPError, match="400"):
            through(folder, server.url, model=server.service.facts.name)
    assert response.status_code == 400
    assert "scores pruned models" in response.json()["error"]["message"]
    assert len(dense.json()["choices"][0]["logprobs"]["tokens"]) == len("one two") + 1
