"""Makes the recording that greets a visitor of the window: one answer, pruned and dense.

Usage: python benchmarks/make_greeting.py [--out src/dart_llm/server/static/greeting.json]

Both answers are the default model's, greedy, one after the other on a warm engine, as the window
asks for them.  Kept are the records that the page reads, numbers with as many digits as it shows.
Run it on a machine that does nothing else: the page says how fast the answers were.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STATIC = ROOT / "src" / "dart_llm" / "server" / "static"
TOKENS = 192
"""The window's longest answer."""
LARGEST = 130_000
"""Bytes that the recording may have."""
OF_TOKEN = ("kind", "choice", "index", "id", "text", "piece", "phase", "logprob", "seconds")
OF_CONFIG = ("method", "masking_step", "min_evidence")
TOP = 2
"""Other likely tokens that are kept."""


def main() -> None:
    """Record, thin out, write, and say what was recorded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=STATIC / "greeting.json", help="where it goes")
    parser.add_argument("--dtype", default="float32", help="of the dense weights")
    parser.add_argument("--place", type=int, default=0, help="of the ready prompt, from 0")
    parser.add_argument("--method", help="instead of the ready prompts' own")
    given = parser.parse_args()
    records = [thin(one) for one in record(given.dtype, given.place, given.method)]
    text = json.dumps(records, ensure_ascii=False, separators=(",", ":"))
    if len(text.encode()) > LARGEST:
        raise SystemExit(f"the recording has {len(text.encode())} bytes, more than {LARGEST}")
    given.out.write_text(text.replace(',{"kind"', ',\n{"kind"') + "\n", encoding="utf-8")
    for one in records:
        if one["kind"] in ("remask", "done"):
            print(
                {name: one[name] for name in ("step", "cause", "finish", "timings") if name in one}
            )


def record(dtype: str, place: int, method: str | None) -> list[dict[str, Any]]:
    """The records of a ready prompt's answers: pruned by the first one's settings, then dense."""
    from dart_llm.data.texts import chat_ids
    from dart_llm.engine.engine import Engine
    from dart_llm.engine.requests import GenerationRequest as Ask
    from dart_llm.engine.requests import Sampling
    from dart_llm.models.loading import load
    from dart_llm.pruning.config import PruneConfig
    from dart_llm.server.window import PROMPTS

    ready = json.loads((STATIC / PROMPTS).read_text("utf-8"))
    asked = {name: value for name, value in ready[0]["dart"].items() if value}
    own = asked.pop("method")
    config = PruneConfig.build(method or own, **asked)
    model, tokenizer = load("smollm2-135m", weights="dense", dtype=dtype)
    ids = chat_ids(tokenizer, [{"role": "user", "content": ready[place]["text"]}])
    found: list[dict[str, Any]] = []
    with Engine(model, tokenizer) as engine:
        for one in (config, None):
            engine.run(Ask(ids, Sampling(max_tokens=8), one))  # what is made once is made here
            ask = Ask(ids, Sampling(max_tokens=TOKENS, logprobs=TOP), one)
            engine.run(ask, lambda told: found.append(told.to_dict()))
    return found


def thin(told: dict[str, Any]) -> dict[str, Any]:
    """A record without what the page does not read."""
    if told["kind"] == "start":
        config = {name: told["config"].get(name) for name in OF_CONFIG}
        rule = (told["config"].get("drift") or {}).get("rule")
        return {**told, "config": {**config, "drift": {"rule": rule}}}
    if told["kind"] == "token":
        kept = {name: rounded(told[name]) for name in OF_TOKEN}
        return {**kept, "top": [{**one, "logprob": rounded(one["logprob"])} for one in told["top"]]}
    if told["kind"] == "mask":
        return {**told, "kept_share": [rounded(share) for share in told["kept_share"]]}
    if told["kind"] == "remask":
        return {name: rounded(value) for name, value in told.items() if name != "kept"}
    if told["kind"] == "done":
        names = ("achieved_sparsity", "dense_token_share", "decoded_tokens", "remasks")
        return {**told, "report": {name: told["report"][name] for name in names}}
    return {name: rounded(value) for name, value in told.items()}


def rounded(value: Any) -> Any:
    """Four digits after the point."""
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
