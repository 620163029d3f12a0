"""What a forward or generate call means: prompt or decode, padding, ended rows.

docs/method.md, "Life of a sequence", has the rules.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dart_llm.errors import ConfigError
from dart_llm.models.growing_cache import extendable, held, is_cache, is_static
from dart_llm.pruning.forward import ForwardCall, Kind

GENERATE = "generate"

PREFILL = "_prefill"
"""Methods of a model that are wrapped while attached: the token loop, and its prompt step."""


@dataclass(frozen=True)
class ForwardArgs:
    """What a root forward was called with."""

    cached: int
    tokens: int
    rows: int
    input_ids: Tensor | None
    valid: Tensor | None
    """[B, T] float32, 0 for padding; None when nothing says that there is padding."""
    cache: Any = None


@functools.lru_cache(maxsize=64)
def forward_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """Parameters of a model class's forward, ``self`` left out."""
    found = tuple(inspect.signature(kind.forward).parameters)
    return tuple(name for name in found if name not in ("self", "args"))


def read_forward(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ForwardArgs:
    """Read cache length, new tokens and padding of a call of ``model``."""
    names = forward_names(type(model)) if args else ()  # type: ignore[arg-type]
    given = {**kwargs, **dict(zip(names, args, strict=False))}
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    tensor = ids if ids is not None else embeds
    if tensor is None:
        raise ConfigError("a forward of a pruned model needs input_ids or inputs_embeds")
    cache = next((given[k] for k in ("cache", "past_key_values") if given.get(k) is not None), None)
    cached = 0 if cache is None else int(cache.get_seq_length())
    rows, tokens = int(tensor.shape[0]), int(tensor.shape[1])
    valid = _valid(given.get("attention_mask"), tokens)
    return ForwardArgs(cached, tokens, rows, ids, valid, cache)


def _valid(mask: Any, tokens: int) -> Tensor | None:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    part = mask[:, -tokens:]
    return None if tokens > 1 and bool(part.all()) else part.float()


_SECOND_TEXT = {"guidance_scale": 1, "assistant_early_exit": None}
"""Settings with which ``generate`` calls its own model for another text, and their off values."""


_OTHER_CALLS = (
    "custom_generate",
    "synced_gpus",
    "assistant_model",
    "assistant_tokenizer",
    "tokenizer",
)
_OTHER_LOOPS = (
    "constraints",
    "force_words_ids",
    "penalty_alpha",
    "use_mtp",
    "dola_layers",
    "prompt_lookup_num_tokens",
    "cache_implementation",
)
"""Arguments and settings of ``generate`` with which it runs another loop than its usual one, or
does not hand them to one that is given (the tokenizer of stop strings).
"""


def read_generate(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Loop:
    """The loop of a call of ``generate``; ``ConfigError`` when it would run without a cache."""
    inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    if inputs is None:
        inputs = kwargs.get("inputs_embeds")
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)

    def setting(name: str, default: Any) -> Any:
        for source in (kwargs.get(name), getattr(config, name, None)):
            if source is not None:
                return source
        known = getattr(model.generation_config, name, None)
        return default if known is None else known

    if not setting("use_cache", True):
        raise ConfigError(
            "generate without a cache runs the whole text again for every token, so there is no "
            "decode step to prune; leave use_cache on"
        )
    for name, neutral in _SECOND_TEXT.items():
        if setting(name, neutral) != neutral:
            raise ConfigError(
                f"generate with {name} runs a second text through the model between the steps, so "
                "the steps cannot be told apart; leave it out"
            )
    prompt = 1 if inputs is None else int(inputs.shape[1])
    loop = Loop(prompt, int(setting("num_beams", 1)))
    asked = any(kwargs.get(name) is not None for name in _OTHER_CALLS)
    others = any(setting(name, None) for name in _OTHER_LOOPS)
    loop.plain = loop.beams == 1 and len(args) <= 2 and not asked and not others
    return loop


class Loop:
    """One running call of ``generate``: is it in its prompt step, and which rows have ended."""

    def __init__(self, prompt_tokens: int, beams: int) -> None:
        self.prompt_tokens, self.beams = prompt_tokens, beams
        self.plain = False
        """Whether it is transformers' greedy or sampling loop."""
        self.in_prefill = False
        self.forwards = 0
        self.cache: Any = None
        """The cache of the newest forward: after the loop it says how many tokens stayed."""
        self._ends: Tensor | None = None
        self._mask: Tensor | None = None

    def read_prefill(self, prefill: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Read a call of ``_prefill``: its mask [B, cached + prompt tokens], and the ids that end a
        row or pad it after its end.
        """
        given = inspect.signature(prefill).bind(*args, **kwargs).arguments
        device = given["input_ids"].device

        def ids(name: str) -> Tensor | None:
            found = getattr(given["generation_config"], name, None)
            return found.flatten().to(device) if isinstance(found, Tensor) else None

        ends, pads = ids("_eos_token_tensor"), ids("_pad_token_tensor")
        if ends is not None and pads is not None:
            ends = torch.cat([ends, pads])
        mask = given["model_kwargs"].get("attention_mask")
        self._ends = ends
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def call(self, seen: ForwardArgs) -> ForwardCall:
        """What the next forward of this loop is; raises ``ConfigError`` without a cache."""
        first, self.forwards, self.cache = self.forwards == 0, self.forwards + 1, seen.cache
        if self.in_prefill:
            return _call(Kind.PREFILL, seen, valid=self._prompt_part(seen))
        if first:  # assisted decoding has no prompt step: candidates ride along with the prompt
            prompt = self.prompt_tokens
            sliced = prompt > seen.tokens
            new = prompt - seen.cached * int(sliced)
            return _call(Kind.PREFILL, seen, seen.valid, observable=new)
        if not seen.cached:
            raise ConfigError("this generation runs without a cache, so nothing is decoded")
        return _call(Kind.DECODE, seen, seen.valid, live=self._live(seen.input_ids))

    def _prompt_part(self, seen: ForwardArgs) -> Tensor | None:
        """The prompt's padding, also where the forward itself got a 4-D mask (static caches)."""
        if seen.valid is not None or self._mask is None:
            return seen.valid
        part = self._mask[:, seen.cached : seen.cached + seen.tokens]
        return None if bool(part.all()) else part.float()

    def _live(self, ids: Tensor | None) -> Tensor | None:
        """[B] bool: rows that have not ended; None when all count."""
        if ids is None or self._ends is None or len(ids) == 1 or self.beams > 1:
            return None
        return ~torch.isin(ids, self._ends).any(1)


class OwnLoop:
    """A token loop of this package, which says what each of its forwards is.

    ``prompt``: whether the next forward is one of the prompt; ``live``: [B] bool, rows that have
    not ended, or None when all count.
    """

    def __init__(self) -> None:
        self.prompt = True
        self.live: Tensor | None = None
        self.cache: Any = None

    def call(self, seen: ForwardArgs) -> ForwardCall:
        """What the next forward is."""
        self.cache = seen.cache
        if self.prompt:
            return _call(Kind.PREFILL, seen, seen.valid)
        return _call(Kind.DECODE, seen, seen.valid, live=self.live)


def bare_call(seen: ForwardArgs, forced_decode: bool) -> ForwardCall:
    """What a forward outside ``generate`` is."""
    decode = seen.cached and (seen.tokens == 1 or forced_decode)
    call = _call(Kind.DECODE if decode else Kind.PREFILL, seen, seen.valid)
    return replace(call, forced=forced_decode)


def _call(
    kind: Kind,
    seen: ForwardArgs,
    valid: Tensor | None,
    live: Tensor | None = None,
    observable: int | None = None,
) -> ForwardCall:
    return ForwardCall(kind, seen.cached, seen.tokens, seen.rows, valid, live, observable)


@dataclass(frozen=True)
class SlimCall:
    """A forward that decodes one token of each row, ids [B, 1], after transformers' own cache.

    ``forbidden``: token ids, where nothing is wanted but the likeliest next tokens other than
    these; None: logits are.
    """

    ids: Tensor
    cache: Any
    forbidden: list[int] | None = None


@dataclass(frozen=True)
class PromptCall:
    """A forward of whole texts ids [B, T] from their beginning, without padding.

    ``cache``: transformers' own, which is empty, or None for one that ``cached`` asks for;
    ``keep``: last tokens whose logits are asked for, 0 for all.
    """

    ids: Tensor
    cache: Any
    cached: bool
    keep: int


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_cache": (True,),
    "return_dict": (True,),
    "logits_to_keep": (0, 1),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
}
"""Arguments of a forward, and the values with which a whole step can serve it."""


def read_call(
    kwargs: dict[str, Any],
    args: tuple[Any, ...],
    dtype: torch.dtype,
    windows: Sequence[int | None],
    most: int | None = 1,
) -> SlimCall | None:
    """The call of a root forward when a whole step can serve it, else None.

    ``dtype``: of the weights; ``windows``: positions that each layer sees, None: all; ``most``:
    rows that a step takes, None: any number.
    """
    given = {key: value for key, value in kwargs.items() if value is not None}
    ids = given.pop("input_ids", args[0] if len(args) == 1 else None)
    cache = given.pop("cache", None) or given.pop("past_key_values", None)
    if len(args) > 1 or not isinstance(ids, Tensor) or ids.dim() != 2 or cache is None:
        return None
    rows = len(ids)
    if ids.shape[1] != 1 or not rows or (most is not None and rows > most):
        return None
    if not extendable(cache, windows):
        return None
    length = int(cache.get_seq_length())
    if not length:
        return None
    keys, values = held(cache.layers[0])
    if len(keys) != rows:
        return None
    if keys.dtype != dtype or values.dtype != dtype:
        return None  # filled under autocast: the model's own forward says what comes of it
    given.pop("tokenizer", None)  # of stop strings: generate hands it on, and no model reads it
    mask, positions = given.pop("attention_mask", None), given.pop("position_ids", None)
    whole = is_static(cache) and all(window is None or window > length for window in windows)
    if mask is not None and not _hides_nothing(mask, rows, length, whole):
        return None
    if positions is not None and not bool((positions[..., -1] == length).all()):
        return None
    neutral = all(
        not isinstance(value, Tensor) and value in _NEUTRAL.get(key, ())
        for key, value in given.items()
    )
    return SlimCall(ids, cache) if neutral else None


def read_prompt(
    kwargs: dict[str, Any], args: tuple[Any, ...], windows: Sequence[int | None], cached: bool
) -> PromptCall | None:
    """The call of a root forward where its token ids are all that it is about, from a text's start.

    ``windows``: positions that each layer sees, None: all; no text may be longer.  ``cached``:
    whether the model makes a cache where nothing says so.
    """
    given = {key: value for key, value in kwargs.items() if value is not None}
    ids = given.pop("input_ids", args[0] if len(args) == 1 else None)
    caches = [given.pop(name) for name in ("cache", "past_key_values") if name in given]
    cache = caches[0] if caches else None
    if len(args) > 1 or not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
        return None
    length = ids.shape[1]
    if length < 2 or any(window is not None and window < length for window in windows):
        return None
    if cache is not None and not _is_empty(cache, windows):
        return None
    given.pop("tokenizer", None)
    mask, positions = given.pop("attention_mask", None), given.pop("position_ids", None)
    if mask is not None and not (
        isinstance(mask, Tensor) and mask.shape == ids.shape and mask.all()
    ):
        return None
    if positions is not None and not _count_up(positions, length):
        return None
    keep, cached = given.pop("logits_to_keep", 0), given.pop("use_cache", cached)
    if not isinstance(keep, int) or keep < 0 or not isinstance(cached, bool):
        return None
    neutral = all(
        not isinstance(value, Tensor) and value in _NEUTRAL.get(key, ())
        for key, value in given.items()
    )
    return PromptCall(ids, cache, cached or cache is not None, keep) if neutral else None


def _count_up(positions: Any, length: int) -> bool:
    """Whether ``positions`` [., length] are those of texts that begin."""
    fits = isinstance(positions, Tensor) and positions.shape[-1:] == (length,)
    return fits and bool((positions == torch.arange(length)).all())


def _is_empty(cache: Any, windows: Sequence[int | None]) -> bool:
    """Whether ``cache`` is the one of transformers that grows, and holds nothing."""
    known = is_cache(cache) and (not cache.layers or extendable(cache, windows))
    return known and not cache.get_seq_length()


def new_cache(model: Any) -> Any:
    """The cache that ``model`` makes when it is given none."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config())


def _hides_nothing(mask: Any, rows: int, length: int, whole: bool) -> bool:
    """Whether an attention mask shows a token the ``length`` positions before it and itself.

    ``whole``: it may be [B, 1, 1, capacity] (floats: added to scores), or one for every kind of
    layer, as ``generate`` makes them for a static cache.
    """
    if isinstance(mask, Mapping):
        return whole and all(_hides_nothing(one, rows, length, whole) for one in mask.values())
    if not isinstance(mask, Tensor):
        return False
    if not whole or mask.dim() == 2:
        return mask.shape == (rows, length + 1) and bool(mask.all())
    if mask.shape[:-1] not in ((rows, 1, 1), (1, 1, 1)) or mask.shape[-1] <= length:
        return False
    before, after = mask[..., : length + 1], mask[..., length + 1 :]
    if mask.dtype == torch.bool:
        return bool(before.all()) and not bool(after.any())
    least = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
    return least < 0 and not bool(before.any()) and bool((after <= least).all())


def as_output(logits: Tensor, cache: Any) -> Any:
    """What a causal language model returns.  logits: [B, V] or [B, T, V]."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    shown = logits[:, None] if logits.dim() == 2 else logits
    return CausalLMOutputWithPast(logits=shown, cache=cache)
