"""Prompts: by name, from a file or standard input, through a chat template, or of MMLU."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from dart_llm.data.datasets import mmlu_questions, with_choices
from dart_llm.data.texts import prompt_names, read_prompt
from dart_llm.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def chat_text(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    instead: str = "use a model that was tuned for chats",
    **options: Any,
) -> str:
    """The prompt of ``messages`` (``role``, ``content``), up to where the answer begins.

    Raises ``ConfigError`` without a chat template (``instead``: what to do then), and for messages
    that it refuses.  ``options`` are the template's own.
    """
    check_chat_template(tokenizer, instead)
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=True,
            **options,
        )
    except TemplateError as error:
        raise ConfigError(f"the model's chat template refuses these messages: {error}") from None
    return text


def check_chat_template(tokenizer: Any, instead: str) -> None:
    """Raise ``ConfigError``, which says what to do ``instead``, without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"this model's tokenizer has no chat template: {instead}")


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """``chat_text`` as token ids; the template writes special tokens itself."""
    text = chat_text(tokenizer, messages)
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode_prompt(tokenizer: Any, text: str, chat: bool) -> Tensor:
    """Token ids [1, T] of a prompt, through the chat template if ``chat``.

    Raises ``ConfigError`` when the tokenizer has no chat template.
    """
    if chat:
        messages = [{"role": "user", "content": text}]
        text = chat_text(tokenizer, messages, "leave --chat off")
    ids: Tensor = tokenizer(
        text,
        return_tensors="pt",
        add_special_tokens=not chat,
        verbose=False,  # a text that is too long is refused elsewhere
    ).input_ids
    return ids


LOCAL_PROMPTS = Path("datasets")  # in the current folder

LONGEST_NAME = 200  # characters; a longer text is never looked up as a file


def is_text(text: str) -> bool:
    """Whether the command line or standard input gave valid UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_prompt_file(file: str) -> str:
    """The text of a UTF-8 file, without the mark of its encoding; ``-`` is standard input."""
    try:
        if file != "-":
            return Path(file).read_text(encoding="utf-8-sig")
        text = sys.stdin.read()
    except FileNotFoundError:
        raise ConfigError(
            f"there is no prompt file {file}: give an existing file, or --prompt TEXT"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        name = "from standard input" if file == "-" else f"file {file}"
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the prompt {name}: {reason}") from None
    if not is_text(text):
        raise ConfigError("the prompt from standard input is not valid UTF-8: correct it")
    return text


def resolve_prompt(text_or_name: str) -> str:
    """The prompt that a user means.

    A shipped prompt's name gives that prompt; the name of a file under ``datasets/`` in the
    current folder (with or without ``.txt``) gives that file's text as it is, or ``ConfigError``
    where that is not UTF-8; anything else is the prompt itself and comes back unchanged.
    """
    if text_or_name in prompt_names():
        return read_prompt(text_or_name)
    path = _local_file(text_or_name)
    if path is None:
        return text_or_name
    try:
        return path.read_bytes().decode("utf-8")  # bytes: line ends stay what they are
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the prompt file {path} cannot be read as UTF-8: {error}") from error


def given_prompt(text_or_name: str) -> str:
    """``resolve_prompt`` of a command line's argument; ``ConfigError`` unless that is UTF-8."""
    if not is_text(text_or_name):
        raise ConfigError("the prompt is not valid UTF-8: put the text in a file and give that")
    return resolve_prompt(text_or_name)


def _local_file(name: str) -> Path | None:
    """The file under ``datasets/`` that ``name`` means, or None; never one outside of it."""
    if not name or len(name) > LONGEST_NAME or "\n" in name:
        return None
    pure = PurePath(name)
    if pure.anchor or ".." in pure.parts:
        return None
    if pure.parts[:1] == (LOCAL_PROMPTS.name,):  # "datasets/NAME" was written out
        pure = pure.relative_to(LOCAL_PROMPTS)
    with contextlib.suppress(OSError, ValueError):  # a name that no file can have
        for path in (LOCAL_PROMPTS / f"{pure}.txt", LOCAL_PROMPTS / pure):
            if path.is_file():
                return path
    return None


def mmlu_prompt(subjects: Sequence[str], tokenizer: Any, length: int) -> str:
    """A prompt of MMLU questions with their choices and without answers; none is a test question.

    Each subject gets the same share of the ``length`` tokens, special tokens included.  A share
    ends at the last question that fits; a first question that is too long alone is cut at the
    token limit.

    Raises ``ConfigError`` (no subject, no room, no questions) and what ``mmlu_questions`` raises.
    """
    names = list(dict.fromkeys(subjects))
    if not names:
        raise ConfigError("an MMLU prompt needs one subject or more: name one, such as astronomy")
    room = length - len(tokenizer.encode(""))
    # A blank line may take one token more between two texts than it takes alone.
    joints = (len(names) - 1) * (_count("\n\n", tokenizer) + 1)
    share = (room - joints) // len(names)
    if share < 1:
        raise ConfigError(
            f"a prompt of {length} tokens has no room for {len(names)} MMLU subject(s): "
            "raise the prompt length or name fewer subjects"
        )
    return _cut("\n\n".join(_block(name, tokenizer, share) for name in names), tokenizer, room)


def _block(subject: str, tokenizer: Any, share: int) -> str:
    """A heading and as many questions as fit in ``share`` tokens, at least one."""
    questions = [with_choices(question) for question in mmlu_questions(subject)]
    if not questions:
        raise ConfigError(f"there are no MMLU questions for {subject!r}: name another subject")
    block = f"The following are multiple choice questions about {subject.replace('_', ' ')}."
    for number, question in enumerate(questions):
        longer = f"{block}\n\n{question}"
        if _count(longer, tokenizer) > share:
            return block if number else _cut(question, tokenizer, share)
        block = longer
    return block


def _count(text: str, tokenizer: Any) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


def _cut(text: str, tokenizer: Any, limit: int) -> str:
    """The first ``limit`` tokens of ``text``, as text that has no more tokens than that."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) <= limit:
        return text
    for end in range(limit, 0, -1):
        # A cut inside a multi-byte character decodes to a replacement character: drop it.
        piece = str(tokenizer.decode(ids[:end])).rstrip("\ufffd")
        if piece and _count(piece, tokenizer) <= limit:
            return piece
    raise ConfigError(f"no text fits in {limit} token(s): raise the prompt length")
