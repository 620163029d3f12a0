"""OpenAI's client, curl, lm-eval's client and many clients at once, against real models."""

import json
import logging
import math

import openai
import pytest
import serve_load
import yaml

from dart_llm.engine.engine import Engine
from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.engine.requests import Sampling
from engine_cases import tokenizer
from lm_cases import CHOICE, QUESTIONS
from serve_cases import running_model
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
def test_answers(client, smollm2):
    """Dense, pruned and dense again, each as if it were alone; accounting and streams."""
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve("smollm2-135m").id == MODEL
    dense, pruned = chat(client, extra_body=DENSE), chat(client, extra_body=GRIFFIN)
    text = smollm2[1].apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    ids = smollm2[1](text, add_special_tokens=False).input_ids
    assert dense.usage.prompt_tokens == len(ids)
    assert dense.dart["dense_token_share"] == 1
    assert "Paris" in dense.choices[0].message.content
    assert (pruned.object, pruned.model) == ("chat.completion", MODEL)
    assert pruned.choices[0].message.role == "assistant"
    assert pruned.choices[0].finish_reason in ("stop", "length")
    usage, timings = pruned.usage, pruned.timings
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens <= len(ids) + 12
    assert pruned.dart["method"] == "griffin"
    assert pruned.dart["achieved_sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert pruned.dart["remask_causes"] == {"first": 1}
    assert timings["prompt_n"] == usage.prompt_tokens
    each = timings["predicted_ms"] / timings["predicted_n"]
    assert timings["predicted_per_token_ms"] == pytest.approx(each)
    assert chat(client).dart["requested_sparsity"] == 0.3  # the server's own
    for whole, dart in ((dense, DENSE), (pruned, GRIFFIN)):
        options = {"include_usage": True}
        chunks = list(chat(client, stream=True, stream_options=options, extra_body=dart))
        parts = [c for chunk in chunks for c in chunk.choices]
        text = "".join(c.delta.content or "" for c in parts)
        assert text == whole.choices[0].message.content
        assert chunks[0].choices[0].delta.role == "assistant"
        assert {chunk.usage for chunk in chunks[:-1]} == {None} and chunks[-1].choices == []
        assert chunks[-1].usage == whole.usage
        assert chunks[-1].dart["achieved_sparsity"] == whole.dart["achieved_sparsity"]
        reasons = [c.finish_reason for c in parts if c.finish_reason]
        assert reasons == [whole.choices[0].finish_reason]


@pytest.mark.smollm2
def test_choices_and_log_probabilities(client, smollm2):
    alone = chat(client, extra_body=GRIFFIN).choices[0].message.content
    greedy = chat(client, n=2, extra_body=GRIFFIN)
    assert [choice.message.content for choice in greedy.choices] == [alone, alone]
    assert greedy.dart["remask_causes"] == {"first": 1}  # one batch, one mask
    found = chat(client, max_tokens=3, logprobs=True, top_logprobs=4, extra_body=DENSE).choices[0]
    assert "".join(one.token for one in found.logprobs.content) == found.message.content
    for one in found.logprobs.content:
        assert bytes(one.bytes).decode() == one.token
        assert one.logprob == one.top_logprobs[0].logprob  # greedy: the likeliest
        told = [t.logprob for t in one.top_logprobs]
        assert told == sorted(told, reverse=True)
        assert sum(map(math.exp, told)) <= 1 + 1e-4
    prompt = smollm2[1]("The sky is").input_ids
    (choice,) = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=1, temperature=0, logprobs=2, extra_body=DENSE
    ).choices
    scored = choice.logprobs
    assert scored and scored.tokens == [choice.text] and scored.text_offset == [0]
    (top,) = scored.top_logprobs or []
    assert len(top) == 2 and scored.token_logprobs == [max(top.values())]


