"""Text that a model writes by itself: what priors are learnt from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dart_llm.errors import ConfigError, DartError

WRITTEN = 64
"""Sequences that the model writes at a time."""


def own_start(model: Any) -> list[int]:
    """The token that a text of ``model`` starts with: its start or end token, or nothing."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(config, name, None)
            token = token[0] if isinstance(token, list) and token else token
            if isinstance(token, int):
                return [token]
    return []


@torch.inference_mode()
def write_sequences(
    model: Any,
    start: Sequence[int],
    count: int,
    length: int,
    seed: int,
    say: Callable[[str], None] = lambda text: None,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Tensor:
    """``count`` sequences of ``length`` tokens, sampled from the dense model.

    ``start``: the token that all begin with, or nothing: then each begins with a random one.  An
    end of sequence does not stop them.  ``temperature`` holds from the second token that the model
    chooses on, so that the sequences begin differently; ``top_p`` always.  Returns [count, length]
    int64 on the host.  Raises ``ConfigError`` for a model without a head, ``DartError`` for logits
    that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(model.config.get_text_config().vocab_size)
    rows = []
    for done in range(0, count, WRITTEN):
        size = min(WRITTEN, count - done)
        first = torch.randint(vocabulary, (size, 1), generator=generator)
        ids = torch.full_like(first, start[0]) if start else first
        cache = None
        for step in range(1, length):
            given: dict[str, Any] = {} if cache is None else {"cache": cache}
            output = model(ids[:, -1:].to(model.device), use_cache=True, **given)
            cache = output.cache
            opening = bool(start) and step == 1
            logits = _last_logits(model, output)
            chances = likeliest((logits if opening else logits / temperature).softmax(-1), top_p)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
            if step % 32 == 0:
                say(f"the model writes text to learn from: {step} of {length} tokens")
        rows.append(ids)
    return torch.cat(rows).clone()


def _last_logits(model: Any, output: Any) -> Tensor:
    """[B, V] float32 on the host."""
    found = getattr(output, "logits", None)
    if found is None:
        raise ConfigError(
            f"{type(model).__name__} has no language-model head, so it writes no text to learn "
            "from: prune the causal language model around it, or use griffin"
        )
    logits: Tensor = found[:, -1].float().cpu()
    if bool((logits.isnan() | logits.isposinf()).any()):
        raise DartError(
            "a logit of the model's own text is not finite: the model overflows; try dtype float32"
        )
    return logits


def likeliest(chances: Tensor, top_p: float) -> Tensor:
    """Chances [B, V] with 0 for tokens after the likeliest ones that reach ``top_p`` together."""
    if top_p >= 1:
        return chances
    ordered, tokens = chances.sort(descending=True)
    ordered[ordered.cumsum(-1) - ordered > top_p] = 0
    return torch.zeros_like(chances).scatter(1, tokens, ordered)
