"""One attachment answers many requests: none of them shows in another, nor in the model after."""

from __future__ import annotations

import json
import random
import threading
from typing import Any

import pytest
import torch

from dart_llm.engine.engine import Engine
from dart_llm.engine.events import Mask, Record, Token
from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.engine.requests import Sampling
from dart_llm.errors import AttachError
from dart_llm.session.run import prune
from engine_cases import (
    CONFIGS,
    PROMPT,
    all_alone,
    alone,
    ask,
    half,
    kinds,
    own_model,
    prepared,
    tokenizer,
)
from products import SHAPES
from steps import Same
from tiny import LAYERS, WIDTH, tiny


@pytest.fixture(scope="module")
def engine() -> Any:
    with Same(own_model()), prepared() as engine:
        yield engine


def without_memory(report: Any) -> dict[str, Any]:
    return report.to_dict() | {"extra_memory_bytes": 0}


@pytest.fixture(scope="module")
def wanted() -> dict[str, Any]:
    return all_alone()


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize("name", [*SHAPES, "gemma3", "bloom"])
def test_every_model(name: str) -> None:
    model = own_model(name)
    with Same(model):
        plain = alone(model, None)[0]
        pruned = alone(model, half(masking_step=4))
        with Engine(model, tokenizer()) as engine:
            for _ in range(2):
                answer, _ = ask(engine)
                assert answer.tokens[0] == plain
                assert answer.report.achieved_sparsity == 0 and answer.report.method == "dense"
                answer, _ = ask(engine, half(masking_step=4))
                assert answer.tokens[0] == pruned[0]
                assert answer.report.to_dict() == pruned[1].to_dict()
    assert alone(model, None)[0] == plain


def test_requests_in_any_order(engine: Engine, wanted: dict[str, Any]) -> None:
    order = list(CONFIGS) * 2
    random.Random(0).shuffle(order)
    for place, name in enumerate(order):
        if place % 3 == 2:  # somebody who goes away
            left = iter(range(place % 7))
            other = list(CONFIGS)[place % len(CONFIGS)]
            asked = Ask(PROMPT[::-1], Sampling(max_tokens=40), CONFIGS[other])
            answer = engine.run(asked, cancelled=lambda left=left: next(left, None) is None)
            assert answer.finish == ("cancelled",)
        answer, _ = ask(engine, CONFIGS[name])
        tokens, report = wanted[name]
        assert answer.tokens[0] == tokens, name
        if report is not None:
            assert without_memory(answer.report) == without_memory(report), name


def test_pruned_answers_differ(wanted: dict[str, Any]) -> None:
    assert len({tokens for tokens, _ in wanted.values()}) >= 7
    assert wanted["none"][0] == wanted["dense"][0]


def test_memory_is_that_of_the_request(engine: Engine) -> None:
    for name in ("griffin", "dart-token", "griffin", "dense"):
        config = CONFIGS[name]
        with prune(tiny(), config or "dense") as run:
            run.model.generate(torch.tensor([PROMPT]), max_new_tokens=40, do_sample=False)
        assert ask(engine, config)[0].report.extra_memory_bytes == run.report().extra_memory_bytes


