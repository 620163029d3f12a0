"""lm-eval tasks on a pruned model.

lm-eval builds the requests and computes the metrics; this module runs the model.
``_loglikelihood_tokens`` receives context and continuation as separate token lists, so the prompt
can be distinguished from the scored tokens (docs/reference.md, "Protocols").  This is the only file
that imports lm_eval, and it is imported only when a task needs it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dart_llm.data import datasets
from dart_llm.data.datasets import LOCAL_MMLU, MMLU_SUBJECTS
from dart_llm.data.texts import check_chat_template
from dart_llm.errors import ConfigError, DartError, LoadError, MissingExtra, UnknownName, chain
from dart_llm.evaluation.likelihood import SHORT, Scorer
from dart_llm.evaluation.measurement import LEAK, Measurement, MeasureOptions, mean
from dart_llm.evaluation.parts import UnitStore, merge_accounting
from dart_llm.evaluation.perplexity import perplexity
from dart_llm.evaluation.tasks import FEWSHOT, specifications
from dart_llm.session.generation import FiniteLogits
from dart_llm.session.run import BoundMethod

try:
    from lm_eval.api import task as lm_eval_task
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise MissingExtra("lm-eval", "eval") from error

Advance = Callable[[int], None]


def measure(
    candidate: BoundMethod, task: str, options: MeasureOptions, parts: UnitStore, advance: Advance
) -> Measurement:
    """Run one lm-eval task or group; ``task`` may be ``mmlu:astronomy+anatomy``.

    ``advance(1)`` is called per document.  Raises ``UnknownName`` for a task that does not exist,
    ``LoadError`` if its data cannot be loaded, ``ConfigError`` if lm-eval rejects it, and
    ``DartError`` if a loss is not finite.
    """
    if options.apply_chat_template:
        check_chat_template(candidate.tokenizer, "drop --apply-chat-template")
    loaded = _load(task, options)
    _configure(loaded["tasks"], task, options)
    lm = PrunedLM(candidate, options, parts, advance)
    documents = _choose_documents(loaded["tasks"], options)
    try:
        with _no_bars():
            results = evaluate(
                lm=lm,
                task_dict=loaded,
                limit=None if documents else options.limit,
                samples=documents,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=bool(options.apply_chat_template),
                fewshot_as_multiturn=bool(options.apply_chat_template),
            )
    except (ValueError, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"lm-eval cannot run the task {task}: {reason}") from error
    return collect(task, results, lm.scorer, options)


def count(task: str, options: MeasureOptions, tokenizer: Any = None, model: Any = None) -> int:
    """The number of documents that ``measure`` will score."""
    sizes = [len(leaf.eval_docs) for leaf in _load(task, options)["tasks"].values()]
    return sum(size if options.limit is None else min(size, options.limit) for size in sizes)


def check(task: str, include_path: str | None) -> None:
    """Raise ``UnknownName`` for a task that does not exist; loads neither model nor data."""
    names = _manager(include_path).all_tasks
    for specification in specifications(task):
        if isinstance(specification, str) and specification not in names:
            raise UnknownName("task", specification, names)


@lru_cache(maxsize=4)
def _manager(include_path: str | None) -> Any:
    for noisy in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    datasets.no_bars()
    if include_path and not Path(include_path).is_dir():
        raise ConfigError(
            f"--include-path {include_path} is not a folder: give the folder of the task files"
        )
    return TaskManager(include_path=include_path)


@lru_cache(maxsize=8)
def _load(task: str, options: MeasureOptions) -> Any:
    """lm-eval's tasks and groups for a name, with their documents loaded."""
    check(task, options.include_path)
    try:
        loaded = _manager(options.include_path).load(specifications(task))
        for leaf in loaded["tasks"].values():
            if not len(leaf.eval_docs):
                raise LoadError(f"the task {leaf.task_name} has no documents: check its data file")
    except DartError:
        raise
    # Datasets, hub and YAML errors share no base class.
    except Exception as error:
        raise LoadError(
            f"the data of the task {task} could not be loaded ({_reason(error)}); correct the task "
            "file or its data, or work without the hub: give --include-path FOLDER, or put "
            "<subject>_test.jsonl into datasets/mmlu/ (docs/evaluation.md)"
        ) from error
    return loaded


def _reason(error: Exception) -> str:
    """The error's cause as text, without object addresses, which differ between processes."""
    if isinstance(error, StopIteration):
        return "it has no rows"
    causes = [cause for cause in chain(error) if type(cause).__name__ != "DatasetGenerationError"]
    text = " ".join(str(causes[0]).split()) if causes else ""
    return re.sub(r" at 0x[0-9a-f]+", "", text)[:300].rstrip(" .") or type(error).__name__


