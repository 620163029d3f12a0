"""``dart-llm detect``: signals, replayed detectors, rates against known changes, the study."""

import json

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dart_llm.errors import ConfigError, DartError
from dart_llm.experiments.study import run_study
from dart_llm.models.describe import decoder_layers
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.drift import SINKS, Rule, cosine, guards_allow
from dart_llm.reporting.console import Ui
from dart_llm.session.run import prune
from dart_llm.settings import BaseSettings, merge
from dart_llm.studies.drift import replay as replaying
from dart_llm.studies.drift.detect import DetectionStudy, blind_rule, study_passage, watchers
from dart_llm.studies.drift.replay import Outcome, make_watcher, outcome, rates, replay
from dart_llm.studies.drift.settings import SIGNALS, DetectSettings, collect, parse_methods
from dart_llm.studies.drift.sources import load_passages, read_passage
from drift_cases import PROMPT, THREE, TWO, write_rows
from html_page import Page, check_alone
from lm_cases import place
from steps import Same, decode, shared_model
from synthetic import HIDDEN, Driver, Stream, config, make_layers
from tiny import NAMES, tiny, tokens
from written import axes_of, lines, read


def direct(model, ids, layer):
    """v of one layer by a hook on the projection that ends the attention."""
    decoder, names, _ = decoder_layers(model)
    module, outputs = decoder[layer].get_submodule(names.attention_out), []
    handle = module.register_forward_hook(lambda m, a, output: outputs.append(output))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return outputs[0].reshape(ids.shape[1], -1).float()


@pytest.mark.parametrize("name", NAMES)
def test_recorded_signals_are_what_the_model_computes(name):
    model, ids = shared_model(name), tokens(1, 60, seed=3)
    with Same(model):
        signals = replaying.record_signals(model, ids[0], tuple(SIGNALS))
    assert list(signals) == list(SIGNALS)
    with torch.no_grad():
        logits = model.get_output_embeddings()(signals["hidden"])
        expected = model(ids).logits[0]
    last, upper = direct(model, ids, 3), direct(model, ids, 2)
    assert torch.allclose(signals["attention"], last, atol=1e-5)
    assert torch.allclose(signals["attention-80"], upper, atol=1e-5)  # round(0.8 * 3) = 2
    both = torch.cat([normalize(upper, dim=-1), normalize(last, dim=-1)], -1)
    assert torch.allclose(signals["attention-several"], both, atol=1e-5)
    if name not in ("gemma2", "gemma3"):  # these bend the logits afterwards
        assert torch.allclose(logits, expected, atol=1e-4)


def test_signals_are_finite_numbers():
    model, ids = tiny("llama"), tokens(1, 60)[0]
    with torch.no_grad():
        model.model.layers[3].self_attn.o_proj.weight[0, 0] = torch.inf
    with pytest.raises(DartError, match="the signal attention is not finite"):
        replaying.record_signals(model, ids, ("attention",))


@pytest.mark.parametrize("name", NAMES)
def test_the_detector_sees_the_last_hidden_state(name):
    """What the head of the model is given: of the prompt, dense, then of the pruned tokens."""
    prompt = 32
    model, ids, seen = shared_model(name), tokens(1, prompt + 10), list[Tensor]()
    head = model.get_output_embeddings()
    drift = {"rule": "published", "signal": "hidden"}
    with prune(model, "griffin", sparsity=0.5, drift=drift) as run:
        handle = head.register_forward_pre_hook(lambda m, args: seen.append(args[0][0].detach()))
        decode(model, ids, prompt)
        handle.remove()
    v = torch.cat(seen).float()
    first, *_ = run.drift_checks
    assert first.step == 5 and first.threshold is not None
    centroid, window = v[SINKS:prompt].mean(0), v[prompt : prompt + 5].mean(0)
    assert first.similarity == pytest.approx(float(cosine(window, centroid)), abs=1e-5)


START = 84


