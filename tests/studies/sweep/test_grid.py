"""From flags, files and variables to the cells of a grid and their keys."""

import json
from pathlib import Path

import pytest
import yaml

from dart_llm.errors import ConfigError, LoadError
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.experiments.cell import DEFAULT_LAYERS, Cell, layer_count
from dart_llm.settings import merge
from dart_llm.studies.sweep.grid import execution_order, expand
from dart_llm.studies.sweep.settings import CompareSettings, SweepSettings
from tiny import LAYERS
from tiny_gpt2 import write_gpt2

TASK = "perplexity:embedded"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return write_gpt2(tmp_path_factory.mktemp("gpt2") / "model")


def cells(kind=SweepSettings, **data):
    return expand(merge(kind, {"tasks": TASK, **data}, environment={}))


def test_cells_come_in_table_order_and_are_computed_by_model():
    lists = {"models": "smollm2-135m,some/model", "tasks": "arc_easy,winogrande", "seeds": "0,1"}
    lists |= {"methods": "griffin,dense", "sparsities": "0.5,0.3", "protocols": "decode,full"}
    grid = cells(**lists)
    rows = [(c.model, c.task, c.options.protocol, c.seed, c.method, c.sparsity or 0) for c in grid]
    assert len(grid) == 2 * 2 * 2 * 2 * 3 == len(set(rows))
    first = ("smollm2-135m", "arc_easy", "decode")
    pruned = [("griffin", 0.5), ("griffin", 0.3), ("dense", 0.0)]
    assert rows[:4] == [*((*first, 0, *way) for way in pruned), (*first, 1, "griffin", 0.5)]
    assert rows[-1] == ("some/model", "winogrande", "full", 1, "dense", 0.0)
    assert all(c.options.seed == c.seed for c in grid)
    mixed = [cell for pair in zip(grid[:24], grid[24:], strict=True) for cell in pair]
    order = execution_order(mixed)
    assert sorted(c.key for c in order) == sorted(c.key for c in grid)
    assert [c.model for c in order] == sorted(c.model for c in grid)
    ways = [(c.model, c.label, c.seed) for c in order]
    assert sum(a != b for a, b in zip(ways, ways[1:], strict=False)) == len(set(ways)) - 1


def test_a_cell_has_what_decides_its_result_alone():
    grid = cells(methods="dense,griffin", sparsities="0.1,0.2")
    assert [c.label for c in grid] == ["dense", "griffin@0.1", "griffin@0.2"]
    unused = {"sparsities": "0.5", "overrides": {"seed": 3}, "calibration": "embedded"}
    assert cells(methods="dense") == cells(methods="dense", **unused)
    reads = cells(methods="griffin,wanda", sparsities="0.5", calibration="embedded")
    assert [(c.method, c.calibration) for c in reads] == [("griffin", None), ("wanda", "embedded")]
    (preset,) = cells(methods="griffin")  # without sparsities presets keep theirs
    assert preset.sparsity is None and preset.label == "griffin"
    changes = {"compensation": False, "budget": "uniform", "drift": {"min_distance": 9}}
    (changed,) = cells(methods="dart", sparsities="0.4", seeds="7", overrides=changes)
    config = changed.config()
    assert (config.sparsity, config.seed, config.compensation) == (0.4, 7, False)
    drift = (config.drift.rule, config.drift.min_distance)
    assert (config.budget.name, *drift) == ("uniform", "dart", 9)


def test_layers_by_themselves_with_the_dense_line(gpt2):
    grid = cells(models=str(gpt2), methods="griffin", layers="each", keep="0.5")
    labels = [f"griffin layers {layer} keep 0.5" for layer in range(LAYERS)]
    assert [c.label for c in grid] == ["dense", *labels]
    assert [c.config().budget.table for c in grid[1:]] == ["0:0.5", "1:0.5", "2:0.5", "3:0.5"]
    assert all(c.config().sparsity is None for c in grid[1:])
    groups = {"layers": ["0-1", "2,3"], "keep": [0.5, 0.25], "base_keep": 0.9}
    grid = cells(methods="griffin,dense", overrides={"masking_step": 2}, **groups)
    assert [(c.layers, c.keep, c.base_keep) for c in grid if c.method == "griffin"] == [
        (group, keep, 0.9) for keep in (0.5, 0.25) for group in ("0-1", "2,3")
    ]
    assert len(grid) == 5 and grid[1].config().budget.table == "all:0.9,2,3:0.5"
    layers = {"methods": "griffin", "layers": "0-1", "keep": "0.5"}
    compared = cells(CompareSettings, **layers)  # layers set the counts
    assert [cell.label for cell in compared] == ["dense", "griffin layers 0-1 keep 0.5"]


