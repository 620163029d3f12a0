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
    """Settings of ``dart-llm serve``; None means that a setting was not given."""

    UNUSED: ClassVar = ("masks", "save_layer_topk", "experiment_name", "style")

    host: str = setting(
        SERVER, "Listen on this address; a public address needs --api-key.", "127.0.0.1"
    )
    port: int = setting(SERVER, "Listen on this port; 0 selects a free port.", 8000, ge=0, le=65535)
    api_key: str | None = setting(
        SERVER, "Accept only these API keys, comma-separated; DART_API_KEY is safer."
    )
    allow_host: str | None = setting(
        SERVER, "Also accept these names of this server in Host headers, comma-separated."
    )
    open: bool = setting(SERVER, "Open the page in a browser.", False)
    methods: str | None = setting(
        SERVER, "Prepare these methods too before the first request, comma-separated."
    )
    calibration: str | None = setting(SERVER, "Calibrate methods on this text (default: c4).")
    temperature: float = setting(SERVER, "Default temperature; 0 is greedy.", 0.0, ge=0, le=2)
    conversations: int = setting(SERVER, "Keep the cache of this many conversations.", 4, ge=0)
    max_waiting: int = setting(LIMITS, "Let this many requests wait; others get 429.", 64, ge=1)
    max_tokens: int = setting(LIMITS, "Maximum number of tokens per answer.", 2048, ge=1)
    max_prompt_tokens: int | None = setting(
        LIMITS, "Maximum number of tokens per prompt (default: the model's context).", ge=1
    )
    max_prompts: int = setting(LIMITS, "Maximum prompts per /v1/completions request.", 64, ge=1)
    max_choices: int = setting(LIMITS, "Maximum n (answers per prompt) of a request.", 4, ge=1)
    max_body_kib: int = setting(LIMITS, "Maximum size of a request body in KiB.", 1024, ge=1)
    request_timeout: float = setting(
        LIMITS, "Maximum seconds per request, including the queue.", 600, ge=1, allow_inf_nan=False
    )
    grace: float = setting(
        LIMITS,
        "Let the running answer take this many more seconds when the server stops.",
        10,
        ge=0,
        allow_inf_nan=False,
    )
    verbose: bool = setting(LOG, "Log one line per request to stderr, without texts.", False)
    log_prompts: bool = setting(
        LOG, "Log prompts and error messages (which may quote prompts) to stderr.", False
    )

    @model_validator(mode="after")
    def _check_server(self) -> ServeSettings:
        for key in self.keys:
            if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable():
                raise ConfigError(
                    f"every --api-key must have at least {SHORTEST_KEY} printable ASCII "
                    "characters: create a key with python -c 'import secrets; "
                    "print(secrets.token_urlsafe())'"
                )
        if not self.keys and not self.is_loopback:
            raise ConfigError(
                f"--host {self.host} can be reached from other machines: also give --api-key, or "
                "leave out --host to serve this machine only"
            )
        for method in self.ready:
            METHODS.check(method)
        return self

    @property
    def is_loopback(self) -> bool:
        """True if only this machine can reach ``host``."""
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
    def hosts(self) -> frozenset[str] | None:
        """Host names that may be in a request's Host header; None allows every name."""
        allowed = {name.lower() for name in words(self.allow_host)}
        if not allowed and not self.is_loopback:
            return None
        host = f"[{self.host}]" if ":" in self.host else self.host
        return frozenset({"localhost", "127.0.0.1", "[::1]", host, *allowed})

    @property
    def ready(self) -> tuple[str, ...]:
        """Methods that are prepared before the first request, the default method first."""
        default = self.method if self.kept is None else self.kept.config.method
        return tuple(dict.fromkeys((default, *words(self.methods))))

    def configs(self) -> tuple[PruneConfig, ...]:
        """The configurations to prepare, one for each method in ``ready``."""
        configs = [self.prune_config()]
        for name in self.ready[1:]:
            changes = {"sparsity": self.sparsity} if removes_neurons(name) else {}
            configs.append(PruneConfig.build(name, **changes))
        return tuple(configs)


def removes_neurons(method: str) -> bool:
    """True if the method removes neurons, so that a sparsity can be set for it."""
    return bool(METHODS.get(method).sparsity != 0)
