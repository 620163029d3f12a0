"""Any lm-eval task, pruned; the only file that imports lm_eval.

lm-eval builds the requests and computes the metrics.  What runs the model is ours: context and
continuation arrive as tokens in ``_loglikelihood_tokens``, so the prompt can be told from what is
scored (docs/method.md, "Evaluation").
"""

from __future__ import annotations

import contextlib
import logging
import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dart_llm import hub_data
from dart_llm.candidate import Candidate, Parts
from dart_llm.devices import chain
from dart_llm.errors import ConfigError, DartError, LoadError, MissingExtra, UnknownName
from dart_llm.harness_items import collect
from dart_llm.harness_score import Scorer
from dart_llm.harness_tasks import FEWSHOT, specifications
from dart_llm.hub_errors import unreachable
from dart_llm.measurement import Measurement, MeasureOptions

Advance = Callable[[int], None]


def measure(
    candidate: Candidate, name: str, options: MeasureOptions, parts: Parts, advance: Advance
) -> Measurement:
    """Run one lm-eval task or group; ``name`` may be ``mmlu:astronomy+anatomy``.

    ``advance(1)`` is called per document.  Raises ``UnknownName`` for a task that does not exist,
    ``LoadError`` when its data cannot be reached, ``DartError`` for a loss that is not finite.
    """
    _library()
    from lm_eval.evaluator import evaluate

    if options.apply_chat_template and not getattr(candidate.tokenizer, "chat_template", None):
        raise ConfigError("this model's tokenizer has no chat template: drop --apply-chat-template")
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
    tasks = _load(name, options)["tasks"].values()
    sizes = [len(_documents(task)) for task in tasks]
    return sum(size if options.limit is None else min(size, options.limit) for size in sizes)


def _library() -> None:
    try:
        import_module("lm_eval.evaluator")
    except ImportError as error:
        raise MissingExtra("lm-eval", "eval") from error
    for noisy in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    hub_data.no_bars()


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
    known = _manager(include_path).all_tasks
    for one in specifications(name):
        if isinstance(one, str) and one not in known:
            raise UnknownName("task", one, known)


@lru_cache(maxsize=8)
def _load(name: str, options: MeasureOptions) -> Any:
    """lm-eval's tasks and groups of one name, their documents loaded."""
    check(name, options.include_path)
    try:
        loaded = _manager(options.include_path).load(specifications(name))
        for task in loaded["tasks"].values():
            if not len(_documents(task)):
                raise LoadError(f"the task {task.task_name} has no documents: check its data file")
    except DartError:
        raise
    # Datasets, hub and YAML errors share no base class.
    except Exception as error:
        raise LoadError(
            f"the data of the task {name} could not be loaded ({_reason(error)}); "
            f"{_way_out(name, error)}"
        ) from error
    return loaded


def _reason(error: Exception) -> str:
    """What went wrong in words, the same in every process: no addresses of objects."""
    if isinstance(error, StopIteration):
        return "it has no rows"
    causes = [one for one in chain(error) if type(one).__name__ != "DatasetGenerationError"]
    text = " ".join(str(causes[0]).split()) if causes else ""
    return re.sub(r" at 0x[0-9a-f]+", "", text)[:300].rstrip(" .") or type(error).__name__


def _way_out(name: str, error: Exception) -> str:
    text = " ".join(str(one) for one in chain(error)).lower()
    if "hub" in text or any(unreachable(one) for one in chain(error)):
        if name.partition(":")[0] == "mmlu":
            return "without the hub put <subject>_test.jsonl into datasets/mmlu/ (docs/data.md)"
        return (
            "without the hub give --include-path FOLDER with task files over local data "
            "(docs/evaluation.md)"
        )
    return "correct the task file, or its data: one JSON object a line with the columns it names"