def test_weight_formats_are_rows_of_their_own():
    grid = cells(methods="dense,griffin", sparsities="0.5", weights="dense,auto")
    labels = {"dense": "dense", "griffin@0.5": "dense", "dense auto": "auto"}
    assert {c.label: c.weights for c in grid} == {**labels, "griffin auto@0.5": "auto"}
    assert [c.label for c in cells(methods="dense", weights="auto")] == ["dense"]


def test_tasks_have_shortcuts_and_options_of_their_own():
    seven = "boolq rte hellaswag winogrande arc_easy arc_challenge openbookqa".split()
    options = {"limit": 4, "batch_size": 2, "task_options": {"general-nlp": {"limit": 3}}}
    grid = cells(methods="dense", tasks=["general-nlp", "arc_easy", TASK], **options)
    assert [c.task for c in grid][:7] == seven and grid[-1].task == TASK
    assert {c.options.limit for c in grid[:7]} == {3} and grid[-1].options.limit == 4
    assert {c.options.batch_size for c in grid} == {2}


def test_layers_of_models(gpt2, tmp_path):
    assert layer_count(Cell(str(gpt2), "dense", TASK)) == LAYERS
    assert layer_count(Cell("SmolLM2-135M", "dense", TASK)) == DEFAULT_LAYERS
    with pytest.raises(LoadError, match="not in the hub's cache"):
        layer_count(Cell("nobody/nothing", "dense", TASK))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(LoadError, match=r"x\.gguf"):
        layer_count(Cell(str(tmp_path / "x.gguf"), "dense", TASK))


def test_flags_win_over_variables_over_the_file_over_defaults(tmp_path):
    file = tmp_path / "grid.yaml"
    data = {"models": "a/b", "methods": ["dense", "griffin"], "sparsities": [0.3, 0.5]}
    data |= {"tasks": TASK, "limit": 4, "batch_size": 2, "dtype": "float32"}
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    flags = {"sparsities": "0.7", "limit": 8, "seeds": None}
    plain = merge(SweepSettings, flags, file, {})
    assert (plain.models, plain.methods) == (("a/b",), ("dense", "griffin"))
    assert (plain.sparsities, plain.seeds, plain.dtype) == ((0.7,), (0,), "float32")
    assert (plain.limit, plain.batch_size) == (8, 2)
    words = "MODELS=c/d METHODS=flap SPARSITIES=0.2 LIMIT=9 PROMPT_TOKENS=32 ENGINE=ray"
    variables = dict(f"DART_{word}".split("=") for word in words.split())
    both = merge(SweepSettings, flags, file, variables)
    assert (both.models, both.methods, both.sparsities) == (("c/d",), ("flap",), (0.7,))
    assert (both.limit, both.batch_size, both.prompt_tokens, both.engine) == (8, 2, 32, "ray")
    plain = merge(CompareSettings, {"tasks": TASK}, None, {"DART_METHODS": "flap"})
    assert (plain.sparsities, plain.methods, plain.experiment) == ((0.3,), ("flap",), "compare")


