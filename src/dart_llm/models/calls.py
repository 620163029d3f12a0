"""Classifies each forward of a model as prompt or decode, inside and outside ``generate``.

It also finds padding and finished rows; a row is one sequence of the batch.  The rules are in
docs/method.md, "Life of a sequence".
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dart_llm.errors import ConfigError
from dart_llm.models.growing_cache import extendable, is_growing, layer_tensors
from dart_llm.pruning.forward import ForwardCall, Kind

GENERATE = "generate"

PREFILL = "_prefill"
"""``GENERATE`` and ``PREFILL`` (which runs the prompt) are methods that pruning wraps."""


@functools.cache
def cache_name() -> str:
    """What transformers calls a KV cache, in arguments and outputs; version 5.20 renamed it."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    fields = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
    return "cache" if "cache" in fields else "past_key_values"


def cache_of(output: Any) -> Any:
    """The KV cache in the output of a model's forward."""
    return getattr(output, cache_name())


@dataclass(frozen=True)
class ForwardArgs:
    """Arguments of one forward of the whole model, on ids [B, T]: ``rows`` is B, ``tokens`` is T.

    ``cached``: number of tokens in ``cache`` before the forward.  ``valid``: [B, T] float32, 0 for
    padding, else 1; None means no padding.
    """

    cached: int
    tokens: int
    rows: int
    input_ids: Tensor | None
    valid: Tensor | None
    cache: Any = None

    def as_call(self, kind: Kind, **more: Any) -> ForwardCall:
        """The ``ForwardCall`` for the controller; ``more``: further fields of the call."""
        more = {"valid": self.valid, **more}
        return ForwardCall(kind, self.cached, self.tokens, self.rows, **more)


@functools.lru_cache(maxsize=64)
def forward_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the parameters of a model class's forward, without ``self``."""
    parameters = inspect.signature(kind.forward).parameters
    return tuple(name for name in parameters if name not in ("self", "args"))


