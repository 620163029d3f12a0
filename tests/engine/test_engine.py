"""One attachment answers many requests: none of them shows in another, nor in the model after."""

import contextlib
import gc
import json
import random
import warnings
from unittest.mock import Mock

import pytest
import torch

import dart_llm
from dart_llm.engine import request as requests
from dart_llm.engine.engine import Engine
from dart_llm.engine.request import mask_record
from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.engine.requests import Mask, Sampling, Scores, Token
from dart_llm.errors import AttachError, ConfigError
from dart_llm.patching.watch import Watch
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.masks import LayerMask
from dart_llm.session.run import prune
from engine_cases import CONFIGS, PROMPT, alone, ask, half, kinds, made_of, own_model, tokenizer
from products import SHAPES
from steps import Same
from tiny import LAYERS, WIDTH, tiny, tokens


@pytest.fixture(scope="module")
def engine():
    with Same(own_model()), Engine(own_model(), tokenizer()) as engine:
        for config in CONFIGS.values():
            engine.prepare(config)
        yield engine


@pytest.fixture(scope="module")
def wanted():
    return {name: alone(tiny(), config) for name, config in CONFIGS.items()}


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize("name", [*SHAPES, "gemma3", "bloom"])
def test_every_model(name):
    model, late = own_model(name), half(masking_step=4)
    with Same(model):
        plain, (tokens, report) = alone(model, None)[0], alone(model, late)
        with Engine(model, tokenizer()) as engine:
            for _ in range(2):
                answer, _ = ask(engine)
                assert answer.tokens[0] == plain
                assert answer.report.achieved_sparsity == 0 and answer.report.method == "dense"
                answer, _ = ask(engine, late)
                assert answer.tokens[0] == tokens
                assert answer.report.to_dict() == report.to_dict()


def test_requests_in_any_order(engine, wanted):
    assert len({tokens for tokens, _ in wanted.values()}) >= 7
    assert wanted["none"][0] == wanted["dense"][0]
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
            without = {"extra_memory_bytes": 0}
            assert answer.report.to_dict() | without == report.to_dict() | without, name


def test_records(engine):
    answer, records = ask(engine, half(masking_step=3, drift="interval 8"), new=30, logprobs=2)
    assert kinds(records)[:3] == ["start", "remask", "mask"] and kinds(records)[-1] == "done"
    made = made_of(records)
    assert [token.index for token in made] == list(range(30))
    assert tuple(token.id for token in made) == answer.tokens[0]
    assert "".join(token.text for token in made) == answer.texts[0]
    assert answer.texts[0] == tokenizer().decode(answer.tokens[0], skip_special_tokens=True)
    phases = [token.phase for token in made]
    assert phases[:5] == ["prefill", "observe", "observe", "observe", "pruned"]
    assert all(token.seconds > 0 and len(token.top) == 2 for token in made)
    masks = [record for record in records if isinstance(record, Mask)]
    # 4 tokens pass, then each mask serves 8 and 3 are observed
    assert [(mask.number, mask.token) for mask in masks] == [(1, 4), (2, 15), (3, 26)]
    at = records.index(masks[0])
    assert records[at - 1].kind == "remask" and records[at + 1] == made[4]
    assert masks[0].kept_share == (0.5,) * LAYERS
    start, done = records[0].to_dict(), records[-1].to_dict()
    assert (start["neurons"], start["layers"]) == ([WIDTH] * LAYERS, LAYERS)
    assert (start["method"], start["sparsity"]) == ("griffin", 0.5)
    assert "".join(token["text"] for token in start["prompt"]) == tokenizer().decode(PROMPT)
    assert done["report"] == answer.report.to_dict() and done["texts"] == list(answer.texts)
    for record in records:
        text = json.dumps(record.to_dict(), allow_nan=False)
        assert json.dumps(json.loads(text)) == text and record.to_dict()["kind"] == record.kind


def test_the_raster_is_the_mask(engine):
    kept = [torch.arange(0, WIDTH, 2), torch.arange(24), torch.tensor([0])]
    masks = [None, *(LayerMask(ids, WIDTH, None) for ids in kept)]
    record = mask_record(masks, [WIDTH] * LAYERS, 7, 3)
    assert record.kept_share == (1.0, 0.5, 0.5, 1 / WIDTH)
    rows = [[255] * WIDTH, [255, 0] * 24, [255] * 24 + [0] * 24, [255] + [0] * 47]
    assert [list(row) for row in record.raster] == rows
    wide = mask_record([LayerMask(torch.arange(0, 1000, 2), 1000, None), None], [1000, 97], 1, 0)
    assert [len(row) for row in wide.raster] == [96, 96]
    assert all(116 <= value <= 140 for value in wide.raster[0])
    _, records = ask(engine, CONFIGS["dart-token"])  # tokens select: half of all, somewhere
    mask = next(record for record in records if isinstance(record, Mask))
    assert mask.raster == (bytes([128] * WIDTH),) * LAYERS