@pytest.mark.smollm2
def test_a_conversation_reads_only_what_is_new(client):
    body = {"dart": {**GRIFFIN["dart"], "conversation": "cities"}}
    first = chat(client, extra_body=body)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    answer = {"role": "assistant", "content": first.choices[0].message.content}
    further = [*QUESTION, answer, {"role": "user", "content": "And of Spain?"}]
    second = chat(client, messages=further, extra_body=body)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert 0 < cached < second.usage.prompt_tokens
    assert second.timings["prompt_n"] == second.usage.prompt_tokens - cached
    assert second.dart["achieved_sparsity"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.smollm2
def test_errors(client):
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.models.retrieve("gpt")
    for options, kind, param, code in (
        ({"model": "gpt"}, openai.NotFoundError, "model", "model_not_found"),
        ({"temperature": 3}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"extra_body": {"top_k": 3}}, openai.BadRequestError, "top_k", "unknown_parameter"),
        ({"stream": True, "n": 9}, openai.BadRequestError, "n", "invalid_value"),
    ):
        with pytest.raises(kind) as caught:
            chat(client, **options)
        assert (caught.value.param, caught.value.code) == (param, code)
        assert caught.value.request_id.startswith("req_")
        assert set(caught.value.body) == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A task over a file of its own, and the tokenizer as lm-eval's client wants it."""
    made = tmp_path_factory.mktemp("tasks")
    (made / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    data = {"data_files": {"test": str(made / "questions.jsonl")}}
    task = {"task": "questions", "dataset_path": "json", "dataset_kwargs": data, **CHOICE}
    task |= {"test_split": "test", "doc_to_target": "answer"}
    (made / "questions.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    tokenizer().save_pretrained(made / "tokenizer")
    return made


def scores(folder, model, **options):
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


def through(folder, server, batch_size=1, **more):
    arguments = {
        "model": server.service.facts.name,
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": str(folder / "tokenizer"),
        "tokenizer_backend": "huggingface",
        "max_length": 500,
        "max_retries": 1,
        **more,
    }
    return scores(folder, "local-completions", model_args=arguments, batch_size=batch_size)


def test_lm_evals_client_scores_as_its_own_model_does(folder):
    from lm_eval.models.huggingface import HFLM

    own = HFLM(tiny(), tokenizer=tokenizer(), batch_size=1, device="cpu")
    wanted_metrics, wanted = scores(folder, own)
    ways = [(2, {"num_concurrent": 3}), (1, {"tokenized_requests": False})]
    with running_model(tiny(), tokenizer(), method="dense") as server:
        for batch_size, more in ways:
            metrics, found = through(folder, server, batch_size, **more)
            assert metrics == wanted_metrics and [len(row) for row in found] == [3] * len(QUESTIONS)
            for row, wanted_row in zip(found, wanted, strict=True):
                assert [greedy for _, greedy in row] == [greedy for _, greedy in wanted_row]
                likely = [score for score, _ in wanted_row]
                assert [score for score, _ in row] == pytest.approx(likely, abs=2e-5)


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
    state = {name: id(part) for name, part in model.named_modules()}
    asked = Ask(tuple(BODIES[0]["prompt"]), Sampling(max_tokens=8))
    with Engine(model, words) as engine:
        before = engine.run(asked).tokens
    expected = serve_load.expected_texts(model, words, BODIES)
    assert len(set(expected)) > 2
    with running_model(model, words, method="griffin", max_waiting=4) as server:
        found = serve_load.measure(server.url, lambda: 1, BODIES, expected, REQUESTS, 8)
        assert server.service.worker.alive
    assert found["wrong"] == [] and found["errors"] == [] and found["passed"]
    assert found["completed"] + found["cancelled"] == REQUESTS
    assert found["cancelled"] >= REQUESTS // 4  # some texts end before their half
    assert found["sent_away_429"] > 0
    assert {name: id(part) for name, part in model.named_modules()} == state
    assert not any("forward" in vars(part) for part in model.modules())
    with Engine(model, words) as engine:
        assert engine.run(asked).tokens == before
