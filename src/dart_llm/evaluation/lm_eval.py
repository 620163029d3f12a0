"""Any lm-eval task, pruned; the only file that imports lm_eval.

lm-eval builds the requests and computes the metrics; this module runs the model.  Context and
continuation arrive as tokens in ``_loglikelihood_tokens``, so that the prompt is known apart from
what is scored (docs/reference.md, "Protocols").
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dart_llm.data import datasets
from dart_llm.data.datasets import LOCAL_MMLU, MMLU_SUBJECTS
from dart_llm.data.texts import check_chat_template
from dart_llm.errors import ConfigError, DartError, LoadError, MissingExtra, UnknownName, chain
from dart_llm.evaluation.likelihood import SHORT
from dart_llm.evaluation.lm_eval_scoring import Scorer
from dart_llm.evaluation.masks_seen import count_masks
from dart_llm.evaluation.measurement import LEAK, Measurement, MeasureOptions, mean
from dart_llm.evaluation.perplexity import perplexity
from dart_llm.evaluation.tasks import FEWSHOT, specifications
from dart_llm.session.generation import FiniteLogits
from dart_llm.session.prepare import UnitStore
from dart_llm.session.run import BoundMethod

# From lm-eval's results to a measurement.

PERPLEXITIES = ("word_perplexity", "byte_perplexity")
"""Metrics of a log-likelihood and a weight per document; items have the first that all have."""

HEADLINES = ("acc", "exact_match", "em", "f1", *PERPLEXITIES)
"""Metrics that come first in tables, in this order."""

Items = list[dict[str, Any]]


def collect(
    name: str, results: Mapping[str, Any], scorer: Scorer, options: MeasureOptions
) -> Measurement:
    """One measurement of a task, or of a group with its tasks as ``subtasks``."""
    leaves = list(results["samples"])
    counts, masks = count_masks(scorer.finished)
    named = [set(sample["metrics"]) for leaf in leaves for sample in results["samples"][leaf]]
    weighed = next((m for m in PERPLEXITIES if all(m in metrics for metrics in named)), "")
    items = {leaf: _items(leaf, results["samples"][leaf], weighed) for leaf in leaves}
    subtasks = {leaf: _metrics(results["results"][leaf]) for leaf in leaves}
    if len(leaves) == 1:
        metrics, subtasks = subtasks[leaves[0]], {}
    else:
        metrics = _overall(items, subtasks, weighed)
    metric = next((m for m in (*HEADLINES, *metrics) if m in metrics), "")
    better = results["higher_is_better"].get(leaves[0], {})
    return Measurement(
        task=name,
        protocol=options.protocol,
        metric=metric,
        higher_is_better=bool(better.get(metric, better.get(metric.partition(",")[0], True))),
        metrics=metrics,
        items=tuple(item for leaf in leaves for item in items[leaf]),
        accounting=scorer.accounting(),
        samples=tuple(s for leaf in leaves for s in _samples(leaf, results["samples"][leaf])),
        notes=tuple(_notes(scorer, options, name, len(leaves))),
        counts=counts,
        masks=masks,
        subtasks=subtasks,
    )


def _notes(scorer: Scorer, options: MeasureOptions, name: str, tasks: int) -> Iterator[str]:
    yield from scorer.candidate.notes
    if (config := scorer.candidate.config) is not None:
        if options.protocol == "published":
            yield LEAK
        slow = config.drift.rule != "never" or config.min_evidence or config.masking_step
        if slow and scorer.at_once:
            yield (
                "likelihood tasks: masks at once and no re-mask (masking_step 0, min_evidence 0, "
                "drift never)"
            )
        if scorer.short:
            what = "context was" if scorer.short == 1 else "contexts were"
            yield f"{scorer.short} {what} scored dense: fewer than {SHORT} tokens"
    subjects = len(MMLU_SUBJECTS)
    if name == "mmlu" and tasks < subjects:
        yield f"mmlu: {tasks} of its {subjects} subjects, those in {LOCAL_MMLU.as_posix()}"


def _metrics(row: Mapping[str, Any]) -> dict[str, float | None]:
    """``acc,none`` becomes ``acc``; other filters stay in the name unless they are the only one."""
    metrics: dict[str, float | None] = {}
    filters = {key.partition(",")[2] for key in row if "," in key}
    for key, value in row.items():
        name, _, which = key.partition(",")
        if not which or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        finite = float(value) if math.isfinite(value) else None
        metrics[name if which == "none" or len(filters) == 1 else f"{name},{which}"] = finite
    return metrics


def _items(task: str, samples: Sequence[Mapping[str, Any]], weighed: str) -> Items:
    """``{"id", metric: number}`` per document; filters of one document are joined.

    ``weighed``: the metric whose log-likelihood and weight become a mean loss and ``tokens``.
    """
    items: dict[str, dict[str, Any]] = {}
    filters = {sample["filter"] for sample in samples}
    for sample in samples:
        item = items.setdefault(str(sample["doc_id"]), {"id": f"{task}/{sample['doc_id']}"})
        for metric in sample["metrics"]:
            plain = len(filters) == 1 or sample["filter"] == "none"
            name = metric if plain else f"{metric},{sample['filter']}"
            value = sample.get(metric)
            if isinstance(value, bool | int | float):
                item[name] = float(value)
            elif name == weighed and isinstance(value, tuple | list) and len(value) == 2:
                loss, weight = value
                item.update(mean_loss=-float(loss) / max(1, weight), tokens=int(weight))
    return list(items.values())


def _overall(
    items: Mapping[str, Items], subtasks: Mapping[str, Mapping[str, float | None]], weighed: str
) -> dict[str, float | None]:
    """Metrics of a group over all its documents, each document once.

    The perplexity of all together, and what every task averages over its documents: aggregates of
    another kind cannot be put together from those of the tasks.
    """
    every = [item for of_task in items.values() for item in of_task]
    metrics: dict[str, float | None] = {}
    if weighed and every:
        loss = math.fsum(item["mean_loss"] * item["tokens"] for item in every)
        metrics[weighed] = perplexity(loss / max(1, sum(item["tokens"] for item in every)))
    for name in every[0] if every else ():
        if all(
            _averages(of_task, name, subtasks[leaf].get(name)) for leaf, of_task in items.items()
        ):
            metrics[name] = mean([float(item[name]) for item in every])
    return metrics


def _averages(items: Items, name: str, value: float | None) -> bool:
    """Whether ``value`` is the mean of the items' numbers."""
    if value is None or not all(name in item for item in items):
        return False
    return math.isclose(mean([item[name] for item in items]), value, rel_tol=1e-6, abs_tol=1e-9)


