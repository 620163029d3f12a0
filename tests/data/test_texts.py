"""What is shipped; prompts by name, from files and of MMLU; passages and prompts in files."""

import hashlib
import io
import json
import re
import subprocess
import sys

import pytest

from dart_llm.data import passages, texts
from dart_llm.data.passages import Passage, Segment, Topic, listed_passages, listed_prompts
from dart_llm.data.texts import mmlu_prompt, read_prompt, read_prompt_file, resolve_prompt
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.files import write_lines
from shells import ROOT

SUBJECTS = ("aqueduct", "bicycle", "bread", "court", "immunity", "tides")
PROMPTS = tuple("arithmetic code continue letter sky story summary two_topics".split())
FROZEN = {
    "texts": "3b3843426e01780d",
    "prompts": "8b4d3cf248bf4028",
    "openings": "c9fd726398486dc6",
    "passages": "a15012363fce4502",
    "two-topic prompts": "738940215a3967cb",
}
"""sha256 of what is shipped: published numbers were measured on it."""


def test_what_is_shipped_never_changes():
    shipped = {
        "texts": texts.all_text(),
        "prompts": "".join(map(texts.read_prompt, PROMPTS)),
        "openings": "".join(texts.openings()),
        "passages": json.dumps([passage.to_dict() for passage in passages.shipped()]),
        "two-topic prompts": json.dumps([prompt.to_dict() for prompt in listed_prompts()]),
    }
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in shipped.items()}
    assert {name: digest[:16] for name, digest in digests.items()} == FROZEN
    assert texts.subjects() == SUBJECTS and texts.prompt_names() == PROMPTS
    assert texts.all_text() == "\n\n".join(map(texts.read, SUBJECTS))
    with pytest.raises(UnknownName, match="unknown prompt 'storry'; did you mean story"):
        texts.read_prompt("storry")
    for name in ("", "prompts/sky", "../errors", "tides.txt"):  # a name is not a path
        with pytest.raises(UnknownName):
            texts.read(name)


