"""The study on a tiny model: grid, folder, what is kept; what is recommended, by hand."""

import json
import math
import re

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import dart_llm
import written
from dart_llm.errors import ConfigError, DartError
from dart_llm.reporting import figures
from dart_llm.settings import merge
from dart_llm.studies.bench import rows as row_numbers
from dart_llm.studies.bench.rows import REFERENCE, clearly_over, quality_row, recommend, undecided
from dart_llm.studies.bench.settings import Formats, TuneSettings, estimate, quick_grid, tune_grid
from dart_llm.studies.bench.tune import TuneStudy, all_slices, generate_text, user_slices
from lm_cases import loaded
from tune_cases import PROMPT, TOKENS, job, settings


def asked(**given):
    return merge(TuneSettings, given, environment={})


def labels(grid):
    return [candidate.label for candidate in grid]


def test_the_default_grid():
    both, alone = Formats(("file", "dense"), ("file",)), Formats(("file",), ("file",))
    grid = labels(tune_grid(asked(), both))
    dense = ["dense, weights file", "dense, weights dense", "dense, screened head, weights file"]
    assert grid[:3] == dense and len(grid) == 13
    assert {"dart-token 50 %, screened head, weights file", "griffin 30 %, weights file"} < {*grid}
    assert labels(tune_grid(asked(methods="none"), alone)) == ["dense", "dense, screened head"]


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_dtype_leaves_the_blocks_of_a_gguf_file_to_be_tried(native, dtype):
    formats = Formats.from_settings(asked(model="smollm2-135m", dtype=dtype, device="cpu"))
    assert formats == Formats(("file", "q4_0"), ("file",)) and formats.reference == "file"
    assert Formats(("q8_0", "q4_0"), ("q8_0",)).reference == "dense"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"methods": "dart-tokens"}, 'did you mean "?dart-token'),
        ({"heads": "half"}, "head"),
        ({"weights": "auto"}, "unknown weights 'auto'"),
        ({"max_loss": 0}, "--max-loss 0 must be more than 0"),
        ({"max_loss": 2}, "--max-loss 2 must be at most 1"),
        ({"text": "no-such-text"}, 'unknown text "no-such-text"'),
        ({"slices": 1}, "--slices 1 must be at least 2"),
    ],
)
def test_refusals_are_one_sentence(given, sentence):
    with pytest.raises(DartError, match=sentence) as error:
        asked(**given)
    assert "\n" not in str(error.value)


