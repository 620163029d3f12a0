"""What a setting needs of others: a method that can honour it, or a switch that asks for it.

A setting that is given alone works under the defaults: where the default method cannot honour it,
the first of ``METHODS`` that can is taken, and the log says so.  A method that was named is never
replaced: then a setting that does not fit is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dart_llm.config import PruneConfig
from dart_llm.errors import ConfigError
from dart_llm.registry import SCORES

METHODS = ("dart", "dart-prompt", "griffin", "published")
"""In the order in which they are tried."""


@dataclass(frozen=True)
class Need:
    """``problem``: why a configuration cannot honour the setting, "" when it can."""

    setting: str
    problem: Callable[[PruneConfig], str]


def _decay(config: PruneConfig) -> str:
    if config.score.ema_decay is None or config.target == 0:
        return ""
    why = SCORES.get(config.score.name).undecayed
    return f'score "{config.score.name}" {why}: drop the ema_decay' if why else ""


NEEDS = (Need("ema_decay", _decay),)
"""What a method must be able to do.  Everything else that is set overrides its part of any."""

IMPLIED: Mapping[str, tuple[str, str]] = {
    "ppl_subjects": ("ppl_datasets", "mmlu"),
    "prompt_subject": ("prompt_type", "mmlu"),
}
"""Setting -> the setting that it concerns, and the value of that which it asks for."""

SWITCHES: Mapping[str, str] = {
    "ppl_": "eval_perplexity",
    "mmlu_": "eval_mmlu",
    "general_nlp_": "eval_general_nlp",
    "summarization_": "eval_summarization",
}
"""What names begin with that have no effect unless a switch is on."""


def problem(config: PruneConfig) -> str:
    """Why a configuration cannot honour all that it asks for, as one sentence; "" when it can."""
    return next((found for need in NEEDS if (found := need.problem(config))), "")


def check(config: PruneConfig) -> None:
    """Raise ``ConfigError`` for a configuration that asks for what it cannot honour."""
    if found := problem(config):
        raise ConfigError(f"{found}, or give another --ranking-method")


def method_for(settings: Any) -> tuple[str, str]:
    """The method that honours ``settings``, and what the log says where it is not their own.

    Raises ``ConfigError`` where the one that was named, or every one, cannot.
    """
    own = settings.prune_config()
    found = problem(own)
    if not found:
        return settings.method, ""
    able = next((config for config in _candidates(settings) if not problem(config)), None)
    if able is None:
        raise ConfigError(found)
    if "method" in settings.model_fields_set:
        raise ConfigError(f"{found}, or leave the method out: {able.method} can")
    flags = " and ".join(_flag(need.setting) for need in NEEDS if need.problem(own))
    return able.method, (
        f"{flags} is honoured by method {able.method} with score {able.score.name}: taken instead "
        f"of {own.method}, whose {found.partition(':')[0]}"
    )


def _candidates(settings: Any) -> Iterator[PruneConfig]:
    for method in METHODS:
        with contextlib.suppress(ConfigError):  # other settings do not fit this one
            yield settings.model_copy(update={"method": method}).prune_config()


def values_for(settings: Any) -> tuple[dict[str, Any], list[str]]:
    """Values that a run's settings imply, and what the log says of them and of idle settings.

    A setting counts as given where it differs from its default: the scripts hand on every default.
    """
    fields = type(settings).model_fields
    given = [name for name in fields if getattr(settings, name) != fields[name].default]
    changes: dict[str, Any] = {}
    notes = []
    for name in given:
        switch = next((s for start, s in SWITCHES.items() if name.startswith(start)), "")
        other, value = IMPLIED.get(name, ("", ""))
        rival = other in given or (name == "prompt_subject" and settings.has_prompt)
        if switch and not getattr(settings, switch):
            notes.append(f"{_flag(name)} has no effect without {_flag(switch)}")
        elif other and not rival:
            changes[other] = value
            notes.append(f"{_flag(name)} asks for {_flag(other)} {value}: taken")
        elif other and value not in str(getattr(settings, other)):
            notes.append(f"{_flag(name)} has no effect without {_flag(other)} {value}")
    return changes, notes


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
