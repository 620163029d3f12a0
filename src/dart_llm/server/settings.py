"""The settings of ``dart-llm serve``."""

from __future__ import annotations

import ipaddress
from typing import ClassVar

from pydantic import model_validator

from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.registry import METHODS
from dart_llm.settings import BaseSettings, setting, words

SERVER, LIMITS, LOG = "Server", "Limits", "Log"
SHORTEST_KEY = 8


class ServeSettings(BaseSettings):
    """What ``dart-llm serve`` is asked to do; None means "not given"."""

    UNUSED: ClassVar = ("masks", "save_layer_topk", "experiment_name", "style")

    host: str = setting(SERVER, "Address to listen at; a key must guard any other.", "127.0.0.1")
    port: int = setting(SERVER, "Port; 0 takes a free one.", 8000, ge=0, le=65535)
    api_key: str | None = setting(
        SERVER, "Key that every request must carry; several with commas. Better as DART_API_KEY."
    )
    allow_host: str | None = setting(
        SERVER, "Further names by which requests may call this server, with commas."
    )
    share_runs: bool = setting(
        SERVER, "Show past runs to every key, where there are several.", False
    )
    open: bool = setting(SERVER, "Open the page in a browser when it is there.", False)
    methods: str | None = setting(
        SERVER, "Methods to make ready before the first request, with commas (default: --method)."
    )
    calibration: str | None = setting(
        SERVER, "Text for methods that calibrate (default: c4 of the hub)."
    )
    temperature: float = setting(
        SERVER, "Temperature of requests that give none; 0 is greedy.", 0.0, ge=0, le=2
    )
    conversations: int = setting(SERVER, "Conversations whose cache is kept.", 4, ge=0)
    max_waiting: int = setting(LIMITS, "Requests that may wait; the next one gets 429.", 64, ge=1)
    max_tokens: int = setting(LIMITS, "Tokens that one answer may have; it ends there.", 2048, ge=1)
    max_prompt_tokens: int | None = setting(
        LIMITS, "Tokens of the longest prompt (default: the model's context).", ge=1
    )
    max_choices: int = setting(LIMITS, "Largest n.", 4, ge=1)
    max_prompts: int = setting(LIMITS, "Prompts of one request to /v1/completions.", 64, ge=1)
    max_body_kib: int = setting(LIMITS, "Largest body of a request, KiB.", 1024, ge=1)
    request_timeout: float = setting(
        LIMITS,
        "Seconds that a request may take, its waiting included.",
        600.0,
        ge=1,
        allow_inf_nan=False,
    )
    grace: float = setting(
        LIMITS,
        "Seconds that the running answer has to finish at the end.",
        10.0,
        ge=0,
        allow_inf_nan=False,
    )
    verbose: bool = setting(LOG, "One line per request on stderr, without texts.", False)
    log_prompts: bool = setting(
        LOG, "Write prompts to stderr, and messages of faults, which may quote them.", False
    )

    @model_validator(mode="after")
    def _check_server(self) -> ServeSettings:
        for key in self.keys:
            if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable():
                raise ConfigError(
                    f"every --api-key must have {SHORTEST_KEY} or more plain characters: make one "
                    "with python -c 'import secrets; print(secrets.token_urlsafe())'"
                )
        if not self.keys and not self.is_loopback:
            raise ConfigError(
                f"--host {self.host} can be reached from other machines: give --api-key too, or "
                "leave --host out to serve this machine alone"
            )
        for method in self.ready:
            METHODS.check(method)
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach ``host``."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(words(self.api_key))

    @property
    def shows_runs(self) -> bool:
        """Whether past runs can be read: they hold prompts, which are not every key's affair."""
        return self.share_runs or len(self.keys) < 2

    @property
    def hosts(self) -> frozenset[str] | None:
        """Names that a request's Host may have; None: any."""
        given = {name.lower() for name in words(self.allow_host)}
        if not given and not self.is_loopback:
            return None
        own = f"[{self.host}]" if ":" in self.host else self.host
        return frozenset({"localhost", "127.0.0.1", "[::1]", own, *given})

    @property
    def ready(self) -> tuple[str, ...]:
        """Methods that are made ready before the first request, the server's own first."""
        own = self.method if self.kept is None else self.kept.config.method
        return tuple(dict.fromkeys((own, *words(self.methods))))

    def configs(self) -> tuple[PruneConfig, ...]:
        """What the methods in ``ready`` run with when a request says nothing else."""
        own = self.prune_config()
        others = [
            PruneConfig.build(name, **({"sparsity": self.sparsity} if prunes(name) else {}))
            for name in self.ready[1:]
        ]
        return (own, *others)


def prunes(method: str) -> bool:
    """Whether a method removes neurons, so that a sparsity can be asked of it."""
    config = METHODS.get(method)
    return config.weight_bits is None and config.sparsity != 0
