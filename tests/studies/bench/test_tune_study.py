"""The study on a tiny model: grid, folder, what is kept."""

import json
import re

import pytest
import torch
import yaml

import dart_llm
import written
from dart_llm.errors import ConfigError, DartError
from dart_llm.pruning.config import PruneConfig
from dart_llm.reporting import figures
from dart_llm.settings import merge
from dart_llm.studies.bench import rows as row_numbers
from dart_llm.studies.bench.settings import Formats, TuneSettings, estimate, quick_grid, tune_grid
from dart_llm.studies.bench.tune import TuneStudy, all_slices, generate_text, user_slices
from lm_cases import call, loaded
from tune_cases import PROMPT, TOKENS, job, settings

FORMS = ("file", "q8_0", "q4_0", "dense")


def asked(**given):
    return merge(TuneSettings, given, environment={})


def labels(grid):
    return [one.label for one in grid]


def test_the_default_grid():
    both = Formats(("file", "dense"), ("file",))
    grid = labels(tune_grid(asked(), both))
    dense = ["dense, weights file", "dense, weights dense", "dense, screened head, weights file"]
    assert grid[:3] == dense and len(grid) == 13
    assert "dart-token 50 %, screened head, weights file" in grid
    assert "griffin 30 %, weights file" in grid
    alone = Formats(("file",), ("file",))
    assert labels(tune_grid(asked(methods="none"), alone)) == ["dense", "dense, screened head"]


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_dtype_leaves_the_blocks_of_a_gguf_file_to_be_tried(native, dtype):
    found = Formats.from_settings(asked(model="smollm2-135m", dtype=dtype, device="cpu"))
    assert found.every == ("file", "q4_0")
    assert found.pruned == ("file",)
    assert found.reference == "file"
    assert Formats(FORMS[1:3], FORMS[1:2]).reference == "dense"


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
    with pytest.raises(DartError, match=sentence) as found:
        asked(**given)
    assert "\n" not in str(found.value)


def test_slices_of_both_texts_come_in_turn(tmp_path):
    model, tokenizer = loaded()
    own = generate_text(model, 3, PROMPT + TOKENS, 0)
    assert own == generate_text(model, 3, PROMPT + TOKENS, 0) != generate_text(model, 3, 64, 1)
    path = settings(tmp_path).text
    found = all_slices(
        dict(enumerate(own)), user_slices(path, tokenizer, 3, PROMPT, TOKENS), PROMPT
    )
    assert [one.id for one in found[:4]] == ["own/0", "bees/0", "own/1", "bees/1"]
    assert all(one.window.scored == TOKENS and len(one.window.ids) == 64 for one in found)
    short = tmp_path / "short.txt"
    short.write_text("a" * 100)
    with pytest.raises(ConfigError, match="has 100 tokens, and two slices need 128"):
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
    """And what is left, dense, is what is kept: nothing is worth it."""
    monkeypatch.setattr(row_numbers, "clearly_over", lambda row, most: row["kl"] > 1e-6)
    found = job(tmp_path, sparsities="0.7", max_loss=1e-7)
    dense, pruned = found.summary["rows"]
    assert pruned["ms"] is None and pruned["times_dense"] is None and dense["recommended"]
    assert found.sentences()[0].startswith("No setting within the loss of 0 % is more than 3 %")
    assert found.sentences()[-1].endswith("setting.yaml --prompt 'The sky is blue because'")
    kept = yaml.safe_load((found.path / "setting.yaml").read_text())
    assert kept["setting"]["method"] == "dense" and kept["measured"]["loss"] == 0
    assert "griffin 70 %" not in found.repetitions[0]["samples"]


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
    assert study.sentences()[1] == "griffin 70 % is left out: no room"


def test_a_run_says_first_how_long_it_takes(tmp_path):
    """And how much memory it needs, which --quick needs less of."""

    def told(**more):
        asked = settings(tmp_path, slices=8, **more)
        formats = Formats.from_settings(asked)
        grid = tune_grid(asked, formats)
        grid = quick_grid(grid, asked, formats) if asked.quick else grid
        return estimate(asked, grid, 1.0)

    whole, learning, quick = told(), told(methods="dart"), told(quick=True)
    assert re.fullmatch(r"roughly \d+ min on two CPU cores; about [\d,.]+ GB of memory", whole)
    assert "to learn from self-generated text" in learning
    minutes = [int(re.search(r"(\d+) min", text)[1]) for text in (whole, quick)]
    assert minutes[0] > minutes[1]
    assert "not known" in estimate(settings(tmp_path), (), None)


def test_the_quick_grid():
    both, given = Formats(("file", "q4_0"), ("file",)), asked(quick=True)
    grid = quick_grid(tune_grid(given, both), given, both)
    assert labels(grid) == [
        "dense, weights file",
        "dense, screened head, weights file",
        "dart-token 30 %, weights file",
    ]
    dense, screened, token = (one.config.self_stats for one in grid)
    assert dense is None and screened.sequences == token.sequences == 8  # a quarter of the text
    assert (screened.tokens, token.tokens) == (0, 32)
    rounded = Formats(("dense", "q8_0", "q4_0"), ("q8_0",))
    given = asked(quick=True, methods="griffin,dart", sparsities="0.4,0.2", heads="full")
    assert labels(quick_grid(tune_grid(given, rounded), given, rounded)) == [
        "dense, weights dense",
        "dense, weights q8_0",
        "griffin 20 %, weights q8_0",
        "dart 20 %, weights q8_0",
    ]


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
    given = {"text": settings(tmp_path).text, "slices": 2, "repeats": 1, "timed_tokens": 4}
    given |= {"prompt_tokens": PROMPT, "tokens": TOKENS, "heads": "full", "methods": "griffin"}
    found = dart_llm.tune(
        model, tokenizer, 1.0, sparsities="0.5", results_dir=tmp_path, quiet=True, **given
    )
    assert [row["row"] for row in found.rows] == ["dense", "griffin 50 %"]
    assert found.recommended in found.rows and found.folder.is_dir()
    path = found.save(tmp_path / "mine.yaml")
    with dart_llm.prune(model, f"file:{path}") as run:
        model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=4, do_sample=False)
    assert run.config == found.setting.config
    with pytest.raises(AttributeError):
        found.rows = ()


def test_the_command_answers_in_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = settings(tmp_path, sparsities="0.7")
    values = {name: getattr(asked, name) for name in asked.model_fields_set}
    flags = [
        f"--{name.replace('_', '-')}={','.join(map(str, v)) if isinstance(v, tuple) else v}"
        for name, v in values.items()
    ]
    done = call("tune", *flags, "--save", "mine.yaml", "--json")
    assert done.code == 0, done.err
    assert done.json["setting"] == "mine.yaml" and len(done.json["rows"]) == 2
    assert PruneConfig.build("file:mine.yaml").method in ("dense", "griffin")
