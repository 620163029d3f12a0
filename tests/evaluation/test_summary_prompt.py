"""The summary's prompt: what is shortened, and what never is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dart_llm.errors import ConfigError
from dart_llm.evaluation.summarization import CUE, INSTRUCTION, fit
from tiny_gpt2 import write_gpt2

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
DOCUMENT = "".join(f"sentence number {i} is here. " for i in range(1, 41))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def base(folder) -> Any:
    """One token per character, lower case."""
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def chat(folder) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def frame(document: str) -> str:
    return f"{INSTRUCTION}\n\n{document}\n\n{CUE}".lower()


def test_a_document_that_fits_is_left_alone(base):
    prompt = fit(base, " A short one.\n", 1024, 100)
    assert base.decode(prompt.ids) == frame("a short one.")
    assert not prompt.shortened and not prompt.chat
    assert fit(base, "A short one.", 1024, 100).ids == prompt.ids


def test_without_a_known_context_nothing_is_shortened(base):
    prompt = fit(base, DOCUMENT, None, 100)
    assert prompt.document == DOCUMENT.strip()
    assert len(prompt.ids) == len(frame(DOCUMENT.strip()))


@pytest.mark.parametrize("context", [150, 200, 301, 500, 1024])
def test_a_long_document_loses_its_end_and_nothing_else_does(base, context):
    prompt = fit(base, DOCUMENT, context, 40)
    text = base.decode(prompt.ids)
    assert prompt.shortened
    assert len(prompt.ids) + 40 <= context
    assert text == frame(prompt.document)
    assert DOCUMENT.startswith(prompt.document)
    assert len(prompt.ids) + 40 > context - len("sentence number 10 is here. ")


def test_the_cut_follows_a_sentence_where_one_is_near_and_else_a_word(base):
    assert fit(base, DOCUMENT, 700, 40).document.endswith("is here.")
    words = DOCUMENT.replace(".", "")
    document = fit(base, words, 700, 40).document
    assert words[len(document)] == " "
    solid = "x" * 900
    assert fit(base, solid, 700, 40).document == "x" * (700 - 40 - len(frame("")))


def test_a_line_break_is_a_place_to_cut(base):
    lines = "".join(f"line {i:02d} without a stop\n" for i in range(40))
    assert re.fullmatch(r"(line \d\d without a stop\n)*line \d\d without a stop",
                        fit(base, lines, 700, 40).document)  # fmt: skip


def test_the_chat_template_is_used_where_there_is_one_and_survives(chat):
    prompt = fit(chat, DOCUMENT, 400, 40)
    text = chat.decode(prompt.ids)
    assert prompt.chat and prompt.shortened
    assert text == f"<s>user: {frame(prompt.document)}</s><s>assistant: "
    assert 400 - len("sentence number 10 is here. ") < len(prompt.ids) + 40 <= 400


def test_the_chat_template_can_be_left_out(chat, base):
    assert fit(chat, DOCUMENT, 400, 40, chat=False).ids == fit(base, DOCUMENT, 400, 40).ids
    assert fit(chat, DOCUMENT, 400, 40, chat=True).ids == fit(chat, DOCUMENT, 400, 40).ids


def test_a_chat_template_that_is_missing_cannot_be_asked_for(base):
    with pytest.raises(ConfigError, match="no chat template"):
        fit(base, DOCUMENT, 1024, 40, chat=True)


@pytest.mark.parametrize("context", [8, 41, 40 + len(frame(""))])
def test_a_context_without_room_for_the_document_is_refused(base, context):
    with pytest.raises(ConfigError, match=f"context of {context} leaves no room"):
        fit(base, DOCUMENT, context, 40)


def test_one_word_is_enough_room(base):
    context = 40 + len(frame("sentence"))
    assert fit(base, DOCUMENT, context, 40).document == "sentence"


def test_tokens_that_are_not_characters(byte_pairs):
    """Byte-pair tokens: a cut can make two tokens of one, and the prompt still fits."""
    text = "Überraschend 🙂 viele Wörter; antidisestablishmentarianism — 東京 " * 20
    base = len(fit(byte_pairs, "", None, 1, chat=False).ids)
    for room in range(base + 12, base + 60, 3):
        ids = fit(byte_pairs, text, room + 16, 16, chat=False).ids
        assert room - 24 < len(ids) <= room
        assert byte_pairs.decode(ids).endswith(f"\n\n{CUE}")


@pytest.fixture(scope="module")
def byte_pairs() -> Any:
    """A byte-level BPE over bytes alone with a few merges, as real models have them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([INSTRUCTION * 3, "viele antidisestablishment Wörter"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
