"""From flags, files and variables to the specification of a sweep, and from that to its cells."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_llm.errors import ConfigError, LoadError
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.model_facts import DEFAULT_LAYERS, layer_count
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.layer_table import parse_layer_spec
from dart_llm.pruning.registry import METHODS
from dart_llm.studies.sweep.grid import collect, expand
from dart_llm.studies.sweep.study import SweepRequest
from tiny import LAYERS
from tiny_gpt2 import write_gpt2

TASK = "perplexity:embedded"


@pytest.fixture(autouse=True, scope="module")
def _rounded() -> Iterator[None]:
    """A form of the dense model by another name, as dense-8bit is."""
    METHODS.register("dense-test", PruneConfig(method="dense-test", sparsity=0.0))
    yield
    METHODS.unregister("dense-test")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpt2(tmp_path_factory.mktemp("gpt2") / "model")


def cells(**data: Any) -> tuple[Cell, ...]:
    return expand(collect({"tasks": TASK, **data}))


def test_the_table_order_is_model_task_protocol_seed_method_sparsity() -> None:
    found = cells(
        models="smollm2-135m,some/model",
        methods="griffin,dense",
        sparsities="0.5,0.3",
        tasks="arc_easy,winogrande",
        seeds="0,1",
        protocols="decode,full",
    )
    keys = [
        (c.model, c.task, c.options.protocol, c.seed, c.method, c.sparsity or 0.0) for c in found
    ]
    assert len(found) == 2 * 2 * 2 * 2 * 3 == len(set(keys))
    assert keys[:4] == [
        ("smollm2-135m", "arc_easy", "decode", 0, "griffin", 0.5),
        ("smollm2-135m", "arc_easy", "decode", 0, "griffin", 0.3),
        ("smollm2-135m", "arc_easy", "decode", 0, "dense", 0.0),
        ("smollm2-135m", "arc_easy", "decode", 1, "griffin", 0.5),
    ]
    assert keys[-1] == ("some/model", "winogrande", "full", 1, "dense", 0.0)
    assert all(c.options.seed == c.seed for c in found)


def test_a_cell_has_what_decides_its_result_alone() -> None:
    found = cells(methods="dense,dense-test,griffin", sparsities="0.1,0.2,0.3")
    labels = ["dense", "dense-test", "griffin@0.1", "griffin@0.2", "griffin@0.3"]
    assert [c.label for c in found] == labels
    assert cells(methods="dense") == cells(
        methods="dense", sparsities="0.5", overrides={"seed": 3}, calibration="embedded"
    )
    reads = cells(methods="griffin,wanda", sparsities="0.5", calibration="embedded")
    assert [(c.method, c.calibration) for c in reads] == [("griffin", None), ("wanda", "embedded")]
    (own,) = cells(methods="griffin")  # without sparsities presets keep their own
    assert own.sparsity is None and own.label == "griffin"


def test_overrides_reach_the_configuration() -> None:
    (found,) = cells(
        methods="dart",
        sparsities="0.4",
        seeds="7",
        overrides={"compensation": False, "budget": "uniform", "drift": {"min_distance": 9}},
    )
    config = found.config()
    assert (config.sparsity, config.seed, config.compensation) == (0.4, 7, False)
    assert (config.budget.name, config.drift.rule, config.drift.min_distance) == (
        "uniform",
        "dart",
        9,
    )


def test_layers_by_themselves_with_the_dense_line(gpt2: Path) -> None:
    found = cells(models=str(gpt2), methods="griffin", layers="each", keep="0.5")
    labels = [f"griffin layers {layer} keep 0.5" for layer in range(LAYERS)]
    assert [c.label for c in found] == ["dense", *labels]
    tables = [c.config().budget.table for c in found[1:]]
    assert tables == ["0:0.5", "1:0.5", "2:0.5", "3:0.5"]
    assert all(c.config().sparsity is None for c in found[1:])
    found = cells(
        models=str(gpt2),
        methods="griffin,dense",
        layers=["0-1", "2,3"],
        keep=[0.5, 0.25],
        base_keep=0.9,
        overrides={"budget": {"multiple": 8}},
    )
    pruned = [c for c in found if c.method == "griffin"]
    assert len(found) == 5
    assert [(c.layers, c.keep, c.base_keep) for c in pruned] == [
        ("0-1", 0.5, 0.9),
        ("2,3", 0.5, 0.9),
        ("0-1", 0.25, 0.9),
        ("2,3", 0.25, 0.9),
    ]
    assert pruned[1].config().budget.table == "all:0.9,2,3:0.5"
    assert all(c.config().budget.multiple == 8 for c in pruned)


def test_tasks_have_shortcuts_and_options_of_their_own() -> None:
    found = cells(methods="dense", tasks="general-nlp,arc_easy,mmlu")
    seven = "boolq rte hellaswag winogrande arc_easy arc_challenge openbookqa".split()
    assert [c.task for c in found] == [*seven, "mmlu"]
    found = cells(
        methods="dense",
        tasks=["general-nlp", TASK],
        options={"limit": 4, "batch_size": 2},
        task_options={"general-nlp": {"limit": 3}},
    )
    assert {c.options.limit for c in found[:-1]} == {3} and found[-1].options.limit == 4
    assert {c.options.batch_size for c in found} == {2}


def test_layers_of_models(gpt2: Path, tmp_path: Path) -> None:
    assert layer_count(Cell(str(gpt2), "dense", TASK)) == LAYERS
    assert layer_count(Cell("SmolLM2-135M", "dense", TASK)) == DEFAULT_LAYERS
    with pytest.raises(LoadError, match="not in the hub's cache"):
        layer_count(Cell("nobody/nothing", "dense", TASK))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(LoadError, match="does not say how many layers"):
        layer_count(Cell(str(tmp_path / "x.gguf"), "dense", TASK))


@pytest.mark.smollm2
def test_layers_of_the_default(smollm2: Any) -> None:
    assert smollm2[0].config.num_hidden_layers == DEFAULT_LAYERS


@pytest.fixture
def file(tmp_path: Path) -> Path:
    data = {
        "model": "a/b",
        "method": ["dense", "griffin"],
        "sparsity": [0.3, 0.5],
        "task": TASK,
        "options": {"limit": 4, "batch_size": 2},
        "dtype": "float32",
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def test_flags_win_over_variables_over_the_file_over_defaults(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = SweepRequest.collect("sweep", {"sparsities": "0.7", "limit": 8, "seeds": None}, file)
    grid = request.grid
    assert (grid.models, grid.methods) == (("a/b",), ("dense", "griffin"))
    assert (grid.sparsities, grid.seeds, grid.dtype) == ((0.7,), (0,), "float32")
    assert grid.options == {"limit": 8, "batch_size": 2}
    assert (request.place.root, request.place.experiment) == (Path("results"), "grid")
    for name, value in {
        "MODEL": "c/d",
        "METHODS": "flap",
        "SPARSITY": "0.2",
        "LIMIT": "9",
        "PROMPT_TOKENS": "32",
        "CALIBRATION": "text.txt",
        "REVISION": "v2",
        "DRIFT": "never",
        "RESULTS_DIR": "elsewhere",
        "EXPERIMENT_NAME": "mine",
        "ENGINE": "ray",
        "WORKERS": "3",
        "TRACKER": "mlflow",
    }.items():
        monkeypatch.setenv(f"DART_{name}", value)
    request = SweepRequest.collect("sweep", {"sparsities": "0.7", "limit": 8}, file)
    grid, flags = request.grid, request.flags
    assert (grid.models, grid.methods, grid.sparsities) == (("c/d",), ("flap",), (0.7,))
    assert grid.options == {"limit": 8, "batch_size": 2, "prompt_tokens": 32}
    assert (grid.calibration, grid.revision, grid.overrides) == (
        *("text.txt", "v2"),
        {"drift": "never"},
    )
    assert (request.place.root, request.place.experiment) == (Path("elsewhere"), "mine")
    assert (flags.engine, flags.workers, flags.tracker) == ("ray", 3, "mlflow")
    plain = SweepRequest.collect("compare", {"tasks": TASK}, defaults={"seeds": "5"})
    assert (plain.grid.seeds, plain.grid.methods) == ((5,), ("flap",))


def test_layers_leave_out_the_default_sparsities() -> None:
    flags = {"tasks": TASK, "methods": "griffin", "layers": "0-1", "keep": "0.5"}
    request = SweepRequest.collect("compare", flags, defaults={"sparsities": "0.5"})
    assert request.grid.sparsities == ()
    assert [cell.method for cell in request.cells()] == ["dense", "griffin"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"metods": "dense"}, 'did you mean "methods"'),
        ({"methods": "grifin"}, "did you mean griffin"),
        ({"protocols": "dekode"}, "did you mean decode"),
        ({"protocols": "standard", "tasks": "arc_easy"}, 'arc_easy has no protocol "standard"'),
        ({"tasks": ""}, "names no tasks"),
        ({"tasks": "perplexity:no-such-text"}, 'no text "no-such-text"'),
        ({"models": []}, "names no models"),
        ({"sparsities": "50"}, "did you mean 0.5"),
        ({"sparsities": "half"}, "sparsities.0 = 'half'"),
        ({"sparsities": [[0.3]]}, "sparsities must be a plain list"),
        ({"seeds": "-1"}, "seed -1"),
        ({"seeds": "1.5"}, "seeds.0 = '1.5'"),
        ({"task": "x", "tasks": "y"}, "gives tasks twice"),
        ({"keep": 0.5}, "belong to layers"),
        ({"base_keep": 0.5}, "belong to layers"),
        ({"layers": "each"}, "needs keep"),
        ({"layers": "each", "keep": 0.5, "sparsities": 0.3}, "drop the sparsities"),
        ({"layers": "each,0-3", "keep": 0.5}, "not both"),
        ({"layers": "0-3:0.5", "keep": 0.5}, "the value in keep"),
        ({"layers": "0-3", "keep": 50}, "a keep ratio lies in"),
        ({"layers": "0-3", "keep": 0.5, "base_keep": 0}, "a keep ratio lies in"),
        ({"layers": "5-3", "keep": 0.5}, "runs backwards"),
        ({"layers": "0-3", "keep": 0.5, "methods": "dense"}, "a method that prunes"),
        ({"options": {"limits": 3}}, "did you mean limit"),
        ({"options": {"limit": 0}}, "limit = 0 must be 1 or more"),
        ({"options": {"limit": "many"}}, "limit = 'many'"),
        ({"options": {"limit": True}}, "limit = True"),
        ({"options": {"protocol": "full"}}, "write protocols"),
        (
            {"task_options": {"arc_eazy": {"limit": 1}}, "tasks": "arc_easy"},
            "did you mean arc_easy",
        ),
        ({"task_options": {TASK: {"limit": 0}}}, "limit = 0 must be 1 or more"),
        ({"overrides": {"compensate": True}}, 'did you mean "compensation"'),
        ({"overrides": {"score": "weigth"}}, "did you mean weight"),
    ],
)
def test_errors_are_one_sentence(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        cells(**{"methods": "griffin", **data})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


names = st.lists(
    st.sampled_from(["dense", "griffin", "dart", "static", "published"]), min_size=1, unique=True
)
amounts = st.lists(st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.7]), min_size=1, unique=True)
numbers = st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True)


@settings(max_examples=60, deadline=None)
@given(methods=names, sparsities=amounts, seeds=numbers, tasks=st.integers(1, 3))
def test_the_number_of_cells(
    methods: list[str], sparsities: list[float], seeds: list[int], tasks: int
) -> None:
    data: dict[str, Any] = {
        "methods": methods,
        "sparsities": sparsities,
        "seeds": seeds,
        "tasks": [f"task{n}" for n in range(tasks)],
    }
    found = cells(**data)
    pruned = len([m for m in methods if m != "dense"])
    each = ("dense" in methods) + pruned * len(sparsities)
    assert len(found) == tasks * len(seeds) * each == len({c.key for c in found})
    as_text = {k: ", ".join(map(str, v)) for k, v in data.items()}
    assert expand(collect(as_text)) == found
    assert cells(**{**data, "sparsities": [*sparsities, sparsities[0]]}) == found


ranges = st.tuples(st.integers(0, 3), st.integers(0, 3)).map(lambda p: f"{min(p)}-{max(p)}")


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(ranges, min_size=1, max_size=4, unique=True),
    keep=st.floats(0.01, 1.0),
    base=st.none() | st.floats(0.01, 1.0),
)
def test_layer_tables_say_what_was_asked(
    groups: list[str], keep: float, base: float | None
) -> None:
    width = 1000
    data = {"methods": "griffin", "layers": groups, "keep": keep, "base_keep": base}
    found = [c for c in cells(**data) if c.method == "griffin"]
    assert [c.layers for c in found] == groups
    for cell in found:
        table = cell.config().budget.table
        assert table is not None
        low, high = map(int, cell.layers.split("-"))
        rest = None if base is None else max(1, round(base * width))
        for layer, count in enumerate(parse_layer_spec(table).resolve([width] * 4)):
            assert count == (max(1, round(keep * width)) if low <= layer <= high else rest)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["tasks", "methods", "layers", "keep", "x"]),
        st.none() | st.text(max_size=6) | st.integers() | st.floats() | st.lists(st.text()),
        max_size=4,
    )
)
def test_nonsense_is_a_config_error_or_a_specification(data: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        found = collect({"tasks": "x", **data})
        assert found.tasks and found.methods