def test_logprobs_are_those_of_a_plain_forward(engine, monkeypatch):
    monkeypatch.setattr(requests, "SCORED_PIECE", 7)
    settings = {"logprobs": 3, "prompt_logprobs": True}
    answer, records = ask(engine, new=12, temperature=1.5, seed=4, **settings)
    whole = torch.tensor([[*PROMPT, *answer.tokens[0]]])
    with torch.no_grad():
        rows = torch.log_softmax(own_model()(whole).logits[0, :-1], -1)
    (scores,) = (record for record in records if isinstance(record, Scores))
    likeliest = rows.topk(3).indices.tolist()
    for id, row, logprob in zip(PROMPT[1:], rows, scores.logprobs[1:], strict=False):
        assert logprob == pytest.approx(float(row[id]), abs=1e-4)
    assert scores.logprobs[0] is None and len(scores.logprobs) == len(PROMPT)
    assert [[one.id for one in top] for top in scores.top[1:]] == likeliest[: len(PROMPT) - 1]
    for token, row in zip(made_of(records), rows[len(PROMPT) - 1 :], strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [top.id for top in token.top] == row.topk(3).indices.tolist()
    unanswered, records = ask(engine, new=0, **settings)
    assert unanswered.finish == ("length",) and scores in records
    assert all(record.top is None for record in made_of(ask(engine)[1]))


@pytest.mark.parametrize("config", [None, half()], ids=["dense", "griffin"])
def test_several_choices(engine, config):
    settings = {"new": 16, "n": 3, "temperature": 0.9}
    answer, records = ask(engine, config, seed=11, **settings)
    assert answer.tokens == ask(engine, config, seed=11, **settings)[0].tokens
    assert answer.tokens != ask(engine, config, seed=12, **settings)[0].tokens
    assert len(set(answer.tokens)) == 3
    for choice in range(3):
        mine = [one for one in made_of(records) if one.choice == choice]
        assert tuple(one.id for one in mine) == answer.tokens[choice]
        assert "".join(one.text for one in mine) == answer.texts[choice]
    count = sum(map(len, answer.tokens))
    assert answer.usage.completion_tokens == count
    assert answer.report.decoded_tokens == answer.timings.predicted_n == count - 3
    greedy, _ = ask(engine, config, n=2)
    assert set(greedy.tokens) == {alone(tiny(), config)[0]}
    # a row that ends early is neither told nor counted
    stopped, records = ask(engine, config, seed=11, stop=(answer.texts[0][5:7],), **settings)
    lengths = [len(tokens) for tokens in stopped.tokens]
    assert stopped.finish[0] == "stop" and lengths[0] < 16
    assert [sum(one.choice == row for one in made_of(records)) for row in range(3)] == lengths
    assert stopped.report.decoded_tokens == sum(lengths) - 3


def test_the_end_of_a_text():
    model = tiny()
    plain = alone(model, None)[0]
    end = plain[7]
    model.generation_config.eos_token_id = [2, end]
    short = plain[: plain.index(end) + 1]
    assert alone(model, None)[0] == short
    with Engine(model, tokenizer()) as engine:
        answer, records = ask(engine)
    assert answer.tokens[0] == short and answer.finish == ("stop",)
    last = made_of(records)[-1]
    assert (last.id, last.text) == (end, "") and last.piece
    assert answer.texts[0] == tokenizer().decode(short[:-1], skip_special_tokens=True)


def test_a_prompt_of_several_pieces(engine, wanted, monkeypatch):
    monkeypatch.setattr(requests, "PIECE", 23)  # the second piece is one token
    for name in ("dense", "dart", "griffin", "dart-token", "per row"):
        answer, _ = ask(engine, CONFIGS[name])
        assert answer.tokens[0] == wanted[name][0]
        assert (answer.report.prompt_tokens, answer.report.decoded_tokens) == (len(PROMPT), 39)
    calls = iter([False, True])
    answer = engine.run(Ask(PROMPT), cancelled=lambda: next(calls))
    assert answer.tokens == ((),) and answer.finish == ("cancelled",)


def test_an_error_leaves_nothing(engine, wanted):
    records = []

    def emit(record):
        records.append(record)
        if isinstance(record, Token) and record.index == 6:
            raise OSError("secret")

    with pytest.raises(OSError, match="secret"):
        engine.run(Ask(PROMPT, config=half(), conversation="a"), emit)
    told = {"kind": "error", "id": records[0].id, "message": "the request failed"}
    assert records[-1].to_dict() == told
    assert not engine._host.patch.controller.sequences and engine._host.patch.loop is None
    assert ask(engine, conversation="a")[0].usage.cached_tokens == 0
    assert ask(engine, half())[0].tokens[0] == wanted["griffin"][0]


def test_one_at_a_time(engine):
    def emit(record):
        if record.kind == "start":
            for call in (lambda: ask(engine), lambda: engine.prepare(None), engine.close):
                with pytest.raises(AttachError, match="answering another request"):
                    call()

    engine.run(Ask(PROMPT, Sampling(max_tokens=2)), emit)
    with pytest.raises(AttachError, match="already being pruned"):  # between requests, too
        prune(own_model(), "griffin").attach()


def test_learning_while_serving(monkeypatch, tmp_path):
    monkeypatch.setenv("DART_CACHE", str(tmp_path))  # other tests have learned from this model
    model, news = tiny(), []
    with Same(model):
        with Engine(model, tokenizer(), say=news.append) as engine:
            first, _ = ask(engine, half("griffin"), new=8, conversation="a")
            assert not news
            engine.prepare(half("dart"))
            assert any(line.startswith("learning from self-generated text") for line in news)
            count = len(news)
            dart, _ = ask(engine, half("dart"))
            ask(engine, half("dart", masking_step=3))
            assert len(news) == count
            longer = (*PROMPT, *first.tokens[0], 5, 6)
            again, _ = ask(engine, half("griffin"), longer, conversation="a")
            assert again.usage.cached_tokens == len(PROMPT) + 7
        assert dart.tokens[0] == alone(model, half("dart"))[0]


LONG = tuple(tokens(1, 513)[0].tolist())
SCORED = Sampling(0, logprobs=0, prompt_logprobs=True)
UNSERVED = [
    (half(executor="masked"), 'served by executor "compact"'),
    (PruneConfig.build("griffin", budget={"table": "31:0.5"}), "layer 31 is out of range"),
]
REFUSED = [
    *((lambda engine, one=one: engine.prepare(one), words) for one, words in UNSERVED),
    *((lambda engine, one=one: ask(engine, one), words) for one, words in UNSERVED),
    (lambda engine: Ask(()), "the prompt is empty"),
    (lambda engine: Ask(PROMPT, Sampling(n=2), conversation="a"), "use n=1"),
    (lambda engine: Ask(PROMPT, SCORED, half()), "prompts always run dense"),
    (lambda engine: Ask(PROMPT, SCORED, conversation="a"), "leave the conversation out"),
    (lambda engine: ask(engine, ids=LONG), "513 tokens but the model's context holds 512"),
]


def test_what_cannot_be_served(engine):
    for call, words in REFUSED:
        with pytest.raises(ConfigError, match=words):
            call(engine)
    full, _ = ask(engine, ids=LONG[:510], new=40)
    assert len(full.tokens[0]) == 3 and full.finish == ("length",)


def test_engines_that_cannot_be(monkeypatch):
    model = tiny()
    with pytest.raises(ConfigError, match=r"call model\.eval\(\) first"):
        Engine(model.train(), tokenizer())
    model.eval()
    with pytest.raises(ConfigError, match="executor"):
        Engine(model, tokenizer(), executor="fast")
    with Same(model), Engine(model, tokenizer(), executor="masked") as engine:
        assert ask(engine, half())[0].report.executor == engine.executor == "masked"
        with pytest.raises(AttachError, match="already being pruned"):
            Engine(model, tokenizer())
        dart_llm.restore(model)
        with pytest.raises(AttachError, match="detached"):
            ask(engine)
    with pytest.raises(AttachError, match="closed"):
        ask(engine)
    monkeypatch.setattr(Watch, "check", Mock(side_effect=RuntimeError))  # ends attaching
    with Same(model), pytest.raises(RuntimeError):
        Engine(model, tokenizer())


def _tensors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some module of torch warns when it is looked at
        return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())


@pytest.mark.parametrize("config", [None, half(), half(drift="interval 4")])
def test_no_tensor_stays(config):
    """Nothing is left for the collector by requests that end, are cancelled, or fail."""

    def request(calls):
        with contextlib.suppress(StopIteration):
            engine.run(Ask(PROMPT, Sampling(max_tokens=12), config), cancelled=calls)

    with Engine(tiny(), tokenizer()) as engine:
        request(lambda: False)
        gc.collect()
        gc.disable()
        before = _tensors()
        for calls in ([False] * 4 + [True], [True], [False] * 2, [False] * 99):
            request(iter(calls).__next__)
        after = _tensors()
        gc.enable()
    assert after <= before
