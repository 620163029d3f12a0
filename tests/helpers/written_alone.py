"""Results that are one file: of ``results``, ``prompts generate``, ``chat`` and ``serve``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from chat_cases import say, settings
from dart_llm.cli.chat import Chat
from dart_llm.engine.engine import Engine
from engine_cases import ask, half, own_model, tokenizer
from lm_cases import call, write_rows
from serve_cases import CHAT, FakeEngine, events, running
from written import perplexity


def listing() -> None:
    """``dart-llm results`` of a finished folder, short and long: the header of both."""
    perplexity()
    tables = [call("results", "results", "--csv", *more).out for more in ((), ("--long",))]
    heads = [table.splitlines()[0] for table in tables]
    Path("table.csv").write_text(",".join(heads) + "\n", encoding="utf-8")


def prompts() -> None:
    done = call("prompts", "generate", 2, "--out", "prompts.jsonl")
    assert done.code == 0, done.err


def chat() -> None:
    """A pruned and a dense turn, saved."""
    with Engine(own_model(), tokenizer()) as engine:
        talk = Chat(engine, tokenizer(), settings())
        say(talk, "Why?", "/method dense", "And?", "/save talk.json")


def records() -> None:
    """Records of a request with a re-mask, of one that scores its prompt, and of one that fails."""
    with Engine(own_model(), tokenizer()) as engine:
        _, made = ask(engine, half("dart-prompt", drift="paper"), new=80, logprobs=2)
        _, scored = ask(engine, new=1, logprobs=1, prompt_logprobs=True)
    found: list[dict[str, Any]] = [record.to_dict() for record in (*made, *scored)]
    broken = FakeEngine(fault=RuntimeError("a fault"), fault_at=1)
    with running(broken) as server, server.client() as client:
        found += events(client.post("/api/events", json=CHAT).text)
    write_rows(Path("records.jsonl"), [one for one in found if one is not None])


FILES: dict[str, tuple[Callable[[], None], str]] = {
    "results": (listing, "table.csv"),
    "prompts generate": (prompts, "prompts.jsonl"),
    "chat": (chat, "talk.json"),
    "serve": (records, "records.jsonl"),
}
"""What makes one file, by the command's name in the docs: how it is run, and the file."""
