"""What learning says: how long and how much memory before it starts, then how far it is."""

import logging
import re
from itertools import pairwise

import pytest
import torch

from calibration_cases import WORDS, Letters
from dart_llm.calibration import progress as module
from dart_llm.calibration.calibrate import calibrate
from dart_llm.calibration.learn import BASES
from dart_llm.calibration.progress import (
    READING,
    WRITING,
    Progress,
    graph_bytes,
    learning,
    speed_of,
    text_bytes,
)
from dart_llm.errors import ConfigError
from dart_llm.models import float32_copy, float32_products
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.run import prune
from prior_cases import CONFIG, layers_of, learn
from steps import forward_lengths
from tiny import HIDDEN, LAYERS, VOCAB, WIDTH, tiny

logger = logging.getLogger("dart_llm")


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_lines_by_the_clock(clock):
    """The first when parts have been timed, then one every ten seconds; time left by own speed."""
    news = []
    progress = Progress(news.append, {"first": 100.0, "second": 300.0}, 4.0)
    progress.announce("learning", 1_300_000_000, "griffin learns nothing")
    assert news == ["learning: about 2 min, 1.3 GB of memory; griffin learns nothing"]
    advance = progress.stage("first")
    for second in range(1, 51):  # this stage is half as fast as was thought
        clock[0] = float(second)
        advance(second / 50)
    advance = progress.stage("second")
    for second in range(51, 81):
        clock[0] = float(second)
        advance((second - 50) / 30)
    assert news[1:] == [
        *(f"learning (first): {share} %, about 3 min left" for share in (2, 8, 12, 18, 22)),
        "learning (second): 38 %, about 20 s left",
        *("learning (second): 62 %, about 15 s left", "learning (second): 88 %, about 5 s left"),
    ]


def test_what_is_quick_says_one_line_or_none(clock, caplog):
    news = []
    for say in (news.append, logger.info):
        progress = Progress(say, {"first": 100.0}, 50.0)
        progress.announce("learning", 1000, "griffin learns nothing")
        progress.stage("first")(0.5)
    assert news == ["learning: a few seconds"] and not caplog.records


def test_a_library_call_that_takes_long_warns(clock, caplog):
    """Where nobody asked for news: else a call that is silent for minutes seems to hang."""
    progress = Progress(logger.info, {"first": 100.0}, 1.0)
    progress.announce("learning", 1000, "")
    advance = progress.stage("first")
    for second in range(1, 31):
        clock[0] = float(second)
        advance(second / 100)
    found = [(one.levelname, one.getMessage()) for one in caplog.records]
    assert found[0] == ("WARNING", "learning: about 2 min")
    assert [level for level, _ in found[1:]] == ["WARNING"] * 3
    assert found[-1][1] == "learning (first): 25 %, about 80 s left"


def test_a_call_that_was_thought_quick_and_is_not_warns_too(clock, caplog):
    progress = Progress(logger.info, {"first": 100.0}, 100.0)
    progress.announce("learning", 1000, "")
    advance = progress.stage("first")
    clock[0] = 12.0
    advance(0.1)
    assert [one.getMessage() for one in caplog.records] == [
        "learning (first): 10 %, about 2 min left"
    ]


def test_learning_speaks_between_layers(tmp_path, monkeypatch):
    """Of a model in which every layer of a forward takes seconds: it is never silent for long."""
    now, news = [0.0], []

    def tick():
        now[0] += 2.0
        return now[0]

    monkeypatch.setattr(module.time, "monotonic", tick)

    def say(text):
        news.append((now[0], text))

    learn(tiny(), CONFIG, layers_of(tiny()), str(tmp_path), say)
    times = [time for time, _ in news]
    assert max(b - a for a, b in pairwise(times)) <= 15
    said = "".join(text for _, text in news)
    assert all(f"learning ({stage})" in said for stage in (WRITING, BASES, READING))


@pytest.mark.parametrize("method", ["dart", "glass", "wanda"])
def test_what_does_not_fit_is_refused_before_anything_runs(method, tmp_path, monkeypatch):
    """In one sentence that names what would fit; nothing is kept, and no forward was made."""
    monkeypatch.setenv("DART_CACHE", str(tmp_path))
    text = tmp_path / "text.txt"
    text.write_text(WORDS)
    model = tiny()

    def body():
        if method == "dart":
            return prune(model, CONFIG).attach()
        small = {"sequences": 4, "length": 16}
        made = PruneConfig.build(method, sparsity=0.5, calibration=small)
        source = None if method == "glass" else str(text)
        return calibrate(model, Letters(), made, source, None, lambda line: None)

    def refuse():
        with pytest.raises(ConfigError) as caught:
            body()
        assert re.fullmatch(
            r"learning takes 0\.\d MB of memory beside this model and 0\.0 MB is free: hold the "
            r"weights in blocks \(--weights q8_0\), learn from a smaller text \(length and "
            r"sequences of prior or calibration\), or use method griffin, which learns nothing",
            str(caught.value),
        )

    monkeypatch.setattr(module, "available", lambda: 30_000)
    assert forward_lengths(model, refuse) == []
    assert not list(tmp_path.rglob("*.safetensors"))
    monkeypatch.setattr(module, "available", lambda: 1 << 40)
    assert forward_lengths(model, body)


def test_memory_by_hand():
    model = tiny()  # heads of 8, of which two are kept
    kept = 2 * 2 * 8 * LAYERS
    assert text_bytes(model, 3, 10) == 4 * 3 * (2 * 10 * kept + 4 * VOCAB)
    each = 16 * HIDDEN + 16 * WIDTH // 3
    assert graph_bytes(model, 5, True) == 4 * 5 * (each * LAYERS + 4 * VOCAB)
    assert graph_bytes(model, 5, False) == 4 * 5 * (each + VOCAB)


def test_the_copy_is_part_of_the_memory(monkeypatch):
    monkeypatch.setattr(float32_products, "emulates", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(module, "LARGE", 0)
    model, news = tiny(dtype=torch.bfloat16), []
    size = 4 * sum(one.numel() for one in model.parameters())
    for free in (2 * size, 2 * size - 1):
        monkeypatch.setattr(float32_copy, "available", lambda free=free: free)
        with learning(model, news.append, "learning", {"first": 1.0}, 500_000) as (found, progress):
            assert (found is model) == (free < 2 * size)
            progress.stage("first")(1.0)
    whole = (500_000 + size) / 1e6
    assert news == [f"learning: a few seconds, {mb:.1f} MB of memory" for mb in (whole, 0.5)]


def test_the_speed_is_that_of_a_product_and_draws_no_numbers(monkeypatch):
    now = iter([0.0, 2.0, 10.0, 10.5, 20.0, 21.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(now))
    state = torch.get_rng_state()
    assert speed_of(tiny()) == pytest.approx(64 * HIDDEN * WIDTH / 0.5)
    assert torch.equal(torch.get_rng_state(), state)
