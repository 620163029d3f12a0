"""The texts of perplexity, by name: embedded, MMLU, files, and the hub through a fake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dart_llm.data import documents as ppl_texts
from dart_llm.data import texts
from dart_llm.errors import ConfigError, LoadError, UnknownName
from fake_datasets import FakeDatasets, install


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDatasets:
    """A fake ``datasets`` module, and an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return install(monkeypatch)


def write(path: Path, *rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


QUESTION = {"question": " Which? ", "choices": ["red", "blue"], "answer": 1}


def test_names_of_the_hub(hub: FakeDatasets) -> None:
    hub.rows = {
        ("allenai/c4", "en", "validation", True): [{"text": "a"}, {"text": "b"}],
        ("allenai/c4", "en", "train", True): [{"text": "c"}, {"text": "d"}],
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False): [{"text": "e"}, {"text": "f"}],
        ("x/y", None, "test", True): [{"z": "g"}, {"z": "h"}],
    }
    assert ppl_texts.read("c4") == "a b"
    assert ppl_texts.read("c4_train") == "c\n\nd"
    assert ppl_texts.read("wikitext2") == "e\n\nf"
    assert ppl_texts.read("hub:x/y:test[:9]:z") == "g\n\nh"
    assert ppl_texts.read("embedded") == texts.all_text()


def test_mmlu_questions_with_answers_only_when_asked(hub: FakeDatasets) -> None:
    write(Path("datasets/mmlu/virology_dev.jsonl"), QUESTION, QUESTION | {"question": "Why?"})
    write(Path("datasets/mmlu/astronomy_dev.jsonl"), QUESTION | {"question": "Where?"})
    write(Path("datasets/mmlu/astronomy_test.jsonl"), QUESTION | {"question": "Scored!"})
    assert ppl_texts.read("mmlu", "virology") == " Which? \n\nWhy?"
    assert ppl_texts.read("mmlu") == "Where?\n\n Which? \n\nWhy?"
    assert ppl_texts.read("mmlu-answers", "astronomy, virology").split("\n\n") == [
        f"{text}\nA. red\nB. blue\nAnswer: B" for text in ("Where?", "Which?", "Why?")
    ]
    assert hub.calls == []
    with pytest.raises(UnknownName, match="'virolgy'; did you mean virology"):
        ppl_texts.read("mmlu", "virolgy")


def test_without_local_questions_mmlu_is_the_hub(hub: FakeDatasets) -> None:
    hub.error = ConnectionError("no route")
    with pytest.raises(LoadError, match=r"cais/mmlu \(abstract_algebra, dev\) .* put abstract_"):
        ppl_texts.read("mmlu")


def test_files_are_plain_text_or_jsonl(hub: FakeDatasets) -> None:
    Path("plain.txt").write_text("some text\n", encoding="utf-8")
    rows = write(Path("rows.jsonl"), {"text": "one"}, {"text": "two", "id": 3})
    assert ppl_texts.read("plain.txt") == "some text\n"
    assert ppl_texts.read(rows) == "one\n\ntwo"
    Path("marked.txt").write_bytes(b"\xef\xbb\xbfsome text")  # with a byte-order mark
    assert ppl_texts.read("marked.txt") == "some text"
    write(Path("datasets/more.txt"))
    Path("datasets/more.txt").write_text("more", encoding="utf-8")
    assert ppl_texts.read("more") == ppl_texts.read("more.txt") == "more"
    assert ppl_texts.names(f"plain.txt, {rows},c4,plain.txt,hub:x/y:test:z") == [
        "plain.txt",
        rows,
        "c4",
        "hub:x/y:test:z",
    ]
    assert [n for n in ("c4", "hub:x/y:test:z", "mmlu-answers", rows) if ppl_texts.is_file(n)] == [
        rows
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "a"}, {"page": "b"}],
            'line 2 of .* needs "text" with a text in it and has pa',
        ),
        ([{}], 'line 1 of .* needs "text" with a text in it and has nothing: name that column'),
        ([{"text": None}], 'line 1 of .* needs "text"'),
        ([["text"]], "line 1 of .* needs a JSON object, and holds a list"),
        ([{"text": " "}], r'rows.jsonl holds no text: write \{"text": "..."\} a line'),
        ([], r"rows.jsonl holds no text"),
    ],
)
def test_a_jsonl_file_without_text_is_refused(
    hub: FakeDatasets, rows: list[Any], message: str
) -> None:
    path = write(Path("rows.jsonl"), *rows)
    for read in (ppl_texts.read, ppl_texts.names):
        with pytest.raises(ConfigError, match=message):
            read(path)


def test_an_unknown_name_lists_what_there_is(hub: FakeDatasets) -> None:
    with pytest.raises(ConfigError) as caught:
        ppl_texts.names("wikitext")
    assert str(caught.value) == (
        'no text "wikitext" for perplexity (did you mean wikitext2?): use embedded, mmlu, '
        "mmlu-answers, c4, wikitext2, c4_train, a data set of the hub such as "
        "hub:Salesforce/wikitext/wikitext-2-raw-v1:test:text, or the path of a text file"
    )
    with pytest.raises(ConfigError, match=r"e\.g\. hub:Salesforce/wikitext"):
        ppl_texts.names("hub:x:test")
    with pytest.raises(ConfigError, match="no text for perplexity"):
        ppl_texts.names(" , ")
    assert hub.calls == []