REFUSED = [
    ({"metods": "dense"}, 'did you mean "methods"'),
    ({"methods": "grifin"}, "did you mean griffin"),
    ({"protocols": "standard", "tasks": "arc_easy"}, 'arc_easy has no protocol "standard"'),
    ({"tasks": ""}, "no tasks were given"),
    ({"tasks": "perplexity:no-such-text"}, 'unknown text "no-such-text"'),
    ({"models": []}, "no models were given"),
    ({"sparsities": "50"}, "did you mean 0.5"),
    ({"sparsities": [[0.3]]}, "a list must contain single values"),
    ({"seeds": "-1"}, "seed -1"),
    ({"base_keep": 0.5}, "base_keep requires both"),
    ({"layers": "each"}, "require each other"),
    ({"layers": "each", "keep": 0.5, "sparsities": 0.3}, "drop the sparsities"),
    ({"layers": "each,0-3", "keep": 0.5}, "each"),
    ({"layers": "0-3", "keep": 50}, "write a keep ratio in"),
    ({"task_options": {TASK: {"protocol": "full"}}}, "unknown measuring option 'protocol'"),
    ({"protocols": "full", "tasks": "shift:embedded"}, 'no protocol "full"'),
    ({"task_options": {"arc_eazy": {"limit": 1}}, "tasks": "arc_easy"}, "did you mean arc_easy"),
    ({"task_options": {TASK: {"limit": 0}}}, "--limit 0 must be at least 1"),
    ({"overrides": {"compensate": True}}, 'did you mean "compensation"'),
]


@pytest.mark.parametrize(("data", "words"), REFUSED)
def test_errors_are_one_sentence(data, words):
    given = {"methods": "griffin", "tasks": TASK, **data}
    with pytest.raises(ConfigError) as error:
        expand(merge(SweepSettings, given, environment={}))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.contract("every parser round-trips")
def test_a_cell_travels_as_data():
    for cell in cells(sparsities="0.3", limit=3, overrides={"budget": "uniform"}):
        back = Cell.from_dict(json.loads(json.dumps(cell.to_dict())))
        assert back == cell and back.key == cell.key
        assert isinstance(back.options, MeasureOptions)


def test_the_key_follows_what_decides_the_result(tmp_path):
    half = {"methods": "griffin", "sparsities": "0.5"}
    changes = [{"sparsities": "0.4"}, {"seeds": "1"}, {"dtype": "float32"}, {"device": "cpu"}]
    changes += [{"protocols": "full"}, {"limit": 9}, {"models": "some/model"}]
    changes += [{"overrides": {"compensation": True}}, {"revision": "abc"}, {}]
    keys = [cells(**{**half, **change})[0].key for change in changes]
    assert len(set(keys)) == len(changes)
    assert cells(**half, cache_dir=str(tmp_path))[0].key == keys[-1]
    assert keys[-1].startswith("smollm2-135m-griffin@0.5-perplexity-embedded-decode-")


def test_a_changed_file_is_another_cell(gpt2, tmp_path, monkeypatch):
    """Weights, texts, task files and the data that they name, local MMLU questions."""
    monkeypatch.chdir(tmp_path)
    more = "doc_to_text: !function utils.text\ndataset_kwargs: {data_files: {test: data.jsonl}}\n"
    Path("datasets/mmlu").mkdir(parents=True)
    Path("tasks").mkdir()
    Path("text.txt").write_text("one")
    Path("data.jsonl").write_text("1")
    Path("tasks/mine.yaml").write_text(f"task: mine\n{more}")
    flags = {"models": str(gpt2), "methods": "dense", "include_path": "tasks"}
    flags["tasks"] = "perplexity:text.txt,mine,mmlu,mmlu:anatomy,perplexity:mmlu"
    inputs = [sorted(cell.inputs) for cell in cells(**flags)]
    assert inputs[:2] == [["model", "model_files", "text"], ["model", "model_files", "tasks"]]
    before = [cell.key for cell in cells(**flags)]
    config = str(gpt2 / "config.json")
    for name, text, changed in (
        ("other.jsonl", "not named by the task", []),
        ("text.txt", "two", [0]),
        ("data.jsonl", "2", [1, 2, 3]),
        ("tasks/mine.yaml", f"task: mine\nnum_fewshot: 1\n{more}", [1, 2, 3]),
        ("datasets/mmlu/anatomy_dev.jsonl", "one", [2, 3, 4]),
        ("datasets/mmlu/anatomy_dev.jsonl", "two", [2, 3, 4]),
        (config, Path(config).read_text() + "\n", [0, 1, 2, 3, 4]),
    ):
        Path(name).write_text(text)
        after = [cell.key for cell in cells(**flags)]
        assert [n for n, key in enumerate(after) if key != before[n]] == changed, name
        before = after
