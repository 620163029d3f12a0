"""OpenAI's client, lm-eval's, and many clients at once, against real models."""

import openai
import pytest
import serve_load

from dart_llm.engine.engine import Engine
from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.engine.requests import Sampling
from engine_cases import tokenizer
from lm_cases import loaded, place
from serve_cases import running_model
from steps import Same
from tiny import tiny, tokens

MODEL = "SmolLM2-135M-Instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GRIFFIN = {"dart": {"method": "griffin", "sparsity": 0.5}}
DENSE = {"dart": {"method": "dense"}}


@pytest.fixture(scope="module")
def server(smollm2):
    with running_model(*smollm2, method="griffin", sparsity=0.3, max_tokens=64) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    transport = openai.DefaultHttpxClient(trust_env=False)
    base = f"{server.url}/v1"
    with openai.OpenAI(base_url=base, api_key="none", http_client=transport, max_retries=0) as made:
        yield made


def chat(client, **options):
    asked = {"model": MODEL, "messages": QUESTION, "max_tokens": 12, "temperature": 0, **options}
    return client.chat.completions.create(**asked)


@pytest.mark.smollm2
def test_answers(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve("smollm2-135m").id == MODEL
    dense, pruned = chat(client, extra_body=DENSE), chat(client, extra_body=GRIFFIN)
    assert dense.dart["dense_token_share"] == 1
    assert "Paris" in dense.choices[0].message.content
    assert pruned.dart["method"] == "griffin" and pruned.dart["remask_causes"] == {"first": 1}
    assert pruned.dart["achieved_sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert chat(client).dart["requested_sparsity"] == 0.3  # the server's own
    for whole, dart in ((dense, DENSE), (pruned, GRIFFIN)):
        options = {"include_usage": True}
        chunks = list(chat(client, stream=True, stream_options=options, extra_body=dart))
        parts = [c for chunk in chunks for c in chunk.choices]
        text = "".join(c.delta.content or "" for c in parts)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage == whole.usage
    for options, kind, param in (
        ({"model": "gpt"}, openai.NotFoundError, "model"),
        ({"extra_body": {"top_k": 3}}, openai.BadRequestError, "top_k"),
    ):
        with pytest.raises(kind) as caught:
            chat(client, **options)
        assert caught.value.param == param and caught.value.request_id.startswith("req_")


def test_lm_evals_client_scores_as_its_own_model_does():
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    def answers(model, **options):
        manager = TaskManager(include_path=str(place() / "tasks"), include_defaults=False)
        fixed = {"tasks": ["tiny_choice"], "task_manager": manager, "bootstrap_iters": 0}
        samples = simple_evaluate(model=model, **fixed, **options)["samples"]["tiny_choice"]
        resps = [one["resps"] for one in sorted(samples, key=lambda one: one["doc_id"])]
        return [tuple(answer[0]) for sample in resps for answer in sample]

    model, words = loaded()
    wanted = answers(HFLM(model, tokenizer=words, batch_size=1, device="cpu"))
    with running_model(model, words, method="dense") as server:
        to = {"model": server.service.facts.name, "base_url": f"{server.url}/v1/completions"}
        to |= {"tokenizer": str(place() / "model"), "tokenizer_backend": "huggingface"}
        to |= {"max_length": 500, "max_retries": 1, "num_concurrent": 3}
        found = answers("local-completions", model_args=to, batch_size=2)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert [one for one, _ in found] == pytest.approx([one for one, _ in wanted], abs=1e-4)


DARTS = [
    {"method": "dense"},
    {"method": "griffin", "sparsity": 0.5},
    {"method": "griffin", "sparsity": 0.7, "drift": "interval 4"},
]
BODIES = [
    {"prompt": tokens(1, 24, seed)[0].tolist(), "max_tokens": 12, "temperature": 0, "dart": dart}
    for seed in range(2)
    for dart in DARTS
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
        found = serve_load.measure(server.url, lambda: 1, BODIES, expected, REQUESTS, 8)
        assert server.service.worker.alive
    assert found["wrong"] == [] and found["errors"] == [] and found["passed"]
    assert found["completed"] + found["cancelled"] == REQUESTS
    assert found["cancelled"] >= REQUESTS // 4  # some texts end before their half
    assert found["sent_away_429"] > 0
    with Engine(model, words) as engine:
        assert engine.run(asked).tokens == before
