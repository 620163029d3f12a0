"""From a request's body to what the engine is asked; every limit on tokens is here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from dart_llm.config import PruneConfig
from dart_llm.engine_ask import Ask, Sampling
from dart_llm.errors import ConfigError
from dart_llm.registry import METHODS
from dart_llm.serve_errors import Refusal
from dart_llm.serve_schemas import ChatBody, Common, CompletionBody, Dart, Message
from dart_llm.settings_serve import ServeSettings, prunes

COMPLETION_TOKENS = 16
"""``max_tokens`` of ``/v1/completions`` when nothing is said, as OpenAI has it."""
SMALLEST_TOP_P = 1e-6
"""What top_p 0 means: the likeliest token alone."""
CHARACTERS = 4
"""Of a token, about; a longer text is looked at in parts first."""
CUT_TOKENS = 64
"""By so many a text that is cut off may have more tokens than the same part of the whole."""


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

    def chat(self, body: ChatBody, request_id: str, client: str) -> tuple[Ask, ...]:
        """Of ``/v1/chat/completions``; raises ``Refusal`` for what cannot be answered."""
        self._check_model(body.model)
        if body.top_logprobs and not body.logprobs:
            raise Refusal(400, "top_logprobs goes with logprobs: true alone", "top_logprobs")
        ids = self._ids(chat_text(self.tokenizer, body.messages), add_special_tokens=False)
        asked = (
            body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        )
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return (self._ask(body, ids, asked, logprobs, request_id, client),)

    def completion(self, body: CompletionBody, request_id: str, client: str) -> tuple[Ask, ...]:
        """Of ``/v1/completions``, one per prompt; raises ``Refusal`` as ``chat`` does."""
        self._check_model(body.model)
        prompts, most = body.prompts, self.settings.max_prompts
        if len(prompts) > most:
            raise Refusal(400, f"{len(prompts)} prompts are too many: at most {most}", "prompt")
        if len(prompts) > 1 and body.dart and body.dart.conversation:
            raise Refusal(
                400, "a conversation goes on from one prompt: give one", "dart.conversation"
            )
        asked = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        scored = bool(body.echo) and body.logprobs is not None
        return tuple(
            self._ask(
                body, self._prompt_ids(prompt), asked, body.logprobs, request_id, client, scored
            )
            for prompt in prompts
        )

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            raise Refusal(
                404,
                f"the model {name!r} is not served here: ask for {self.names[0]!r}",
                "model",
                "model_not_found",
            )

    def _prompt_ids(self, prompt: str | list[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return self._ids(prompt)
        if any(not 0 <= one < self.vocabulary for one in prompt):
            raise Refusal(400, f"token ids lie in 0 to {self.vocabulary - 1}", "prompt")
        return tuple(prompt)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest prompt; None: not known."""
        limits = (self.settings.max_prompt_tokens, self.context)
        return min((one for one in limits if one is not None), default=None)

    def _ids(self, text: str, **options: Any) -> tuple[int, ...]:
        """Token ids of ``text``.

        Raises ``Refusal`` when its beginning is too long already, so that no text costs more than
        the longest prompt does.
        """
        longest = self.longest
        if longest is not None:
            most = longest + CUT_TOKENS
            length = CHARACTERS * most
            while length < len(text):
                if len(self.tokenizer(text[:length], verbose=False, **options).input_ids) > most:
                    raise _too_long(longest, f"more than {longest}")
                length *= 2
        return tuple(self.tokenizer(text, verbose=False, **options).input_ids)

    def _ask(
        self,
        body: Common,
        ids: tuple[int, ...],
        asked: int | None,
        logprobs: int | None,
        request_id: str,
        client: str,
        scored: bool = False,
    ) -> Ask:
        settings, n = self.settings, body.n or 1
        if n > settings.max_choices:
            raise Refusal(400, f"n {n} is too large: at most {settings.max_choices}", "n")
        tokens = 0 if scored and asked == 0 else self._room(len(ids), asked)
        temperature = settings.temperature if body.temperature is None else body.temperature
        top_p = 1.0 if body.top_p is None else max(SMALLEST_TOP_P, body.top_p)
        config = self.config(body.dart)
        try:
            sampling = Sampling(
                tokens, temperature, top_p, body.seed, n, body.stops, logprobs, scored
            )
            return Ask(ids, sampling, config, _kept_as(body, client, config), request_id, client)
        except ConfigError as error:
            raise Refusal(400, str(error)) from None

    def _room(self, prompt: int, asked: int | None) -> int:
        """Tokens of the answer after ``prompt`` tokens: what is asked for, as far as it fits."""
        if not prompt:
            raise Refusal(400, "the prompt is empty: give at least one word", "prompt")
        longest = self.longest
        if longest is not None and prompt > longest:
            raise _too_long(longest, str(prompt))
        if asked == 0:
            raise Refusal(
                400, "max_tokens 0 asks for no answer: give 1 or more, or echo with logprobs too",
                "max_tokens",
            )  # fmt: skip
        room = self.settings.max_tokens
        if self.context is not None:
            room = min(room, self.context - prompt)
        if not room:
            raise _too_long(self.context, f"{prompt}, which leaves no room for an answer,")
        return room if asked in (None, -1) else min(room, asked)

    def config(self, asked: Dart | None) -> PruneConfig | None:
        """The configuration of a request; None: dense.

        Raises ``Refusal`` for values that do not fit, and for a method that would make this
        request wait until something is learnt.
        """
        base, changes = self._base, {} if asked is None else _changes(asked)
        try:
            wrong = "dart.method"
            if asked is not None and asked.method not in (None, base.method):
                if base.sparsity and "sparsity" not in changes and prunes(str(asked.method)):
                    changes["sparsity"] = base.sparsity
                base = METHODS.get(str(asked.method))
            wrong = ""
            config = base.replace(changes)
        except ConfigError as error:
            raise Refusal(400, str(error), wrong or _wrong(base, changes)) from None
        if config.method == "dense" and config.target > 0:
            raise Refusal(
                400, "method dense removes nothing: drop the sparsity, or give 0", "dart.sparsity"
            )
        if config.weight_bits is not None:
            raise Refusal(
                400,
                f"method {config.method} needs a copy of the model, which this server has not",
                "dart.method",
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


def _too_long(limit: int | None, found: str) -> Refusal:
    """In the words by which OpenAI's clients know this refusal."""
    return Refusal(
        400,
        f"This model's maximum context length is {limit} tokens, but the prompt has {found} "
        "tokens: shorten it",
        code="context_length_exceeded",
    )


def _kept_as(body: Common, client: str, config: PruneConfig | None) -> str | None:
    """The name under which the engine keeps a conversation, if it is to.

    It belongs to its client: nobody goes on with, or overwrites, another's.  The dense side of a
    conversation is kept apart, so that both sides of a comparison go on.
    """
    name = body.dart.conversation if body.dart else None
    side = "dense" if config is None else "pruned"
    return None if name is None else json.dumps([client, body.user, side, name])


def _wrong(base: PruneConfig, changes: Mapping[str, Any]) -> str:
    """The field whose value does not fit even alone; all of them where they do not fit together."""
    for name, value in changes.items():
        try:
            base.replace({name: value})
        except ConfigError:
            return f"dart.{name}"
    return "dart"


def _changes(asked: Dart) -> dict[str, Any]:
    given = {
        "sparsity": asked.sparsity,
        "masking_step": asked.masking_step,
        "drift": None if asked.drift is None else {"rule": asked.drift},
    }
    return {name: value for name, value in given.items() if value is not None}


def chat_text(tokenizer: Any, messages: Sequence[Message]) -> str:
    """A conversation as the model's own template writes it; raises ``Refusal``."""
    if not getattr(tokenizer, "chat_template", None):
        raise Refusal(
            400, "this model has no chat template: use /v1/completions", "messages", "no_template"
        )
    turns = [
        {"role": "system" if one.role == "developer" else one.role, "content": one.text}
        for one in messages
    ]
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError) as error:
        reason = str(error) if isinstance(error, TemplateError) else "it failed"
        raise Refusal(
            400, f"the model's chat template does not take these messages: {reason}", "messages"
        ) from None
    return text
