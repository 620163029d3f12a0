"""Text arguments: what a name means, what is read from it, and what must not be evaluated too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calibration_cases import WORDS, Letters
from dart_llm.data import datasets, documents, texts
from dart_llm.data.documents import Document, check_disjoint, load_documents, sequences
from dart_llm.errors import ConfigError, LoadError, UnknownName
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.tasks import check_calibration
from dart_llm.pruning.config import PruneConfig
from fake_datasets import Call, FakeDatasets, install

QUESTION = {"question": " Which? ", "choices": ["red", "blue"], "answer": 1}


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDatasets:
    """A fake ``datasets`` module, and an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return install(monkeypatch)


def write(name: str, *rows: Any) -> str:
    """A file of JSON lines, or of the text that is given."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows]
    path.write_bytes("".join(lines).encode("utf-8", "surrogateescape"))
    return name


def calibrated(name: str | None) -> list[str]:
    return list(documents.calibration_texts(name))


def halves(name: str) -> tuple[str, ...]:
    return documents.sources([name])[0].documents


def test_names_of_the_hub(hub: FakeDatasets) -> None:
    hub.rows = {
        ("allenai/c4", "en", "validation", True): [{"text": "a"}, {"text": "b"}],
        ("allenai/c4", "en", "train", True): [{"text": "c"}, {"text": "d"}],
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False): [{"text": "e"}, {"text": "f"}],
        ("x/y", None, "test", True): [{"z": "g"}, {"z": "h"}],
    }
    assert documents.read("c4") == "a b"
    assert documents.read("c4_train") == "c\n\nd"
    assert documents.read("wikitext2") == "e\n\nf"
    assert documents.read("hub:x/y:test[:9]:z") == "g\n\nh"
    assert documents.read("embedded") == texts.all_text()
    for name in (None, "c4", "c4_train"):  # what is calibrated on where nothing is said
        assert calibrated(name) == ["c\n\nd"]
        assert documents.calibration_source(name).title() == "C4 (English, training split)"
    assert calibrated("wikitext2") == ["e\n\nf"]
    hub.error = ConnectionError("no route")
    with pytest.raises(LoadError, match=r"\(no route\); use the embedded text or a text file of"):
        calibrated(None)


def test_mmlu_questions_with_answers_only_when_asked(hub: FakeDatasets) -> None:
    write("datasets/mmlu/virology_dev.jsonl", QUESTION, QUESTION | {"question": "Why?"})
    write("datasets/mmlu/astronomy_dev.jsonl", QUESTION | {"question": "Where?"})
    write("datasets/mmlu/astronomy_test.jsonl", QUESTION | {"question": "Scored!"})
    assert documents.read("mmlu", "virology") == " Which? \n\nWhy?"
    assert documents.read("mmlu") == "Where?\n\n Which? \n\nWhy?"
    assert documents.read("mmlu-answers", "astronomy, virology").split("\n\n") == [
        f"{text}\nA. red\nB. blue\nAnswer: B" for text in ("Where?", "Which?", "Why?")
    ]
    assert hub.calls == []
    with pytest.raises(UnknownName, match="'virolgy'; did you mean virology"):
        documents.read("mmlu", "virolgy")


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("rows.jsonl", ["one", "two", "three", "four"]),
        ("rows.jsonl#2", ["three", "four"]),
        ("more.jsonl:body", ["five", "six", "seven"]),
        ("more.jsonl:body#1", ["six", "seven"]),
        ("folder/more.ndjson:body#2", ["seven"]),
    ],
)
def test_rows_of_a_file_are_the_same_for_every_reader(name: str, rows: list[str]) -> None:
    """Both suffixes, for perplexity, calibration and the two halves of bench quality alike."""
    write(
        "rows.jsonl", {"text": "one"}, {"document": "two"}, {"article": "three"}, {"page": "four"}
    )
    for file in ("more.jsonl", "folder/more.ndjson"):
        write(f"datasets/{file}", *({"body": row, "n": 1} for row in "five six seven".split()))
    assert documents.read(name) == "\n\n".join(rows)
    assert calibrated(name) == rows
    assert list(halves(name)) == rows
    assert documents.find_file(name) is not None


def test_plain_files_and_their_names() -> None:
    write("plain.txt", "some text\n")
    Path("marked.txt").write_bytes(b"\xef\xbb\xbfsome text")  # with a byte-order mark
    write("datasets/more.txt", "a\n\nb")
    write("odd#1", "a file may be called so")
    assert documents.read("plain.txt") == "some text\n"
    assert documents.read("marked.txt") == "some text"
    assert documents.read("more") == documents.read("more.txt") == "a\n\nb"
    assert halves("more") == ("a", "b")
    assert calibrated("odd#1") == ["a file may be called so"]
    given = "plain.txt, more,c4,plain.txt,hub:x/y:test:z"
    assert documents.names(given) == ["plain.txt", "more", "c4", "hub:x/y:test:z"]
    every = ("c4", "xsum", "hub:x/y:test:z", "mmlu-answers", "more", "no such file")
    assert [name for name in every if documents.find_file(name)] == ["more"]
    source = write("folder/rows.jsonl", {"text": "a"}, {"text": "b"})
    assert documents.resolve(f"{source}#1").title() == "rows.jsonl from row 1 on"
    assert documents.resolve(f"{source}:text").label == "rows:text"


def test_an_unknown_name_lists_what_there_is(hub: FakeDatasets) -> None:
    with pytest.raises(ConfigError) as caught:
        documents.names("wikitext")
    assert str(caught.value) == (
        'there is no text "wikitext" (did you mean wikitext2?): use embedded, mmlu, mmlu-answers, '
        "c4, wikitext2, c4_train, a data set of the hub such as "
        "hub:Salesforce/wikitext/wikitext-2-raw-v1:test:text, the path of a text file, or that of "
        "a JSONL file, FILE.jsonl[:COLUMN][#ROW]"
    )
    for name in ("xsum", "gov_report", "hub:a/b:test:x:y", write("m.jsonl", {})):
        documents.check(name)
    assert hub.calls == []


REFUSED = [
    (documents.read, "a.jsonl#1", '{"text": "x"}\n', "has 1 rows: it cannot be read from row 1"),
    (documents.read, "a.jsonl", '{"text": "x"}\n{"b": 1}\n', "line 2 of .* has no text under text"),
    (documents.read, "a.jsonl", "{}\n", "line 1 of .*, but nothing: name the column, as in a.jso"),
    (documents.read, "a.jsonl", '{"text": null}\n', "line 1 of .* has no text under text, doc"),
    (documents.read, "a.jsonl:b", '{"text": "x"}\n', 'no text under "b", but text: name the col'),
    (documents.read, "a.jsonl", '["text"]\n', "line 1 of .* needs a JSON object, and holds a li"),
    (documents.names, "a.jsonl", '{"text": " "}\n', r"a.jsonl holds no text: write \{"),
    (documents.names, "a.jsonl", "", "a.jsonl holds no text"),
    (documents.names, "a.txt#5", "x", '"a.txt#5" names a column or a row, but only a JSONL file'),
    (documents.names, "hub:x:test", "", r"e\.g\. hub:Salesforce/wikitext"),
    (documents.names, " , ", "", "no text for perplexity"),
    (calibrated, "a.txt", "\udcff", "cannot read a.txt as text"),
    (calibrated, "b.txt", "", 'there is no text "b.txt": use embedded'),
    (halves, "a.txt", " \n", 'the text "a.txt" holds nothing'),
    (load_documents, "xsun", "", r'no documents "xsun" to summarize .* xsum\?\): use cnn'),
    (load_documents, "hub:a/b:t:x", "", r"e\.g\. hub:EdinburghNLP/xsum:test:document:summary"),
    (load_documents, "a.jsonl", "\n\n", r"a\.jsonl holds no documents: add lines such as \{\"doc"),
    (load_documents, "a.jsonl", '{"document": "a"}\n', r"line 1 .* no summary \(or highlights\) b"),
    (load_documents, "a.jsonl", '{"a": 1, "b": 2}\n', r"no document \(or text, article, report\)"),
    (load_documents, "a.jsonl", "{}\n", "line 1 of .* has no document .* but nothing: write"),
    (load_documents, "a.jsonl:b:c", '{"b": "x"}\n', "line 1 of .* has no c but b: write"),
    (
        *(load_documents, "a.jsonl", '\n{"document": "a", "summary": " "}\n'),
        "the summary in line 2 of .* is empty or no text",
    ),
    (
        *(load_documents, "a.jsonl", '{"document": 3, "summary": "a"}\n'),
        "the document in line 1 of .* is empty or no text",
    ),
    (
        *(load_documents, "a.jsonl", '{"document": "a \\ud83d b", "summary": "s"}\n'),
        "line 1 of .* half a character, .ud83d:",
    ),
    (load_documents, "a.jsonl", '{"document": \n', r"line 1 of .*a\.jsonl is not JSON"),
    (
        load_documents,
        "a.jsonl",
        '{"document": "a", "summary": "s", "id": 2}\n{"document": "a", "summary": "s"}\n',
        'lines 1 and 2 of .* have the same id "2": give each document its own',
    ),
]


@pytest.mark.parametrize(("reader", "name", "content", "words"), REFUSED)
def test_sources_that_cannot_be_used(reader: Any, name: str, content: str, words: str) -> None:
    for file in ("a.txt", "a.jsonl"):
        write(file, content)
    with pytest.raises(ConfigError, match=words):
        reader(name)


def test_the_same_text_twice_is_refused() -> None:
    write("a.txt", "x")
    with pytest.raises(ConfigError, match='the text "a" was given twice'):
        documents.sources(["a.txt", "./a.txt"])
    with pytest.raises(ConfigError, match="no text is named"):
        documents.sources([])


def test_documents_with_each_kind_of_column() -> None:
    rows = [
        {"document": " A\u2028long text. ", "summary": "Short."},
        {"text": "t", "summary": ["One.", "Two."], "id": 7},
        {"article": "a", "highlights": "[\"it's\", 'x']", "id": "x"},
        {"report": "r", "summary": "[1] is a footnote [2]", "document": "first of them"},
        {"document": "a \ud83d\ude00", "summary": "\\ud83d"},
    ]
    path = write("d.jsonl", "\ufeff\n", *rows)
    every = [
        Document("2", "A\u2028long text.", "Short."),
        Document("7", "t", "One.\nTwo."),
        Document("x", "a", "it's\nx"),
        Document("5", "first of them", "[1] is a footnote [2]"),
        Document("6", "a \U0001f600", "\\ud83d"),
    ]
    assert load_documents(path) == every
    assert load_documents(f"{path}#2") == every[2:]
    two = write("two.jsonl", {"body": "b", "tldr": "t"})
    assert load_documents(f"{two}:body:tldr") == [Document("1", "b", "t")]


def test_documents_of_the_hub_and_a_sample_of_a_file(hub: FakeDatasets) -> None:
    xsum: Call = ("EdinburghNLP/xsum", None, "test", True)
    hub.rows = {
        xsum: [{"id": 5, "document": "d", "summary": "s"}],
        ("a/b", None, "test", False): [{"x": "d", "y": "s"}],
    }
    assert load_documents("xsum", 1) == [Document("5", "d", "s")]
    assert load_documents("hub:a/b:test:x:y") == [Document("0", "d", "s")]
    path = write("mine.jsonl", *({"document": f"d{i}", "summary": "s"} for i in range(20)))
    assert [document.id for document in load_documents(path, 3)] == ["1", "2", "3"]
    sampled = load_documents(path, 3, seed=1)
    assert [int(document.id) - 1 for document in sampled] == datasets.positions(20, 3, 1)


C4_TEST = "hub:allenai/c4/en:validation[:9]:text"

LEAKS = [
    ("a.txt", "folder/../a.txt", None, True),
    ("a.txt", "b.txt", None, False),
    ("a.txt", "embedded", None, False),
    ("datasets/local.txt", "local", None, True),
    ("rows.jsonl#1", "rows.jsonl", 1, False),
    ("rows.jsonl#1", "rows.jsonl", 2, True),
    ("rows.jsonl#1", "rows.jsonl:text#1", 2, True),
    ("rows.jsonl#1", "rows.jsonl", None, True),
    ("rows.jsonl:text", "rows.jsonl:document:summary", 1, True),
    (None, "a.txt", None, False),
    (None, "c4", None, False),
    ("c4", "c4", None, False),  # what calibrates is the training split, what is scored is not
    (None, "c4_train", None, True),
    (None, "hub:allenai/c4/en:train:text", None, True),
    (C4_TEST, "c4", None, True),
    ("wikitext2", "wikitext2", None, True),
    ("hub:EdinburghNLP/xsum:test:document", "xsum", 5, True),
    ("embedded", "embedded", None, True),
    ("mmlu", "mmlu-answers", None, True),
    ("embedded", "mmlu", None, False),
    ("embedded", "no such text", None, False),
    ("hub:allenai/ai2_arc/ARC-Easy:test:question", "arc_easy", 4, True),
    ("hub:allenai/ai2_arc/ARC-Easy:train:question", "arc_easy", 4, False),
    ("hub:allenai/ai2_arc/ARC-Easy:test:question", "arc_challenge", None, False),
    ("hub:cais/mmlu/virology:test:question", "mmlu", None, True),
    ("hub:cais/mmlu/virology:test:question", "mmlu:anatomy+virology", None, True),
]


@pytest.mark.contract("nothing evaluated calibrates")
@pytest.mark.parametrize(("source", "evaluated", "rows", "leaks"), LEAKS)
def test_what_is_evaluated_never_calibrates(
    source: str | None, evaluated: str, rows: int | None, leaks: bool
) -> None:
    for name in ("a.txt", "b.txt", "datasets/local.txt", "folder/c.txt"):
        write(name, "x")
    write("rows.jsonl", {"text": "a"}, {"text": "b"})
    if not leaks:
        check_disjoint(source, {evaluated: rows})
        return
    after = "3" if evaluated.endswith("#1") else rows
    way = rf", or start after .*: rows\.jsonl#{after}" if rows and source[0] == "r" else ""
    with pytest.raises(ConfigError, match=f"is evaluated and cannot .* give another text{way}$"):
        check_disjoint(source, {evaluated: rows})


def test_a_text_that_a_task_spreads_over_is_refused_from_any_row() -> None:
    """Its slices lie all over the text, after that row too; so do documents without a limit."""
    few = MeasureOptions(limit=1)
    wanda = PruneConfig.build("wanda")
    source = write("rows.jsonl", {"text": "a"}, {"text": "b"})
    check_calibration(wanda, f"{source}#1", [f"summarize:{source}", "arc_easy"], few)
    check_calibration(PruneConfig.build("griffin"), source, [f"perplexity:{source}"], few)
    for task, options in (
        (f"summarize:{source}", MeasureOptions()),
        (f"summarize:{source}", MeasureOptions(limit=1, sample_seed=0)),
        (f"perplexity:{source}", few),
    ):
        with pytest.raises(ConfigError, match=r"rows\.jsonl is evaluated .*: give another text$"):
            check_calibration(wanda, f"{source}#1", [task], options)


def letters(text: str) -> list[int]:
    return Letters()(text)["input_ids"]


def test_windows_are_cut_from_the_joined_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = sequences(Letters(), ["abcd", "efg", "hij"], 3, 4)
    assert found.tolist() == [letters("abcd"), letters("\n\nef"), letters("g\n\nh")]
    assert sequences(Letters(), ["abcd", "efg"], 9, 4).shape == (2, 4)
    assert sequences(Letters(), [WORDS], 1, 4).tolist() == [letters(WORDS[:4])]
    with pytest.raises(ConfigError, match="has 4 tokens and one sequence needs 5"):
        sequences(Letters(), ["abcd"], 1, 5)
    starting = Letters(bos=1, adds=True)  # every window starts as the tokenizer starts a text
    assert sequences(starting, ["abcdef"], 9, 4).tolist() == [
        [1, *letters("abc")],
        [1, *letters("def")],
    ]
    assert sequences(Letters(bos=1), ["abcd"], 9, 4).tolist() == [letters("abcd")]
    monkeypatch.setattr(documents, "PIECE", 8)

    def endless():  # no more of it is read than is needed
        while True:
            yield "abc" * 5

    found = sequences(Letters(), endless(), 3, 10)
    assert found.flatten().tolist() == letters("abc" * 5 + "\n\n" + "abc" * 5)[:30]
