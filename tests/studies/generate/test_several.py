"""Several settings of one prompt in one run; what is refused before weights are read."""

import json

import pytest

from dart_llm.errors import ConfigError
from dart_llm.experiments.store import read
from dart_llm.models.loading import _Builder
from dart_llm.reporting.console import Ui
from dart_llm.session.trace_file import read_trace
from dart_llm.studies.generate import study as generate_study
from dart_llm.studies.generate.settings import RunSettings, collect
from dart_llm.studies.generate.study import RunStudy, run_job
from html_page import Page
from tiny_gpt2 import CONTEXT

pytestmark = pytest.mark.usefixtures("no_pictures")


def settings(gpt2, folder, **more):
    given = {"model": str(gpt2), "prompt": "hello", "generation": 6, "results_dir": str(folder)}
    return RunSettings(**{**given, **more})


def shares(study):
    return {name: one["achieved_sparsity"] for name, one in study.accountings.items()}


def test_every_listed_setting_has_a_text_its_accounting_and_its_files(gpt2, tmp_path):
    (tmp_path / "text.txt").write_text("a b c d e f g. " * 20, encoding="utf-8")
    listed = {"methods": "griffin,published,dense", "sparsities": "0.25,0.5"}
    text = {"eval_perplexity": True, "ppl_datasets": str(tmp_path / "text.txt")}
    sizes = {"ppl_prompt_tokens": 32, "ppl_scored_tokens": 16, "ppl_max_samples": 2}
    traced = {"trace": str(tmp_path / "neurons.safetensors")}
    study = run_job(settings(gpt2, tmp_path, **listed, **text, **sizes, **traced), Ui(quiet=True))
    names = ["griffin@0.25", "griffin@0.5", "published@0.25", "published@0.5"]
    assert list(study.generations) == ["dense", *names]
    assert shares(study) == pytest.approx(dict(zip(names, [0.25, 0.5] * 2, strict=True)), abs=0.01)
    assert study.path.parent.name == f"{gpt2.name}-griffin-published-0.25-0.5"
    records = [
        json.loads(line) for line in (study.path / "generation.jsonl").read_text().splitlines()
    ]
    assert [one["variant"] for one in records] == ["dense", *names]
    assert not (study.path / "masks.safetensors").exists()
    for name in names:
        folder = study.path / name.replace("@", "-")
        assert {file.name for file in folder.iterdir()} == {
            "masks.json",
            "masks.safetensors",
            "drift.csv",
        }
        traces = tmp_path / f"neurons-{name.replace('@', '-')}.safetensors"
        assert len(read_trace(traces).arrays["token_id"]) > 0
    judged = study.timing["speed_ups"]
    assert list(judged) == names
    for name, one in judged.items():
        assert one["bytes_limit"] == pytest.approx(study.accountings[name]["bytes_limit"])
        assert one["speed_up"] is None or one["speed_up"] <= one["bytes_limit"]
    assert [row["label"] for row in study.perplexity[0]["rows"]] == ["dense", *names]
    (counted, perplexity) = study.tables()
    heads = ["griffin 25 %", "griffin 50 %", "published 25 %", "published 50 %"]
    assert counted.head == ("quantity", *heads)
    assert counted.caption == "accounting of the generated texts"
    assert counted.cells()[0][1:] == ("25 % (25 %)", "50 % (50 %)") * 2
    assert perplexity.caption.startswith(str(tmp_path / "text.txt")[:10])
    page = Page((study.path / "report.html").read_text(encoding="utf-8"))
    assert page.row("decoding")[0] == "decoding" and len(page.row("quantity")) == 1 + 2 * len(names)
    for name in ("dense", *heads):
        assert f"{name}6 tokens" in page.text.replace("\xa0", " ")
    assert page.row("methods") == ["methods", "griffin,published,dense"]
    assert "One prompt, dense and under 4 settings." in page.text.replace("\xa0", " ")
    assert page.row("griffin 25 %")[-1] == page.row("published 25 %")[-1]  # bytes
    view = read(study.path)
    assert list(view.accountings) == names


