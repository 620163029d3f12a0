"""Free mode: texts of the generate loop, the end of a text, metrics against the dense text."""

import copy
from types import SimpleNamespace

import pytest
import torch

from dart_llm.errors import ConfigError, MissingExtra
from dart_llm.evaluation.text_metrics import NUMBERS
from dart_llm.pruning.config import PruneConfig
from dart_llm.reporting.console import Ui
from dart_llm.session.run import BoundMethod, Run
from dart_llm.studies.drift.sources import Source, read_prompt
from dart_llm.studies.drift.study import write_text
from drift_cases import PROMPTS, draw_nothing, free, results, study
from lm_cases import loaded
from written import lines, read


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    draw_nothing(monkeypatch)


@pytest.fixture
def compared(monkeypatch):
    """Comparisons that were made: the shared share of characters stands for every number."""
    made, tools = [], SimpleNamespace(notes=("made by hand",), to_dict=lambda: {"embedder": "none"})

    def compare(candidate, reference, tools):
        made.append((candidate, reference))
        same = sum(a == b for a, b in zip(candidate, reference, strict=False))
        return dict.fromkeys(NUMBERS, same / max(1, len(reference)))

    monkeypatch.setattr("dart_llm.evaluation.text_metrics.load_tools", lambda *a, **k: tools)
    monkeypatch.setattr("dart_llm.evaluation.text_metrics.compare", compare)
    return made


def test_texts_are_those_of_the_models_own_generate(tmp_path):
    job = study(free(tmp_path, methods="never,interval:8", limit=1, generation=100))
    rows, texts = results(job), {t["key"]: t for t in lines(job.path / "texts.jsonl")}
    labels = ("dense", "never@0.5", "interval:8@0.5")
    assert list(rows) == list(texts) == [f"free/one/{label}/0" for label in labels]
    model, tokenizer = loaded()
    ids = tokenizer(PROMPTS[0]["text"], return_tensors="pt").input_ids
    options = {"max_new_tokens": 100, "do_sample": False}
    with torch.inference_mode():
        plain = model.generate(ids, **options)
        own = PruneConfig.build("dart", sparsity=0.5, drift="never", min_evidence=0)
        with Run(model, own) as run:
            pruned = model.generate(ids, **options)
    for label, found in (("dense", plain), ("never@0.5", pruned)):
        text = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        assert texts[f"free/one/{label}/0"]["text"] == text
    assert texts["free/one/dense/0"]["text"] != texts["free/one/never@0.5/0"]["text"]
    row = rows["free/one/never@0.5/0"]
    assert row["accounting"]["achieved_sparsity"] == pytest.approx(run.report().achieved_sparsity)
    assert (row["prompt_tokens"], row["decoded_tokens"]) == (ids.shape[1], 100)
    row = rows["free/one/interval:8@0.5/0"]
    assert [m["step"] for m in row["remasks"]] == [0, 40, 80]  # 8 pruned, 32 observed, and again
    assert row["accounting"]["dense_token_share"] == pytest.approx((32 + 32 + 11) / 99)


def test_a_text_ends_where_the_model_ends_it():
    model, tokenizer = loaded()
    reading = read_prompt(Source("one", PROMPTS[0]["text"]), tokenizer, None, 20, None)
    made = write_text(BoundMethod(model, tokenizer, None), None, reading, 20)
    assert (len(made["pieces"]), made["finish"]) == (20, "length")
    ending = copy.deepcopy(model)
    with torch.inference_mode():
        third = int(model.generate(reading.ids[None], max_new_tokens=3, do_sample=False)[0, -1])
    ending.generation_config.eos_token_id = third
    stopped = write_text(BoundMethod(ending, tokenizer, None), None, reading, 20)
    first = made["pieces"].index(made["pieces"][2])
    assert stopped["pieces"] == [*made["pieces"][:first], ""]
    assert (stopped["text"], stopped["finish"]) == ("".join(made["pieces"][:first]), "eos")


def test_the_chat_template_is_used_where_there_is_one():
    tokenizer = loaded("chatty")[1]
    source = Source("one", "write about tea")
    wrapped, plain = (read_prompt(source, tokenizer, chat, 5, None) for chat in (None, False))
    assert tokenizer.decode(wrapped.ids) == "[user] write about tea\n[assistant] "
    assert tokenizer.decode(plain.ids) == "write about tea"
    with pytest.raises(ConfigError, match="has no chat template"):
        read_prompt(source, loaded()[1], True, 5, None)
    with pytest.raises(ConfigError, match=r'"one" has 15 tokens and 20 are to be written, but'):
        read_prompt(source, loaded()[1], None, 20, 34)


def test_metrics_compare_with_the_dense_text_of_the_same_seed(tmp_path, compared):
    asked = free(tmp_path, methods="never,dart", seeds="0,1", temperature=1.0, metrics=True)
    job = study(asked)
    assert len(compared) == 8
    texts = {t["key"]: t["text"] for t in lines(job.path / "texts.jsonl")}
    assert texts["free/one/dense/0"] != texts["free/one/dense/1"]
    rows = results(job)
    for key, row in rows.items():
        source, label, seed = key.split("/")[1:]
        if label == "dense":
            assert row["metrics"] is None
            continue
        own, dense = texts[key], texts[f"free/{source}/dense/{seed}"]
        assert (own, dense) in compared
        same = sum(a == b for a, b in zip(own, dense, strict=False)) / len(dense)
        assert row["metrics"] == dict.fromkeys(NUMBERS, same)
    summary = read(job.path / "summary.json")
    line = summary["rows"][1]
    values = [
        rows[f"free/{s}/never@0.5/{n}"]["metrics"]["bleu"]
        for s in ("one", "another")
        for n in (0, 1)
    ]
    assert line["metrics"]["bleu"]["mean"] == pytest.approx(sum(values) / 4)
    assert line["metrics"]["bleu"]["n"] == 2 and line["loss"] is None


def test_without_the_extra_the_study_goes_on_and_says_what_to_install(tmp_path, monkeypatch):
    def missing(*args, **options):
        raise MissingExtra("sacrebleu", "drift")

    monkeypatch.setattr("dart_llm.evaluation.text_metrics.load_tools", missing)
    ui = Ui(quiet=True)
    job = study(free(tmp_path, methods="never", metrics=True, limit=1, generation=8), ui)
    assert results(job)["free/one/never@0.5/0"]["metrics"] is None
    sentence = "no metrics: this needs sacrebleu, which is not installed: pip install"
    assert any(sentence in line for line in ui.log)
    assert any(sentence in note for note in read(job.path / "summary.json")["notes"])