def _samples(task: str, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Raw material: the requests, their answers, the document and its target."""
    return [
        {
            "id": f"{task}/{sample['doc_id']}",
            "filter": sample["filter"],
            "target": sample["target"],
            "arguments": [list(arguments) for arguments in sample["arguments"]],
            "answers": sample["resps"],
            "filtered": sample["filtered_resps"],
            **{metric: sample.get(metric) for metric in sample["metrics"]},
        }
        for sample in samples
    ]


Advance = Callable[[int], None]


def measure(
    candidate: BoundMethod,
    name: str,
    options: MeasureOptions,
    parts: UnitStore,
    advance: Advance,
) -> Measurement:
    """Run one lm-eval task or group; ``name`` may be ``mmlu:astronomy+anatomy``.

    ``advance(1)`` is called per document.  Raises ``UnknownName`` for a task that does not exist,
    ``LoadError`` when its data cannot be reached, ``DartError`` for a loss that is not finite.
    """
    _library()
    from lm_eval.evaluator import evaluate

    if options.apply_chat_template:
        check_chat_template(candidate.tokenizer, "drop --apply-chat-template")
    tasks = _load(name, options)
    _configure(tasks["tasks"], name, options)
    lm = _model(candidate, options, parts, advance)
    indices = _chosen(tasks["tasks"], options)
    try:
        with _no_bars():
            results = evaluate(
                lm=lm,
                task_dict=tasks,
                limit=None if indices else options.limit,
                samples=indices,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=bool(options.apply_chat_template),
                fewshot_as_multiturn=bool(options.apply_chat_template),
            )
    except (ValueError, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"lm-eval cannot run the task {name}: {reason}") from error
    return collect(name, results, lm.scorer, options)


def count(name: str, options: MeasureOptions) -> int:
    """Documents that ``measure`` will score."""
    sizes = [len(task.eval_docs) for task in _load(name, options)["tasks"].values()]
    return sum(size if options.limit is None else min(size, options.limit) for size in sizes)


def _library() -> None:
    try:
        import_module("lm_eval.evaluator")
    except ImportError as error:
        raise MissingExtra("lm-eval", "eval") from error
    for noisy in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    datasets.no_bars()


@lru_cache(maxsize=4)
def _manager(include_path: str | None) -> Any:
    _library()
    from lm_eval.tasks import TaskManager

    if include_path and not Path(include_path).is_dir():
        raise ConfigError(
            f"--include-path {include_path} is not a folder: give the folder of the task files"
        )
    return TaskManager(include_path=include_path)


def check(name: str, include_path: str | None) -> None:
    """Raise ``UnknownName`` for a task that does not exist; loads neither model nor data."""
    tasks = _manager(include_path).all_tasks
    for specification in specifications(name):
        if isinstance(specification, str) and specification not in tasks:
            raise UnknownName("task", specification, tasks)


@lru_cache(maxsize=8)
def _load(name: str, options: MeasureOptions) -> Any:
    """lm-eval's tasks and groups of one name, their documents loaded."""
    check(name, options.include_path)
    try:
        loaded = _manager(options.include_path).load(specifications(name))
        for task in loaded["tasks"].values():
            if not len(task.eval_docs):
                raise LoadError(f"the task {task.task_name} has no documents: check its data file")
    except DartError:
        raise
    # Datasets, hub and YAML errors share no base class.
    except Exception as error:
        raise LoadError(
            f"the data of the task {name} could not be loaded ({_reason(error)}); correct the task "
            "file or its data, or work without the hub: give --include-path FOLDER, or put "
            "<subject>_test.jsonl into datasets/mmlu/ (docs/evaluation.md)"
        ) from error
    return loaded


def _reason(error: Exception) -> str:
    """The cause in words, the same in every process: no addresses of objects."""
    if isinstance(error, StopIteration):
        return "it has no rows"
    causes = [one for one in chain(error) if type(one).__name__ != "DatasetGenerationError"]
    text = " ".join(str(causes[0]).split()) if causes else ""
    return re.sub(r" at 0x[0-9a-f]+", "", text)[:300].rstrip(" .") or type(error).__name__


def _configure(tasks: dict[str, Any], name: str, options: MeasureOptions) -> None:
    """Few-shot examples and every seed, as lm-eval's front end sets them."""
    shots = options.num_fewshot if options.num_fewshot is not None else FEWSHOT.get(name)
    for task in tasks.values():
        default = task.get_config("num_fewshot")
        if shots is not None and default != 0:  # a task with 0 cannot take examples
            task.set_config(key="num_fewshot", value=shots)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=options.seed)
    random.seed(options.seed)
    np.random.seed(options.seed % 2**32)
    torch.manual_seed(options.seed)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """lm-eval's progress bars would break up dart-llm's."""
    from lm_eval.api import task

    task.tqdm, shown = partial(task.tqdm, disable=True), task.tqdm
    try:
        yield
    finally:
        task.tqdm = shown


