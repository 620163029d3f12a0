"""``dart-llm detect``: how well drift rules notice known changes of topic."""

from __future__ import annotations

import json
from typing import Any

import typer

from dart_llm.options import Config, Fresh, Json
from dart_llm.settings_base import merge
from dart_llm.settings_detect import DetectSettings


def detect(
    flags: dict[str, Any],
    config: Config = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Detection rate, delay and false alarms of every drift rule on every signal.

    The dense model reads passages whose changes of topic are known; nothing is pruned.

    Examples:

    dart-llm detect

    dart-llm detect --signals attention,hidden --rules "paper,interval 64" --limit 2

    dart-llm detect --passages mine.jsonl --horizon 64 --windows 5,10,20 --json
    """
    from dart_llm.detection_job import document, run_detect
    from dart_llm.results import finite
    from dart_llm.ui import Ui

    job = run_detect(merge(DetectSettings, flags, config), Ui(quiet=as_json), fresh)
    if as_json:
        typer.echo(json.dumps(finite(document(job))))
