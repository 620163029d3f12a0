"""A conversation with a model that stays loaded: its messages, its settings, its turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from dart_llm.chat_template import chat_ids
from dart_llm.config import PruneConfig
from dart_llm.engine import Answer, Ask, Engine, Record, Sampling
from dart_llm.registry import METHODS
from dart_llm.settings_chat import ChatSettings

NAME = "chat"
"""The conversation's name in the engine."""
PROBE = 128
"""Tokens that are read to see how fast this machine is."""
OWN_TEXT = 5
"""What a token of the model's own text costs to write and to learn from, in tokens read."""


@dataclass(frozen=True)
class Turn:
    """One question and its answer, under the settings of then."""

    question: str
    answer: str
    settings: dict[str, Any]
    result: Answer

    @property
    def finish(self) -> str:
        """Why the answer ended: ``stop``, ``length`` or ``cancelled``."""
        return self.result.finish[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            "question": self.question,
            "answer": self.answer,
            "settings": self.settings,
            "finish": self.finish,
            "usage": asdict(self.result.usage),
            "timings": self.result.timings.to_dict(),
            "report": self.result.report.to_dict(),
        }


class Chat:
    """Messages and settings; every answer sees all messages before it."""

    def __init__(self, engine: Engine, tokenizer: Any, settings: ChatSettings) -> None:
        self.engine, self.settings = engine, settings
        self.turns: list[Turn] = []
        self._tokenizer = tokenizer
        self._learnt = {settings.method}
        self._ids([{"role": "user", "content": "?"}])  # no template is said now, not later
        engine.prepare(settings.served())

    @property
    def messages(self) -> list[dict[str, str]]:
        """The system message, if one was given, questions and answers."""
        system = self.settings.system
        found = [] if system is None else [{"role": "system", "content": system}]
        for turn in self.turns:
            found.append({"role": "user", "content": turn.question})
            found.append({"role": "assistant", "content": turn.answer})
        return found

    def _ids(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        return chat_ids(self._tokenizer, messages)

    def ask(
        self, question: str, emit: Callable[[Record], None], cancelled: Callable[[], bool]
    ) -> Turn:
        """Answer ``question``; what was said of a cancelled answer stays in the conversation.

        Raises ``ConfigError`` when the conversation no longer fits into the model's context.
        """
        ids = self._ids([*self.messages, {"role": "user", "content": question}])
        settings = self.settings
        asked = Ask(ids, settings.sampling(), settings.served(), NAME)
        answer = self.engine.run(asked, emit, cancelled)
        turn = Turn(question, answer.texts[0], _shown(settings), answer)
        if any(answer.tokens):
            self.turns.append(turn)
        return turn

    def change(self, **changes: Any) -> None:
        """Other settings from the next answer on; raises ``ConfigError`` and keeps the old ones.

        Learns what a method needs.
        """
        settings = self.settings.changed(**changes)
        self.engine.prepare(settings.served())
        self._learnt.add(settings.method)
        self.settings = settings

    def seconds_to_learn(self, method: str) -> float:
        """About how long ``method`` learns before its first answer; 0 where it learns nothing.

        Measured on this machine now; what an earlier time kept makes it faster.
        """
        config = METHODS.get(method)
        part = config.prior or config.calibration
        if part is None or method in self._learnt:
            return 0.0
        each = 1 if getattr(part, "source", "self") == "text" else OWN_TEXT
        ids = (self._ids([{"role": "user", "content": "?"}]) * PROBE)[:PROBE]
        for _ in range(2):  # the first one also warms up
            timings = self.engine.run(Ask(ids, Sampling(max_tokens=1))).timings.to_dict()
        read = float(timings["prompt_ms"]) / float(timings["prompt_n"]) / 1e3
        return each * part.sequences * part.length * read

    def reset(self) -> None:
        """Forget all messages."""
        self.turns.clear()
        self.engine.forget(NAME)

    def to_dict(self) -> dict[str, Any]:
        """Everything that was said, and what it cost; JSON-able."""
        return {
            "model": self.settings.model,
            "settings": self.settings.model_dump(mode="json"),
            "messages": self.messages,
            "turns": [turn.to_dict() for turn in self.turns],
        }

    def to_text(self) -> str:
        """What was said, as Markdown."""
        parts = [f"**{one['role']}**\n\n{one['content']}\n" for one in self.messages]
        return "\n".join(parts)


def _shown(settings: ChatSettings) -> dict[str, Any]:
    config: PruneConfig | None = settings.served()
    if config is None:
        return {"method": "dense", "sparsity": 0.0}
    return {"method": config.method, "sparsity": config.target, "drift": config.drift.rule}