def shifting(*at, length=600, noise=0.3, seed=7):
    """[T, D]: a direction with noise; the next direction from each of ``at`` on."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.bucketize(torch.arange(length), torch.tensor(at), right=True)
    return torch.eye(HIDDEN)[axis] + noise * torch.randn(length, HIDDEN, generator=generator)


def test_a_change_is_noticed_after_three_windows_and_the_reference_is_renewed():
    """Reference: 80 tokens after the sinks.  Windows end at 94, 104, ..., the third low at 234."""
    steady = Rule(10, lambda mu, sigma: mu - 6 * sigma, 3)
    triggers, windows = replay(shifting(204, 454), START, replaying.Watcher("steady", steady, 50))
    # after the first: 50 tokens observed, windows from 284 on: 464 holds the change at 454 alone
    assert triggers == [234, 484]
    seen = [at for at, _ in windows]
    assert seen == [*range(94, 235, 10), *range(294, 485, 10), *range(544, 601, 10)]
    assert [check.window for _, check in windows][:16] == [*range(1, 16), 1]


def test_guards_by_hand():
    """With an allowance of 32: 64 when 5 % of n + 32 are 32, at n = 608."""
    for allowed, arguments in (
        (False, (73, 10, 0, 1, 64, None)),
        (True, (74, 10, 0, 1, 64, None)),
        (False, (287, None, 0, 32, 0, 0.1)),
        (True, (288, None, 0, 32, 0, 0.1)),
        (False, (607, 0, 32, 32, 64, 0.05, 32)),
        (True, (608, 0, 32, 32, 64, 0.05, 32)),
        (False, (608, 545, 32, 32, 64, 0.05, 32)),  # the distance counts all the same
    ):
        assert guards_allow(*arguments) is allowed, arguments


def test_rules_and_methods_by_name():
    dart = make_watcher("dart-prompt", 7)
    assert (dart.rule.window, dart.rule.count, dart.observe) == (10, 3, 32)
    assert dart.guards[:2] == (64, 0.1)
    for name in ("paper", "published", "dart"):  # the rule, not the method
        watcher = make_watcher(name, 7)
        assert (watcher.observe, watcher.guards) == (7, (0, None, 0))
    for name, error in (
        ("griffin", "never re-masks"),
        ("interval 0", "N whole tokens >= 1"),
        ("papr", "did you mean paper"),
    ):
        with pytest.raises(ConfigError, match=error):
            make_watcher(name, 7)
    rule = make_watcher("windows:10:2:1.5", 7).rule
    threshold = rule.threshold(torch.tensor([0.9]), torch.tensor([0.1]))
    assert (rule.window, rule.count, float(threshold)) == (10, 2, pytest.approx(0.75))


@pytest.mark.parametrize(
    ("rule", "guards", "observe"),
    [
        ("published", (0, None), 1),
        ("published", (90, None), 50),
        ("paper", (64, 0.1), 32),
        ("interval 40", (0, None), 32),
        ("interval 40", (64, 0.1), 50),
    ],
)
def test_equal_to_the_tracer_on_the_same_values(rule, guards, observe):
    layers = make_layers()
    stream = Stream(layers, 1, 600)
    stream.v = shifting(204, 454)[None]
    drift = {"rule": rule, "min_distance": guards[0], "max_dense_share": guards[1]}
    settings = config(drift=drift, remask={"observe_tokens": observe})
    live = Driver(settings, layers=layers, stream=stream)
    live.prefill(START)
    live.steps(600 - START)
    watcher = replaying.Watcher(rule, make_watcher(rule, observe).rule, observe, (*guards, 0))
    triggers, windows = replay(stream.v[0], START, watcher)
    expected = [check.step + START for check in live.tracer.checks if check.trigger]
    if rule.startswith("interval"):
        # a mask is built observe tokens after each trigger
        expected = [remask.step + START - observe for remask in live.announced[1:]]
        triggers = [at for at in triggers if at + observe < 600]
    assert triggers == expected and expected
    for (at, replayed), check in zip(windows, live.tracer.checks, strict=True):
        numbers = (at - START, replayed.window, replayed.counter)
        assert numbers == (check.step, check.window, check.counter)
        assert replayed.similarity == pytest.approx([check.similarity], abs=1e-5)
        threshold = check.threshold and pytest.approx([check.threshold], abs=1e-5)
        assert replayed.threshold == threshold


@pytest.mark.parametrize(
    ("triggers", "delays", "false_alarms", "late", "stationary"),
    [
        ([], (None, None), 0, 0, 100),
        ([200], (None, None), 1, 0, 100),  # of the old topic alone
        ([201], (1, None), 0, 0, 100 + 199),
        ([328], (128, None), 0, 0, 100 + 72),
        ([329], (None, None), 0, 1, 100 + 71),  # late, and stationary from then on
        ([450], (None, 50), 0, 0, 100 + 150),  # the first change was missed
        ([400], (None, None), 0, 1, 100),  # 200 late; the second change comes at once
    ],
)
def test_where_a_trigger_belongs(triggers, delays, false_alarms, late, stationary):
    result = outcome(triggers, [200, 400], 100, 600, 128)
    expected = delays, false_alarms, late, stationary
    assert (result.delays, result.false_alarms, result.late, result.stationary) == expected


def test_pooled_rates_by_hand():
    texts = [
        Outcome((128, 128), (30, None), 2, 1, 4, 1000, 1500),
        Outcome((128,), (50,), 1, 0, 2, 500, 500),
    ]
    assert rates(texts)["no_interval"] == "too few (n = 2)"
    pooled = rates(texts * 3)
    expected = {"changes": 9, "detected": 6, "rate": 2 / 3, "gain": 2 / 3 - 0.384, "late": 3}
    expected |= {"delay_median": 40, "delay_with_misses": (30 + 128 + 50) / 3, "false_alarms": 9}
    expected |= {"false_alarms_per_1000": 2.0, "tokens": 4500, "decoded": 6000, "alarms": 18}
    expected |= {"alarms_per_1000": 3.0, "blind_rate": 128 * 0.003}
    numbers = {name: value for name, value in pooled.items() if "interval" not in name}
    assert numbers == pytest.approx(expected) and pooled["no_interval"] is None
    low, high = pooled["rate_interval"]
    assert 0.5 <= low < 2 / 3 < high <= 1.0 and pooled["fa_interval"][0] <= 2.0
    assert pooled == rates(texts * 3)  # the same seed, the same intervals


def test_nothing_detected_and_a_blind_rule_have_defined_values():
    silent = outcome([], [200], 100, 400, 128)
    result = rates([silent])
    names = ("rate", "delay_median", "delay_with_misses", "blind_rate")
    assert [result[name] for name in names] == [0.0, None, 128.0, 0.0]
    assert rates([silent] * 6)["rate_interval"] == [0.0, 0.0]
    always = rates([outcome(list(range(101, 601)), [250], 100, 600, 128)] * 3)
    assert (always["rate"], always["blind_rate"], always["gain"]) == (1.0, 1.0, 0.0)
    assert always["false_alarms_per_1000"] == pytest.approx(1000, rel=0.01)
    often = Outcome((128, 64), (None, None), 0, 0, 6, 500, 500)
    assert rates([often])["blind_rate"] == pytest.approx((1 + 64 * 0.012) / 2)
    assert blind_rule("rate", 0.005, 128) == pytest.approx(0.64)
    for rate, delay in ((1 / 128, 64), (0.02, 25)):
        assert blind_rule("delay_with_misses", rate, 128) == pytest.approx(delay)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    file = write_rows(root / "passages.jsonl", [TWO, THREE])
    flags = {"model": str(place() / "model"), "passages": file, "device": "cpu", "horizon": 60}
    flags |= {"results_dir": str(root / "results"), "prompt_tokens": PROMPT}
    settings = merge(DetectSettings, {**flags, "thresholds": "0,2", "counts": "1,2"}, None, {})
    return run_study(DetectionStudy(settings, Ui(quiet=True)))


def test_detection_json_pools_the_lines_of_passages(job):
    written = lines(job.path / "results.jsonl")
    assert [line["key"] for line in written] == ["two", "three"]
    reading = read_passage(load_passages(job.settings)[1], job.tokenizer, PROMPT, None)
    assert list(reading.changes) == THREE["changes"]  # one token per character
    again = study_passage(job.model, reading, job.settings, watchers(job.settings))
    assert written[1] == json.loads(json.dumps(again))
    assert written[1]["passage"]["changes"] == list(reading.changes)
    document = read(job.path / "detection.json")
    for number, row in enumerate(document["rows"]):
        tried = [(line["rules"][number]["triggers"], line["passage"]) for line in written]
        expected = rates([outcome(at, p["changes"], PROMPT, p["tokens"], 60) for at, p in tried])
        assert {name: row[name] for name in expected} == expected
        assert row["changes"] == 3 and set(row) - set(expected) == {"signal", "rule"}
    blind = next(row for row in document["rows"] if row["rule"] == "interval 64")
    assert blind["signal"] == "none" and blind["alarms"] > 0
    points = {(p["signal"], p["n0"], p["k"]): p["alarms_per_1000"] for p in document["curves"]}
    assert set(points) == {(s, n0, k) for s in SIGNALS for n0 in (1, 2) for k in (0, 2)}
    for signal in SIGNALS:  # a lower threshold never gives more alarms at n0 = 1
        assert points[signal, 1, 2] <= points[signal, 1, 0]


def test_the_page_and_the_curves_have_the_numbers(job):
    html = (job.path / "report.html").read_text("utf-8")
    check_alone(html)
    (table,) = job.tables()
    page, cells = Page(html), next(c for c in table.cells() if c[:2] == ("hidden", "paper"))
    assert page.row("hidden", "paper") == [*cells]
    assert job.sentences()[0] in page.text.replace("\xa0", " ")
    (curves,) = job.figures()
    drawn = axes_of(curves)
    assert len(drawn) == 4  # rate and delay for each n0
    points = [p for p in job.summary["curves"] if (p["signal"], p["n0"]) == ("attention", 1)]
    assert list(drawn[0].lines[0].get_ydata()) == [point["rate"] for point in points]


DART = PruneConfig.build("dart", sparsity=0.5)


def parse(text, **base):
    settings = BaseSettings(**{"method": "dart", "sparsity": 0.5, **base})
    return {method.label: method for method in parse_methods(text.split(","), settings)}


def drift(**flags):
    return collect({"passages": "shipped", **flags}, environment={})


def detect(**flags):
    return watchers(merge(DetectSettings, flags, environment={}))


def test_methods_of_a_study():
    assert (drift().kind, drift(passages=None, prompts="shipped").kind) == ("forced", "free")
    assert drift(seeds="3,1,3").seeds == (3, 1)
    methods = drift().candidates()
    names = "never interval:64 published paper dart"
    assert [m.label for m in methods] == ["dense", *(f"{name}@0.5" for name in names.split())]
    assert methods[0].config is None and methods[0].sparsity == 0.0
    mixed = parse("dart@0.3,interval:8@0.25,paper")
    assert [m.sparsity for m in mixed.values()] == [0.0, 0.3, 0.25, 0.5]
    assert "dart@table" in parse("dart,griffin", sparsity=None, layer_topk="all:0.25")
    changed = parse("never,dart,published,griffin", budget="depth", compensation=False)
    configs = {method.name: method.config for method in changed.values()}
    for name in ("never", "dart"):
        assert (configs[name].budget.name, configs[name].compensation) == ("depth", False)
    for name in ("published", "griffin"):
        assert configs[name] == PruneConfig.build(name, sparsity=0.5)


UNGUARDED = {"min_distance": 0, "max_dense_share": None, "allowance": 0}


@pytest.mark.parametrize(
    ("name", "drift"),
    [
        ("never", {"rule": "never"}),
        ("interval:7", {"rule": "interval 7", **UNGUARDED}),
        ("paper", {"rule": "paper", "signal": "attention", **UNGUARDED}),
        ("dart", {}),
    ],
)
def test_variants_differ_from_dart_in_their_drift_rule_alone(name, drift):
    (_, method) = parse(name).values()
    assert method.name == name
    assert method.config == DART.replace({"method": name, "drift": drift})


DRIFT = [
    ({"methods": "interval:0"}, 'cannot parse the method "interval:0"'),
    ({"methods": "dart@half"}, 'cannot parse the method "dart@half"'),
    ({"methods": "drat"}, r"unknown method 'drat'; did you mean dart or gate or cats\?"),
    ({"methods": "dart@1.5"}, r"sparsity 1.5 must lie in \[0, 1\)"),
    ({"methods": "dense@0.5"}, "method dense removes nothing: drop the @0.5"),
    ({"methods": "dart,dart@0.5"}, r'"dart@0.5" was given twice'),
    ({"methods": " , "}, "methods .* at least 1 item"),
    ({"passages": None}, "mode free needs a prompt: give"),
    ({"prompt": "a"}, "--prompt and --passages: give --prompt TEXT or --prompts"),
    ({"seeds": "-1"}, "--seeds -1 must be at least 0"),
]
DETECT = [
    ({"method": "dart"}, 'unknown setting "method"'),
    ({"signals": "hiden"}, "did you mean hidden"),
    ({"thresholds": "0,inf"}, "finite"),
    ({"counts": "0,1"}, "--counts 0 must be at least 1"),
    ({"rules": "griffin"}, "griffin never re-masks"),
]


@pytest.mark.parametrize(
    ("make", "flags", "sentence"),
    [*((drift, *case) for case in DRIFT), *((detect, *case) for case in DETECT)],
)
def test_settings_that_cannot_be_used(make, flags, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make(**flags)
