"""``dart-llm serve``."""

from __future__ import annotations

import logging
from typing import Any

from dart_llm.options import Config
from dart_llm.settings_base import merge
from dart_llm.settings_serve import ServeSettings


def serve(flags: dict[str, Any], config: Config = None) -> None:
    """Serve a model over HTTP: OpenAI's API, and a page that shows its neurons.

    One model, one request at a time, fairly queued.  A request may say how it is pruned, under the
    key dart.  docs/server.md has every route, field and limit.

    Examples:

    dart-llm serve

    dart-llm serve --model Qwen/Qwen2.5-0.5B-Instruct --port 0 --sparsity 0.3

    dart-llm serve --method dart --methods griffin,glass --max-waiting 16 --verbose

    DART_API_KEY=... dart-llm serve --host 0.0.0.0
    """
    settings = merge(ServeSettings, flags, config)
    from dart_llm.serve_run import serve as run
    from dart_llm.ui import Ui

    if settings.verbose:
        logging.getLogger("dart_llm.serve").setLevel(logging.INFO)
    run(settings, Ui())
