"""The study `dart-llm drift`: passages read and prompts continued, lines, summary, refused sources.

That it resumes, and what a full disk costs, is tested for all studies in tests/experiments.
"""

import copy
import math
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import cross_entropy

from dart_llm.data.passages import Topic
from dart_llm.errors import ConfigError, MissingExtra
from dart_llm.evaluation.perplexity import score_window
from dart_llm.evaluation.text_metrics import NAMES, TextMetrics
from dart_llm.evaluation.windows import Window
from dart_llm.experiments.artifacts import MaskRecorder
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.records import Remask
from dart_llm.reporting.console import Ui
from dart_llm.session.run import BoundMethod, Run
from dart_llm.studies.drift.runs import remask_records
from dart_llm.studies.drift.sources import Source, read_passage, read_prompt
from dart_llm.studies.drift.study import read_losses, write_text
from drift_cases import (
    PROMPT,
    PROMPTS,
    THREE,
    TWO,
    draw_nothing,
    finished,
    forced,
    free,
    results,
    settings,
    study,
    write_rows,
)
from lm_cases import loaded
from written import lines, read


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures have tests of their own."""
    draw_nothing(monkeypatch)


def source(row):
    topics = tuple(Topic(t["name"], t["domain"]) for t in row["topics"])
    return Source(row["id"], row["text"], topics, tuple(row["changes"]))


def reading(row=TWO, longest=1024):
    return read_passage(source(row), loaded()[1], PROMPT, longest)


# Passages and prompts as tokens.


def test_tokens_changes_and_pieces():
    whole = reading(THREE)  # a token is a character here
    assert whole.starts == (0, *(change - PROMPT for change in THREE["changes"]))
    assert "".join(whole.pieces) == THREE["text"][PROMPT:]
    assert whole.decoded == len(whole.pieces) == len(THREE["text"]) - PROMPT
    assert whole.pieces[whole.starts[1]] == "g" and not whole.cut
    end = THREE["changes"][1] + 10
    cut = reading(THREE, end)  # a context that ends within the last topic
    assert (len(cut.ids), cut.cut, cut.decoded) == (end, True, end - PROMPT)
    assert "".join(cut.pieces) == THREE["text"][PROMPT:end]
    before = reading(THREE, THREE["changes"][1])
    assert len(before.starts) == len(before.source.topics) == 2
    (start,) = TWO["changes"]
    assert read_passage(source(TWO), loaded()[1], start - 2, None).starts == (0, 2)
    words = f'"two" has {start} tokens before its first change .* too few for a prompt of '
    with pytest.raises(ConfigError, match=f"{words}{start - 1} .* a smaller --prompt-tokens"):
        read_passage(source(TWO), loaded()[1], start - 1, None)
    with pytest.raises(ConfigError, match=r'"two" changes its topic after the 100 tokens of the'):
        reading(TWO, 100)


class Spans:
    """A tokenizer of words with a special token ahead, and blanks that belong to the next word."""

    def __init__(self, is_fast):
        self.is_fast = is_fast

    def __call__(self, text, verbose=True, **more):
        self.spans = [(0, 0), *((m.start(), m.end()) for m in re.finditer(r"\s*\S+", text))]
        self.text = text
        assert self.is_fast or not more, "only fast tokenizers know offsets"
        return {"input_ids": list(range(len(self.spans))), "offset_mapping": self.spans}

    def decode(self, ids, skip_special_tokens):
        return "".join(self.text[start:end] for start, end in (self.spans[i] for i in ids))


@pytest.mark.parametrize("is_fast", [True, False])
def test_a_token_that_holds_the_break_too_belongs_to_the_new_topic(is_fast):
    text = "a bb dd\n\ncc d"
    changing = Source("x", text, (Topic("a", "a"), Topic("b", "b")), (text.index("cc"),))
    assert read_passage(changing, Spans(is_fast), 2, None).changes == (4,)  # special, a, bb, dd, cc


def test_the_chat_template_is_used_where_there_is_one():
    tokenizer = loaded("chatty")[1]
    tea = Source("one", "write about tea")
    wrapped, plain = (read_prompt(tea, tokenizer, chat, 5, None) for chat in (None, False))
    assert tokenizer.decode(wrapped.ids) == "[user] write about tea\n[assistant] "
    assert tokenizer.decode(plain.ids) == "write about tea"
    with pytest.raises(ConfigError, match="has no chat template"):
        read_prompt(tea, loaded()[1], True, 5, None)
    with pytest.raises(ConfigError, match=r'"one" has 15 tokens and 20 are to be written, but'):
        read_prompt(tea, loaded()[1], None, 20, 34)


# Passages read by a method.


def step_by_step(run, model, passage):
    """One decode forward per token, and whatever the run does between them."""
    kept = []
    with torch.inference_mode():
        output = model(passage.ids[None, :PROMPT], use_cache=True)
        for at in range(PROMPT, len(passage.ids) - 1):
            run.tokens_until_change()
            with run.decoding():
                output = model(passage.ids[None, at : at + 1], cache=output.cache)
            kept.append(float(cross_entropy(output.logits[0, -1:], passage.ids[None, at + 1])))
    return kept


@pytest.mark.parametrize("rule", ["interval 40", "published"])
def test_losses_are_those_of_one_forward_and_pruned_of_single_steps(rule):
    model, passage = loaded()[0], reading()
    config = PruneConfig.build("dart", sparsity=0.5, drift={"rule": rule, "min_distance": 0})
    with Run(model, config) as run:
        fast = read_losses(model, run, passage)
        masks = [(r.step, r.cause, r.kept) for r in run.remasks]
    with Run(model, config) as run:
        slow = step_by_step(run, model, passage)
        assert [(r.step, r.cause, r.kept) for r in run.remasks] == masks
    assert fast[1:] == pytest.approx(slow, abs=2e-5)
    dense = read_losses(model, None, passage)
    assert fast[1:] != pytest.approx(dense[1:], abs=0.01)
    with torch.inference_mode():
        logits = model(passage.ids[None]).logits[0].float()
    direct = cross_entropy(logits[:-1], passage.ids[1:], reduction="none")[PROMPT:]
    assert dense[0] is None and len(dense) == passage.decoded
    assert dense[1:] == pytest.approx(direct.tolist(), abs=2e-5)


def test_jaccard_per_layer():
    recorder = MaskRecorder()
    masks = [{0: [0, 1, 2], 1: [5, 6]}, {0: [2, 3, 4], 1: [5, 6]}, {0: [2, 3, 4]}]
    for number, ids in enumerate(masks):
        kept = tuple(len(ids.get(layer, range(8))) for layer in range(2))
        recorder.remasks.append(Remask(0, None, 10 * number, "drift", 1.0, kept, None))
        for layer, neurons in ids.items():
            recorder.tensors[f"remask{number}.layer{layer}.ids"] = torch.tensor(neurons).int()
    first, second, third = remask_records(recorder, [8, 8])
    assert (first["jaccard"], first["first_jaccard"]) == (None, None)
    assert second["jaccard"] == second["first_jaccard"] == [0.2, 1.0]
    assert third["jaccard"] == [1.0, 0.25]  # the second layer runs dense now: all 8 neurons
    assert (third["first_jaccard"], third["kept"]) == ([0.2, 0.25], [3, 8])


@pytest.fixture(scope="module")
def whole():
    return finished()


def test_every_run_is_a_line_in_grid_order(whole):
    labels = ["dense", "never@0.5", "interval:40@0.5", "dart@0.3"]
    rows = lines(whole.path / "results.jsonl")
    keys = [f"forced/{source}/{label}/0" for source in ("two", "three") for label in labels]
    assert [row["key"] for row in rows] == keys
    assert {(row["status"], row["error"], row["finish"]) for row in rows} == {("done", None, "end")}
    assert rows[0]["accounting"] is rows[0]["masks"] is None and rows[3]["sparsity"] == 0.3
    numbers = lines(whole.path / "rows.jsonl")
    assert [(n["label"], n["value"]) for n in numbers] == [
        (line["label"], line["loss"]["after"]["mean"]) for line in whole.summary["rows"]
    ]
    for row in filter(lambda row: row["masks"], rows):
        with safe_open(whole.path / row["masks"], "pt") as file:
            for number, mask in enumerate(row["remasks"]):
                kept = [len(file.get_tensor(f"remask{number}.layer{k}.ids")) for k in range(4)]
                assert kept == mask["kept"] and min(kept) > 0


def test_a_line_is_what_a_run_of_the_library_gives(whole):
    model, tokenizer = loaded()
    ids = tokenizer(TWO["text"], return_tensors="pt").input_ids[0]
    row = results(whole)["forced/two/interval:40@0.5/0"]
    changes = {"rule": "interval 40", "min_distance": 0, "max_dense_share": None}
    with Run(model, PruneConfig.build("dart", sparsity=0.5, drift=changes)) as run:
        scored = score_window(model, run, Window(ids, PROMPT + 1))
        report = run.report()
    assert [mask["step"] for mask in row["remasks"]] == [
        r.step for r in report.sequences[0].remasks
    ]
    assert len(row["checks"]) == len(run.drift_checks)
    assert row["accounting"]["achieved_sparsity"] == pytest.approx(report.achieved_sparsity)
    assert row["losses"][1:] == pytest.approx(list(scored.losses), abs=1e-6)
    assert row["topics"][1]["start"] == TWO["changes"][0] - PROMPT


def test_the_summary_follows_from_the_lines(whole):
    rows = results(whole)
    by_label = {line["label"]: line for line in read(whole.path / "summary.json")["rows"]}
    own = [rows[f"forced/{source}/never@0.5/0"] for source in ("two", "three")]
    after = [loss for row in own for loss in row["losses"][row["topics"][1]["start"] :]]
    never, dense = by_label["never@0.5"], by_label["dense"]
    mean = math.fsum(after) / len(after)
    assert never["loss"]["after"]["mean"] == pytest.approx(mean, abs=1e-9)
    assert never["loss"]["after"]["n"] == 2 and never["loss"]["recovery"]["changes"] == 3
    gap = never["loss"]["after"]["mean"] - dense["loss"]["after"]["mean"]
    assert never["loss"]["after_minus_dense"]["mean"] == pytest.approx(gap, abs=1e-9)
    assert never["loss"]["after_minus_never"]["mean"] == 0.0
    assert by_label["dart@0.3"]["loss"]["after_minus_never"] is None  # no never at that sparsity
    assert (dense["achieved_sparsity"], dense["dense_token_share"]) == (0.0, 1.0)
    weights = [row["accounting"]["decoded_tokens"] for row in own]
    achieved = [row["accounting"]["achieved_sparsity"] for row in own]
    assert never["achieved_sparsity"] == pytest.approx(
        sum(w * a for w, a in zip(weights, achieved, strict=True)) / sum(weights)
    )
    interval = [rows[f"forced/{name}/interval:40@0.5/0"]["remasks"] for name in ("two", "three")]
    remasks = sum(len(masks) - 1 for masks in interval)
    line = by_label["interval:40@0.5"]
    assert (line["remasks"], line["remasks_per_run"]) == (remasks, remasks / 2) and remasks > 1


def test_seeds_are_averaged_within_a_source(tmp_path):
    text = tmp_path / "calibration.txt"
    text.write_text("".join(f"the tide number {n * n} goes out by {n}. " for n in range(60)))
    more = {"calibration": str(text), "cache_dir": str(tmp_path / "cache")}
    job = study(forced(tmp_path, methods="random,wanda", seeds="0,1", limit=1, **more))
    rows = results(job)
    start = TWO["changes"][0] - PROMPT
    means = [
        math.fsum(losses) / len(losses)
        for seed in (0, 1)
        for losses in [rows[f"forced/two/random@0.5/{seed}"]["losses"][start:]]
    ]
    assert means[0] != means[1]
    line = read(job.path / "summary.json")["rows"][1]
    assert (line["runs"], line["sources"], line["loss"]["after"]["n"]) == (2, 1, 1)
    assert line["loss"]["after"]["mean"] == pytest.approx(sum(means) / 2)
    assert line["loss"]["after"]["low"] is None  # one source says nothing of the spread
    own = rows["forced/two/wanda@0.5/0"]  # calibrated presets stand beside dart
    assert own["accounting"]["achieved_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert own["remasks"][0]["cause"] == "fixed"


def test_sources_that_cannot_be_used(tmp_path):
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff")
    for make, sentence in (
        (lambda: forced(tmp_path, passages="none"), r"--passages none: there is no such file"),
        (lambda: free(tmp_path, prompts="none"), r"--prompts none: there is no such file"),
        (lambda: forced(tmp_path, passages=str(tmp_path / "bytes.jsonl")), "read as UTF-8 text"),
        (lambda: settings(tmp_path, prompt="bees \udcff"), "the prompt is not valid UTF-8"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            study(make())
    assert not (tmp_path / "results").exists()


def test_ids_that_cannot_name_files(tmp_path):
    rows = [{**TWO, "id": name} for name in ("a/b", "a-b", "é" * 120, "a\0b")]
    file = write_rows(tmp_path / "own.jsonl", rows)
    job = study(settings(tmp_path, passages=file, prompt_tokens=PROMPT, methods="never"))
    masks = [row["masks"] for row in results(job).values() if row["masks"]]
    assert len(set(masks)) == 4 and all((job.path / name).exists() for name in masks)


# Prompts continued by a method.


@pytest.fixture
def compared(monkeypatch):
    """Comparisons that were made: the shared share of characters stands for every number."""
    made, tools = [], SimpleNamespace(notes=("made by hand",), to_dict=lambda: {"embedder": "none"})

    def compare(candidate, reference, tools):
        made.append((candidate, reference))
        same = sum(a == b for a, b in zip(candidate, reference, strict=False))
        return TextMetrics(**dict.fromkeys(NAMES, same / max(1, len(reference))))

    monkeypatch.setattr("dart_llm.evaluation.text_metrics.load_tools", lambda *a, **k: tools)
    monkeypatch.setattr("dart_llm.evaluation.text_metrics.compare", compare)
    return made


def test_texts_are_those_of_the_models_own_generate(tmp_path):
    rows = results(study(free(tmp_path, methods="never,interval:8", limit=1, generation=100)))
    assert list(rows) == [f"free/one/{m}/0" for m in ("dense", "never@0.5", "interval:8@0.5")]
    model, tokenizer = loaded()
    ids = tokenizer(PROMPTS[0]["text"], return_tensors="pt").input_ids
    options = {"max_new_tokens": 100, "do_sample": False}
    config = PruneConfig.build("dart", sparsity=0.5, drift="never", min_evidence=0)
    with torch.inference_mode():
        plain = model.generate(ids, **options)
        with Run(model, config) as run:
            pruned = model.generate(ids, **options)
    for label, generated in (("dense", plain), ("never@0.5", pruned)):
        text = tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
        assert rows[f"free/one/{label}/0"]["text"] == text
    assert rows["free/one/dense/0"]["text"] != rows["free/one/never@0.5/0"]["text"]
    row = rows["free/one/never@0.5/0"]
    assert row["accounting"]["achieved_sparsity"] == pytest.approx(run.report().achieved_sparsity)
    assert (row["prompt_tokens"], row["decoded_tokens"]) == (ids.shape[1], 100)
    row = rows["free/one/interval:8@0.5/0"]
    assert [m["step"] for m in row["remasks"]] == [0, 40, 80]  # 8 pruned, 32 observed, and again
    assert row["accounting"]["dense_token_share"] == pytest.approx((32 + 32 + 11) / 99)


def test_a_text_ends_where_the_model_ends_it():
    model, tokenizer = loaded()
    prompt = read_prompt(Source("one", PROMPTS[0]["text"]), tokenizer, None, 20, None)
    made = write_text(BoundMethod(model, tokenizer, None), None, prompt, 20)
    assert (len(made["pieces"]), made["finish"]) == (20, "length")
    ending = copy.deepcopy(model)
    with torch.inference_mode():
        third = int(model.generate(prompt.ids[None], max_new_tokens=3, do_sample=False)[0, -1])
    ending.generation_config.eos_token_id = third
    stopped = write_text(BoundMethod(ending, tokenizer, None), None, prompt, 20)
    first = made["pieces"].index(made["pieces"][2])
    assert stopped["pieces"] == [*made["pieces"][:first], ""]
    assert (stopped["text"], stopped["finish"]) == ("".join(made["pieces"][:first]), "eos")


def test_metrics_compare_with_the_dense_text_of_the_same_seed(tmp_path, compared):
    asked = free(tmp_path, methods="never,dart", seeds="0,1", temperature=1.0, metrics=True)
    job = study(asked)
    assert len(compared) == 8
    rows = results(job)
    assert rows["free/one/dense/0"]["text"] != rows["free/one/dense/1"]["text"]
    for key, row in rows.items():
        if row["label"] == "dense":
            assert row["metrics"] is None
            continue
        text, dense = row["text"], rows[f"free/{row['source']}/dense/{row['seed']}"]["text"]
        assert (text, dense) in compared, key
        same = sum(a == b for a, b in zip(text, dense, strict=False)) / len(dense)
        assert row["metrics"] == dict.fromkeys(NAMES, same)
    line = read(job.path / "summary.json")["rows"][1]
    values = [r["metrics"]["bleu"] for r in rows.values() if r["label"] == "never@0.5"]
    assert line["metrics"]["bleu"]["mean"] == pytest.approx(sum(values) / 4)
    assert line["metrics"]["bleu"]["n"] == 2 and line["loss"] is None


def test_without_the_extra_the_study_continues_and_names_what_to_install(tmp_path, monkeypatch):
    def missing(*args, **options):
        raise MissingExtra("sacrebleu", "drift")

    monkeypatch.setattr("dart_llm.evaluation.text_metrics.load_tools", missing)
    ui = Ui(quiet=True)
    job = study(free(tmp_path, methods="never", metrics=True, limit=1, generation=8), ui)
    assert results(job)["free/one/never@0.5/0"]["metrics"] is None
    sentence = "no metrics: this needs sacrebleu, which is not installed: pip install"
    assert any(sentence in note for note in read(job.path / "summary.json")["notes"])