def _configure(tasks: dict[str, Any], name: str, options: MeasureOptions) -> None:
    """Set the number of few-shot examples and all seeds, as lm-eval's command line does."""
    shots = options.num_fewshot if options.num_fewshot is not None else FEWSHOT.get(name)
    for task in tasks.values():
        default = task.get_config("num_fewshot")
        if shots is not None and default != 0:  # a task with 0 does not support examples
            task.set_config(key="num_fewshot", value=shots)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=options.seed)
    random.seed(options.seed)
    np.random.seed(options.seed % 2**32)
    torch.manual_seed(options.seed)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Disable lm-eval's progress bars, which would disturb those of dart-llm."""
    tqdm = lm_eval_task.tqdm
    lm_eval_task.tqdm = partial(tqdm, disable=True)
    try:
        yield
    finally:
        lm_eval_task.tqdm = tqdm


def _choose_documents(
    tasks: dict[str, Any], options: MeasureOptions
) -> dict[str, list[int]] | None:
    """Indices of ``limit`` random documents per task; None if no random sample is requested."""
    if options.sample_seed is None or options.limit is None:
        return None
    chosen = {}
    for name, task in tasks.items():
        total, chooser = len(task.eval_docs), random.Random(f"{options.sample_seed}/{name}")
        chosen[name] = sorted(chooser.sample(range(total), min(total, options.limit)))
    return chosen


