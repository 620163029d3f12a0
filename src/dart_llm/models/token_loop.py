"""Replaces transformers' token loop for one sequence, greedy or sampled, with less overhead.

``generate`` does its usual preparation and then calls a ``TokenLoop`` instead of ``_sample``.  The
loop makes the same calls in the same order, so that tokens, random numbers and the inputs of
processors, criteria and streamers are the same.  It leaves out work that has no effect.  It also
does not build the arguments of the model's forward when a *whole step* of the executor ``native``
runs instead: a single C++ call that decodes one token per row.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dart_llm.models.calls import cache_name
from dart_llm.models.growing_cache import is_growing

Step = Callable[[Tensor, Any, list[int] | None], Tensor | None]
"""A function of ids [1, 1], a cache, and a list of forbidden ids or None.

It returns logits [1, V], or None if the model's forward must run instead.  If it gets a list, it
may return, instead of logits, the likeliest id that is not in the list: [1] int64.
"""

Processor = Callable[[Tensor, Tensor], Tensor]
"""A function of ids [1, T] and scores (processed logits); returns new scores, [1, V] float32."""

Criterion = Callable[[int, int], bool]
"""A function of the number of ids and the last id; returns True at the sequence's end."""

_ARGUMENTS = {"use_cache", "attention_mask", "position_ids", "logits_to_keep"}
"""The arguments of a forward, besides the cache, that the loop can update for the next token."""

_EXTRAS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def can_stand_in(model: Any, generate: Any) -> bool:
    """Whether a ``TokenLoop`` can replace the loop of ``generate``, a method of ``model``."""
    from transformers import GenerationMixin

    loop_methods = ("_sample", "_update_model_kwargs_for_generation")
    # whole steps do not call the two methods added here, so an override on the instance would be
    # ignored
    names = {*loop_methods, "prepare_inputs_for_generation", "_has_unfinished_sequences"}
    if (
        getattr(generate, "__func__", None) is not GenerationMixin.generate
        or names & vars(model).keys()
    ):
        return False
    return all(
        getattr(type(model), name) is getattr(GenerationMixin, name) for name in loop_methods
    )


class TokenLoop:
    """The argument ``custom_generate`` of ``generate``; ``step`` decodes one token."""

    def __init__(self, step: Step, streamer: Any = None) -> None:
        self._step, self._streamer = step, streamer

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Generate as ``_sample`` does; if this loop cannot be used, call ``_sample``."""
        if not _serves(input_ids, generation_config, model_kwargs):
            return type(model)._sample(
                model,
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                streamer=self._streamer,
                **model_kwargs,
            )
        sequence = _Sequence(model, self._step, generation_config, model_kwargs)
        ids = self._decode(sequence, input_ids, logits_processor, stopping_criteria)
        if self._streamer is not None:
            self._streamer.end()
        if not generation_config.return_dict_in_generate:
            return ids
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        output: Any = GenerateDecoderOnlyOutput
        return output(sequences=ids, **{cache_name(): sequence.cache})

    def _decode(self, sequence: _Sequence, ids: Tensor, processors: Any, criteria: Any) -> Tensor:
        process = _processors(processors)
        scored = sequence.sampled or not all(isinstance(item, _NoEnds) for item in process)
        quick_criteria, others = _criteria(criteria)
        text = _Text(ids)
        token = scores = sequence.prompt(ids)
        while True:
            if scores.is_floating_point():
                for processor in process:
                    scores = processor(text.ids(), scores)
                if sequence.sampled:
                    token = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
                else:
                    token = _likeliest(scores)
            text.add(token)
            number, length = int(token), text.length
            complete = any(criterion(length, number) for criterion in quick_criteria)
            if others is not None:
                complete |= bool(others(text.ids(), None).all())
            if self._streamer is not None:
                self._streamer.put(token.cpu())
            if complete:
                return text.ids()
            token = scores = sequence.next(text, None if scored else _forbidden(process, length))


class _Text:
    """The ids of a sequence, [1, T]; new ones are joined to them only when someone reads them."""

    def __init__(self, ids: Tensor) -> None:
        self._ids, self._new = ids, list[Tensor]()
        self.length = ids.shape[1]

    def add(self, token: Tensor) -> None:
        """Append an id [1]."""
        self._new.append(token[:, None])
        self.length += 1

    def last(self) -> Tensor:
        """The id that was added last, [1, 1]."""
        return self._new[-1] if self._new else self._ids[:, -1:]

    def ids(self) -> Tensor:
        """All ids, [1, T]."""
        if self._new:
            self._ids, self._new = torch.cat([self._ids, *self._new], dim=-1), []
        return self._ids


def _likeliest(scores: Tensor) -> Tensor:
    """The first id [1] with the largest score in [1, V]; numpy finds it faster than torch."""
    if scores.dtype != torch.float32 or scores.requires_grad or scores.dim() != 2:
        return torch.argmax(scores, dim=-1).reshape(-1)
    return torch.from_numpy(scores.numpy().argmax(-1))


class _Sequence:
    """The sequence that is being generated.  ``cache``: the cache of the latest forward.

    ``prompt`` and ``next`` return float32 logits, which processors may modify in place.
    """

    def __init__(self, model: Any, step: Step, config: Any, kwargs: dict[str, Any]) -> None:
        self._model, self._step, self._config, self._kwargs = model, step, config, kwargs
        self.cache = kwargs[cache_name()]
        self.sampled = bool(config.do_sample)
        self._prompt = 0
        self._steps = False

    def prompt(self, ids: Tensor) -> Tensor:
        """Run the forward of the prompt ids [1, T]; return the logits [1, V] after the prompt."""
        self._prompt = ids.shape[1]
        outputs = self._model._prefill(ids, self._config, self._kwargs, is_first_iteration=True)
        logits = self._read(outputs)
        positions = self._kwargs.get("position_ids")
        end = self.cache.get_seq_length()
        # whole steps need the cache's length as position; otherwise the model's forward must run
        self._steps = positions is None or bool((positions[..., -1] == end - 1).all())
        return logits

    def next(self, text: _Text, forbidden: list[int] | None) -> Tensor:
        """Run the forward of the last id of ``text``; return the logits [1, V] after it.

        The cache must contain all other ids.  If ``forbidden`` is a list, the result may instead be
        the likeliest id that is not in this list, [1] int64.
        """
        if self._steps:
            logits = self._step(text.last(), self.cache, forbidden)
            if logits is not None:
                return logits.float() if logits.is_floating_point() else logits
        kwargs = {**self._kwargs, cache_name(): self.cache}
        positions = kwargs.get("position_ids")
        if positions is not None:
            kwargs["position_ids"] = positions[..., -1:] + (text.length - self._prompt)
        model = self._model
        inputs = model.prepare_inputs_for_generation(text.ids(), next_sequence_length=1, **kwargs)
        return self._read(model(**inputs, return_dict=True))

    def _read(self, outputs: Any) -> Tensor:
        """Store the new cache; return a copy of the last logits, so that others can be freed."""
        self.cache = outputs.get(cache_name(), self.cache)
        logits: Tensor = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
        return logits


def _serves(ids: Tensor, config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this loop can replace ``_sample`` with these arguments."""
    extras = config.return_dict_in_generate and any(getattr(config, name) for name in _EXTRAS)
    if extras or getattr(config, "is_assistant", False):
        return False
    if config.prefill_chunk_size is not None or config.compile_config is not None:
        return False
    if ids.device.type != "cpu" or ids.dim() != 2 or len(ids) != 1 or not ids.shape[1]:
        return False
    arguments = {name for name, value in kwargs.items() if value is not None}
    plain = arguments <= {*_ARGUMENTS, cache_name()} and "attention_mask" not in arguments
    return plain and bool(kwargs.get("use_cache")) and is_growing(kwargs.get(cache_name()))