def test_the_shipped_prompts_are_what_the_script_makes():
    lines = (passages.FOLDER / "prompts.jsonl").read_text(encoding="utf-8")
    command = [sys.executable, str(ROOT / "benchmarks/make_prompts.py"), "480"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == lines


TWO_TOPICS = {
    "id": "own",
    "text": "Bees dance.\n\nThey fly.\n\nLoans cost money.",
    "topics": [{"name": "bees", "domain": "zoology"}, {"name": "loans", "domain": "finance"}],
    "changes": [24],
}
BEES = TWO_TOPICS["topics"][0]
REFUSED = [
    ({"id": None}, "line 1 of .*, id: "),
    ({"topics": [{"name": "bees"}]}, r"line 1 of .*, topics.0.domain: "),
    ({"changes": []}, "needs one change for each topic but the first"),
    *(({"changes": [at]}, f"change at character {at}, where no") for at in (0, 23, 25, 41, -17)),
    ({"topics": [BEES, {**BEES, "name": "wasps"}]}, "adjacent topics of the same domain: zoology"),
]


@pytest.mark.contract("every parser round-trips")
def test_files_of_passages(tmp_path):
    path, shipped = tmp_path / "own.jsonl", passages.shipped()
    write_lines(path, [passage.to_dict() for passage in shipped])
    assert listed_passages(path) == shipped
    topics = (Topic("bees", "zoology"), Topic("loans", "finance"))
    passage = Passage("own", TWO_TOPICS["text"], topics, (24,))
    assert passage.segments() == [
        Segment(topics[0], 0, 24, "Bees dance.\n\nThey fly."),
        Segment(topics[1], 24, 41, "Loans cost money."),
    ]
    assert passage.domains == ("zoology", "finance") and passage.to_dict() == TWO_TOPICS
    refused = [([{**TWO_TOPICS, **changes}], problem) for changes, problem in REFUSED]
    refused += [([], "is empty"), ([TWO_TOPICS] * 2, 'the id "own" in line 2 of .* is used twice')]
    for rows, problem in refused:
        write_lines(path, rows)
        with pytest.raises(ConfigError, match=problem):
            listed_passages(path)


@pytest.mark.contract("every parser round-trips")
def test_files_of_prompts(tmp_path):
    path, prompts = tmp_path / "own.jsonl", listed_prompts()[:30]
    write_lines(path, [prompt.to_dict() for prompt in prompts])
    assert listed_prompts(path) == prompts
    path.write_text('{"text": "a"}\n\n{"text": "b", "id": 7}\n')  # only a text is needed
    assert [(prompt.id, prompt.text) for prompt in listed_prompts(path)] == [("1", "a"), ("7", "b")]
    for line in ("", "{", '{"text": " "}', '{"text": "a", "domains": ["a", "b", "c"]}'):
        path.write_text(line)
        with pytest.raises(ConfigError, match=r"own\.jsonl"):
            listed_prompts(path)


def test_a_prompt_file_is_read_without_its_byte_order_mark(tmp_path, monkeypatch):
    file = tmp_path / "bees.txt"
    file.write_text("bees\n", encoding="utf-8-sig")
    assert read_prompt_file(str(file)) == "bees\n"
    file.write_bytes(b"\xff")
    for name in (file, tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="cannot read the prompt file"):
            read_prompt_file(str(name))
    for errors in ("strict", "surrogateescape"):
        stdin = io.TextIOWrapper(io.BytesIO(b"bees \xff"), "utf-8", errors)
        monkeypatch.setattr("sys.stdin", stdin)
        with pytest.raises(ConfigError, match="cannot read the prompt from standard input"):
            read_prompt_file("-")


AWKWARD = "say \"hi\" and 'bye', $HOME ${PATH} `whoami` $(date) \\n %s\r\n\tnext line\n\n* end \n"


def test_names_of_shipped_prompts_and_of_files_under_datasets(tmp_path, monkeypatch):
    (tmp_path / "datasets").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_prompt("two_topics") == read_prompt("two_topics")
    ordinary = [AWKWARD, "", " ", "sky ", "Sky", "no such file", ".", "..", "datasets"]
    for text in (*ordinary, "a\0b", "a/" * 90, "x" * 10_000, "日本語の文章"):
        assert resolve_prompt(text) == text
    (tmp_path / "datasets/mine.txt").write_bytes(AWKWARD.encode())
    for name in ("mine", "mine.txt", "datasets/mine", "datasets/mine.txt"):
        assert resolve_prompt(name) == AWKWARD
    (tmp_path / "secret.txt").write_text("secret")
    for name in ("../secret", "../secret.txt", "secret", str(tmp_path / "secret.txt")):
        assert resolve_prompt(name) == name  # nothing outside is read
    (tmp_path / "datasets/bad.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("bad", "\ud800"):
        with pytest.raises(ConfigError, match="UTF-8"):
            resolve_prompt(name)


class Words:
    """One token a word, with the space before it; a line break is a token; one at the start."""

    def encode(self, text):
        return ["<s>", *re.findall(r"\n| *[^\s]+| +", text)]


def test_a_mmlu_prompt_has_this_form_and_shows_no_answer(monkeypatch):
    def questions(subject):
        for number in range(9):
            question = {"question": f"{number} of {subject}?\n", "choices": ["one", "two "]}
            yield {**question, "answer": 1, "explanation": "SECRET"}

    monkeypatch.setattr(texts, "mmlu_questions", questions)
    first = (
        "The following are multiple choice questions about us history.\n\n"
        "0 of us_history?\nA. one\nB. two"
    )
    second = "1 of us_history?\nA. one\nB. two"
    # every token counts
    for length, prompt in ((31, first), (32, f"{first}\n\n{second}")):
        assert mmlu_prompt(["us_history"], Words(), length) == prompt
    both = mmlu_prompt(["law", "art"], Words(), 10_000)
    assert "SECRET" not in both and "nswer" not in both
    assert re.findall(r"\d of \w+", both)[:3] == ["0 of law", "0 of art", "1 of law"]
    assert both.count("B. two") == 18
    for names, length in (([], 100), (["law"], 10)):
        with pytest.raises(ConfigError, match="has no room for a question"):
            mmlu_prompt(names, Words(), length)
    monkeypatch.undo()
    with pytest.raises(UnknownName, match="unknown MMLU subject 'astronmy'; did you mean astro"):
        mmlu_prompt(["astronmy"], Words(), 100)