def test_slices_of_both_texts_come_in_turn(tmp_path):
    model, tokenizer = loaded()
    texts = generate_text(model, 3, PROMPT + TOKENS, 0)
    assert texts == generate_text(model, 3, PROMPT + TOKENS, 0) != generate_text(model, 3, 64, 1)
    bees = user_slices(settings(tmp_path).text, tokenizer, 3, PROMPT, TOKENS)
    slices = all_slices(dict(enumerate(texts)), bees, PROMPT)
    assert [each.id for each in slices[:4]] == ["own/0", "bees/0", "own/1", "bees/1"]
    assert {(each.window.scored, len(each.window.ids)) for each in slices} == {(TOKENS, 64)}
    short = tmp_path / "short.txt"
    short.write_text("a" * 100)
    with pytest.raises(ConfigError, match="has 100 tokens, but two slices need 128"):
        user_slices(str(short), tokenizer, 3, PROMPT, TOKENS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return job(tmp_path_factory.mktemp("tune"), max_loss=1.0)


def test_the_document_holds_every_candidate(whole):
    rows = {row["row"]: row for row in whole.summary["rows"]}
    assert list(rows) == ["dense", "griffin 30 %", "griffin 70 %"]
    dense, some, most = rows.values()
    assert dense["loss"] == pytest.approx(0, abs=1e-6) and dense["kl"] < 1e-6
    assert dense["times_dense"] == 1.0 and dense["dense_token_share"] == 1.0
    assert some["achieved_sparsity"] == pytest.approx(0.3, abs=0.03)
    assert most["achieved_sparsity"] == pytest.approx(0.7, abs=0.03)
    assert 0 < some["kl"] < most["kl"]
    assert dense["bytes_share"] > some["bytes_share"] > most["bytes_share"]
    assert dense["ms"] > 0 and some["ms"] > 0
    assert most["loss"] > 1 and most["ms"] is None  # clearly over what may be lost: not timed
    assert sum(row["recommended"] for row in rows.values()) == 1
    assert len(whole.lines) == 4 * 4  # the reference and three candidates on four slices


def test_the_folder_has_table_picture_and_setting(whole):
    names = {path.name for path in whole.path.iterdir()}
    assert {"tune.json", "tune.md", "tune.csv", "setting.yaml"} <= names
    assert list(whole.path.rglob("tune.png"))
    text = (whole.path / "tune.md").read_text()
    assert re.search(r"\| griffin 70 % \| dense \| [\d.]+ % ", text)
    assert whole.sentences()[0] in text
    lines = written.lines(whole.path / "rows.jsonl")
    metrics = [line["metric"] for line in lines if line["label"] == "griffin 70 %"]
    assert metrics == ["loss"]  # it is not timed
    dense = {line["metric"]: line for line in lines if line["label"] == "dense"}
    assert {"loss", "ms_per_token", "speed_up"} == set(dense) and dense["speed_up"]["value"] == 1
    assert (dense["loss"]["dense_share"], dense["loss"]["dtype"]) == (1, "float32")


def test_a_loss_that_is_clearly_too_much_is_not_timed(tmp_path, monkeypatch):
    """Then nothing but dense is within the loss, and dense is recommended."""
    monkeypatch.setattr(row_numbers, "clearly_over", lambda row, most: row["kl"] > 1e-6)
    study = job(tmp_path, sparsities="0.7", max_loss=1e-7)
    dense, pruned = study.summary["rows"]
    assert pruned["ms"] is None and pruned["times_dense"] is None and dense["recommended"]
    assert study.sentences()[0].startswith("No setting within a loss of 0 % is more than 3 %")
    assert study.sentences()[-1].endswith("setting.yaml --prompt 'The sky is blue because'")
    kept = yaml.safe_load((study.path / "setting.yaml").read_text())
    assert kept["setting"]["method"] == "dense" and kept["measured"]["loss"] == 0
    assert "griffin 70 %" not in study.repetitions[0]["samples"]


def test_what_cannot_run_is_left_out_with_its_reason(tmp_path, monkeypatch):
    """A maker that refuses one candidate leaves the others."""
    maker = TuneStudy.maker

    def refuse(study, candidate):
        if candidate.config.target == 0.7:
            raise ConfigError("no room")
        return maker(study, candidate)

    monkeypatch.setattr(TuneStudy, "maker", refuse)
    monkeypatch.setattr(figures, "save", lambda folder, wanted, style: [])
    study = job(tmp_path)
    assert [row["row"] for row in study.summary["rows"]] == ["dense", "griffin 30 %"]
    assert study.summary["left_out"] == {"griffin 70 %": "no room"}
    assert study.sentences()[1] == "griffin 70 % is skipped: no room"


def test_a_run_says_first_how_long_it_takes(tmp_path):
    """And how much memory it needs, which --quick needs less of."""

    def estimated(**more):
        given = settings(tmp_path, slices=8, **more)
        formats = Formats.from_settings(given)
        grid = tune_grid(given, formats)
        return estimate(given, quick_grid(grid, given, formats) if given.quick else grid, 1.0)

    whole, quick = estimated(), estimated(quick=True)
    assert re.fullmatch(r"roughly \d+ min on two CPU cores; about [\d,.]+ GB of memory", whole)
    assert "to learn from self-generated text" in estimated(methods="dart")
    assert int(re.search(r"(\d+) min", whole)[1]) > int(re.search(r"(\d+) min", quick)[1])
    assert "unknown" in estimate(settings(tmp_path), (), None)


def test_the_quick_grid():
    both, given = Formats(("file", "q4_0"), ("file",)), asked(quick=True)
    grid = quick_grid(tune_grid(given, both), given, both)
    names = ["dense", "dense, screened head", "dart-token 30 %"]
    assert labels(grid) == [f"{name}, weights file" for name in names]
    dense, screened, token = (candidate.config.self_stats for candidate in grid)
    assert dense is None and screened.sequences == token.sequences == 8  # a quarter of the text
    assert (screened.tokens, token.tokens) == (0, 32)
    rounded = Formats(("dense", "q8_0", "q4_0"), ("q8_0",))
    given = asked(quick=True, methods="griffin,dart", sparsities="0.4,0.2", heads="full")
    names = ["dense, weights dense"]
    names += [f"{name}, weights q8_0" for name in ("dense", "griffin 20 %", "dart 20 %")]
    assert labels(quick_grid(tune_grid(given, rounded), given, rounded)) == names


def test_a_quick_run_answers_and_the_whole_one_continues_from_it(tmp_path):
    first = job(tmp_path, quick=True, slices=4, max_loss=1.0)
    rows = [row["row"] for row in first.summary["rows"]]
    assert rows == ["dense", "griffin 30 %"]
    assert first.summary["slices"] == 2 and len(first.lines) == 4 * 3
    assert first.sentences()[0].startswith("First answer: ")
    assert "measures 1 further setting and continues from here" in first.sentences()[0]
    kept = yaml.safe_load((first.path / "setting.yaml").read_text())
    assert kept["measured"]["quick"] is True
    assert json.loads((first.path / "config.json").read_text())["status"] == "complete"
    again = job(tmp_path, quick=True, slices=4, max_loss=1.0)
    assert again.path == first.path and again.computed == 0
    whole = job(tmp_path, slices=4, max_loss=1.0)
    assert whole.path == first.path and not whole.summary["quick"]
    texts = 1  # what the model writes for the other slices; the first ones are there
    assert whole.computed == texts + 8 * 4 - len(first.lines) + 2
    assert [line for line in first.lines if line not in whole.lines] == []
    assert not (whole.path / "parts.jsonl").exists()


def test_from_python_on_a_loaded_model(tmp_path):
    model, tokenizer = loaded()
    flags = {"text": settings(tmp_path).text, "slices": 2, "repeats": 1, "timed_tokens": 4}
    flags |= {"prompt_tokens": PROMPT, "tokens": TOKENS, "heads": "full", "methods": "griffin"}
    flags |= {"sparsities": "0.5", "results_dir": tmp_path, "quiet": True}
    tuned = dart_llm.tune(model, tokenizer, 1.0, **flags)
    assert [row["row"] for row in tuned.rows] == ["dense", "griffin 50 %"]
    assert tuned.recommended in tuned.rows and tuned.folder.is_dir()
    path = tuned.save(tmp_path / "mine.yaml")
    with dart_llm.prune(model, f"file:{path}") as run:
        model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=4, do_sample=False)
    assert run.config == tuned.setting.config
    with pytest.raises(AttributeError):
        tuned.rows = ()


