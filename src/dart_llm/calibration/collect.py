"""Generates text with the dense model, and computes the model's statistics over given tokens.

The statistics are sums over tokens, squared gradients, bases (directions of the FFN's input, for
low-rank compensation) and last hidden states.  On text sampled from the model, let g be the
gradient of the log-likelihood with respect to the neurons' activations.  The mean of g^2 is then
the diagonal of the activations' Fisher information (docs/reference.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dart_llm.calibration.progress import Advance, ignore
from dart_llm.data import texts
from dart_llm.errors import ConfigError, DartError
from dart_llm.models.calls import cache_name, cache_of
from dart_llm.models.capture import LayerActivations, capture_activations
from dart_llm.models.checkpoint import tokenizer_of
from dart_llm.models.describe import decoder_of, describe
from dart_llm.pruning.compensation import find_basis
from dart_llm.pruning.drift import SINKS
from dart_llm.pruning.observations import LayerObservation
from dart_llm.pruning.statistics import FISHER, UP, LayerStatistics, Statistics, Sum, summed
from dart_llm.pruning.weights import FfnWeights

WRITTEN = 64
"""Number of sequences that the model generates in one batch."""

NUCLEUS = 1024
"""How many of the likeliest tokens are sorted at first.  Their chances nearly always add up to
``top_p``, so a sort of the whole vocabulary is rarely needed."""


def opening_ids(model: Any, count: int, length: int) -> Tensor | None:
    """The first ``length`` tokens of ``count`` sequences: [count, length] int64.

    Takes the openings (beginnings of texts that the package ships) with at least ``length`` tokens,
    again from the first when they run out.  None if no opening is long enough, if the model has no
    tokenizer, if an id is outside the vocabulary, or if ``length`` is 0.
    """
    tokenizer = tokenizer_of(model)
    if tokenizer is None or not length:
        return None
    cut = [tokenizer(text)["input_ids"][:length] for text in texts.openings()]
    openings = [ids for ids in cut if len(ids) == length]
    vocabulary = int(model.config.get_text_config().vocab_size)
    if not openings or max(max(ids) for ids in openings) >= vocabulary:
        return None
    return torch.tensor([openings[row % len(openings)] for row in range(count)])


def start_tokens(model: Any) -> list[int]:
    """A list with the model's start token, or else the end token; empty if there is neither.

    The generation configuration is searched before the model's configuration.
    """
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(config, name, None)
            token = token[0] if isinstance(token, list) and token else token
            if isinstance(token, int):
                return [token]
    return []


def start_ids(model: Any, count: int, generator: torch.Generator) -> Tensor:
    """The token of ``start_tokens`` in each row, else random tokens: [count, 1] int64."""
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
    """Continue ids [B, n] to ``length`` tokens with the dense model: [B, length] int64, on host.

    ``temperature`` and ``top_p`` work as in ``generate``; sampling does not stop at an end token.
    Raises ``ConfigError`` for a model without a head, ``DartError`` for logits that are not finite.
    """
    written = []
    for number, rows in enumerate(parts := torch.split(ids, WRITTEN)):
        cache = None
        while rows.shape[1] < length:
            past: dict[str, Any] = {} if cache is None else {cache_name(): cache}
            new = rows if cache is None else rows[:, -1:]
            output = model(new.to(model.device), use_cache=True, logits_to_keep=1, **past)
            cache = cache_of(output)
            chances = likeliest((_last_logits(model, output) / temperature).softmax(-1), top_p)
            rows = torch.cat([rows, torch.multinomial(chances, 1, generator=generator)], 1)
            done = (rows.shape[1] - ids.shape[1]) / (length - ids.shape[1])
            advance((number + done) / len(parts))
        written.append(rows)
    return torch.cat(written).clone()


def _last_logits(model: Any, output: Any) -> Tensor:
    """The logits for the next token, [B, V] float32 on the host."""
    if getattr(output, "logits", None) is None:
        raise ConfigError(
            f"{type(model).__name__} has no language-model head, so it cannot write text to learn "
            "from: prune the causal language model around it, or use dart-prompt or griffin"
        )
    logits: Tensor = output.logits[:, -1].float().cpu()
    if bool((logits.isnan() | logits.isposinf()).any()):
        _check_finite([logits], "logits of the model's self-generated text")
    return logits


def likeliest(chances: Tensor, top_p: float) -> Tensor:
    """``chances`` [B, V], 0 for all but the likeliest tokens, whose chances sum to ``top_p``."""
    if top_p >= 1:
        return chances
    ordered, tokens = chances.topk(min(NUCLEUS, chances.shape[-1]))
    if bool((ordered.sum(-1) <= top_p).any()):  # a full sort is rare; it takes eight times as long
        ordered, tokens = chances.sort(descending=True)
    ordered[ordered.cumsum(-1) - ordered > top_p] = 0
    return torch.zeros_like(chances).scatter(1, tokens, ordered)


LOGITS = 1 << 24
"""Maximum number of elements of the logits in one backward pass."""

BATCH = 8
"""Number of sequences in a forward without a backward pass."""

BACKWARD = 3
"""A forward and a backward pass together take about as long as this many forwards."""

Receive = Callable[[int, LayerActivations, Tensor | None], None]
"""Receives a layer's number, the layer's activations, and the gradient dL/du or None."""


def _check_finite(tensors: Sequence[Tensor], what: str) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise DartError(f"the {what} are not finite: load the model in float32 or bfloat16")


def rows_at_once(model: Any, length: int, backward: bool) -> int:
    """Number of sequences in one forward; ``backward``: whether a backward pass follows."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    return max(1, LOGITS // (length * vocabulary)) if backward else BATCH


