"""The flags of ``dart-llm sweep`` and ``compare``: a grid, options of its tasks, where it runs."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from dart_llm.errors import UnknownName
from dart_llm.experiments.trackers import TRACKERS
from dart_llm.settings import Settings, setting

GRID, TASK, RUN, MODEL = "Grid", "Tasks", "Run", "Model"

OPTIONS = (
    "limit",
    "sample_seed",
    "num_fewshot",
    "include_path",
    "batch_size",
    "apply_chat_template",
    "prompt_tokens",
    "scored_tokens",
    "window",
    "stride",
    "max_output",
)
"""Fields that are options of the grid's tasks."""

PLACE = ("experiment_name", "results_dir", "engine", "workers", "tracker")
"""Fields that say where and how the cells run."""


class SweepFlags(Settings):
    """Every flag; None means "not given".  Lists are written with commas."""

    models: str | None = setting(GRID, "Models (default: smollm2-135m).")
    methods: str | None = setting(GRID, "Methods; dart-llm methods lists them.")
    sparsities: str | None = setting(GRID, "Fractions of FFN neurons to remove, e.g. 0.3,0.5.")
    tasks: str | None = setting(
        GRID, "lm-eval tasks, perplexity:TEXT, summarize:DATA; e.g. arc_easy,perplexity:embedded."
    )
    seeds: str | None = setting(GRID, "Seeds (default: 0).")
    protocols: str | None = setting(GRID, "decode, full, published, standard (default: decode).")
    layers: str | None = setting(GRID, "Prune layers by themselves: each, or ranges 0-3,4-7.")
    keep: str | None = setting(GRID, "Fraction that such a layer keeps, e.g. 0.5.")
    base_keep: float | None = setting(GRID, "Fraction that the other layers keep (default: all).")
    compensation: bool | None = setting(GRID, "For every method: with or without compensation.")
    budget: str | None = setting(GRID, "For every method: this allocator over layers.")
    drift: str | None = setting(GRID, "For every method: this drift rule.")
    calibration: str | None = setting(GRID, "Text for methods that calibrate.")
    limit: int | None = setting(TASK, "Items per task (default: all).")
    sample_seed: int | None = setting(TASK, "Choose the items at random with this seed.")
    num_fewshot: int | None = setting(TASK, "Examples before each item.")
    include_path: str | None = setting(TASK, "Folder with further lm-eval task files.")
    batch_size: int | None = setting(TASK, "Continuations in one forward (default: 8).")
    apply_chat_template: bool | None = setting(TASK, "Wrap contexts in the model's template.")
    prompt_tokens: int | None = setting(TASK, "Prompt tokens of a slice (default: 256).")
    scored_tokens: int | None = setting(TASK, "Scored tokens of a slice (default: 256).")
    window: int | None = setting(TASK, "Window of protocol standard (default: 2048).")
    stride: int | None = setting(TASK, "Its stride (default: the window).")
    max_output: int | None = setting(TASK, "Tokens per summary (default: 256).")
    dtype: str | None = setting(MODEL, "float32, float16, bfloat16 (default: the checkpoint's).")
    device: str | None = setting(MODEL, "0, cuda:0, cpu or mps (default: GPU 0, else CPU).")
    device_map: str | None = setting(MODEL, "How layers are spread over devices, e.g. auto.")
    revision: str | None = setting(MODEL, "Branch, tag or commit of a hub model.")
    attn_implementation: str | None = setting(MODEL, "Attention kernel: eager, sdpa, ...")
    trust_remote_code: bool | None = setting(MODEL, "Run code that comes with the checkpoint.")
    cache_dir: str | None = setting(MODEL, "Where weights are kept.")
    experiment_name: str | None = setting(RUN, "Folder under --results-dir (default: the command).")
    results_dir: str = setting(RUN, "Folder for results.", "results")
    engine: str = setting(RUN, "local, or ray: spread cells over a cluster.", "local")
    workers: int | None = setting(RUN, "Worker processes of the ray engine.")
    tracker: str | None = setting(RUN, "trackio, wandb, mlflow or tensorboard.")

    @model_validator(mode="after")
    def _check_tracker(self) -> SweepFlags:
        if self.tracker and self.tracker not in TRACKERS:
            raise UnknownName("tracker", self.tracker, TRACKERS)
        return self

    def grid_flags(self) -> dict[str, Any]:
        """What ``grid.collect`` takes."""
        data = self.model_dump(exclude_none=True, exclude=set(PLACE))
        options = {name: data.pop(name) for name in OPTIONS if name in data}
        names = ("compensation", "budget", "drift")
        overrides = {name: data.pop(name) for name in names if name in data}
        return {**data, "options": options, "overrides": overrides}