FACTS = {"decoded_tokens": 10, "remasks": 1, "extra_memory_bytes": 5}


def row(name, loss, ms, dense=False, **more):
    times = None if ms is None else 10.0 / ms
    numbers = {"row": name, "loss": loss, "ms": ms, "dense": dense, "loss_interval": None}
    numbers |= {"loss_range": [loss, loss], "times_dense": times, "scatter": 0.0, "disturbed": None}
    return numbers | more


def line(candidate, text, number, loss, kl=0.0, achieved=0.0, tokens=10):
    shares = {"achieved_sparsity": achieved, "dense_token_share": 0.0, "token_bytes_share": None}
    accounting = None if candidate == REFERENCE else {**FACTS, **shares}
    numbers = {"loss": loss, "kl": kl, "tokens": tokens, "accounting": accounting}
    return {"candidate": candidate, "text": text, "slice": f"{text}/{number}", **numbers}


def lines(ratios):
    """Losses such that perplexity is ``ratios[text]`` times dense, slice by slice."""
    pairs = []
    for text, slices in ratios.items():
        for number, ratio in enumerate(slices):
            pairs.append(line(REFERENCE, text, number, 1.0 + number))
            loss = 1.0 + number + math.log(ratio)
            pairs.append(line("dart", text, number, loss, kl=(ratio - 1) / 2, achieved=0.5))
    return pairs


def test_the_loss_is_that_of_the_worse_text():
    scored = quality_row("dart", lines({"own": [1.01] * 6, "mine": [1.03, 1.05] * 3}), 0)
    assert scored["worse_text"] == "mine"
    assert scored["loss"] == pytest.approx(math.sqrt(1.03 * 1.05) - 1)
    low, high = scored["loss_interval"]
    assert 0.025 < low < scored["loss"] < high < 0.055
    assert scored["texts"]["own"]["loss_interval"] == pytest.approx([0.01, 0.01])
    assert scored["kl"] == pytest.approx(0.02) and scored["achieved_sparsity"] == 0.5
    assert scored["remasks"] == 12 and scored["bytes_share"] is None
    assert scored["perplexity"] == pytest.approx(math.exp(3.5) * math.sqrt(1.03 * 1.05))
    assert clearly_over(scored, 0.02) and not clearly_over(scored, 0.035)


