"""What a task name says: its kind, and the protocols that it can run under."""

from __future__ import annotations

from dart_llm.measurement import PROTOCOLS

KINDS = ("perplexity", "summarize")
"""Task names that are no lm-eval task: ``perplexity:<text>``, ``summarize:<data>``."""


def split(task: str) -> tuple[str, str]:
    """``perplexity:embedded`` -> (perplexity, embedded); ``arc_easy`` -> (lm-eval, arc_easy)."""
    kind, colon, name = task.partition(":")
    return (kind, name) if colon and kind in KINDS else ("lm-eval", task)


def protocols(task: str) -> tuple[str, ...]:
    """The protocols that a task can run under."""
    own = ("standard",) if split(task)[0] == "perplexity" else ()
    return (*PROTOCOLS, *own)


def short(task: str) -> str:
    """The task with a file's folders left out."""
    kind, colon, name = task.rpartition(":")
    return f"{kind}{colon}{name.rpartition('/')[2]}" if name.endswith((".txt", ".jsonl")) else task
