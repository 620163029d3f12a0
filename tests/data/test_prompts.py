"""Resolving prompts and building MMLU-style ones, with a word tokenizer and small files."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dart_llm.data.prompts import mmlu_prompt, read_prompt_file, resolve_prompt
from dart_llm.data.texts import read_prompt
from dart_llm.errors import ConfigError, UnknownName

AWKWARD = "say \"hi\" and 'bye', $HOME ${PATH} `whoami` $(date) \\n %s\r\n\tnext line\n\n* end \n"


class WordTokenizer:
    """One token a word, with the space before it; a line break is a token; one at the start."""

    def __init__(self, specials: int = 1) -> None:
        self.specials = specials
        self.words: list[str] = []

    def encode(self, text: str, /, *, add_special_tokens: bool = True) -> list[int]:
        pieces = re.findall(r"\n| *[^\s]+| +", text)
        for piece in pieces:
            if piece not in self.words:
                self.words.append(piece)
        start = [-1] * self.specials if add_special_tokens else []
        return start + [self.words.index(piece) for piece in pieces]

    def decode(self, token_ids: list[int], /) -> str:
        return "".join(self.words[i] for i in token_ids)


class ByteTokenizer:
    """One token a byte of UTF-8, so that a cut can fall inside a character."""

    def encode(self, text: str, /, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, token_ids: list[int], /) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")


def many_questions(subject: str) -> Iterator[dict[str, Any]]:
    """Thirty questions of 17 to 26 tokens, with answers that must not be shown."""
    for number in range(30):
        words = " ".join(f"{subject}{number}w{i}" for i in range(number % 10))
        yield {
            "question": f"{words} what is {subject} number {number}?\n",
            "choices": ["one", "two", "three", "four"],
            "answer": number % 4,
            "explanation": "SECRET",
        }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_prompt_file_is_read_without_the_mark_of_its_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bees.txt"
    file.write_text("bees\n", encoding="utf-8-sig")
    assert read_prompt_file(str(file)) == "bees\n"
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"cannot read the prompt file .*bees\.txt"):
        read_prompt_file(str(file))
    with pytest.raises(ConfigError, match=r"cannot read the prompt file .*: Is a directory$"):
        read_prompt_file(str(tmp_path))
    for errors, problem in (("strict", "cannot read"), ("surrogateescape", "not valid UTF-8")):
        stream = io.TextIOWrapper(io.BytesIO(b"bees \xff"), "utf-8", errors)
        monkeypatch.setattr("sys.stdin", stream)
        with pytest.raises(ConfigError, match=f"{problem}|from standard input"):
            read_prompt_file("-")


ORDINARY = [AWKWARD, "", " ", "sky ", "Sky", "no such file", ".", "..", "datasets"]
ORDINARY += ["a\0b", "a/" * 90, "x" * 10_000, "\ud800", "日本語の文章"]


@pytest.mark.parametrize("text", ORDINARY)
def test_any_other_text_comes_back_unchanged(here: Path, text: str) -> None:
    (here / "datasets").mkdir()
    assert resolve_prompt(text) == text
    assert resolve_prompt("two_topics") == read_prompt("two_topics")


@pytest.mark.parametrize("name", ["mine", "mine.txt", "datasets/mine", "datasets/mine.txt"])
def test_a_file_under_datasets_is_read_as_it_is(here: Path, name: str) -> None:
    (here / "datasets").mkdir()
    (here / "datasets" / "mine.txt").write_bytes(AWKWARD.encode())
    assert resolve_prompt(name) == AWKWARD


def test_files_in_subfolders_and_without_an_ending_are_found(here: Path) -> None:
    (here / "datasets" / "news").mkdir(parents=True)
    (here / "datasets" / "news" / "today.txt").write_text("rain")
    (here / "datasets" / "plain").write_text("no ending")
    assert resolve_prompt("news/today") == "rain"
    assert resolve_prompt("plain") == "no ending"
    assert resolve_prompt("news") == "news"  # a folder is not a prompt


def test_nothing_outside_datasets_is_read(here: Path) -> None:
    (here / "datasets").mkdir()
    (here / "secret.txt").write_text("secret")
    for name in ("../secret", "../secret.txt", "secret", str(here / "secret.txt")):
        assert resolve_prompt(name) == name
    (here / "datasets" / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"the prompt file datasets.bad\.txt cannot be read"):
        resolve_prompt("bad")


def test_a_mmlu_prompt_has_this_form() -> None:
    first = (
        "The following are multiple choice questions about us history.\n\n"
        "what is us_history number 0?\nA. one\nB. two\nC. three\nD. four"
    )
    second = "us_history1w0 what is us_history number 1?\nA. one\nB. two\nC. three\nD. four"
    # 9 words, a blank line of 2 tokens, 17 tokens; then 2 and 18; and one special token.
    for length, prompt in ((48, first), (49, f"{first}\n\n{second}")):
        assert mmlu_prompt(["us_history"], WordTokenizer(), length, many_questions) == prompt


def test_answers_and_other_keys_are_never_shown() -> None:
    prompt = mmlu_prompt(["law", "art"], WordTokenizer(), 900, many_questions)
    assert "SECRET" not in prompt
    assert "nswer" not in prompt
    once = mmlu_prompt("law", WordTokenizer(), 200, many_questions)
    assert mmlu_prompt(["law", "law"], WordTokenizer(), 200, many_questions) == once


@pytest.mark.parametrize("length", [120, 200, 333, 700])
@pytest.mark.parametrize("specials", [0, 1])
def test_subjects_get_equal_shares_within_one_question(length: int, specials: int) -> None:
    names = ["law", "art", "biology"]
    tokenizer = WordTokenizer(specials)
    prompt = mmlu_prompt(names, tokenizer, length, many_questions)
    assert len(tokenizer.encode(prompt)) <= length
    blocks = re.split(r"\n\n(?=The following)", prompt)
    sizes = [len(tokenizer.encode(block, add_special_tokens=False)) for block in blocks]
    longest = 26 + 2  # the longest question and the blank line before it
    share = (length - specials) / 3
    assert all(share - longest - 3 < size <= share for size in sizes)
    for name, block in zip(names, blocks, strict=True):
        assert block.count(f"what is {name} number") == block.count("D. four") >= 1
        assert block.endswith("D. four")  # the limit falls between questions


def test_a_share_is_filled_to_the_last_token() -> None:
    tokenizer = WordTokenizer()
    full = mmlu_prompt("law", tokenizer, 10_000, many_questions)
    assert full.count("D. four") == 30
    exact = len(tokenizer.encode(full))
    assert mmlu_prompt("law", tokenizer, exact, many_questions) == full
    assert mmlu_prompt("law", tokenizer, exact - 1, many_questions).count("D. four") == 29


def test_a_first_question_that_is_too_long_is_cut_by_tokens() -> None:
    long = {"question": " ".join(f"w{i}" for i in range(50)), "choices": ["yes", "no"]}
    tokenizer = WordTokenizer()
    prompt = mmlu_prompt(["law", "art"], tokenizer, 27, lambda _: [long])
    # 26 tokens without the special one, 3 kept for the blank line between: 11 each.
    words = " ".join(f"w{i}" for i in range(11))
    assert prompt == f"{words}\n\n{words}"


def test_a_cut_never_splits_a_character() -> None:
    question = {"question": "é" * 40, "choices": ["ü"]}
    prompt = mmlu_prompt("law", ByteTokenizer(), 31, lambda _: [question])
    assert prompt == "é" * 15


def test_what_cannot_be_built_is_said() -> None:
    with pytest.raises(ConfigError, match="needs one subject or more"):
        mmlu_prompt([], WordTokenizer(), 100, many_questions)
    with pytest.raises(ConfigError, match=r"5 tokens has no room for 3 MMLU subject"):
        mmlu_prompt(["a", "b", "c"], WordTokenizer(), 5, many_questions)
    with pytest.raises(ConfigError, match="there are no MMLU questions for 'law'"):
        mmlu_prompt("law", WordTokenizer(), 100, lambda _: [])
    with pytest.raises(ConfigError, match=r"no text fits in 1 token"):
        mmlu_prompt("law", ByteTokenizer(), 1, lambda _: [{"question": "é", "choices": []}])


def test_the_default_source_is_local_first_and_never_the_test_split(here: Path) -> None:
    folder = here / "datasets" / "mmlu"
    folder.mkdir(parents=True)
    for split, question in (("dev", "what is near?"), ("test", "what is hidden?")):
        row = {"question": question, "choices": ["the Moon", "the Sun"], "answer": 0}
        (folder / f"astronomy_{split}.jsonl").write_text(json.dumps(row) + "\n")
    assert mmlu_prompt("astronomy", WordTokenizer(), 100) == (
        "The following are multiple choice questions about astronomy.\n\n"
        "what is near?\nA. the Moon\nB. the Sun"
    )
    with pytest.raises(UnknownName, match="unknown MMLU subject 'astronmy'; did you mean astro"):
        mmlu_prompt(["astronmy"], WordTokenizer(), 100)