@pytest.mark.parametrize(("slices", "loss"), [(6, 0.99), (2, 1.3)])
def test_the_loss_is_no_less_than_what_the_divergence_gives(slices, loss):
    """Tokens that happen to be likelier do not hide that the model differs; with few slices their
    losses count neither way."""
    kls = [0.02, 0.03] * (slices // 2)
    lines = [line(REFERENCE, "own", n, 1.0) for n in range(slices)]
    lines += [line("dart", "own", n, loss, kl=kl, achieved=0.5) for n, kl in enumerate(kls)]
    scored = quality_row("dart", lines, 0)
    assert scored["loss"] == pytest.approx(math.expm1(0.025))
    assert scored["loss_range"] == pytest.approx([math.expm1(0.02), math.expm1(0.03)])
    assert scored["perplexity"] == pytest.approx(math.exp(loss))
    if slices == 2:
        assert scored["loss_interval"] is None
    else:
        low, high = scored["loss_interval"]
        assert math.expm1(0.02) <= low < scored["loss"] < high <= math.expm1(0.03)


@pytest.mark.parametrize(
    ("changes", "recommended"),
    [
        ({}, "token"),
        ({"token": (0.021, 5.0)}, "q8"),  # loses too much
        ({"token": (0.015, 5.9)}, "q8"),  # is no faster than the noise
        ({"token": (0.015, None), "q8": (0.001, 9.9)}, "dense"),
        ({"token": (0.05, 5.0), "q8": (0.04, 6.0)}, "dense"),
        # no row is within the loss: as the model is loaded
        ({"dense": (0.03, 3.0), "token": (0.05, 2.0), "q8": (0.03, 6.0)}, "dense"),
    ],
)
def test_the_fastest_within_the_loss_that_beats_simpler_ones(changes, recommended):
    values = {"dense": (0.0, 10.0), "q8": (0.001, 6.0), "token": (0.015, 5.0)} | changes
    values["griffin"] = (0.3, 2.0)
    rows = [row(name, *pair, name in ("dense", "q8")) for name, pair in values.items()]
    assert recommend(rows, "dense", 0.02, 0.03) == recommended


MEASURED = st.tuples(st.floats(0, 1), st.none() | st.floats(0.1, 100), st.booleans())


@given(st.lists(MEASURED, min_size=1, max_size=8), st.floats(0.001, 0.5), st.floats(0, 0.2))
def test_what_is_recommended_is_within_and_worth_it(measured, most, noise):
    rows = [row("base", 0.0, 10.0, True)]
    rows += [row(str(n), *numbers) for n, numbers in enumerate(measured)]
    name = recommend(rows, "base", most, noise)
    (best,) = (row for row in rows if row["row"] == name)
    assert best["loss"] <= most and best["ms"] is not None
    if best["row"] != "base":
        assert best["ms"] * (1 + noise) < 10.0
    if not best["dense"]:
        dense = [r["ms"] for r in rows if r["dense"] and r["ms"] and r["loss"] <= most]
        assert best["ms"] * (1 + noise) < min(dense)


@pytest.mark.parametrize(
    ("other", "recommended", "left"),
    [
        (row("token", 0.005, 8.0, loss_range=[0.004, 0.006]), "token", []),  # clearly good
        (row("token", 0.005, 8.0, scatter=0.2), "token", ["token"]),  # may be as slow as dense
        (row("token", 0.015, 8.0, loss_range=[0.01, 0.03]), "token", ["token"]),  # may lose more
        (row("token", 0.05, 8.0, loss_range=[0.04, 0.06]), "dense", []),  # loses too much
        (row("token", 0.005, 9.9), "dense", []),  # is no faster
        (row("token", 0.005, 9.8, scatter=0.1), "dense", ["token"]),
        (row("token", 0.3, None), "dense", []),
        (row("token", 0.005, 8.0, times_dense=None, disturbed="disturbed"), "dense", ["token"]),
    ],
)
def test_few_slices_decide_only_what_is_clear(other, recommended, left):
    rows = [row("dense", 0.0, 10.0, True), other]
    assert recommend(rows, "dense", 0.02, 0.03) == recommended
    assert undecided(rows, "dense", recommended, 0.02, 0.03) == left