def test_a_run_of_several_settings_resumes_text_by_text(gpt2, tmp_path, monkeypatch):
    wanted = settings(gpt2, tmp_path, methods="griffin", sparsities="0.25,0.5")
    real, made = RunStudy._generate, []

    def stops(study, variant, config):
        if variant == "griffin@0.5" and len(made) == 2:
            raise KeyboardInterrupt
        made.append(variant)
        return real(study, variant, config)

    monkeypatch.setattr(RunStudy, "_generate", stops)
    with pytest.raises(KeyboardInterrupt):
        run_job(wanted, Ui(quiet=True))
    made.append("again")
    study = run_job(wanted, Ui(quiet=True))
    assert made == ["dense", "griffin@0.25", "again", "griffin@0.5"]
    assert list(study.generations) == ["dense", "griffin@0.25", "griffin@0.5"]


def test_methods_alone_take_their_own_sparsity_and_sparsities_the_method(gpt2, tmp_path):
    alone = settings(gpt2, tmp_path, methods="griffin,published", sparsity=0.25)
    assert [(one.method, one.target) for one in alone.prune_configs()] == [
        ("griffin", 0.25),
        ("published", 0.25),
    ]
    several = settings(gpt2, tmp_path, method="griffin", sparsities="0.25,0.5,0.25")
    assert [(one.method, one.target) for one in several.prune_configs()] == [
        ("griffin", 0.25),
        ("griffin", 0.5),
    ]
    dense = settings(gpt2, tmp_path, methods="dense").prune_configs()
    assert [one.method for one in dense] == ["dense"]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"methods": "a,griffin"}, "unknown method 'a'"),
        ({"methods": "griffin", "method": "dart"}, "give --method or --methods, not both"),
        ({"sparsities": "0.5", "sparsity": 0.3}, "give --sparsity or --sparsities, not both"),
        ({"sparsities": "30"}, "--sparsities 30 must lie between 0 and 1"),
        ({"sparsities": "0.5", "masks": "m"}, "drop --methods, --sparsities"),
    ],
)
def test_lists_that_cannot_be(given, sentence):
    with pytest.raises(Exception, match=sentence):
        RunSettings(prompt="hi", **given)


def test_a_list_of_a_flag_beats_what_a_weaker_source_says():
    environment = {"DART_METHOD": "dart", "DART_SPARSITY": "0.3"}
    found = collect({"methods": "griffin", "sparsities": "0.5"}, environment=environment)
    assert (found.sparsity, "method" in found.model_fields_set) == (None, False)
    assert [(one.method, one.target) for one in found.prune_configs()] == [("griffin", 0.5)]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"prompt": "a" * 1100}, "the prompt has 1100 tokens and 6 are to be generated"),
        ({"prompt": "hi", "generation": CONTEXT}, "1024 tokens are to be generated"),
        ({"prompt": "hi", "chat": True}, "no chat template"),
    ],
)
def test_what_the_context_cannot_hold_is_refused_before_weights_are_read(
    gpt2, tmp_path, monkeypatch, caplog, given, sentence
):
    monkeypatch.setattr(_Builder, "_model", lambda *arguments: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=sentence):
        run_job(settings(gpt2, tmp_path, **given), Ui(quiet=True))
    assert "indexing errors" not in caplog.text
    assert list(tmp_path.iterdir()) == []  # nor is there a folder


def test_what_others_are_measured_with_is_learnt_in_sight(gpt2, tmp_path, monkeypatch, caplog):
    """A demo's further rows learn by the command, not by the library under it."""
    monkeypatch.setattr(generate_study, "STUDIED", (("dart", 0.5),))
    (tmp_path / "text.txt").write_text("a b c d e f g. " * 20, encoding="utf-8")
    given = {"model": str(gpt2), "method": "griffin", "prompt": "hello", "generation": 4}
    given |= {"ppl_datasets": str(tmp_path / "text.txt"), "ppl_max_samples": 1, "chat": False}
    given |= {"ppl_prompt_tokens": 32, "ppl_scored_tokens": 16}
    monkeypatch.setenv("DART_CACHE", str(tmp_path / "cache"))
    study = generate_study.run_demo(Ui(quiet=True), results_dir=str(tmp_path / "r"), **given)
    told = "\n".join(study.ui.log)
    assert "learning" in told and "logging at level" not in told + caplog.text
    labels = [row["label"] for row in study.perplexity[0]["rows"]]
    assert labels == ["dense", "dart@0.5", "griffin@0.3"]
    assert study.ui.log[-3].startswith("On this model pruning ")
