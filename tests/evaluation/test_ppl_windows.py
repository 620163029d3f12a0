"""Which tokens perplexity scores: slices, and the windows of the standard protocol."""

import pytest
import torch

from dart_llm.errors import ConfigError
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.windows import choose, cut, shape, slice_windows, standard_windows


def spans(windows):
    """(begin, end, first scored token) of every window, in tokens of the text."""
    return [(w.start, w.start + len(w.ids), w.start + w.first) for w in windows]


def test_a_window_scores_only_what_no_window_scored_yet():
    windows = standard_windows(torch.arange(25), 10)
    assert spans(windows) == [(0, 10, 1), (10, 20, 11), (20, 25, 21)]
    assert [w.before.tolist() for w in windows] == [[], list(range(10)), list(range(10, 20))]
    windows = standard_windows(torch.arange(25), 10, 4)
    assert spans(windows) == [(0, 10, 1), (4, 14, 10), (8, 18, 14), (12, 22, 18), (16, 25, 22)]
    assert [w.scored for w in windows] == [9, 4, 4, 4, 3]
    assert [len(w.before) for w in windows] == [0, 4, 8, 10, 10], "at most one window's worth"


@pytest.mark.parametrize("length", [10, 11, 12, 19, 20, 21, 40])
def test_every_token_is_scored_once_or_never(length):
    for stride in (1, 3, 5, 9, 10):
        windows = standard_windows(torch.arange(length), 10, stride)
        scored = [t for w in windows for t in w.ids[w.first :].tolist()]
        skipped = range(0, length, 10) if stride == 10 else [0]
        assert scored == [token for token in range(length) if token not in skipped]
        assert all(w.first >= 1 and w.scored >= 1 for w in windows)


def test_the_usual_loop_gives_the_same_windows():
    """The loop of the transformers guide on perplexity of fixed-length models."""
    expected, previous = [], 0
    for begin in range(0, 57, 6):
        end = min(begin + 16, 57)
        expected.append((begin, end, max(previous, begin + 1)))
        previous = end
        if end == 57:
            break
    assert spans(standard_windows(torch.arange(57), 16, 6)) == expected


def test_slices_are_evenly_spaced_or_a_seeded_choice_that_grows():
    windows = slice_windows(torch.arange(100), 3, 6, 4)
    assert spans(windows) == [(0, 10, 6), (45, 55, 51), (90, 100, 96)]
    assert len(slice_windows(torch.arange(109), None, 6, 4)) == 10
    few, more, other = (
        {w.id for w in slice_windows(torch.arange(200), limit, 6, 4, seed=seed)}
        for limit, seed in ((3, 1), (8, 1), (8, 2))
    )
    assert len(few) == 3 and few < more and more != other
    assert all(start % 10 == 0 for start in more)
    assert choose(5, 3, None) == [0, 1, 2]
    assert choose(5, None, 7) == [0, 1, 2, 3, 4]


def test_the_model_s_context_bounds_the_window_with_a_note():
    options = MeasureOptions(protocol="standard", window=2048)
    windows, notes = cut(torch.arange(300), options, 128)
    assert [len(w.ids) for w in windows] == [128, 128, 44]
    assert len(notes) == 1 and "windows of 128 tokens" in notes[0] and "2048" in notes[0]
    assert cut(torch.arange(4096), options, 8192)[1] == ()
    assert shape(MeasureOptions(window=2048, stride=512), 128) == (128, 128)
    assert shape(MeasureOptions(window=2048, stride=64), None) == (2048, 64)


ids = torch.arange
STANDARD = MeasureOptions(protocol="standard", window=100, stride=300)
LONG = MeasureOptions(prompt_tokens=150, scored_tokens=100)
GAPS = "at least 2 tokens and a stride from 1 to the window"
REFUSED = [
    (lambda: standard_windows(ids(9), 10), "9 tokens, fewer than one window of 10: give a longer"),
    (lambda: standard_windows(ids(30), 1), GAPS),
    (lambda: standard_windows(ids(30), 10, 0), GAPS),
    (lambda: standard_windows(ids(30), 10, 11), GAPS),
    (lambda: slice_windows(ids(9), 2, 6, 4), "9 tokens; a slice needs 6 prompt"),
    (lambda: slice_windows(ids(99), 2, 1, 4), "at least 2 prompt tokens"),
    (lambda: choose(5, 0, None), "limit of 0 leaves nothing"),
    (lambda: cut(ids(300), STANDARD, None), "stride 300 is larger than the window of 100"),
    (lambda: cut(ids(300), MeasureOptions(protocol="standart"), None), "did you mean standard"),
    (lambda: cut(ids(300), LONG, 200), "longer than the model's context of 200"),
]


def test_refused():
    for call, words in REFUSED:
        with pytest.raises(ConfigError, match=words):
            call()
