"""What the settings of every command have in common, whatever they set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from dart_llm.config import unknown_key
from dart_llm.errors import ConfigError


class Settings(BaseModel):
    """Frozen settings; a name that is none of them is an error that suggests the near one."""

    COMMAS: ClassVar[tuple[str, ...]] = ()
    """Texts with commas, which a YAML file may hold as lists."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        for name in data:
            if name not in cls.model_fields:
                raise unknown_key(cls, str(name))
        return cls.read(data)

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """The given values as the fields take them."""
        return {name: joined(v) if name in cls.COMMAS else v for name, v in data.items()}


def words(text: str | None) -> list[str]:
    """The parts between commas."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def joined(value: Any) -> Any:
    """A text with commas, also from a list of a YAML file."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, int | float) else value


def check_least(settings: BaseModel, least: Mapping[str, int]) -> None:
    """Raises ``ConfigError`` for a number below its least value; None is not given."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and value < bound:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least {bound}")


def check_seed(seed: int) -> None:
    """Raises ``ConfigError`` for what no generator of random numbers takes."""
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed {seed} must be a whole number from 0 to 2^63 - 1")


def read_sparsities(name: str, text: str) -> tuple[float, ...]:
    """The sparsities of ``--name``, each once; raises ``ConfigError`` for what is none."""
    try:
        found = tuple(dict.fromkeys(float(word) for word in words(text)))
    except ValueError:
        raise ConfigError(
            f'--{name} "{text}" must be numbers with commas between them, e.g. 0.5,0.7'
        ) from None
    if not found and name == "sparsities":
        raise ConfigError("--sparsities is empty: give at least one, e.g. 0.5")
    for value in found:
        if not 0 < value < 1:
            raise ConfigError(
                f"--{name} {value:g} must lie between 0 and 1: the fraction of neurons to remove"
            )
    return found