def _processors(processors: Any) -> list[Processor]:
    """The processors of a list, so that the loop can call each of them itself.

    Calling the list would inspect the processors' signatures at every token.  If a processor needs
    further arguments, or the list is not transformers', the list is the only item of the result.

    Leading processors that enforce a minimum length become ``_NoEnds``.  transformers' versions
    compare every id of the vocabulary with the end tokens at each token, even after the minimum
    length is reached.
    """
    from transformers import LogitsProcessorList

    counts = [len(inspect.signature(processor.__call__).parameters) for processor in processors]
    if type(processors) is not LogitsProcessorList or any(count > 2 for count in counts):
        return [processors]
    replaced = [_NoEnds.from_processor(processor) for processor in processors]
    # only leading ones: ``_NoEnds`` changes scores in place, and a processor before it might still
    # use the scores that it returned
    first = replaced.index(None) if None in replaced else len(replaced)
    return [*replaced[:first], *processors[first:]]


@dataclass(frozen=True)
class _NoEnds:
    """Forbids the end tokens ``ends`` until there are ``least`` tokens; changes scores in place."""

    least: int
    ends: list[int]

    @classmethod
    def from_processor(cls, processor: Any) -> _NoEnds | None:
        """The equivalent of a minimum-length processor of transformers; None for others."""
        from transformers import MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor

        if type(processor) is MinLengthLogitsProcessor:
            least = processor.min_length
        elif type(processor) is MinNewTokensLengthLogitsProcessor:
            least = processor.min_new_tokens + processor.prompt_length_to_skip
        else:
            return None
        ends = processor.eos_token_id.flatten().tolist()
        return cls(least, [token for token in ends if token >= 0])

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[-1] < self.least:
            scores[:, [end for end in self.ends if end < scores.shape[-1]]] = -math.inf
        return scores


def _forbidden(process: Sequence[Processor], length: int) -> list[int]:
    """The ids that are forbidden as the next token of a sequence that has ``length`` tokens."""
    active = [rule for rule in process if isinstance(rule, _NoEnds) and length < rule.least]
    return list(dict.fromkeys(end for rule in active for end in rule.ends))


def _criteria(criteria: Any) -> tuple[list[Criterion], Any]:
    """Functions for the criteria on last id or length, and a list of all other criteria or None."""
    from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

    if type(criteria) is not StoppingCriteriaList:
        return [], criteria
    numbers: list[Criterion] = []
    others = StoppingCriteriaList()
    for criterion in criteria:
        if type(criterion) is EosTokenCriteria:
            ends = set(criterion.eos_token_id.flatten().tolist())
            numbers.append(lambda length, token, ends=ends: token in ends)  # type: ignore[misc]
        elif type(criterion) is MaxLengthCriteria:
            most = criterion.max_length
            numbers.append(lambda length, token, most=most: length >= most)  # type: ignore[misc]
        else:
            others.append(criterion)
    return numbers, others or None