@dataclass(frozen=True)
class Needs:
    """What ``collect`` sums over the tokens of a text.

    ``bases``: for each layer, directions [r, D]; the FFN's input is projected on them to get its r
    features.  None for a layer without features; empty if no layer has any.  ``fisher``: also sum
    squared gradients, which takes a backward pass.  ``inner``: exclude the attention sinks at the
    start of each sequence, and the last token of each, which has no next token to predict.
    """

    statistics: Statistics
    bases: Sequence[Tensor | None] = ()
    fisher: bool = False
    inner: bool = False


def collect(
    model: Any, ids: Tensor, needs: Needs, advance: Advance = ignore
) -> list[LayerStatistics]:
    """The sums over ids [n, T] for every layer of the dense model.

    The sum ``FISHER`` is divided by its number of tokens.  Raises ``DartError`` if the gradients
    are not finite.
    """
    blocks = describe(model).blocks
    devices = [block.matrices()[-1].device for block in blocks]
    parts = torch.split(ids, rows_at_once(model, ids.shape[1], needs.fisher))
    kept = slice(SINKS, ids.shape[1] - 1) if needs.inner else slice(None)

    def batches() -> Iterator[list[LayerStatistics]]:
        for number, part in enumerate(parts):
            evidence = [LayerStatistics() for _ in devices]

            def add(layer: int, seen: LayerActivations, gradient: Tensor | None) -> None:
                basis, sums = needs.bases[layer] if needs.bases else None, evidence[layer]  # noqa: B023
                with torch.no_grad():
                    f = None if basis is None else F.linear(seen.h, basis.to(seen.h.dtype))[None]
                    part = LayerObservation(seen.u, None, seen.z, seen.x).map(lambda t: t[None])
                    needs.statistics.add([sums], part, None, f)
                    if UP in needs.statistics.needs and not blocks[layer].plain:
                        squares = blocks[layer].up_of(seen.h).flatten(0, 1).float().square()
                        sums.add(UP, squares.sum(0), float(len(squares)))
                if gradient is not None:
                    squares = gradient.flatten(0, 1).float().square()
                    sums.add(FISHER, squares.sum(0), float(len(squares)))

            run_forward(model, part, add, needs.fisher, kept)
            advance((number + 1) / len(parts))
            yield evidence

    with torch.inference_mode(False), evaluating(model):
        evidence_sums = summed(batches(), devices)
    for layer in evidence_sums if needs.fisher else ():
        mean = layer.sums[FISHER].mean
        _check_finite([mean], "gradients of this model's self-generated text")
        layer.sums[FISHER] = Sum(mean, 1.0)
    return evidence_sums