def read_forward(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ForwardArgs:
    """Read the cache length, the new tokens and the padding from the arguments of a forward."""
    names = forward_names(type(model)) if args else ()  # type: ignore[arg-type]
    named = {**kwargs, **dict(zip(names, args, strict=False))}
    ids, embeds = named.get("input_ids"), named.get("inputs_embeds")
    tensor = ids if ids is not None else embeds
    if tensor is None:
        raise ConfigError("a forward of a pruned model needs input_ids or inputs_embeds")
    cache = next((named[k] for k in ("cache", "past_key_values") if named.get(k) is not None), None)
    cached = 0 if cache is None else int(cache.get_seq_length())
    rows, tokens = int(tensor.shape[0]), int(tensor.shape[1])
    valid = _valid(named.get("attention_mask"), tokens)
    return ForwardArgs(cached, tokens, rows, ids, valid, cache)


def _valid(mask: Any, tokens: int) -> Tensor | None:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    part = mask[:, -tokens:]
    return None if tokens > 1 and bool(part.all()) else part.float()


_SECOND_SEQUENCE = {"guidance_scale": 1, "assistant_early_exit": None}
"""Maps settings to neutral values; with other values, ``generate`` runs a second sequence too."""

_OTHER_CALLS = (
    *("custom_generate", "synced_gpus", "assistant_model", "assistant_tokenizer", "tokenizer"),
)
_OTHER_LOOPS = (
    *("constraints", "force_words_ids", "penalty_alpha", "use_mtp", "dola_layers"),
    *("prompt_lookup_num_tokens", "cache_implementation"),
)
"""Arguments (``_OTHER_CALLS``) and settings (``_OTHER_LOOPS``) with which ``TokenLoop`` cannot
replace the loop of ``generate``.  Most need a loop other than greedy decoding or sampling.
``generate`` does not pass the others, such as the tokenizer for stop strings, to a custom loop.
"""


def read_generate(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Loop:
    """Describe a call of ``generate``; raise ``ConfigError`` if its forwards cannot be pruned."""
    inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    if inputs is None:
        inputs = kwargs.get("inputs_embeds")
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)

    def setting(name: str, default: Any) -> Any:
        for source in (kwargs.get(name), getattr(config, name, None)):
            if source is not None:
                return source
        configured = getattr(model.generation_config, name, None)
        return default if configured is None else configured

    if not setting("use_cache", True):
        raise ConfigError(
            "generate without a cache runs the whole sequence for every token, so there is no "
            "decode step to prune; set use_cache=True"
        )
    for name, neutral in _SECOND_SEQUENCE.items():
        if setting(name, neutral) != neutral:
            raise ConfigError(
                f"generate with {name} also runs a second sequence through the model, and dart-llm "
                f"cannot tell their forwards apart; leave out {name}"
            )
    prompt = 1 if inputs is None else int(inputs.shape[1])
    loop = Loop(prompt, int(setting("num_beams", 1)))
    other_call = any(kwargs.get(name) is not None for name in _OTHER_CALLS)
    others = any(setting(name, None) for name in _OTHER_LOOPS)
    loop.plain = loop.beams == 1 and len(args) <= 2 and not other_call and not others
    return loop


class Loop:
    """One running call of ``generate``; ``call`` classifies each of its forwards.

    The caller sets ``in_prefill`` to True while ``PREFILL`` runs.  ``beams``: number of beams.
    """

    def __init__(self, prompt_tokens: int, beams: int) -> None:
        self.prompt_tokens, self.beams = prompt_tokens, beams
        self.plain = False
        """True if the call decodes greedily or samples in a loop that ``TokenLoop`` can replace."""
        self.in_prefill = False
        self.forwards = 0
        self.cache: Any = None
        """The latest forward's cache; after ``generate`` it has no rejected candidate tokens."""
        self._ends: Tensor | None = None
        self._mask: Tensor | None = None

    def read_prefill(self, prefill: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Store a ``_prefill`` call's mask [B, cached + prompt tokens], end ids and padding ids."""
        arguments = inspect.signature(prefill).bind(*args, **kwargs).arguments
        device = arguments["input_ids"].device

        def ids(name: str) -> Tensor | None:
            tensor = getattr(arguments["generation_config"], name, None)
            return tensor.flatten().to(device) if isinstance(tensor, Tensor) else None

        ends, pads = ids("_eos_token_tensor"), ids("_pad_token_tensor")
        if ends is not None and pads is not None:
            ends = torch.cat([ends, pads])
        mask = arguments["model_kwargs"].get("attention_mask")
        self._ends = ends
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def call(self, forward: ForwardArgs) -> ForwardCall:
        """Classify the next forward; raise ``ConfigError`` if it decodes without a cache."""
        first, self.forwards, self.cache = self.forwards == 0, self.forwards + 1, forward.cache
        if self.in_prefill:
            return forward.as_call(Kind.PREFILL, valid=self._prompt_part(forward))
        if first:  # assisted decoding has no prefill: prompt and candidates share a forward
            prompt = self.prompt_tokens
            includes_cached = prompt > forward.tokens
            new_tokens = prompt - forward.cached * int(includes_cached)
            return forward.as_call(Kind.PREFILL, observable=new_tokens)
        if not forward.cached:
            raise ConfigError(
                "this generation runs without a cache, so there is no decode step to prune"
            )
        return forward.as_call(Kind.DECODE, live=self._live(forward.input_ids))

    def _prompt_part(self, forward: ForwardArgs) -> Tensor | None:
        """``valid`` of a prompt's forward, also for a forward with a 4-D mask (static caches)."""
        if forward.valid is not None or self._mask is None:
            return forward.valid
        part = self._mask[:, forward.cached : forward.cached + forward.tokens]
        return None if bool(part.all()) else part.float()

    def _live(self, ids: Tensor | None) -> Tensor | None:
        """[B] bool, True for unfinished rows; None if all rows count as unfinished."""
        if ids is None or self._ends is None or len(ids) == 1 or self.beams > 1:
            return None
        return ~torch.isin(ids, self._ends).any(1)


class OwnLoop:
    """A token loop of dart-llm, which states whether its next forward is part of the prompt.

    ``prompt``: True if the next forward is part of the prompt.  ``live``: [B] bool, True for
    unfinished rows; None if all rows count as unfinished.
    """

    def __init__(self) -> None:
        self.prompt = True
        self.live: Tensor | None = None
        self.cache: Any = None

    def call(self, forward: ForwardArgs) -> ForwardCall:
        """Classify the next forward."""
        self.cache = forward.cache
        if self.prompt:
            return forward.as_call(Kind.PREFILL)
        return forward.as_call(Kind.DECODE, live=self.live)


def bare_call(forward: ForwardArgs, forced_decode: bool) -> ForwardCall:
    """Classify a forward outside ``generate``.

    ``forced_decode``: True if the tokens come from a fixed text (teacher forcing).  In a forward
    with cached tokens, each token then counts as one decode step.
    """
    decode = forward.cached and (forward.tokens == 1 or forced_decode)
    return forward.as_call(Kind.DECODE if decode else Kind.PREFILL, forced=forced_decode)


@dataclass(frozen=True)
class TokenCall:
    """A forward of the whole model on token ids [B, T]: one token per row, or whole prompts.

    ``cache``: transformers' cache.  For a prompt it is empty or None; if it is None, ``use_cache``
    decides whether a cache is made.  ``keep``: number of last tokens whose logits are needed; 0 for
    all.  ``forbidden``: None if the caller needs logits.  If it is a list of ids, the caller needs
    only the likeliest next token of each row that is not in the list.
    """

    ids: Tensor
    cache: Any
    forbidden: list[int] | None = None
    use_cache: bool = True
    keep: int = 0


_READ = ("attention_mask", "position_ids", "use_cache", "logits_to_keep")
_OFF = ("output_attentions", "output_hidden_states")
"""``_READ``: arguments that a native forward reads.  ``_OFF``: arguments that must be False."""


def _plain_args(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Any, Any, Any, Any, Any] | None:
    """Ids, cache and the ``_READ`` arguments; None if others require the model's forward."""
    rest = {key: value for key, value in kwargs.items() if value is not None}
    ids = rest.pop("input_ids", args[0] if len(args) == 1 else None)
    if len(args) > 1 or not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
        return None
    caches = [rest.pop(name) for name in ("cache", "past_key_values") if name in rest]
    mask, positions, use_cache, keep = (rest.pop(name, None) for name in _READ)
    rest.pop("tokenizer", None)  # for stop strings; models ignore it
    neutral = rest.pop("return_dict", True) is True
    if not neutral or any(name not in _OFF or value is not False for name, value in rest.items()):
        return None
    return ids, caches[0] if caches else None, mask, positions, use_cache, keep


def read_step(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dtype: torch.dtype,
    windows: Sequence[int | None],
    most: int,
) -> TokenCall | None:
    """The forward as a ``TokenCall`` if a native whole step can replace it, else None.

    A native whole step decodes one token per row in a single call of C++.  ``dtype``: dtype of the
    weights.  ``windows``: attention window of each layer; None means all positions.  ``most``:
    maximum number of rows in a step.
    """
    plain = _plain_args(args, kwargs)
    if plain is None:
        return None
    ids, cache, mask, positions, use_cache, keep = plain
    if cache is None or use_cache not in (None, True):
        return None
    rows, tokens = ids.shape
    selects_logits = isinstance(keep, Tensor) or keep not in (None, 0, 1)
    if tokens != 1 or rows > most or selects_logits or not extendable(cache, windows):
        return None
    length = int(cache.get_seq_length())
    if not length:
        return None
    keys, values = layer_tensors(cache.layers[0])
    if len(keys) != rows or keys.dtype != dtype or values.dtype != dtype:
        return None  # filled under autocast: only the model's forward handles such a cache
    if mask is not None and not _hides_nothing(mask, rows, length + 1):
        return None
    if positions is not None and not bool((positions[..., -1] == length).all()):
        return None
    return TokenCall(ids, cache)


def read_prompt(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], windows: Sequence[int | None], use_cache: bool
) -> TokenCall | None:
    """The forward as a ``TokenCall`` if it runs whole prompts without padding, else None.

    ``windows``: attention window of each layer; None means all positions.  For a prompt that is
    longer than a window, the result is None.  ``use_cache``: the model's default for this argument.
    """
    plain = _plain_args(args, kwargs)
    if plain is None:
        return None
    ids, cache, mask, positions, requested, keep = plain
    length, keep = ids.shape[1], 0 if keep is None else keep
    use_cache = use_cache if requested is None else requested
    if length < 2 or any(window is not None and window < length for window in windows):
        return None
    if cache is not None and not _is_empty(cache, windows):
        return None
    if mask is not None and not _hides_nothing(mask, len(ids), length):
        return None
    counts = positions is None or positions.shape[-1:] == (length,)
    if not counts or (positions is not None and bool((positions != torch.arange(length)).any())):
        return None
    if not isinstance(keep, int) or keep < 0 or not isinstance(use_cache, bool):
        return None
    return TokenCall(ids, cache, use_cache=use_cache or cache is not None, keep=keep)


def _is_empty(cache: Any, windows: Sequence[int | None]) -> bool:
    """Whether ``cache`` is an empty ``DynamicCache`` that fits the model's windows."""
    grows = is_growing(cache) and (not cache.layers or extendable(cache, windows))
    return grows and not cache.get_seq_length()


def new_cache(model: Any) -> Any:
    """The cache that ``model`` makes by default."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config())


def _hides_nothing(mask: Any, rows: int, length: int) -> bool:
    """Whether an attention mask is [rows, length] and hides no position from any row."""
    fits = isinstance(mask, Tensor) and mask.shape == (rows, length)
    return fits and bool(mask.all())


def as_output(logits: Tensor, cache: Any) -> Any:
    """The output object of a causal language model, made from logits [B, V] or [B, T, V]."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    by_token = logits[:, None] if logits.dim() == 2 else logits
    return CausalLMOutputWithPast(logits=by_token, **{cache_name(): cache})
