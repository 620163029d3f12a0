"""The settings of ``dart-llm chat``."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import model_validator

from dart_llm.engine.requests import Sampling
from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.settings import BaseSettings, setting

PANEL = "Chat"


class ChatSettings(BaseSettings):
    """``dart-llm chat``: the model, how it is pruned, and how it answers."""

    UNUSED: ClassVar = ("masks", "save_layer_topk", "experiment_name", "results_dir", "style")

    system: str | None = setting(PANEL, "System message (default: the chat template's own).")
    max_tokens: int = setting(PANEL, "Largest number of tokens per answer.", 512)
    temperature: float = setting(PANEL, "Sample at this temperature; 0: the likeliest token.", 0.0)
    top_p: float = setting(
        PANEL, "Sample from the likeliest tokens that together have this probability.", 1.0
    )
    history: str | None = setting(
        PANEL, "File that keeps what you type, for the next chat (default: none)."
    )
    calibration: str | None = setting(
        PANEL, "Text for methods that calibrate (default: c4 of the hub)."
    )

    @model_validator(mode="after")
    def _check_chat(self) -> ChatSettings:
        if self.masks is not None:
            raise ConfigError("chat selects its own masks: leave masks out")
        self.sampling()
        return self

    def sampling(self) -> Sampling:
        """How every answer is sampled; the same prompt and seed give the same answer."""
        return Sampling(self.max_tokens, self.temperature, self.top_p, self.seed)

    def served(self) -> PruneConfig | None:
        """The configuration of the answers; None: the plain dense model."""
        config = self.prune_config()
        return config if config.method != "dense" or config.screens else None

    def changed(self, **changes: Any) -> ChatSettings:
        """A copy with ``changes``, checked as a whole; raises ``ConfigError``."""
        values = {name: getattr(self, name) for name in self.model_fields_set} | changes
        return type(self).model_validate(values)