def run_forward(
    model: Any, ids: Tensor, receive: Receive, backward: bool = True, kept: slice = slice(None)
) -> None:
    """Run ids [B, T] through the dense model, forward and optionally backward.

    Calls ``receive(layer, seen, g)`` for every layer.  The tensors of ``seen``, [B, T', ...],
    contain only the positions in the slice ``kept``.  g is dL/du, [B, T', I], with L the next-token
    loss summed over all tokens; without ``backward``, g is None.  Parameters get no gradients, and
    no flag of the model changes.
    """
    ids = ids.clone().to(model.device)

    def cut(t: Tensor) -> Tensor:
        return t.detach().reshape(len(ids), -1, t.shape[-1])[:, kept]

    def pass_on(layer: int, seen: LayerActivations, gradient: Tensor | None = None) -> None:
        parts = LayerActivations(*map(cut, (seen.u, seen.x, seen.z, seen.r, seen.h)))
        receive(layer, parts, None if gradient is None else cut(gradient))

    if not backward:
        with torch.no_grad(), capture_activations(model, pass_on):
            model(ids, use_cache=False, logits_to_keep=1)
        return
    captured: dict[int, LayerActivations] = {}
    with torch.enable_grad():
        with (
            capture_activations(model, captured.__setitem__, graph=True),
            _in_graph(model.get_input_embeddings()),
        ):
            logits = model(ids, use_cache=False).logits
        predicted, following = logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
        loss = F.cross_entropy(predicted, following.to(logits.device), reduction="sum")
        layers = sorted(captured)
        gradients = torch.autograd.grad(loss, [captured[n].u for n in layers])
    for layer, gradient in zip(layers, gradients, strict=True):
        pass_on(layer, captured.pop(layer), gradient)


@contextlib.contextmanager
def _in_graph(embedding: nn.Module) -> Iterator[None]:
    """A context in which the embedding's output requires gradients, even if weights are frozen."""

    def attach(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.detach().requires_grad_()

    handle = embedding.register_forward_hook(attach)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which ``model`` is in evaluation mode; restores each module's ``training``."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


BASIS_TOKENS = 1024
"""Approximate number of tokens from which the basis of low-rank compensation is computed."""


@torch.no_grad()
def find_bases(
    model: Any, ids: Tensor, rank: int, layers: Sequence[FfnWeights], advance: Advance = ignore
) -> list[Tensor | None]:
    """For each layer, the ``rank`` main directions [r, D] of the FFN's input over ids [n, T].

    The directions have the model's dtype.  All entries are None if ``rank`` is 0.  The entry of an
    inline FFN (it has no separate module, as in OPT) is None too, because the module that pruning
    replaces there does not receive the FFN's input.
    """
    if not rank:
        return [None] * len(layers)
    inline = {block.index for block in describe(model).blocks if block.inline}
    inputs: dict[int, list[Tensor]] = {}
    rows = min(len(ids), max(1, -(-BASIS_TOKENS // (ids.shape[1] - SINKS))))

    def store(layer: int, seen: LayerActivations) -> None:
        inputs.setdefault(layer, []).append(seen.h[:, SINKS:].flatten(0, 1))

    with torch.inference_mode(False), capture_activations(model, store):
        _forwards(model, ids[:rows].clone(), lambda share: advance(share / 2))
    bases: list[Tensor | None] = []
    for number, layer in enumerate(layers):
        advance(0.5 + 0.5 * number / len(layers))
        if layer.index in inline:
            bases.append(None)
            continue
        h = torch.cat(inputs[layer.index]).float()
        _check_finite([h], f"FFN inputs of layer {layer.index}")
        bases.append(find_basis(h, rank).to(layer.down.dtype))
    return bases


def _forwards(model: Any, ids: Tensor, advance: Advance) -> None:
    """Run ids [n, T] through ``model`` for the caller's hooks, four sequences at a time."""
    for number, part in enumerate(parts := torch.split(ids, 4)):
        model(part.to(model.device), use_cache=False, logits_to_keep=1)
        advance((number + 1) / len(parts))


@torch.no_grad()
def last_states(model: Any, ids: Tensor, advance: Advance = ignore) -> Tensor:
    """The last hidden states (the head's input) of ids [n, T]: [n * T, D] on the host."""
    states: list[Tensor] = []
    width = model.get_output_embeddings().weight.shape[1]

    def store(module: nn.Module, args: Any, output: Any) -> None:
        states.append(output[0].detach().reshape(-1, width).cpu())

    handle = decoder_of(model).register_forward_hook(store)
    try:
        _forwards(model, ids, advance)
    finally:
        handle.remove()
    _check_finite(states, "model's last hidden states")
    return torch.cat(states)
