"""Self-generated text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dart_llm.calibration.progress import Advance, layer_ticks, part_of
from dart_llm.data import texts
from dart_llm.errors import ConfigError, DartError
from dart_llm.models.checkpoint import tokenizer_of

WRITTEN = 64
"""Sequences that the model writes at a time."""

NUCLEUS = 1024
"""Tokens that nearly always reach ``top_p``: they need not all be sorted."""


def opening_ids(model: Any, count: int, length: int) -> Tensor | None:
    """``count`` openings of ``length`` tokens, [count, length] int64; None without a tokenizer.

    Openings of fewer tokens are left out.
    """
    tokenizer = tokenizer_of(model)
    if tokenizer is None or not length:
        return None
    made = [tokenizer(text)["input_ids"][:length] for text in texts.openings()]
    openings = [ids for ids in made if len(ids) == length]
    vocabulary = int(model.config.get_text_config().vocab_size)
    if not openings or max(max(ids) for ids in openings) >= vocabulary:
        return None
    return torch.tensor([openings[row % len(openings)] for row in range(count)])


def start_tokens(model: Any) -> list[int]:
    """The token that a text of ``model`` starts with: its start or end token, or ignore."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(config, name, None)
            token = token[0] if isinstance(token, list) and token else token
            if isinstance(token, int):
                return [token]
    return []


def start_ids(model: Any, count: int, generator: torch.Generator) -> Tensor:
    """[count, 1] int64: the token that the model's texts start with, or random ones."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    first = torch.randint(vocabulary, (count, 1), generator=generator)
    start = start_tokens(model)
    return first.fill_(start[0]) if start else first


@torch.inference_mode()
def sample_continuations(
    model: Any,
    ids: Tensor,
    length: int,
    generator: torch.Generator,
    advance: Advance,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Tensor:
    """ids [B, n] and what the dense model writes after them, up to ``length`` tokens in all.

    ``temperature`` and ``top_p`` select as in ``generate``; an end of sequence stops nothing.
    Returns [B, length] int64 on the host.  Raises ``ConfigError`` for a model without a head,
    ``DartError`` for logits that are not finite.
    """
    parts = torch.split(ids, WRITTEN)
    written = []
    for number, rows in enumerate(parts):
        cache, here = None, part_of(advance, number, len(parts))
        while rows.shape[1] < length:
            past: dict[str, Any] = {} if cache is None else {"cache": cache}
            done = part_of(here, rows.shape[1] - ids.shape[1], length - ids.shape[1])
            new = rows if cache is None else rows[:, -1:]
            with layer_ticks(model, done):
                output = model(new.to(model.device), use_cache=True, logits_to_keep=1, **past)
            cache = output.cache
            chances = likeliest((_last_logits(model, output) / temperature).softmax(-1), top_p)
            rows = torch.cat([rows, torch.multinomial(chances, 1, generator=generator)], 1)
            done(1.0)
        written.append(rows)
    return torch.cat(written).clone()


def _last_logits(model: Any, output: Any) -> Tensor:
    """[B, V] float32 on the host."""
    outputs = getattr(output, "logits", None)
    if outputs is None:
        raise ConfigError(
            f"{type(model).__name__} has no language-model head, so it writes no text to learn "
            "from: prune the causal language model around it, or use dart-prompt or griffin"
        )
    logits: Tensor = outputs[:, -1].float().cpu()
    if bool((logits.isnan() | logits.isposinf()).any()):
        raise DartError(
            "a logit of the model's self-generated text is not finite: the model overflows; try "
            "dtype float32"
        )
    return logits


def likeliest(chances: Tensor, top_p: float) -> Tensor:
    """Chances [B, V] with 0 for tokens after the likeliest ones that reach ``top_p`` together."""
    if top_p >= 1:
        return chances
    ordered, tokens = chances.topk(min(NUCLEUS, chances.shape[-1]))
    if bool((ordered.sum(-1) <= top_p).any()):  # a flat row: rare, and eight times as slow
        ordered, tokens = chances.sort(descending=True)
    ordered[ordered.cumsum(-1) - ordered > top_p] = 0
    return torch.zeros_like(chances).scatter(1, tokens, ordered)