def test_records(engine: Engine) -> None:
    answer, records = ask(engine, half(masking_step=3, drift="interval 8"), new=30, logprobs=2)
    assert kinds(records)[:3] == ["start", "remask", "mask"] and kinds(records)[-1] == "done"
    made = [record for record in records if isinstance(record, Token)]
    assert [one.index for one in made] == list(range(30))
    assert tuple(one.id for one in made) == answer.tokens[0]
    assert "".join(one.text for one in made) == answer.texts[0]
    assert answer.texts[0] == tokenizer().decode(answer.tokens[0], skip_special_tokens=True)
    phases = [one.phase for one in made]
    assert phases[:5] == ["prefill", "observe", "observe", "observe", "pruned"]
    assert set(phases) == {"prefill", "observe", "pruned"}
    assert all(one.seconds > 0 and one.top is not None and len(one.top) == 2 for one in made)
    masks = [record for record in records if isinstance(record, Mask)]
    # 4 tokens pass, then each mask serves 8 and 3 are observed
    assert [(mask.number, mask.token) for mask in masks] == [(1, 4), (2, 15), (3, 26)]
    at = records.index(masks[0])
    assert records[at - 1].kind == "remask" and records[at + 1] == made[4]
    assert masks[0].kept_share == (0.5,) * LAYERS
    start = records[0].to_dict()
    assert start["neurons"] == [WIDTH] * LAYERS and start["layers"] == LAYERS
    assert (start["method"], start["sparsity"]) == ("griffin", 0.5)
    assert [one["id"] for one in start["prompt"]] == list(PROMPT)
    assert "".join(one["text"] for one in start["prompt"]) == tokenizer().decode(PROMPT)
    done = records[-1].to_dict()
    assert done["report"] == answer.report.to_dict() and done["texts"] == list(answer.texts)
    assert {record.to_dict()["kind"] for record in records} == {
        "start",
        "token",
        "remask",
        "mask",
        "done",
    }
    for record in records:
        text = json.dumps(record.to_dict(), allow_nan=False)
        assert json.dumps(json.loads(text)) == text


def test_checks_are_recorded(engine: Engine) -> None:
    config = half(drift={"rule": "published"})
    with prune(tiny(), config) as run:
        run.model.generate(torch.tensor([PROMPT]), max_new_tokens=60, do_sample=False)
    _, records = ask(engine, config, new=60)
    found = [record.check for record in records if record.kind == "check"]
    assert found == list(run.drift_checks) and len(found) > 3
    built = [record.remask for record in records if record.kind == "remask"]
    assert built == list(run.remasks)


def test_the_raster_is_the_mask(engine: Engine) -> None:
    keep = {0: range(0, WIDTH, 2), 1: range(WIDTH), 2: range(24), 3: [0]}
    with prune(tiny(), masks={layer: list(ids) for layer, ids in keep.items()}) as run:
        run.model.generate(torch.tensor([PROMPT]), max_new_tokens=3, do_sample=False)
    from dart_llm.engine.request import mask_record

    masks = run._newest_masks()
    record = mask_record(masks, [WIDTH] * LAYERS, 7, 3)
    assert record.kept_share == (0.5, 1.0, 0.5, 1 / WIDTH)
    assert [list(row) for row in record.raster] == [
        [255, 0] * 24,
        [255] * WIDTH,
        [255] * 24 + [0] * 24,
        [255] + [0] * 47,
    ]
    from dart_llm.pruning.masks import LayerMask

    wide = mask_record([LayerMask(torch.arange(0, 1000, 2), 1000, None), None], [1000, 97], 1, 0)
    assert [len(row) for row in wide.raster] == [96, 96]
    assert all(116 <= value <= 140 for value in wide.raster[0])
    _, records = ask(engine, CONFIGS["dart-token"])
    chosen = next(record for record in records if isinstance(record, Mask))
    assert (
        chosen.kept_share == (0.5,) * LAYERS and chosen.raster == (bytes([128] * WIDTH),) * LAYERS
    )


