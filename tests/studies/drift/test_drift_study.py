"""The study `dart-llm drift`: passages read, prompts continued, lines, summary, pictures, page."""

import math
import sys
from copy import deepcopy
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import drift_cases
from dart_llm.data.passages import Topic
from dart_llm.errors import ConfigError, MissingExtra
from dart_llm.evaluation.perplexity import score_window
from dart_llm.evaluation.text_metrics import NUMBERS
from dart_llm.evaluation.windows import Window
from dart_llm.experiments.artifacts import MaskRecorder
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.records import Remask
from dart_llm.session.run import BoundMethod, Run
from dart_llm.studies.drift import report, summary
from dart_llm.studies.drift.runs import EMPTY, remask_records
from dart_llm.studies.drift.sources import Source, read_passage, read_prompt
from dart_llm.studies.drift.study import write_text
from drift_cases import PROMPT, THREE, TWO, finished, forced, free, results, study
from html_page import Page, check_alone
from lm_cases import loaded
from written import axes_of, lines


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures have tests of their own."""
    drift_cases.draw_nothing(monkeypatch)


def reading(row=TWO, longest=1024, prompt=PROMPT):
    topics = tuple(Topic(t["name"], t["domain"]) for t in row["topics"])
    source = Source(row["id"], row["text"], topics, tuple(row["changes"]))
    return read_passage(source, loaded()[1], prompt, longest)


def test_tokens_changes_and_pieces():
    whole = reading(THREE)  # a token is a character here
    assert whole.starts == (0, *(change - PROMPT for change in THREE["changes"]))
    assert "".join(whole.pieces) == THREE["text"][PROMPT:]
    assert whole.decoded == len(whole.pieces) == len(THREE["text"]) - PROMPT and not whole.cut
    end = THREE["changes"][1] + 10
    cut = reading(THREE, end)  # a context that ends within the last topic
    assert (len(cut.ids), cut.cut, cut.decoded) == (end, True, end - PROMPT)
    before = reading(THREE, THREE["changes"][1])
    assert len(before.starts) == len(before.source.topics) == 2
    (start,) = TWO["changes"]
    assert reading(TWO, None, start - 2).starts == (0, 2)
    words = f'"two" has {start} tokens before its first topic change, too few for a prompt of '
    with pytest.raises(ConfigError, match=f"{words}{start - 1} .* a smaller --prompt-tokens"):
        reading(TWO, None, start - 1)
    with pytest.raises(ConfigError, match=r'"two" first changes after the 100 tokens of the'):
        reading(TWO, 100)


class Words:
    """A tokenizer: a special token, then words with the blanks before them."""

    words = ("", "a", " bb", " dd", "\n\ncc", " d")

    def __call__(self, text, verbose, return_offsets_mapping):
        ends = [*accumulate(map(len, self.words))]
        return {"input_ids": range(6), "offset_mapping": [*zip([0, *ends], ends, strict=False)]}

    def decode(self, ids, skip_special_tokens):
        return "".join(self.words[k] for k in ids)


def test_a_token_that_holds_the_break_too_belongs_to_the_new_topic():
    topics = (Topic("a", "a"), Topic("b", "b"))
    changing = Source("x", "a bb dd\n\ncc d", topics, (len("a bb dd\n\n"),))
    assert read_passage(changing, Words(), 2, None).changes == (4,)


def test_prompts_use_the_chat_template_and_fit_the_context():
    tokenizer, tea = loaded("chatty")[1], Source("one", "write about tea")
    wrapped, plain = (read_prompt(tea, tokenizer, chat, 5, None) for chat in (None, False))
    assert tokenizer.decode(wrapped.ids) == "[user] write about tea\n[assistant] "
    assert tokenizer.decode(plain.ids) == "write about tea"
    with pytest.raises(ConfigError, match=r'"one" has 15 tokens and 20 are to be generated, but'):
        read_prompt(tea, loaded()[1], None, 20, 34)


def test_jaccard_per_layer():
    recorder = MaskRecorder()
    masks = ({0: [0, 1, 2], 1: [5, 6]}, {0: [2, 3, 4], 1: [5, 6]}, {0: [2, 3, 4]})
    for number, mask in enumerate(masks):
        recorder.remasks.append(Remask(0, None, 10 * number, "drift", 1.0, (), None))
        for layer, neurons in mask.items():
            recorder.tensors[f"remask{number}.layer{layer}.ids"] = torch.tensor(neurons).int()
    first, second, third = remask_records(recorder, [8, 8])
    assert (first["jaccard"], first["first_jaccard"]) == (None, None)
    assert second["jaccard"] == second["first_jaccard"] == [0.2, 1.0]
    assert third["jaccard"] == [1.0, 0.25]  # the second layer runs dense now: all 8 neurons
    assert third["first_jaccard"] == [0.2, 0.25]


def test_lines_are_in_grid_order_and_what_a_run_of_the_library_gives():
    rows, model = results(finished()), loaded()[0]
    labels = ["dense", "never@0.5", "interval:40@0.5", "dart@0.3"]
    keys = [f"forced/{source}/{label}/0" for source in ("two", "three") for label in labels]
    assert list(rows) == keys
    assert {(r["status"], r["error"], r["finish"]) for r in rows.values()} == {
        ("done", None, "end")
    }
    dense, row = rows[keys[0]], rows[keys[2]]
    assert dense["accounting"] is dense["masks"] is None and rows[keys[3]]["sparsity"] == 0.3
    changes = {"rule": "interval 40", "min_distance": 0, "max_dense_share": None}
    with Run(model, PruneConfig.build("dart", sparsity=0.5, drift=changes)) as run:
        scored = score_window(model, run, Window(reading().ids, PROMPT + 1))
        sequence = run.report().sequences[0]
    assert [mask["step"] for mask in row["remasks"]] == [r.step for r in sequence.remasks]
    assert len(row["checks"]) == len(run.drift_checks)
    assert row["accounting"]["achieved_sparsity"] == pytest.approx(sequence.achieved_sparsity)
    assert row["losses"][0] is None
    assert row["losses"][1:] == pytest.approx(list(scored.losses), abs=1e-6)
    assert row["topics"][1]["start"] == TWO["changes"][0] - PROMPT


def test_the_summary_follows_from_the_lines():
    job = finished()
    rows, by_label = results(job), {row["label"]: row for row in job.summary["rows"]}
    numbers = [(line["label"], line["value"]) for line in lines(job.path / "rows.jsonl")]
    assert numbers == [(label, row["loss"]["after"]["mean"]) for label, row in by_label.items()]
    runs = [rows[f"forced/{source}/never@0.5/0"] for source in ("two", "three")]
    after = [loss for row in runs for loss in row["losses"][row["topics"][1]["start"] :]]
    never, dense = by_label["never@0.5"], by_label["dense"]
    mean = math.fsum(after) / len(after)
    assert never["loss"]["after"]["mean"] == pytest.approx(mean, abs=1e-9)
    assert never["loss"]["after"]["n"] == 2 and never["loss"]["recovery"]["changes"] == 3
    gap = never["loss"]["after"]["mean"] - dense["loss"]["after"]["mean"]
    assert never["loss"]["after_minus_dense"]["mean"] == pytest.approx(gap, abs=1e-9)
    assert never["loss"]["after_minus_never"]["mean"] == 0.0
    assert by_label["dart@0.3"]["loss"]["after_minus_never"] is None  # no never at that sparsity
    assert (dense["achieved_sparsity"], dense["dense_token_share"]) == (0.0, 1.0)
    interval = [rows[f"forced/{name}/interval:40@0.5/0"]["remasks"] for name in ("two", "three")]
    remasks = sum(len(masks) - 1 for masks in interval)
    line = by_label["interval:40@0.5"]
    assert (line["remasks"], line["remasks_per_run"]) == (remasks, remasks / 2) and remasks > 1


def test_seeds_are_averaged_within_a_source_and_presets_are_calibrated(tmp_path):
    text = tmp_path / "calibration.txt"
    text.write_text("".join(f"the tide number {n * n} goes out by {n}. " for n in range(60)))
    more = {"calibration": str(text), "cache_dir": str(tmp_path / "cache")}
    job = study(forced(tmp_path, methods="random,wanda", seeds="0,1", limit=1, **more))
    rows, start = results(job), TWO["changes"][0] - PROMPT
    seeds = [rows[f"forced/two/random@0.5/{seed}"]["losses"][start:] for seed in (0, 1)]
    assert seeds[0] != seeds[1]
    line = job.summary["rows"][1]
    assert (line["runs"], line["sources"], line["loss"]["after"]["n"]) == (2, 1, 1)
    mean = math.fsum(seeds[0] + seeds[1]) / (2 * len(seeds[0]))
    assert line["loss"]["after"]["mean"] == pytest.approx(mean)
    assert line["loss"]["after"]["low"] is None  # one source says nothing of the spread
    wanda = rows["forced/two/wanda@0.5/0"]
    assert wanda["accounting"]["achieved_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert wanda["remasks"][0]["cause"] == "fixed"


def test_sources_that_cannot_be_used(tmp_path):
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff")
    for flags, sentence in (
        ({"passages": "none"}, r"--passages none: there is no such file"),
        ({"prompts": "none"}, r"--prompts none: there is no such file"),
        ({"passages": str(tmp_path / "bytes.jsonl")}, "read as UTF-8 text"),
        ({"prompt": "bees \udcff"}, "the prompt is not valid UTF-8"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            study(drift_cases.settings(tmp_path, **flags))
    assert not (tmp_path / "results").exists()
    rows = [{**TWO, "id": name} for name in ("a/b", "a-b", "é" * 120, "a\0b")]
    # ids that cannot name files are fine
    file = drift_cases.write_rows(tmp_path / "own.jsonl", rows)
    job = study(forced(tmp_path, passages=file, methods="never"))
    masks = [row["masks"] for row in results(job).values() if row["masks"]]
    assert len(set(masks)) == 4 and all((job.path / name).exists() for name in masks)


def test_texts_are_those_of_the_models_own_generate(tmp_path):
    rows = results(study(free(tmp_path, methods="never,interval:8", limit=1, generation=100)))
    assert list(rows) == [f"free/one/{m}/0" for m in ("dense", "never@0.5", "interval:8@0.5")]
    model, tokenizer = loaded()
    ids = tokenizer(drift_cases.PROMPTS[0]["text"], return_tensors="pt").input_ids
    options = {"max_new_tokens": 100, "do_sample": False}
    config = PruneConfig.build("dart", sparsity=0.5, drift="never", min_evidence=0)
    with torch.inference_mode():
        plain = model.generate(ids, **options)
        with Run(model, config):
            pruned = model.generate(ids, **options)
    for label, generated in (("dense", plain), ("never@0.5", pruned)):
        text = tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
        assert rows[f"free/one/{label}/0"]["text"] == text
    row = rows["free/one/interval:8@0.5/0"]
    assert (row["prompt_tokens"], row["decoded_tokens"]) == (ids.shape[1], 100)
    assert [m["step"] for m in row["remasks"]] == [0, 40, 80]  # 8 pruned, 32 observed, and again
    assert row["accounting"]["dense_token_share"] == pytest.approx((32 + 32 + 11) / 99)


def test_a_text_ends_where_the_model_ends_it():
    model, tokenizer = loaded()
    prompt = read_prompt(Source("one", drift_cases.PROMPTS[0]["text"]), tokenizer, None, 20, None)
    made = write_text(BoundMethod(model, tokenizer, None), None, prompt, 20)
    assert (len(made["pieces"]), made["finish"]) == (20, "length")
    ending = deepcopy(model)
    with torch.inference_mode():
        third = int(model.generate(prompt.ids[None], max_new_tokens=3, do_sample=False)[0, -1])
    ending.generation_config.eos_token_id = third
    stopped = write_text(BoundMethod(ending, tokenizer, None), None, prompt, 20)
    first = made["pieces"].index(made["pieces"][2])
    assert stopped["pieces"] == [*made["pieces"][:first], ""]
    assert (stopped["text"], stopped["finish"]) == ("".join(made["pieces"][:first]), "eos")


def test_metrics_compare_with_the_dense_text_of_the_same_seed(tmp_path, monkeypatch):
    """The share of equal characters stands for every number."""

    def compare(candidate, reference, tools=None):
        same = sum(a == b for a, b in zip(candidate, reference, strict=False))
        return dict.fromkeys(NUMBERS, same / len(reference))

    tools = SimpleNamespace(notes=("made by hand",), to_dict=lambda: {"embedder": "none"})
    monkeypatch.setattr("dart_llm.evaluation.text_metrics.load_tools", lambda *a, **k: tools)
    monkeypatch.setattr("dart_llm.evaluation.text_metrics.compare", compare)
    flags = {"methods": "never,dart", "seeds": "0,1", "temperature": 1.0, "metrics": True}
    job = study(free(tmp_path, **flags))
    rows = results(job)
    assert rows["free/one/dense/0"]["text"] != rows["free/one/dense/1"]["text"]
    for key, row in rows.items():
        dense = rows[f"free/{row['source']}/dense/{row['seed']}"]["text"]
        expected = None if row["label"] == "dense" else compare(row["text"], dense)
        assert row["metrics"] == expected, key
    line = job.summary["rows"][1]
    values = [r["metrics"]["bleu"] for r in rows.values() if r["label"] == "never@0.5"]
    assert line["metrics"]["bleu"]["mean"] == pytest.approx(sum(values) / 4)
    assert line["metrics"]["bleu"]["n"] == 2 and line["loss"] is None


def test_without_the_extra_the_study_continues_and_names_what_to_install(tmp_path, monkeypatch):
    missing = mock.Mock(side_effect=MissingExtra("sacrebleu", "drift"))
    monkeypatch.setattr("dart_llm.evaluation.text_metrics.load_tools", missing)
    job = study(free(tmp_path, methods="never", metrics=True, limit=1, generation=8))
    assert results(job)["free/one/never@0.5/0"]["metrics"] is None
    sentence = "no metrics: this needs sacrebleu, which is not installed: pip install"
    assert any(sentence in note for note in job.summary["notes"])


def run_of(key="forced/two/interval:40@0.5/0"):
    return next(run for run in finished().runs if run.key == key)


def render(runs):
    job = finished()
    document = summary.summarise(runs, job.settings.model, job.dtype)
    return report.render(runs, job.config, document)


def test_recovery_by_hand():
    flat = [None, *[2.0] * 99]
    assert summary.recovery(flat, flat, [0, 50]) == [0]  # dense itself
    late = [2.0 if loss is None else loss + (50 <= k < 70) for k, loss in enumerate(flat)]
    assert summary.recovery(late, flat, [0, 50]) == [17]  # 3 of 32 tokens, not 4, are within 0.1
    higher = [2.0 if loss is None else loss + 0.11 * (k >= 50) for k, loss in enumerate(flat)]
    assert summary.recovery(higher, flat, [0, 50]) == [None]
    assert summary.recovery(flat[:80], flat[:80], [0, 50]) == [None]  # no window of 32 fits
    assert summary.recovery(flat, flat, [0, 40, 60]) == [None, 0]  # nor before the next change


def test_a_method_that_removed_much_less_does_not_win():
    methods = [("dense", 0.0, 3.0), ("never@0.5", 0.5, 4.0), ("dart@0.5", 0.46, 3.8)]
    methods += [("interval:8@0.5", 0.2, 3.2)]
    rows = [
        {"label": label, "method": label[:5], "achieved_sparsity": share, "metrics": None}
        | {"loss": {"after": {"mean": loss}}}
        for label, share, loss in methods
    ]
    assert [row["label"] for row in summary.comparable(rows)] == ["never@0.5", "dart@0.5"]
    assert summary.headline({"rows": rows}).startswith(
        "dart@0.5: loss after the changes 3.800 at 46 % achieved sparsity, the best of 2 methods"
    )
    rows[2] |= {"loss": None, "metrics": {"document_similarity": {"mean": 0.7}}}
    assert summary.headline({"rows": [rows[0], rows[2]]}).startswith(
        "dart@0.5: document_similarity 0.700 at 46 %"
    )
    assert summary.headline({"rows": rows[:1]}) == ""


def test_a_failed_run_is_counted_and_named():
    *measured, last = finished().runs
    failed = [*measured, replace(last, record=EMPTY, error="no <b>memory")]
    document = summary.summarise(failed, "tiny", "float32")
    assert [(row["runs"], row["failed"]) for row in document["rows"]] == [(2, 0)] * 3 + [(1, 1)]
    assert "no <b>memory" in Page(render(failed)).text
    lines = summary.result_lines({**document, "rows": [{**document["rows"][3], "runs": 0}]})
    assert lines[0].error == "every run failed: see results.jsonl"


def test_loss_around_the_change():
    runs = finished().runs
    curves = report.excess_curves(runs)
    assert set(curves) == {run.label for run in runs} - {"dense"}
    interval, reference = run_of(), run_of("forced/two/dense/0")
    _, change, end = interval.topics[1]
    excess = np.subtract(interval.record["losses"][1:], reference.record["losses"][1:])
    two = [run for run in runs if run.source.id == "two"]
    bins = report.excess_curves(two)["interval:40@0.5"]
    assert max(bins) == (end - change) // 16 * 16 - 16  # whole bins, within the topic
    for start in (-16, 0, 32):  # the first token has no loss
        mean = excess[change + start - 1 : change + start + 15].mean()
        assert (bins[start].estimate, bins[start].n) == (pytest.approx(mean), 1)
    assert curves["dart@0.3"][0].n == 2  # a source is one item, however many changes it has
    plot = report.plot_loss(runs, "")
    assert "no bands: passages too few (n = 2)" in plot.small
    curve = axes_of(plot)[2].lines[0]
    assert list(curve.get_ydata()) == [mean.estimate for mean in curves["dart@0.3"].values()]


def test_pictures_have_the_numbers():
    sections = report.pictures(finished().runs, finished().config)
    drawn = {plot.name: plot for plots in sections.values() for plot in plots}
    assert {"loss", "similarity", "similarity-2", "overlap", "overlap-3"} < set(drawn)
    masks = run_of().record["remasks"]
    plot = next(p for n, p in drawn.items() if n.startswith("overlap") and "two" in p.title)
    (mesh,) = axes_of(plot)[0].collections
    values = mesh.get_array().reshape(4, len(masks))
    assert values[:, 1].tolist() == pytest.approx(masks[1]["jaccard"])
    assert values[:, 0].tolist() == [1.0] * 4
    assert report.chance([0.5, 0.5]) == pytest.approx(1 / 3)


def test_the_page_has_the_numbers_and_escapes_the_names():
    named = deepcopy(finished().runs)
    for run in named:
        run.record["topics"][0]["name"] = "<i>&"
    html = render(named)
    check_alone(html)
    page, job, mask = Page(html), finished(), run_of().record["remasks"][1]
    assert page.row("dart@0.3") == [*summary.table(job.summary).cells()[3]]
    assert summary.headline(job.summary) in page.text.replace("\xa0", " ")
    row = page.row("passage two", "interval:40@0.5", str(mask["step"]))
    assert row[3:5] == [mask["cause"], f"<i>&, token {mask['step']}"]
    assert row[-1] == f"{sum(mask['kept']):,}" and "<i>" not in html


def test_free_texts_are_side_by_side(monkeypatch):
    text = "A ledger <script>alert(1)</script> balances."
    runs = [run_of(f"forced/two/{method}/0") for method in ("dense", "dart@0.3")]
    changes = {"losses": None, "text": text}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    html = render([replace(run, mode="free", record=run.record | changes) for run in runs])
    assert "A ledger &lt;script&gt;alert(1)&lt;/script&gt; balances." in html
    positions = [html.index(f"<article><h3>{name}") for name in ("dense", "dart@0.3")]
    assert positions == sorted(positions) and "tokens dense" in Page(html).text
    assert "No plots: this needs matplotlib, which is not installed" in Page(html).text
