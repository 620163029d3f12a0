"""Embedded texts, and prompts: shipped ones, and those made from files, chats or MMLU questions.

The embedded texts also come with the package.  They were written for this project; each has about
880 words of plain English.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from dart_llm.data.datasets import mmlu_questions, with_choices
from dart_llm.errors import ConfigError, check_name

if TYPE_CHECKING:
    from torch import Tensor

_SHIPPED = Path(__file__).parent / "shipped"


def subjects() -> tuple[str, ...]:
    """The names of the embedded texts, sorted."""
    return _stems("texts")


def read(subject: str) -> str:
    """The embedded text ``subject``; blank lines join its paragraphs.  Raises ``UnknownName``."""
    return _read("texts", "embedded text", subject)


def all_text() -> str:
    """All embedded texts in the order of ``subjects()``, joined by blank lines."""
    return "\n\n".join(map(read, subjects()))


def openings() -> tuple[str, ...]:
    """Beginnings of many kinds of text, for a model to continue; no task evaluates them."""
    text = (_SHIPPED / "openings" / "openings.txt").read_text(encoding="utf-8")
    return tuple(text.rstrip("\n").split("\n---\n"))


def prompt_names() -> tuple[str, ...]:
    """The names of the shipped prompts, sorted."""
    return _stems("prompts")


def read_prompt(name: str) -> str:
    """The shipped prompt called ``name``.  Raises ``UnknownName``."""
    return _read("prompts", "prompt", name)


def _stems(folder: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (_SHIPPED / folder).glob("*.txt")))


def _read(folder: str, kind: str, name: str) -> str:
    check_name(kind, name, _stems(folder))  # check first: a name such as "../x" must not be read
    return (_SHIPPED / folder / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")


# Prompts from the user.

LOCAL = Path("datasets")
"""This subfolder of the current folder is also searched for prompts and texts."""

LONGEST_NAME = 200  # characters; a longer argument is not looked up as a file


def is_text(text: str) -> bool:
    """Whether a text from the command line or standard input was valid UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_prompt_file(file: str) -> str:
    """The text of a UTF-8 file, without a byte-order mark; ``-`` is standard input."""
    source = "from standard input" if file == "-" else f"file {file}"
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
        text.encode()  # standard input may contain lone surrogates
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the prompt {source}: {reason}") from None
    return text


def resolve_prompt(text_or_name: str) -> str:
    """The prompt that a user's argument stands for; raises ``ConfigError`` if it is not UTF-8.

    The argument is the name of a shipped prompt, the name of a file under ``datasets/`` in the
    current folder (with or without ``.txt``), or else the prompt itself.
    """
    if not is_text(text_or_name):
        raise ConfigError("the prompt is not valid UTF-8: write it to a file and give the file")
    if text_or_name in prompt_names():
        return read_prompt(text_or_name)
    path = _local_file(text_or_name)
    if path is None:
        return text_or_name
    try:
        return path.read_bytes().decode("utf-8")  # as bytes, so that line endings are preserved
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the prompt file {path} cannot be read as UTF-8: {error}") from error


def _local_file(name: str) -> Path | None:
    """The file called ``name`` under ``datasets/``, or None; never a file outside that folder."""
    pure = PurePath(name)
    if not name or len(name) > LONGEST_NAME or "\n" in name or pure.anchor or ".." in pure.parts:
        return None
    if pure.parts[:1] == (LOCAL.name,):  # the user wrote "datasets/NAME"
        pure = pure.relative_to(LOCAL)
    with contextlib.suppress(OSError, ValueError):  # if no file can have this name
        for path in (LOCAL / f"{pure}.txt", LOCAL / pure):
            if path.is_file():
                return path
    return None


# Prompts as token ids.


def chat_text(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    instead: str = "use a model that was tuned for chats",
    **options: Any,
) -> str:
    """Format ``messages`` (``role``, ``content``) as a prompt that ends where the answer begins.

    Raises ``ConfigError``, which suggests ``instead``, if there is no chat template; also raises
    ``ConfigError`` if the template rejects the messages.  ``options`` are passed to the template.
    """
    check_chat_template(tokenizer, instead)
    from jinja2 import TemplateError

    options = {"tokenize": False, "add_generation_prompt": True, **options}
    try:
        text: str = tokenizer.apply_chat_template(list(map(dict, messages)), **options)
    except TemplateError as error:
        raise ConfigError(f"the model's chat template rejects these messages: {error}") from None
    return text


def check_chat_template(tokenizer: Any, instead: str) -> None:
    """Raise ``ConfigError``, which suggests ``instead``, if the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"this model's tokenizer has no chat template: {instead}")


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """``chat_text`` as token ids; the template itself adds the special tokens."""
    text = chat_text(tokenizer, messages)
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode_prompt(tokenizer: Any, text: str, chat: bool) -> Tensor:
    """Token ids [1, T] of a prompt; if ``chat``, the chat template is applied first.

    Raises ``ConfigError`` when the tokenizer has no chat template.
    """
    if chat:
        text = chat_text(tokenizer, [{"role": "user", "content": text}], "omit --chat")
    # verbose False: no warning for a long text, which is rejected elsewhere
    options = {"add_special_tokens": not chat, "verbose": False}
    ids: Tensor = tokenizer(text, return_tensors="pt", **options).input_ids
    return ids


def mmlu_prompt(subjects: Sequence[str], tokenizer: Any, length: int) -> str:
    """A prompt of MMLU questions with choices, but without answers; test questions are not used.

    Takes questions from each subject in turn, as many as fit in ``length`` tokens including special
    tokens.  Raises ``ConfigError`` if none fits, and the errors of ``mmlu_questions``.
    """
    names = list(dict.fromkeys(subjects))
    about = ", ".join(names).replace("_", " ")
    prompt = heading = f"The following are multiple choice questions about {about}."
    by_subject = [map(with_choices, mmlu_questions(name)) for name in names]
    for question in filter(None, chain.from_iterable(zip_longest(*by_subject))):
        longer = f"{prompt}\n\n{question}"
        if len(tokenizer.encode(longer)) > length:
            break
        prompt = longer
    if prompt == heading:
        raise ConfigError(
            f"a prompt of {length} tokens has no room for a question about {about or 'no subject'}"
            ": raise the prompt length, or name another subject"
        )
    return prompt
