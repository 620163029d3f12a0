"""Make the recording that the server's page plays to visitors: one answer, pruned and dense.

Usage: python benchmarks/make_greeting.py [--out src/dart_llm/server/static/greeting.json]

Both answers come from the default model, greedy, one after the other on a warm engine, with the
page's requests.  The script keeps the records that the page reads, with numbers rounded to the
digits that it shows.  Run it on an idle machine, because the page shows how fast the answers were.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STATIC = ROOT / "src" / "dart_llm" / "server" / "static"
TOKENS = 192
"""The page's limit on the length of an answer."""
LARGEST = 130_000
"""Maximum size of the recording in bytes."""
OF_TOKEN = ("kind", "choice", "index", "id", "text", "piece", "phase", "logprob", "seconds")
OF_CONFIG = ("method", "masking_step", "min_evidence")
TOP = 2
"""Number of alternative tokens kept at each position."""


def main() -> None:
    """Record, reduce and write the answers, and print a summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=STATIC / "greeting.json", help="the file to write"
    )
    parser.add_argument("--dtype", default="float32", help="dtype of the dense weights")
    parser.add_argument("--place", type=int, default=0, help="number of the example prompt, from 0")
    parser.add_argument("--method", help="method to use instead of the example prompt's")
    args = parser.parse_args()
    records = [thin(event) for event in record(args.dtype, args.place, args.method)]
    text = json.dumps(records, ensure_ascii=False, separators=(",", ":"))
    if len(text.encode()) > LARGEST:
        raise SystemExit(f"the recording has {len(text.encode())} bytes, more than {LARGEST}")
    args.out.write_text(text.replace(',{"kind"', ',\n{"kind"') + "\n", encoding="utf-8")
    names = ("step", "cause", "finish", "timings")
    for event in records:
        if event["kind"] in ("remask", "done"):
            print({name: event[name] for name in names if name in event})


def record(dtype: str, place: int, method: str | None) -> list[dict[str, Any]]:
    """Records of two answers to an example prompt: with the first prompt's settings, and dense."""
    from dart_llm.data.texts import chat_ids
    from dart_llm.engine.engine import Engine
    from dart_llm.engine.requests import GenerationRequest as Ask
    from dart_llm.engine.requests import Sampling
    from dart_llm.models.loading import load
    from dart_llm.pruning.config import PruneConfig
    from dart_llm.server.window import PROMPTS

    ready = json.loads((STATIC / PROMPTS).read_text("utf-8"))
    settings = {name: value for name, value in ready[0]["dart"].items() if value}
    default = settings.pop("method")
    config = PruneConfig.build(method or default, **settings)
    model, tokenizer = load("smollm2-135m", weights="dense", dtype=dtype)
    ids = chat_ids(tokenizer, [{"role": "user", "content": ready[place]["text"]}])
    records: list[dict[str, Any]] = []
    with Engine(model, tokenizer) as engine:
        for pruning in (config, None):
            engine.run(Ask(ids, Sampling(max_tokens=8), pruning))  # warm up
            ask = Ask(ids, Sampling(max_tokens=TOKENS, logprobs=TOP), pruning)
            engine.run(ask, lambda event: records.append(event.to_dict()))
    return records


def thin(event: dict[str, Any]) -> dict[str, Any]:
    """A record without the keys that the page does not read."""
    if event["kind"] == "start":
        config = {name: event["config"].get(name) for name in OF_CONFIG}
        rule = (event["config"].get("drift") or {}).get("rule")
        return {**event, "config": {**config, "drift": {"rule": rule}}}
    if event["kind"] == "token":
        kept = {name: rounded(event[name]) for name in OF_TOKEN}
        top = [{**token, "logprob": rounded(token["logprob"])} for token in event["top"]]
        return {**kept, "top": top}
    if event["kind"] == "mask":
        return {**event, "kept_share": [rounded(share) for share in event["kept_share"]]}
    if event["kind"] == "remask":
        return {name: rounded(value) for name, value in event.items() if name != "kept"}
    if event["kind"] == "done":
        names = ("achieved_sparsity", "dense_token_share", "decoded_tokens", "remasks")
        return {**event, "report": {name: event["report"][name] for name in names}}
    return {name: rounded(value) for name, value in event.items()}


def rounded(value: Any) -> Any:
    """A float rounded to four decimal places; other values unchanged."""
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
