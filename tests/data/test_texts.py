"""The embedded texts and prompts: their size, their subjects, their loaders."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import combinations

import pytest

from dart_llm.data import passages as drift_passages
from dart_llm.data import texts
from dart_llm.data import topic_prompts as drift_prompts
from dart_llm.errors import ConfigError, UnknownName

SUBJECTS = ("aqueduct", "bicycle", "bread", "court", "immunity", "tides")
PROMPTS = tuple("arithmetic code continue letter sky story summary two_topics".split())
COMMON = set(
    """
    about after again also although always because been before begin begins between both called
    could different does each either else even every first form found from great have having held
    here high into just keep kind large less like long made make makes many more most much must
    never next nothing often only other others over part parts same several should side small some
    still such than that their them then there these they this those three through time together
    took under until used usually very were what when where which while whole will with
    within without would years
    """.split()
)


def content_words(text: str) -> set[str]:
    """The words of four letters or more that say what a text is about."""
    return set(re.findall(r"[a-z]{4,}", text.lower())) - COMMON


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_text_is_800_to_900_words_of_plain_paragraphs(subject: str) -> None:
    text = texts.read(subject)
    paragraphs = text.split("\n\n")
    assert 800 <= len(text.split()) <= 900
    assert 7 <= len(paragraphs) <= 10
    assert text == text.strip()
    for paragraph in paragraphs:
        assert "\n" not in paragraph
        assert "  " not in paragraph
        assert paragraph[0].isupper()
        assert paragraph.endswith(".")  # prose: no headings, no lists
        assert 40 <= len(paragraph.split()) <= 160


def test_two_subjects_share_few_words() -> None:
    words = {subject: content_words(texts.read(subject)) for subject in SUBJECTS}
    for first, second in combinations(words.values(), 2):
        assert len(first & second) / len(first | second) < 0.15


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_halves_of_a_text_share_more_than_two_subjects_do(subject: str) -> None:
    words = texts.read(subject).split()
    first, second = (content_words(" ".join(half)) for half in (words[:440], words[440:]))
    within = len(first & second) / len(first | second)
    for other in set(SUBJECTS) - {subject}:
        strange = content_words(" ".join(texts.read(other).split()[440:]))
        assert len(first & strange) / len(first | strange) < within / 1.5


def test_all_text_is_every_text_in_order() -> None:
    assert texts.subjects() == SUBJECTS
    whole = texts.all_text()
    assert whole == "\n\n".join(texts.read(subject) for subject in SUBJECTS)
    assert 5000 <= len(whole.split()) <= 5400


def test_topic_shift_and_names() -> None:
    assert texts.topic_shift("tides", "court") == (texts.read("tides"), texts.read("court"))
    with pytest.raises(ConfigError, match="two different subjects, not 'tides' twice"):
        texts.topic_shift("tides", "tides")
    with pytest.raises(UnknownName, match="unknown embedded text 'tide'; did you mean tides"):
        texts.read("tide")
    with pytest.raises(UnknownName, match="unknown prompt 'storry'; did you mean story"):
        texts.read_prompt("storry")
    for name in ("", "prompts/sky", "../errors", "tides.txt"):  # a name is not a path
        with pytest.raises(UnknownName):
            texts.read(name)


def test_the_shipped_prompts() -> None:
    assert texts.prompt_names() == PROMPTS
    assert texts.read_prompt("sky") == "Why is the sky blue?"
    assert re.search(r"^First explain .* explain how", texts.read_prompt("two_topics"))
    assert texts.read_prompt("summary").endswith("\n\nSummary:")
    assert 240 <= len(texts.read_prompt("continue").split()) <= 280
    for name in PROMPTS:
        prompt = texts.read_prompt(name)
        assert prompt == prompt.strip()
        assert 5 <= len(prompt.split()) <= 280


def test_the_loaders_need_no_torch() -> None:
    # What the package itself imports is another test's matter: only what these add counts here.
    code = (
        "import sys, dart_llm; before = set(sys.modules); "
        "import dart_llm.data.texts, dart_llm.data.prompts, dart_llm.data.documents;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new & {'torch', 'transformers', 'datasets', 'numpy'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def _runs(text: str, words: int = 8) -> set[tuple[str, ...]]:
    """All runs of so many words."""
    found = re.findall(r"[a-z]+", text.lower())
    return {tuple(found[at : at + words]) for at in range(len(found) - words + 1)}


def test_the_openings_are_of_no_text_that_is_evaluated() -> None:
    """Nor do they share eight words in a row with one."""
    openings = texts.openings()
    assert len(openings) == len(set(openings)) == 32
    shipped = [texts.read(name) for name in texts.subjects()]
    shipped += [texts.read_prompt(name) for name in texts.prompt_names()]
    shipped += [prompt.text for prompt in drift_prompts.shipped()]
    shipped += [passage.text for passage in drift_passages.shipped()]
    runs = set[tuple[str, ...]]().union(*map(_runs, shipped))
    for opening in openings:
        assert opening == opening.strip()
        assert 100 <= len(opening) <= 300
        assert not any(opening in text for text in shipped)
        assert not _runs(opening) & runs
