"""Resolving prompts and building MMLU-style ones, with a word tokenizer and small files."""

import io
import re

import pytest

from dart_llm.data import prompts
from dart_llm.data.datasets import mmlu_questions
from dart_llm.data.prompts import mmlu_prompt, read_prompt_file, resolve_prompt
from dart_llm.data.texts import read_prompt
from dart_llm.errors import ConfigError, UnknownName

AWKWARD = "say \"hi\" and 'bye', $HOME ${PATH} `whoami` $(date) \\n %s\r\n\tnext line\n\n* end \n"


@pytest.fixture(autouse=True)
def source(monkeypatch):
    """Questions of any subject."""
    monkeypatch.setattr(prompts, "mmlu_questions", questions)


class Words:
    """One token a word, with the space before it; a line break is a token; one at the start."""

    def __init__(self, specials=1):
        self.specials = specials
        self.words = []

    def encode(self, text, /, *, add_special_tokens=True):
        pieces = re.findall(r"\n| *[^\s]+| +", text)
        self.words += [piece for piece in dict.fromkeys(pieces) if piece not in self.words]
        start = [-1] * self.specials if add_special_tokens else []
        return start + [self.words.index(piece) for piece in pieces]

    def decode(self, token_ids, /):
        return "".join(self.words[i] for i in token_ids)


def questions(subject):
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
def here(tmp_path, monkeypatch):
    """A current folder with an empty folder datasets."""
    (tmp_path / "datasets").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_prompt_file_is_read_without_the_mark_of_its_encoding(tmp_path, monkeypatch):
    file = tmp_path / "bees.txt"
    file.write_text("bees\n", encoding="utf-8-sig")
    assert read_prompt_file(str(file)) == "bees\n"
    file.write_bytes(b"\xff")
    for name, problem in ((file, r".*bees\.txt"), (tmp_path, ".*: Is a directory$")):
        with pytest.raises(ConfigError, match=f"cannot read the prompt file {problem}"):
            read_prompt_file(str(name))
    for errors, problem in (("strict", "cannot read"), ("surrogateescape", "not valid UTF-8")):
        stream = io.TextIOWrapper(io.BytesIO(b"bees \xff"), "utf-8", errors)
        monkeypatch.setattr("sys.stdin", stream)
        with pytest.raises(ConfigError, match=f"{problem}|from standard input"):
            read_prompt_file("-")


def test_names_of_shipped_prompts_and_of_files_under_datasets(here):
    assert resolve_prompt("two_topics") == read_prompt("two_topics")
    ordinary = [AWKWARD, "", " ", "sky ", "Sky", "no such file", ".", "..", "datasets", "\ud800"]
    for text in (*ordinary, "a\0b", "a/" * 90, "x" * 10_000, "日本語の文章"):
        assert resolve_prompt(text) == text
    (here / "datasets/mine.txt").write_bytes(AWKWARD.encode())
    for name in ("mine", "mine.txt", "datasets/mine", "datasets/mine.txt"):
        assert resolve_prompt(name) == AWKWARD
    (here / "secret.txt").write_text("secret")
    for name in ("../secret", "../secret.txt", "secret", str(here / "secret.txt")):
        assert resolve_prompt(name) == name  # nothing outside is read
    (here / "datasets/bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"the prompt file datasets.bad\.txt cannot be read"):
        resolve_prompt("bad")


def test_a_mmlu_prompt_has_this_form_and_shows_no_answer():
    first = (
        "The following are multiple choice questions about us history.\n\n"
        "what is us_history number 0?\nA. one\nB. two\nC. three\nD. four"
    )
    second = "us_history1w0 what is us_history number 1?\nA. one\nB. two\nC. three\nD. four"
    # 9 words, a blank line of 2 tokens, 17 tokens; then 2 and 18; and one special token.
    for length, prompt in ((48, first), (49, f"{first}\n\n{second}")):
        assert mmlu_prompt(["us_history"], Words(), length) == prompt
    prompt = mmlu_prompt(["law", "art"], Words(), 900)
    assert "SECRET" not in prompt and "nswer" not in prompt


def test_subjects_get_equal_shares_within_one_question():
    names = ["law", "art", "biology"]
    for length, specials in ((120, 0), (200, 1), (333, 0), (700, 1)):
        tokenizer = Words(specials)
        prompt = mmlu_prompt(names, tokenizer, length)
        assert len(tokenizer.encode(prompt)) <= length
        blocks = re.split(r"\n\n(?=The following)", prompt)
        sizes = [len(tokenizer.encode(block, add_special_tokens=False)) for block in blocks]
        longest = 26 + 2  # the longest question and the blank line before it
        share = (length - specials) / 3
        assert all(share - longest - 3 < size <= share for size in sizes)
        for name, block in zip(names, blocks, strict=True):
            assert block.count(f"what is {name} number") == block.count("D. four") >= 1
            assert block.endswith("D. four")  # the limit falls between questions


def test_a_share_is_filled_to_the_last_token():
    tokenizer = Words()
    full = mmlu_prompt(["law"], tokenizer, 10_000)
    assert full.count("D. four") == 30
    exact = len(tokenizer.encode(full))
    assert mmlu_prompt(["law"], tokenizer, exact) == full
    assert mmlu_prompt(["law"], tokenizer, exact - 1).count("D. four") == 29


def test_what_cannot_be_built_is_refused(monkeypatch):
    monkeypatch.setattr(prompts, "mmlu_questions", lambda subject: [])
    for names, length, words in (
        ([], 100, "needs one subject or more"),
        (["a", "b", "c"], 5, "5 tokens has no room for 3 MMLU subject"),
        (["law"], 100, "there are no MMLU questions for 'law'"),
    ):
        with pytest.raises(ConfigError, match=words):
            mmlu_prompt(names, Words(), length)
    monkeypatch.setattr(prompts, "mmlu_questions", mmlu_questions)
    with pytest.raises(UnknownName, match="unknown MMLU subject 'astronmy'; did you mean astro"):
        mmlu_prompt(["astronmy"], Words(), 100)
