"""Progress: how much memory before it starts, then how far it is."""

import logging
import re
from itertools import pairwise

import pytest
import torch

from calibration_cases import WORDS, Letters
from dart_llm.calibration import progress as module
from dart_llm.calibration.calibrate import calibrate
from dart_llm.calibration.progress import (
    READING,
    WRITING,
    Progress,
    graph_bytes,
    learning,
    text_bytes,
)
from dart_llm.calibration.self_calibration import BASES
from dart_llm.errors import ConfigError
from dart_llm.models import float32_products
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
    """The first line after five seconds, then every ten; the time left by the measured speed."""
    news = []
    progress = Progress(news.append, {"first": 100.0, "second": 300.0}, "learning")
    advance = progress.stage("first")
    for second in range(1, 31):
        clock[0] = float(second)
        advance(second / 30)
    advance = progress.stage("second")
    for second in range(31, 61):
        clock[0] = float(second)
        advance((second - 30) / 30)
    assert news == [
        "learning",
        "learning (first): 4 %, about 2 min left",
        "learning (first): 12 %, about 2 min left",
        "learning (first): 21 %, about 2 min left",
        "learning (second): 38 %, about 60 s left",
        "learning (second): 62 %, about 30 s left",
        "learning (second): 88 %, about 8 s left",
    ]


def test_a_library_call_warns_where_it_takes_long(clock, caplog):
    """Else a call that is silent for minutes seems to hang; a quick one logs nothing."""
    for seconds in (4, 20):
        progress = Progress(logger.info, {"first": 100.0}, "learning")
        advance = progress.stage("first")
        start = clock[0]
        for second in range(1, seconds + 1):
            clock[0] = start + second
            advance(second / 100)
    result = [(one.levelname, one.getMessage()) for one in caplog.records]
    assert result == [
        ("WARNING", "learning"),
        ("WARNING", "learning (first): 5 %, about 2 min left"),
        ("WARNING", "learning (first): 15 %, about 80 s left"),
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
    lines = "".join(text for _, text in news)
    assert all(f"learning ({stage})" in lines for stage in (WRITING, BASES, READING))


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
            r"learning takes 0\.\d MB of memory beside this model and 0\.0 MB is free: store the "
            r"weights in blocks \(--weights q8_0\), learn from a smaller text \(length and "
            r"sequences of self_stats or calibration\), or use method griffin, which learns "
            r"nothing",
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
        monkeypatch.setattr(float32_products, "available", lambda free=free: free)
        work = {"first": 1.0}
        with learning(model, news.append, "learning", work, 500_000) as (used, progress):
            assert (used is model) == (free < 2 * size)
            progress.stage("first")(1.0)
    whole = (500_000 + size) / 1e6
    assert news == [f"learning, {mb:.1f} MB of memory" for mb in (whole, 0.5)]
