"""Free mode: texts of the generate loop, the end of a text, metrics against the dense text."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dart_llm.errors import CellsFailed, ConfigError, MissingExtra
from dart_llm.evaluation.text_metrics import NAMES, TextMetrics
from dart_llm.pruning.config import PruneConfig
from dart_llm.reporting.console import Ui
from dart_llm.session.run import Run
from dart_llm.studies.drift import runs as drift_metrics
from dart_llm.studies.drift.cells import Source
from dart_llm.studies.drift.runs import ask, write
from drift_cases import PROMPTS, draw_nothing, free, lines, load_json, results, settings, study
from lm_cases import break_position, loaded, place
from stopping import Stopping


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)


@dataclass(frozen=True)
class Tools:
    """Stands for the loaded models of the metrics."""

    notes: tuple[str, ...] = ("made by hand",)

    def to_dict(self) -> dict[str, Any]:
        return {"embedder": "none"}


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Comparisons that were made: the shared share of characters stands for every number."""
    made: list[tuple[str, str]] = []

    def compare(candidate: str, reference: str, tools: Any) -> TextMetrics:
        made.append((candidate, reference))
        same = sum(a == b for a, b in zip(candidate, reference, strict=False))
        return TextMetrics(**dict.fromkeys(NAMES, same / max(1, len(reference))))

    monkeypatch.setattr("dart_llm.evaluation.text_metrics.load_tools", lambda *a, **k: Tools())
    monkeypatch.setattr("dart_llm.evaluation.text_metrics.compare", compare)
    return made


def test_texts_are_those_of_the_models_own_generate(tmp_path: Path) -> None:
    job = study(free(tmp_path, methods="never,interval:8"))
    rows, texts = results(job), {t["key"]: t for t in lines(job.path / "texts.jsonl")}
    assert (
        list(rows)
        == list(texts)
        == [
            f"free/{source}/{label}/0"
            for source in ("one", "another")
            for label in ("dense", "never@0.5", "interval:8@0.5")
        ]
    )
    model, tokenizer = loaded()
    ids = tokenizer(PROMPTS[0]["text"], return_tensors="pt").input_ids
    options = {"max_new_tokens": 40, "do_sample": False}
    with torch.inference_mode():
        plain = model.generate(ids, **options)
        own = PruneConfig.build("dart", sparsity=0.5, drift="never", min_evidence=0)
        with Run(model, own) as run:
            pruned = model.generate(ids, **options)
    for label, found in (("dense", plain), ("never@0.5", pruned)):
        text = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        assert texts[f"free/one/{label}/0"]["text"] == text
        assert (texts[f"free/one/{label}/0"]["id"], rows[f"free/one/{label}/0"]["loss"]) == (
            "one",
            None,
        )
    assert texts["free/one/dense/0"]["text"] != texts["free/one/never@0.5/0"]["text"]
    row = rows["free/one/never@0.5/0"]
    assert row["accounting"]["achieved_sparsity"] == pytest.approx(run.report().achieved_sparsity)
    assert row["topics"] == [
        {"name": "bees", "domain": "zoology", "start": None},
        {"name": "finance", "domain": "finance", "start": None},
    ]
    assert (row["prompt_tokens"], row["decoded_tokens"]) == (ids.shape[1], 40)
    assert [m["cause"] for m in rows["free/one/interval:8@0.5/0"]["remasks"]] == ["first"]
    tokens = {t["key"]: t for t in lines(job.path / "tokens.jsonl")}
    assert set(tokens["free/one/dense/0"]) == {"key", "pieces"}
    assert "".join(tokens["free/one/dense/0"]["pieces"]) == texts["free/one/dense/0"]["text"]


def test_an_interval_re_masks_while_the_model_writes(tmp_path: Path) -> None:
    job = study(free(tmp_path, methods="interval:8", generation=100, limit=1))
    row = results(job)["free/one/interval:8@0.5/0"]
    assert [m["step"] for m in row["remasks"]] == [0, 40, 80]  # 8 pruned, 32 observed, and again
    assert row["accounting"]["dense_token_share"] == pytest.approx((32 + 32 + 11) / 99)


def test_a_text_ends_where_the_model_ends_it() -> None:
    model, tokenizer = loaded()
    asking = ask(Source("one", PROMPTS[0]["text"]), tokenizer, None, 20, None)
    made = write(model, tokenizer, asking, 20, None)
    assert (len(made.pieces), made.ended, asking.chat) == (20, False, False)
    ending = copy.deepcopy(model)
    with torch.inference_mode():
        third = int(model.generate(asking.ids, max_new_tokens=3, do_sample=False)[0, -1])
    ending.generation_config.eos_token_id = third
    stopped = write(ending, tokenizer, asking, 20, None)
    first = next(k for k, piece in enumerate(made.pieces) if piece == made.pieces[2])
    assert stopped.ended and stopped.pieces == (*made.pieces[:first], "")
    assert stopped.text == "".join(made.pieces[:first])