class PrunedLM(HFLM):  # type: ignore[misc]
    """lm-eval's Hugging Face model, whose likelihoods and texts come from the pruned model."""

    def __init__(
        self, candidate: BoundMethod, options: MeasureOptions, parts: UnitStore, advance: Advance
    ) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        super().__init__(pretrained=candidate.model, tokenizer=candidate.tokenizer, batch_size=1)
        self.scorer = Scorer(candidate, options, parts, self.max_length)
        self._advance = advance
        self._run: Any = None

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """The log-likelihood of each request's continuation.

        lm-eval tokenises the requests and passes them to ``_loglikelihood_tokens``.
        """
        self._steps = _by_documents(self._advance, requests)
        self._names = _names(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        pairs = [(tuple(context), tuple(rest)) for _, context, rest in requests]
        return self.scorer.likelihoods(pairs, self._steps, self._names)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """The log-likelihood of each request's whole text."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        first = self.prefix_token_id
        windows = sum(len(self.scorer.windows(text, first)) for text in texts)
        steps = _by_documents(self._advance, requests, windows)
        return self.scorer.rolling(texts, first, steps, _names(requests))

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """The generated text of each request, up to its stop strings."""
        texts, step = [], _by_documents(self._advance, requests)
        with self.scorer.attached(likelihood=False) as self._run:
            for request, name in zip(requests, _names(requests), strict=True):
                self._finite = FiniteLogits(f"document {name}")
                make = partial(self._generate, request)
                texts.append(self.scorer.generate(self._run, request.args, make))
                step(1)
        return texts

    def _generate(self, request: Any) -> str:
        return str(super().generate_until([request], disable_tqdm=True)[0])

    def _model_generate(self, context: Any, max_length: int, stop: Any, **kwargs: Any) -> Any:
        from transformers import LogitsProcessorList

        kwargs["logits_processor"] = LogitsProcessorList([self._finite])
        with self.scorer.generating(self._run, context):
            return super()._model_generate(context, max_length, stop, **kwargs)


def _names(requests: Sequence[Any]) -> list[str]:
    return [f"{request.task_name}/{request.doc_id}" for request in requests]


def _by_documents(advance: Advance, requests: Sequence[Any], units: int = 0) -> Advance:
    """Return a function ``step(n)``, to be called after every n finished requests.

    It calls ``advance`` with the number of newly finished documents.  If n counts other units than
    requests, ``units`` is the total number of these units.
    """
    documents, units, done = len({*_names(requests)}), units or len(requests), 0

    def step(count: int) -> None:
        nonlocal done
        before, done = done * documents // units, done + count
        if finished := done * documents // units - before:
            advance(finished)

    return step


# From lm-eval's results to a measurement.

PERPLEXITIES = ("word_perplexity", "byte_perplexity")
"""Metrics that lm-eval computes from a log-likelihood and a weight per document.

Items contain the first of these metrics that all documents have.
"""

HEADLINES = ("acc", "exact_match", "em", "f1", *PERPLEXITIES)
"""The first of these metrics that a task has is its headline metric."""

Sample = Mapping[str, Any]

Items = list[dict[str, Any]]

Metrics = dict[str, float | None]


def collect(
    task: str, results: Mapping[str, Any], scorer: Scorer, options: MeasureOptions
) -> Measurement:
    """The measurement of a task, or of a group with its tasks as ``subtasks``."""
    samples: Mapping[str, Sequence[Sample]] = results["samples"]
    names = [set(sample["metrics"]) for of_task in samples.values() for sample in of_task]
    weighted = next((m for m in PERPLEXITIES if all(m in metrics for metrics in names)), "")
    items = {leaf: _items(leaf, of_task, weighted) for leaf, of_task in samples.items()}
    subtasks = {leaf: _metrics(results["results"][leaf]) for leaf in samples}
    if len(samples) == 1:
        metrics, subtasks = next(iter(subtasks.values())), {}
    else:
        metrics = _overall(items, subtasks, weighted)
    metric = next((m for m in (*HEADLINES, *metrics) if m in metrics), "")
    better = results["higher_is_better"].get(next(iter(samples)), {})
    return Measurement(
        task=task,
        protocol=options.protocol,
        metric=metric,
        higher_is_better=bool(better.get(metric, better.get(metric.partition(",")[0], True))),
        metrics=metrics,
        items=tuple(item for of_task in items.values() for item in of_task),
        samples=tuple(_sample(leaf, item) for leaf, of_task in samples.items() for item in of_task),
        notes=tuple(_notes(scorer, options, task, len(samples))),
        accounting=merge_accounting(scorer.candidate.run(likelihood=True), scorer.finished),
        subtasks=subtasks,
    )


def _notes(scorer: Scorer, options: MeasureOptions, task: str, tasks: int) -> Iterator[str]:
    yield from scorer.candidate.notes
    if (config := scorer.candidate.config) is not None:
        if options.protocol == "published":
            yield LEAK
        changed = config.drift.rule != "never" or config.min_evidence or config.masking_step
        if changed and scorer.at_once:
            yield (
                "likelihood tasks: masks right after the context, never re-masked (masking_step 0, "
                "min_evidence 0, drift never)"
            )
        if scorer.short:
            contexts = "context was" if scorer.short == 1 else "contexts were"
            yield f"{scorer.short} {contexts} scored dense: fewer than {SHORT} tokens"
    subjects = len(MMLU_SUBJECTS)
    if task == "mmlu" and tasks < subjects:
        yield f"mmlu: {tasks} of its {subjects} subjects, those in {LOCAL_MMLU.as_posix()}"


def _metrics(row: Mapping[str, Any]) -> Metrics:
    """Metrics by name, without stderr.

    lm-eval's keys are ``metric,filter``; the filter is dropped if it is ``none`` or the only one.
    """
    metrics: Metrics = {}
    filters = {key.partition(",")[2] for key in row if "," in key}
    for key, value in row.items():
        name, _, filter_name = key.partition(",")
        if not filter_name or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        finite = float(value) if math.isfinite(value) else None
        plain = filter_name == "none" or len(filters) == 1
        metrics[name if plain else key] = finite
    return metrics


def _items(task: str, samples: Sequence[Sample], weighted: str) -> Items:
    """An item per document: ``id``, and every metric that is a number, for each filter.

    ``weighted``: the perplexity whose log-likelihood and weight per document become ``mean_loss``
    and ``tokens``; "" if there is none.
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
            elif name == weighted and isinstance(value, tuple | list) and len(value) == 2:
                loss, weight = value
                item.update(mean_loss=-float(loss) / max(1, weight), tokens=int(weight))
    return list(items.values())


def _overall(items: Mapping[str, Items], subtasks: Mapping[str, Metrics], weighted: str) -> Metrics:
    """Metrics of a group of tasks, over the documents of all tasks.

    They are the perplexity, and the mean (each document with equal weight) of every metric that
    each task computes as a mean over documents.  Other aggregates cannot be combined.
    """
    documents = [item for of_task in items.values() for item in of_task]
    metrics: Metrics = {}
    if weighted and documents:
        loss = math.fsum(item["mean_loss"] * item["tokens"] for item in documents)
        metrics[weighted] = perplexity(loss / max(1, sum(item["tokens"] for item in documents)))
    for name in documents[0] if documents else ():
        if all(
            _is_mean(of_task, name, subtasks[leaf].get(name)) for leaf, of_task in items.items()
        ):
            metrics[name] = mean([float(item[name]) for item in documents])
    return metrics


def _is_mean(items: Items, name: str, value: float | None) -> bool:
    """Whether ``value`` is the mean of the items' values of the metric ``name``."""
    if value is None or not all(name in item for item in items):
        return False
    return math.isclose(mean([item[name] for item in items]), value, rel_tol=1e-6, abs_tol=1e-9)


def _sample(task: str, sample: Sample) -> dict[str, Any]:
    """Raw data of a document: its requests, the model's answers, the target and the metrics."""
    return {
        "id": f"{task}/{sample['doc_id']}",
        "filter": sample["filter"],
        "target": sample["target"],
        "arguments": [list(arguments) for arguments in sample["arguments"]],
        "answers": sample["resps"],
        "filtered": sample["filtered_resps"],
        **{metric: sample.get(metric) for metric in sample["metrics"]},
    }
