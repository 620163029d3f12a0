"""Loads models from the hub that ``HF_ENDPOINT`` names and prints what happened, as JSON.

The hub library reads its settings when it is imported, so this runs as a process of its own.
Usage: ``python hub_client.py '[{"model": "owner/name", "revision": null}, ...]'``
"""

from __future__ import annotations

import io
import json
import logging
import sys
import time
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from dart_llm.errors import LoadError
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.loading import load

_pause = time.sleep


def attempt(case: dict[str, Any]) -> dict[str, Any]:
    """Load one model; returns the error or the facts, what was said, and the seconds it took."""
    said: list[str] = []
    start = time.monotonic()
    answer: dict[str, Any] = {"error": None, "facts": None, "logits": None}
    try:
        model, tokenizer = load(case["model"], revision=case["revision"], progress=said.append)
        ids = tokenizer("tiny", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            answer["logits"] = model(ids).logits[0, -1].float().tolist()
        answer["facts"] = checkpoint_facts(model)
    except LoadError as error:
        answer["error"] = str(error)
    return answer | {"said": said, "seconds": time.monotonic() - start}


def main() -> None:
    """Run the cases with the hub library's waiting shortened to almost nothing."""
    log = io.StringIO()
    logging.basicConfig(stream=log, level=logging.DEBUG, force=True)
    transformers_logging.enable_propagation()
    time.sleep = lambda seconds: _pause(min(seconds, 0.02))
    answers = [attempt(case) for case in json.loads(sys.argv[1])]
    json.dump({"answers": answers, "log": log.getvalue()}, sys.stdout)


if __name__ == "__main__":
    main()