def test_the_chat_template_is_used_where_there_is_one() -> None:
    tokenizer = loaded("chatty")[1]
    source = Source("one", "write about tea")
    wrapped = ask(source, tokenizer, None, 5, None)
    assert wrapped.chat
    text = tokenizer.decode(wrapped.ids[0])
    assert text == "[user] write about tea\n[assistant] "
    assert not ask(source, tokenizer, False, 5, None).chat
    with pytest.raises(ConfigError, match="has no chat template"):
        ask(source, loaded()[1], True, 5, None)


def test_a_prompt_that_does_not_fit_the_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'"one" has 37 tokens and 1000 are to be written, but'):
        study(free(tmp_path, generation=1000))


def test_sampling_depends_on_the_seed_and_one_prompt_is_enough(tmp_path: Path) -> None:
    asked = settings(
        tmp_path,
        prompt="write about tea",
        methods="never",
        seeds="0,1",
        temperature=1.5,
        generation=20,
        min_evidence=0,
    )
    texts = {t["key"]: t["text"] for t in lines(study(asked).path / "texts.jsonl")}
    assert texts["free/prompt/dense/0"] != texts["free/prompt/dense/1"]
    model, tokenizer = loaded()
    asking = ask(Source("prompt", "write about tea"), tokenizer, None, 20, None)
    assert write(model, tokenizer, asking, 20, None, 1.5, 1).text == texts["free/prompt/dense/1"]


def test_metrics_compare_with_the_dense_text_of_the_same_seed(
    tmp_path: Path, compared: list[tuple[str, str]]
) -> None:
    asked = free(tmp_path, methods="never,dart", seeds="0,1", temperature=1.0, metrics=True)
    with pytest.raises(KeyboardInterrupt):
        study(asked, Stopping(5))
    assert len(compared) == 3
    job = study(asked)
    assert len(compared) == 8  # none twice
    texts = {t["key"]: t["text"] for t in lines(job.path / "texts.jsonl")}
    rows = results(job)
    for key, row in rows.items():
        source, label, seed = key.split("/")[1:]
        if label == "dense":
            assert row["metrics"] is None
            continue
        own, dense = texts[key], texts[f"free/{source}/dense/{seed}"]
        assert (own, dense) in compared
        same = sum(a == b for a, b in zip(own, dense, strict=False)) / len(dense)
        assert row["metrics"] == dict.fromkeys(NAMES, same)
    summary = load_json(job.path / "summary.json")
    line = summary["rows"][1]
    values = [
        rows[f"free/{s}/never@0.5/{n}"]["metrics"]["bleu"]
        for s in ("one", "another")
        for n in (0, 1)
    ]
    assert line["metrics"]["bleu"]["mean"] == pytest.approx(sum(values) / 4)
    assert line["metrics"]["bleu"]["n"] == 2 and line["loss"] is None
    assert (line["mean_tokens"], line["ended_share"]) == (40.0, 0.0)
    assert "made by hand" in summary["notes"]
    assert load_json(job.path / "config.json")["metrics"] == {"embedder": "none"}
    assert set(load_json(job.path / "timing.json")["metrics"]) == {
        k for k in rows if "dense" not in k
    }


def test_without_the_extra_the_study_goes_on_and_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: Any, **options: Any) -> None:
        raise MissingExtra("sacrebleu", "drift")

    monkeypatch.setattr("dart_llm.evaluation.text_metrics.load_tools", missing)
    ui = Ui(quiet=True)
    job = study(free(tmp_path, methods="never", metrics=True), ui)
    assert results(job)["free/one/never@0.5/0"]["metrics"] is None
    sentence = "no metrics: this needs sacrebleu, which is not installed: pip install"
    assert any(sentence in line for line in ui.log)
    assert any(sentence in note for note in load_json(job.path / "summary.json")["notes"])


def test_no_model_of_metrics_is_loaded_where_nothing_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dart_llm.evaluation.text_metrics.load_tools", lambda *a, **k: 1 / 0)
    for asked in (free(tmp_path, methods="dense", metrics=True), free(tmp_path)):
        assert drift_metrics.load_judge(asked, Ui(quiet=True)).tools is None


def test_nan_fails_the_cells_that_reach_it(tmp_path: Path) -> None:
    model, tokenizer = loaded()
    broken = tmp_path / "broken"
    break_position(copy.deepcopy(model), 60).save_pretrained(broken)
    tokenizer.save_pretrained(broken)
    with pytest.raises(CellsFailed, match="a logit of the text after one is not finite"):
        study(free(tmp_path, methods="dense", model=str(broken)))
    assert place().exists()