def test_logprobs_are_those_of_a_plain_forward(engine: Engine) -> None:
    answer, records = ask(engine, new=12, logprobs=3, temperature=1.5, seed=4)
    made = [record for record in records if isinstance(record, Token)]
    whole = torch.tensor([[*PROMPT, *answer.tokens[0]]])
    with torch.no_grad():
        logits = own_model()(whole).logits[0, len(PROMPT) - 1 : -1]
    wanted = torch.log_softmax(logits, -1)
    for one, row in zip(made, wanted, strict=True):
        assert one.logprob == pytest.approx(float(row[one.id]), abs=1e-4)
        best = row.topk(3)
        assert [top.id for top in one.top] == best.indices.tolist()
        assert [top.logprob for top in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert all(record.top is None for record in ask(engine)[1] if isinstance(record, Token))


@pytest.mark.parametrize("config", [None, half()], ids=["dense", "griffin"])
def test_several_choices(engine: Engine, config: Any) -> None:
    answer, records = ask(engine, config, new=16, n=3, temperature=0.9, seed=11)
    again, _ = ask(engine, config, new=16, n=3, temperature=0.9, seed=11)
    other, _ = ask(engine, config, new=16, n=3, temperature=0.9, seed=12)
    assert answer.tokens == again.tokens and answer.tokens != other.tokens
    assert len(set(answer.tokens)) == 3
    made = [record for record in records if isinstance(record, Token)]
    for choice in range(3):
        own = [one for one in made if one.choice == choice]
        assert tuple(one.id for one in own) == answer.tokens[choice]
        assert "".join(one.text for one in own) == answer.texts[choice]
    count = sum(map(len, answer.tokens))
    assert answer.usage.completion_tokens == count
    assert answer.report.decoded_tokens == answer.timings.predicted_n == count - 3
    assert answer.report.prompt_tokens == 3 * len(PROMPT)
    greedy, _ = ask(engine, config, n=2)
    assert set(greedy.tokens) == {alone(tiny(), config)[0]}


def test_rows_that_end_early_are_neither_told_nor_counted(engine: Engine) -> None:
    settings = {"new": 40, "n": 4, "temperature": 1.0, "seed": 3}
    free, _ = ask(engine, half(), **settings)
    stop = free.texts[0][5:7]
    answer, records = ask(engine, half(), stop=(stop,), **settings)
    lengths = [len(tokens) for tokens in answer.tokens]
    assert answer.finish[0] == "stop" and lengths[0] <= 8 and max(lengths) > lengths[0]
    made = [record for record in records if isinstance(record, Token)]
    assert [sum(one.choice == row for one in made) for row in range(4)] == lengths
    assert answer.report.decoded_tokens == sum(lengths) - 4


def test_cancelled_within_one_token(engine: Engine) -> None:
    records: list[Record] = []
    made = lambda: sum(record.kind == "token" for record in records)  # noqa: E731
    answer = engine.run(Ask(PROMPT, config=half()), records.append, lambda: made() >= 5)
    assert len(answer.tokens[0]) == 5 and answer.finish == ("cancelled",)
    assert records[-1].kind == "done" and answer.report.decoded_tokens == 4
    assert answer.usage.completion_tokens == 5 and answer.timings.predicted_n == 4


def test_an_error_leaves_nothing(engine: Engine, wanted: dict[str, Any]) -> None:
    class Broken(Exception):
        pass

    records: list[Record] = []

    def emit(record: Record) -> None:
        records.append(record)
        if isinstance(record, Token) and record.index == 6:
            raise Broken("secret")

    with pytest.raises(Broken):
        engine.run(Ask(PROMPT, config=half(), conversation="a"), emit)
    assert records[-1].to_dict() == {
        "kind": "error",
        "id": records[0].id,
        "message": "the request failed",
    }
    assert not engine._host.patch.controller.sequences and engine._host.patch.loop is None
    assert ask(engine, conversation="a")[0].usage.cached_tokens == 0
    assert ask(engine, half())[0].tokens[0] == wanted["griffin"][0]


def test_one_at_a_time(engine: Engine) -> None:
    refused: list[BaseException] = []

    def second() -> None:
        for call in (lambda: ask(engine), lambda: engine.prepare(None), engine.close):
            with pytest.raises(AttachError, match="answering another request") as error:
                call()
            refused.append(error.value)

    def emit(record: Record) -> None:
        if record.kind == "start":
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    engine.run(Ask(PROMPT, Sampling(max_tokens=2)), emit)
    assert len(refused) == 3
    assert len(ask(engine)[0].tokens[0]) == 40


def test_the_model_can_still_generate_between_requests(engine: Engine) -> None:
    ask(engine, half())
    made = own_model().generate(torch.tensor([PROMPT]), max_new_tokens=40, do_sample=False)
    assert tuple(made[0, len(PROMPT) :].tolist()) == alone(tiny(), None)[0]
    with pytest.raises(AttachError, match="already being pruned"):
        prune(own_model(), "griffin").attach()
