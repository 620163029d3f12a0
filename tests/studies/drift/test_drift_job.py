"""The study `dart-llm drift`: lines, summary and files of a run, failed cells, refused sources.

That it resumes, and what a full disk costs, is tested for all studies in tests/experiments.
"""

import math

import pytest
from safetensors import safe_open

from dart_llm.errors import ConfigError
from dart_llm.evaluation.perplexity import score_window
from dart_llm.evaluation.windows import Window
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.run import Run
from dart_llm.studies.drift.cell import recovery
from drift_cases import (
    PROMPT,
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
from stopping import Stopping
from written import lines, read


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures have tests of their own."""
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def whole():
    return finished()


def test_every_cell_is_a_row_in_grid_order(whole):
    labels = ["dense", "never@0.5", "interval:40@0.5", "dart@0.3", "fresh:4@0.5", "decay:8@0.5"]
    rows = lines(whole.path / "results.jsonl")
    keys = [f"forced/{source}/{label}/0" for source in ("two", "three") for label in labels]
    assert [row["key"] for row in rows] == keys
    assert {(row["status"], row["error"], row["finish"]) for row in rows} == {("done", None, "end")}
    assert rows[0]["accounting"] is None and rows[3]["cell"]["sparsity"] == 0.3
    numbers = lines(whole.path / "rows.jsonl")
    assert [(n["label"], n["value"]) for n in numbers] == [
        (line["label"], line["loss"]["after"]["mean"]) for line in whole.summary["rows"]
    ]


def test_a_row_is_what_a_run_of_the_library_gives(whole):
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
    assert row["accounting"]["achieved_sparsity"] == pytest.approx(report.achieved_sparsity)
    (start,) = (change - PROMPT for change in TWO["changes"])
    after = scored.losses[start - 1 :]  # the first token after the prompt has no loss
    topic = row["loss"]["topics"][1]
    assert (topic["start"], topic["tokens"]) == (start, len(after))
    assert topic["mean_loss"] == pytest.approx(sum(after) / len(after), abs=1e-6)
    assert topic["first"][1] == pytest.approx(sum(after[16:32]) / 16, abs=1e-6)
    assert topic["later"]["mean_loss"] == pytest.approx(sum(after[20:]) / len(after[20:]), abs=1e-6)
    tokens = {one["key"]: one for one in lines(whole.path / "tokens.jsonl")}
    own, dense = (tokens[f"forced/two/{m}/0"]["losses"] for m in ("interval:40@0.5", "dense"))
    assert own[1:] == pytest.approx(list(scored.losses), abs=1e-6)
    assert row["loss"]["recovery"] == recovery(own, dense, [0, start])


def test_masks_and_windows_have_files(whole):
    rows = results(whole)
    names = {path.name for path in (whole.path / "masks").iterdir()}
    pruned = [row for row in rows.values() if row["accounting"]]
    assert names == {f"{row['key'].replace('/', '-')}.safetensors" for row in pruned}
    row = rows["forced/three/fresh:4@0.5/0"]
    with safe_open(whole.path / "masks" / "forced-three-fresh:4@0.5-0.safetensors", "pt") as file:
        for number, mask in enumerate(row["remasks"]):
            kept = [len(file.get_tensor(f"remask{number}.layer{k}.ids")) for k in range(4)]
            assert kept == mask["kept"] and min(kept) > 0
    assert [mask["cause"] for mask in row["remasks"]] == ["first", "forced", "forced"]
    csv = (whole.path / "drift.csv").read_text(encoding="utf-8").splitlines()
    assert csv[0].startswith("key,sequence,row,step,layer,window,similarity,threshold")
    assert len(csv) - 1 == sum(len(row["checks"]) for row in rows.values()) > 0


def test_the_summary_follows_from_the_rows(whole):
    rows = results(whole)
    summary = read(whole.path / "summary.json")
    found = {line["label"]: line for line in summary["rows"]}
    own = [rows[f"forced/{source}/never@0.5/0"] for source in ("two", "three")]
    topics = [topic for row in own for topic in row["loss"]["topics"][1:]]
    tokens = sum(topic["tokens"] for topic in topics)
    mean = math.fsum(topic["tokens"] * topic["mean_loss"] for topic in topics) / tokens
    line = found["never@0.5"]
    assert line["loss"]["after"]["mean"] == pytest.approx(mean, abs=1e-9)
    assert line["loss"]["after"]["n"] == 2 and line["loss"]["recovery"]["changes"] == 3
    gap = line["loss"]["after"]["mean"] - found["dense"]["loss"]["after"]["mean"]
    assert line["loss"]["after_minus_dense"]["mean"] == pytest.approx(gap, abs=1e-9)
    assert line["loss"]["after_minus_never"]["mean"] == 0.0
    assert found["dart@0.3"]["loss"]["after_minus_never"] is None  # no never at that sparsity
    assert found["dense"]["achieved_sparsity"] == 0.0 and found["dense"]["dense_token_share"] == 1.0
    weights = [row["accounting"]["decoded_tokens"] for row in own]
    achieved = [row["accounting"]["achieved_sparsity"] for row in own]
    assert line["achieved_sparsity"] == pytest.approx(
        sum(w * a for w, a in zip(weights, achieved, strict=True)) / sum(weights)
    )
    assert found["fresh:4@0.5"]["remasks"] == 3 and found["fresh:4@0.5"]["remasks_per_cell"] == 1.5
    assert found["fresh:4@0.5"]["loss"]["from"] == 20


def test_a_cell_whose_masks_were_lost_is_computed_again(tmp_path):
    asked = forced(tmp_path, methods="never", limit=1)
    with pytest.raises(KeyboardInterrupt):
        study(asked, Stopping(2))
    (path,) = (tmp_path / "results").rglob("*.safetensors")
    path.unlink()
    job = study(asked)
    assert path.exists() and list(results(job)) == ["forced/two/dense/0", "forced/two/never@0.5/0"]


def test_seeds_are_averaged_within_a_source(tmp_path):
    text = tmp_path / "calibration.txt"
    text.write_text("".join(f"the tide number {n * n} goes out by {n}. " for n in range(60)))
    more = {"calibration": str(text), "cache_dir": str(tmp_path / "cache")}
    asked = forced(tmp_path, methods="random,wanda", seeds="0,1", limit=1, **more)
    job = study(asked)
    rows = results(job)
    one, two = (rows[f"forced/two/random@0.5/{seed}"]["loss"]["topics"][1] for seed in (0, 1))
    assert one["mean_loss"] != two["mean_loss"]
    line = read(job.path / "summary.json")["rows"][1]
    assert (line["cells"], line["sources"], line["loss"]["after"]["n"]) == (2, 1, 1)
    both = (one["mean_loss"] + two["mean_loss"]) / 2
    assert line["loss"]["after"]["mean"] == pytest.approx(both)
    assert line["loss"]["after"]["low"] is None  # one source says nothing of the spread
    own = rows["forced/two/wanda@0.5/0"]  # calibrated presets stand beside dart
    assert own["accounting"]["achieved_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert own["remasks"][0]["cause"] == "fixed"


def test_sources_that_cannot_be_used(tmp_path):
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff")
    alike = write_rows(tmp_path / "c.jsonl", [{"id": n, "text": "x"} for n in ("a/b", "a-b")])
    cases = [
        (forced(tmp_path, passages="none"), r"--passages none: there is no such file"),
        (free(tmp_path, prompts="none"), r"--prompts none: there is no such file"),
        (forced(tmp_path, passages=str(tmp_path / "bytes.jsonl")), "cannot be read as UTF-8 text"),
        (free(tmp_path, prompts=alike), 'ids "a/b" and "a-b" would give two cells one file'),
        (settings(tmp_path, prompt="bees \udcff"), "the prompt is not valid UTF-8"),
    ]
    for number, name in enumerate(("é" * 120, "a\0b")):
        file = write_rows(tmp_path / f"{number}.jsonl", [{**TWO, "id": name}])
        cases.append((forced(tmp_path, passages=file), f'named after the id "{name[:40]}'))
    for asked, sentence in cases:
        with pytest.raises(ConfigError, match=sentence):
            study(asked)
    assert not (tmp_path / "results").exists()
    with pytest.raises(ConfigError, match=r'"two" has \d+ tokens before its first'):
        study(forced(tmp_path, prompt_tokens=len(TWO["text"])))
    (folder,) = (tmp_path / "results").glob("*/*")
    assert lines(folder / "results.jsonl") == []  # said before anything is computed
