"""``dart-llm serve`` as a process: what it says, refuses, costs; and what clients make of it."""

import os
import signal
import socket
import subprocess
import sys

import httpx
import openai
import pytest
import serve_load

from dart_llm.engine.engine import Engine
from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.engine.requests import Sampling
from engine_cases import tokenizer
from lm_cases import loaded, place, refusal
from serve_cases import running_model, serving, until
from steps import Same
from tiny import tiny, tokens


def test_what_cannot_start():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal("serve", "--port", port)
    assert f"cannot listen at 127.0.0.1, port {port}: Address already in use" in said
    assert "--port 0 selects a free port" in said


@pytest.mark.parametrize("package", ["fastapi", "prometheus_client", "uvicorn"])
def test_an_extra_that_is_missing(package):
    script = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv = ['dart-llm', 'serve', '--port', "
        "'0']; from dart_llm.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert f"this needs {package.replace('_', '-')}, which is not installed: pip install " in line


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_opens_the_page_and_ends(tmp_path, monkeypatch, end):
    program, seen = tmp_path / "browser", tmp_path / "seen"
    program.write_text(f'#!/bin/sh\nprintf %s "$1" >{seen}.part && mv {seen}.part {seen}\n')
    program.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{program} %s")
    tiny("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    flags = ("--method", "griffin", "--grace", 1, "--max-tokens", 400, "--open")
    with (
        serving("--model", tmp_path / "model", *flags) as process,
        httpx.Client(base_url=process.url, timeout=60, trust_env=False) as client,
    ):
        body = {"prompt": "abc", "max_tokens": 3, "temperature": 0}
        answer = client.post("/v1/completions", json=body).json()
        assert answer["usage"]["completion_tokens"] <= 3
        until(seen.exists)
        assert seen.read_text().rstrip("/") == process.url
        process.end(end)  # while a connection is still open


def test_what_torch_keeps_for_lengths_of_prompts_is_bounded():
    """Or oneDNN keeps some 3 MiB of code for every length that a server has seen."""
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    script = "import os; from dart_llm.__main__ import set_environment; set_environment(); "
    script += f"print(*(os.environ[name] for name in {names}))"
    for given, wanted in (({}, "64 64"), ({names[0]: "9"}, "9 64")):
        environment = {name: value for name, value in os.environ.items() if name not in names}
        command, how = [sys.executable, "-c", script], {"capture_output": True, "text": True}
        done = subprocess.run(command, env=environment | given, **how)
        assert done.stdout.split() == wanted.split(), done.stderr


@pytest.mark.smollm2
def test_answers_to_openais_client(smollm2):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    fixed = {"model": "SmolLM2-135M-Instruct", "messages": question, "max_tokens": 12}
    griffin, dense = {"method": "griffin", "sparsity": 0.5}, {"method": "dense"}

    def chat(dart=None, **options):
        body = {"extra_body": {"dart": dart}} if dart else {}
        return client.chat.completions.create(**{**fixed, "temperature": 0, **body, **options})

    http = openai.DefaultHttpxClient(trust_env=False)
    with (
        running_model(*smollm2, method="griffin", sparsity=0.3, max_tokens=64) as server,
        openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", http_client=http, max_retries=0
        ) as client,
    ):
        assert [model.id for model in client.models.list()] == [fixed["model"]]
        assert client.models.retrieve("smollm2-135m").id == fixed["model"]
        answer, pruned = chat(dense), chat(griffin)
        assert answer.dart["dense_token_share"] == 1
        assert "Paris" in answer.choices[0].message.content
        assert pruned.dart["method"] == "griffin" and pruned.dart["remask_causes"] == {"first": 1}
        assert pruned.dart["achieved_sparsity"] == pytest.approx(0.5, abs=1e-3)
        assert chat().dart["requested_sparsity"] == 0.3  # the server's own
        for whole, dart in ((answer, dense), (pruned, griffin)):
            chunks = list(chat(dart, stream=True, stream_options={"include_usage": True}))
            parts = [choice.delta.content for chunk in chunks for choice in chunk.choices]
            assert "".join(filter(None, parts)) == whole.choices[0].message.content
            assert chunks[-1].usage == whole.usage
        for options, kind, param in (
            ({"model": "gpt"}, openai.NotFoundError, "model"),
            ({"extra_body": {"top_k": 3}}, openai.BadRequestError, "top_k"),
        ):
            with pytest.raises(kind) as caught:
                chat(**options)
            assert caught.value.param == param and caught.value.request_id.startswith("req_")


def test_lm_evals_client_scores_as_its_own_model_does():
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(place() / "tasks"), include_defaults=False)

    def answers(model, **options):
        fixed = {"tasks": ["tiny_choice"], "task_manager": manager, "bootstrap_iters": 0}
        samples = simple_evaluate(model=model, **fixed, **options)["samples"]["tiny_choice"]
        samples.sort(key=lambda sample: sample["doc_id"])
        return [tuple(answer[0]) for sample in samples for answer in sample["resps"]]

    model, words = loaded()
    expected = answers(HFLM(model, tokenizer=words, batch_size=1, device="cpu"))
    with running_model(model, words, method="dense") as server:
        to = {"model": server.service.facts.name, "base_url": f"{server.url}/v1/completions"}
        to |= {"tokenizer": str(place() / "model"), "tokenizer_backend": "huggingface"}
        to |= {"max_length": 500, "max_retries": 1, "num_concurrent": 3}
        scored = answers("local-completions", model_args=to, batch_size=2)
    assert [greedy for _, greedy in scored] == [greedy for _, greedy in expected]
    logprobs = [logprob for logprob, _ in expected]
    assert [logprob for logprob, _ in scored] == pytest.approx(logprobs, abs=1e-4)


BODIES = [
    {"prompt": tokens(1, 24, seed)[0].tolist(), "max_tokens": 12, "temperature": 0, "dart": dart}
    for seed in range(2)
    for dart in (
        {"method": "dense"},
        {"method": "griffin", "sparsity": 0.5},
        {"method": "griffin", "sparsity": 0.7, "drift": "interval 4"},
    )
]
REQUESTS = 60


@pytest.mark.contract("exact restore")
def test_nothing_leaks_from_one_client_to_another_nor_out_of_the_server():
    model, words = tiny(), tokenizer()
    asked = Ask(tuple(BODIES[0]["prompt"]), Sampling(max_tokens=8))
    with Engine(model, words) as engine:
        before = engine.run(asked).tokens
    expected = serve_load.expected_texts(model, words, BODIES)
    assert len(set(expected)) > 2
    with Same(model), running_model(model, words, method="griffin", max_waiting=4) as server:
        load = serve_load.measure(server.url, lambda: 1, BODIES, expected, REQUESTS, 8)
        assert server.service.worker.alive
    assert load["wrong"] == [] and load["errors"] == [] and load["passed"]
    assert load["completed"] + load["cancelled"] == REQUESTS
    assert load["cancelled"] >= REQUESTS // 4  # some texts end before their half
    assert load["sent_away_429"] > 0
    with Engine(model, words) as engine:
        assert engine.run(asked).tokens == before
