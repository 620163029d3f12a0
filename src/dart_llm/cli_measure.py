"""``dart-llm eval``, ``perplexity`` and ``summarize``."""

from __future__ import annotations

import json
from typing import Any

import typer

from dart_llm.options import Config, Fresh, Json
from dart_llm.settings_base import merge
from dart_llm.settings_measure import (
    EvalSettings,
    MeasureSettings,
    PerplexitySettings,
    SummarizeSettings,
)


def _run(settings: MeasureSettings, fresh: bool, as_json: bool) -> None:
    from dart_llm.measure_job import document, run_measure
    from dart_llm.results import finite
    from dart_llm.ui import Ui

    job = run_measure(settings, Ui(quiet=as_json), fresh)
    if as_json:
        typer.echo(json.dumps(finite(document(job))))


def evaluate(
    flags: dict[str, Any],
    config: Config = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Run lm-eval tasks on a pruned model.

    Examples:

    dart-llm eval --tasks arc_easy,hellaswag --method dart --sparsity 0.5 --limit 200

    dart-llm eval --tasks mmlu --num-fewshot 5 --model Qwen/Qwen2.5-0.5B-Instruct --dense

    dart-llm eval --tasks my_task --include-path my_tasks --json
    """
    _run(merge(EvalSettings, flags, config), fresh, as_json)


def perplexity(
    flags: dict[str, Any],
    config: Config = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Perplexity of a text, dense beside pruned on the same tokens.

    Examples:

    dart-llm perplexity --method dart --sparsity 0.5 --limit 16

    dart-llm perplexity --data wikitext2 --protocol standard --window 2048

    dart-llm perplexity --data my_text.txt,c4 --method griffin --sparsity 0.3 --json
    """
    _run(merge(PerplexitySettings, flags, config), fresh, as_json)


def summarize(
    flags: dict[str, Any],
    config: Config = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Summaries of documents and their ROUGE.

    Examples:

    dart-llm summarize --data xsum --limit 100 --method dart --sparsity 0.5 --dense

    dart-llm summarize --data articles.jsonl --max-output 128 --json
    """
    _run(merge(SummarizeSettings, flags, config), fresh, as_json)
