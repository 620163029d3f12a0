"""From a request's body to what the engine is asked; every limit on tokens is here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from dart_llm.config import PruneConfig
from dart_llm.engine_ask import Ask, Sampling
from dart_llm.errors import ConfigError
from dart_llm.serve_errors import Refusal
from dart_llm.serve_schemas import ChatBody, Common, CompletionBody, Dart, Message
from dart_llm.settings_serve import ServeSettings, prunes

COMPLETION_TOKENS = 16
"""``max_tokens`` of ``/v1/completions`` when nothing is said, as OpenAI has it."""
SMALLEST_TOP_P = 1e-6
"""What top_p 0 means: the likeliest token alone."""


@dataclass(frozen=True)
class Asker:
    """What a request is measured against.

    ``names``: by which the model may be asked for, its own first.  ``context``: tokens it can
    hold, None: unknown.  ``vocabulary``: token ids below it exist.
    """

    tokenizer: Any
    settings: ServeSettings
    names: tuple[str, ...]
    context: int | None
    vocabulary: int
    _base: PruneConfig = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_base", self.settings.prune_config())

    def chat(self, body: ChatBody, request_id: str, client: str) -> Ask:
        """Of ``/v1/chat/completions``; raises ``Refusal`` for what cannot be answered."""
        self._check_model(body.model)
        ids = chat_ids(self.tokenizer, body.messages)
        if body.top_logprobs is not None and not body.logprobs:
            raise Refusal(400, "top_logprobs goes with logprobs: true alone", "top_logprobs")
        asked = self._most(body.max_tokens, "max_tokens")
        asked = self._most(body.max_completion_tokens, "max_completion_tokens") or asked
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return self._ask(body, ids, asked, logprobs, request_id, client)

    def completion(self, body: CompletionBody, request_id: str, client: str) -> Ask:
        """Of ``/v1/completions``; raises ``Refusal`` for what cannot be answered."""
        self._check_model(body.model)
        ids = self._prompt_ids(body)
        asked = self._most(body.max_tokens, "max_tokens") or COMPLETION_TOKENS
        return self._ask(body, ids, asked, body.logprobs, request_id, client)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            raise Refusal(
                404,
                f"the model {name!r} is not served here: ask for {self.names[0]!r}",
                "model",
                "model_not_found",
            )

    def _prompt_ids(self, body: CompletionBody) -> tuple[int, ...]:
        prompt = body.prompt
        if isinstance(prompt, list) and not all(isinstance(part, int) for part in prompt):
            if len(prompt) != 1:
                raise Refusal(400, "one prompt per request: send the others apart", "prompt")
            prompt = prompt[0]  # type: ignore[assignment]
        if isinstance(prompt, str):
            return tuple(self.tokenizer(prompt, verbose=False).input_ids)
        ids = tuple(part for part in prompt if isinstance(part, int))
        if any(not 0 <= one < self.vocabulary for one in ids):
            raise Refusal(400, f"token ids lie in 0 to {self.vocabulary - 1}", "prompt")
        return ids

    def _most(self, asked: int | None, name: str) -> int | None:
        limit = self.settings.max_tokens
        if asked is not None and asked > limit:
            raise Refusal(
                400, f"{name} {asked} is too large: this server answers with {limit} at most", name
            )
        return asked

    def _ask(
        self,
        body: Common,
        ids: tuple[int, ...],
        asked: int | None,
        logprobs: int | None,
        request_id: str,
        client: str,
    ) -> Ask:
        settings, n = self.settings, body.n or 1
        if n > settings.max_choices:
            raise Refusal(400, f"n {n} is too large: at most {settings.max_choices}", "n")
        tokens = self._room(len(ids), asked)
        temperature = settings.temperature if body.temperature is None else body.temperature
        top_p = 1.0 if body.top_p is None else max(SMALLEST_TOP_P, body.top_p)
        try:
            sampling = Sampling(tokens, temperature, top_p, body.seed, n, body.stops, logprobs)
            config = self.config(body.dart)
            return Ask(ids, sampling, config, _kept_as(body, client, config), request_id)
        except ConfigError as error:
            raise Refusal(400, str(error), code="invalid_value") from None

    def _room(self, prompt: int, asked: int | None) -> int:
        """Tokens that the answer may have after ``prompt`` tokens."""
        if not prompt:
            raise Refusal(400, "the prompt is empty: give at least one word", "prompt")
        longest = self.settings.max_prompt_tokens
        if longest is not None and prompt > longest:
            raise Refusal(
                400,
                f"the prompt has {prompt} tokens, and this server takes {longest}: shorten it",
                code="context_length_exceeded",
            )
        room = self.settings.max_tokens
        if self.context is not None:
            room = min(room, self.context - prompt)
        if room < (asked or 1):
            raise Refusal(
                400,
                f"the prompt has {prompt} tokens and {asked or 1} are asked for, but the model's "
                f"context is {self.context}: shorten the prompt, or ask for less",
                code="context_length_exceeded",
            )
        return asked or room

    def config(self, asked: Dart | None) -> PruneConfig | None:
        """The configuration of a request; None: dense.

        Raises ``Refusal`` for a method that would make this request wait until something is
        learnt, ``ConfigError`` for values that do not fit.
        """
        base = self._base
        if asked is None:
            config = base
        elif asked.method in (None, base.method):
            config = base.replace(_changes(asked))
        else:
            changes = _changes(asked)
            if base.sparsity and "sparsity" not in changes and prunes(str(asked.method)):
                changes["sparsity"] = base.sparsity
            config = PruneConfig.build(str(asked.method), **changes)
        if config.method == "dense" and config.target > 0:
            raise ConfigError("method dense removes nothing: drop the sparsity, or give 0")
        if config.weight_bits is not None:
            raise ConfigError(
                f"method {config.method} needs a copy of the model, which this server has not"
            )
        if config.target == 0:
            return None
        learns = config.prior is not None or config.calibration is not None
        if learns and config.method not in self.settings.ready:
            raise Refusal(
                400,
                f"method {config.method} was not made ready: start the server with --methods "
                f"{','.join((*self.settings.ready, config.method))}",
                "dart.method",
                "method_not_ready",
            )
        return config


def _kept_as(body: Common, client: str, config: PruneConfig | None) -> str | None:
    """The name under which the engine keeps a conversation, if it is to.

    It belongs to its client: nobody goes on with, or overwrites, another's.  The dense side of a
    conversation is kept apart, so that both sides of a comparison go on.
    """
    name = body.dart.conversation if body.dart else None
    side = "dense" if config is None else "pruned"
    return None if name is None else json.dumps([client, body.user, side, name])


def _changes(asked: Dart) -> dict[str, Any]:
    given = {
        "sparsity": asked.sparsity,
        "masking_step": asked.masking_step,
        "drift": None if asked.drift is None else {"rule": asked.drift},
    }
    return {name: value for name, value in given.items() if value is not None}


def chat_ids(tokenizer: Any, messages: Sequence[Message]) -> tuple[int, ...]:
    """Token ids of a conversation by the model's own template; raises ``Refusal``."""
    if not getattr(tokenizer, "chat_template", None):
        raise Refusal(
            400, "this model has no chat template: use /v1/completions", "messages", "no_template"
        )
    turns = [
        {"role": "system" if one.role == "developer" else one.role, "content": one.text}
        for one in messages
    ]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError) as error:
        reason = str(error) if isinstance(error, TemplateError) else "it failed"
        raise Refusal(
            400, f"the model's chat template does not take these messages: {reason}", "messages"
        ) from None
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