def _configure(tasks: dict[str, Any], name: str, options: MeasureOptions) -> None:
    """Few-shot examples and every seed, as lm-eval's own front end sets them."""
    shots = options.num_fewshot if options.num_fewshot is not None else FEWSHOT.get(name)
    for task in tasks.values():
        own = task.get_config("num_fewshot")
        if shots is not None and own != 0:  # a task that says 0 cannot take examples
            task.set_config(key="num_fewshot", value=shots)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=options.seed)
    random.seed(options.seed)
    np.random.seed(options.seed % 2**32)
    torch.manual_seed(options.seed)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """lm-eval's own progress bars would cut through ours."""
    from lm_eval.api import task

    known = task.tqdm
    task.tqdm = partial(known, disable=True)
    try:
        yield
    finally:
        task.tqdm = known


def _documents(task: Any) -> Any:
    return task.eval_docs


def _chosen(tasks: dict[str, Any], options: MeasureOptions) -> dict[str, list[int]] | None:
    """A seeded random choice of ``limit`` documents per task; None: the first ones."""
    if options.sample_seed is None or options.limit is None:
        return None
    found = {}
    for name, task in tasks.items():
        size = len(_documents(task))
        chooser = random.Random(f"{options.sample_seed}/{name}")
        found[name] = sorted(chooser.sample(range(size), min(size, options.limit)))
    return found


def _model(candidate: Candidate, options: MeasureOptions, parts: Parts, advance: Advance) -> Any:
    """lm-eval's Hugging Face model with our likelihoods and our runs."""
    from lm_eval.models.huggingface import HFLM
    from transformers import LogitsProcessorList

    from dart_llm.finite_logits import FiniteLogits

    class PrunedLM(HFLM):  # type: ignore[misc]
        """Scores through ``Scorer``; generates one document at a time inside a run."""

        def __init__(self) -> None:
            logging.getLogger("lm_eval").setLevel(logging.ERROR)
            super().__init__(
                pretrained=candidate.model, tokenizer=candidate.tokenizer, batch_size=1
            )
            self.scorer = Scorer(candidate, options, parts, self.max_length)
            self._run: Any = None

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self._steps = _Steps(advance, requests)
            self._names = _names(requests)
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
            pairs = [(tuple(context), tuple(more)) for _, context, more in requests]
            return self.scorer.likelihoods(pairs, self._steps, self._names)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            texts = [self.tok_encode(request.args[0]) for request in requests]
            first = self.prefix_token_id
            windows = sum(len(self.scorer.windows(text, first)) for text in texts)
            steps = _Steps(advance, requests, windows)
            return self.scorer.rolling(texts, first, steps, _names(requests))

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            found = []
            with self.scorer.attached(likelihood=False) as self._run:
                for request, name in zip(requests, _names(requests), strict=True):
                    self._finite = LogitsProcessorList([FiniteLogits(f"document {name}")])
                    found.append(self.scorer.generate(self._run, request.args, self._text(request)))
                    advance(1)
            return found

        def _text(self, request: Any) -> Callable[[], str]:
            return lambda: str(HFLM.generate_until(self, [request], disable_tqdm=True)[0])

        def _model_generate(self, context: Any, max_length: int, stop: Any, **more: Any) -> Any:
            more["logits_processor"] = self._finite
            with self.scorer.generating(self._run, context):
                return super()._model_generate(context, max_length, stop, **more)

    return PrunedLM()


def _names(requests: Sequence[Any]) -> list[str]:
    return [f"{request.task_name}/{request.doc_id}" for request in requests]


class _Steps:
    """Turns progress over requests into whole documents."""

    def __init__(self, advance: Advance, requests: Sequence[Any], units: int = 0) -> None:
        documents = len({(request.task_name, request.doc_id) for request in requests})
        self.share = documents / max(1, units or len(requests))
        self.advance = advance
        self.done = 0.0
        self.told = 0

    def __call__(self, units: int) -> None:
        self.done += units * self.share
        if (whole := int(self.done + 1e-6)) > self.told:
            self.advance(whole - self.told)
            self.told = whole