def _chosen(tasks: dict[str, Any], options: MeasureOptions) -> dict[str, list[int]] | None:
    """A seeded random choice of ``limit`` documents per task; None: the first ones."""
    if options.sample_seed is None or options.limit is None:
        return None
    chosen = {}
    for name, task in tasks.items():
        every, chooser = range(len(task.eval_docs)), random.Random(f"{options.sample_seed}/{name}")
        chosen[name] = sorted(chooser.sample(every, min(len(every), options.limit)))
    return chosen


class PrunedRequests:
    """Answers lm-eval's requests with pruned likelihoods and texts, on top of its model."""

    tok_encode: Callable[[str], list[int]]
    prefix_token_id: int
    max_length: int

    def __init__(
        self,
        candidate: BoundMethod,
        options: MeasureOptions,
        parts: UnitStore,
        advance: Advance,
    ) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        super().__init__(  # type: ignore[call-arg]
            pretrained=candidate.model, tokenizer=candidate.tokenizer, batch_size=1
        )
        self.scorer = Scorer(candidate, options, parts, self.max_length)
        self._advance = advance
        self._run: Any = None

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """lm-eval turns requests into tokens, and hands them to ``_loglikelihood_tokens``."""
        self._steps = _by_documents(self._advance, requests)
        self._names = _names(requests)
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[misc]

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        pairs = [(tuple(context), tuple(more)) for _, context, more in requests]
        return self.scorer.likelihoods(pairs, self._steps, self._names)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """The log-likelihood of whole texts."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        first = self.prefix_token_id
        windows = sum(len(self.scorer.windows(text, first)) for text in texts)
        steps = _by_documents(self._advance, requests, windows)
        return self.scorer.rolling(texts, first, steps, _names(requests))

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """One text per request, up to its stop strings."""
        from transformers import LogitsProcessorList

        texts, step = [], _by_documents(self._advance, requests)
        with self.scorer.attached(likelihood=False) as self._run:
            for request, name in zip(requests, _names(requests), strict=True):
                self._finite = LogitsProcessorList([FiniteLogits(f"document {name}")])
                make = partial(self._generate, request)
                texts.append(self.scorer.generate(self._run, request.args, make))
                step(1)
        return texts

    def _generate(self, request: Any) -> str:
        return str(super().generate_until([request], disable_tqdm=True)[0])  # type: ignore[misc]

    def _model_generate(self, context: Any, max_length: int, stop: Any, **more: Any) -> Any:
        more["logits_processor"] = self._finite
        with self.scorer.generating(self._run, context):
            return super()._model_generate(  # type: ignore[misc]
                context, max_length, stop, **more
            )


def _model(
    candidate: BoundMethod, options: MeasureOptions, parts: UnitStore, advance: Advance
) -> Any:
    from lm_eval.models.huggingface import HFLM

    class PrunedLM(PrunedRequests, HFLM):  # type: ignore[misc]
        """lm-eval's Hugging Face model, pruned."""

    return PrunedLM(candidate, options, parts, advance)


def _names(requests: Sequence[Any]) -> list[str]:
    return [f"{request.task_name}/{request.doc_id}" for request in requests]


def _by_documents(advance: Advance, requests: Sequence[Any], units: int = 0) -> Advance:
    """``advance`` for requests, or for so many ``units``, called with whole documents."""
    documents, units, done = len({*_names(requests)}), units or len(requests), 0

    def step(count: int) -> None:
        nonlocal done
        before, done = done * documents // units, done + count
        if whole := done * documents // units - before:
            advance(whole)

    return step
