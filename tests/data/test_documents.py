"""Text arguments: what a name means, what is read from it, and what must not be evaluated too."""

import json
from pathlib import Path

import pytest

from calibration_cases import WORDS, Letters
from dart_llm.data import documents, texts
from dart_llm.data.datasets import Document
from dart_llm.data.documents import check_disjoint, load_documents, sequences
from dart_llm.errors import ConfigError
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.tasks import check_calibration
from dart_llm.pruning.config import PruneConfig
from fake_hub import install_datasets
from steps import refused

QUESTION = {"question": " Which? ", "choices": ["red", "blue"], "answer": 1}


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """A fake ``datasets`` module, and an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return install_datasets(monkeypatch)


def write(name, *rows):
    """A file of JSON lines, or of the text that is given."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows]
    path.write_bytes("".join(lines).encode("utf-8", "surrogateescape"))
    return name


def calibrated(name):
    return list(documents.calibration_texts(name))


def halves(name):
    return documents.sources([name])[0].documents


def test_names_of_the_hub(hub):
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


def test_mmlu_questions_with_answers_only_when_asked(hub):
    write("datasets/mmlu/virology_dev.jsonl", QUESTION, QUESTION | {"question": "Why?"})
    write("datasets/mmlu/astronomy_dev.jsonl", QUESTION | {"question": "Where?"})
    assert documents.read("mmlu:virology") == " Which? \n\nWhy?"
    assert documents.read("mmlu") == "Where?\n\n Which? \n\nWhy?"
    assert documents.read("mmlu-answers:astronomy+virology").split("\n\n") == [
        f"{text}\nA. red\nB. blue\nAnswer: B" for text in ("Where?", "Which?", "Why?")
    ]
    assert hub.calls == []


ROWS = {
    "rows.jsonl": ["one", "two", "three", "four"],
    "rows.jsonl#2": ["three", "four"],
    "more.jsonl:body": ["five", "six", "seven"],
    "more.jsonl:body#1": ["six", "seven"],
    "folder/more.ndjson:body#2": ["seven"],
}


def test_rows_of_a_file_are_the_same_for_every_reader():
    """Both suffixes, for perplexity, calibration and the two halves of bench quality alike."""
    columns = {"text": "one", "document": "two", "article": "three", "page": "four"}
    write("rows.jsonl", *({name: row} for name, row in columns.items()))
    for file in ("more.jsonl", "folder/more.ndjson"):
        write(f"datasets/{file}", *({"body": row, "n": 1} for row in "five six seven".split()))
    for name, rows in ROWS.items():
        assert documents.read(name) == "\n\n".join(rows)
        assert calibrated(name) == list(halves(name)) == rows
        source, middle = documents.sources([name])[0], len(rows) // 2
        every = list(enumerate(rows))
        assert source.half("choose") == every[:middle] and source.half("report") == every[middle:]
        assert documents.find_file(name) is not None


def test_plain_files_and_their_names():
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
    source = write("folder/rows.jsonl", {"text": "a"}, {"text": "b"})
    assert documents.resolve(f"{source}#1").title() == "rows.jsonl from row 1 on"
    assert documents.resolve(f"{source}:text").label == "rows:text"


def test_an_unknown_name_lists_what_there_is(hub, snapshot):
    assert refused(documents.names, ["wikitext"], ConfigError) == snapshot
    for name in ("xsum", "gov_report", "hub:a/b:test:x:y", write("m.jsonl", {})):
        documents.check(name)
    assert hub.calls == []


REFUSED = {
    documents.read: [
        ("a.jsonl#1", '{"text": "x"}'),
        ("a.jsonl", '{"text": "x"}\n{"b": 1}'),
        ("a.jsonl", '{"text": null}'),
        ("a.jsonl:b", '{"text": "x"}'),
        ("a.jsonl", '["text"]'),
    ],
    documents.names: [
        ("a.jsonl", '{"text": " "}'),
        ("a.txt#5", "x"),
        ("hub:x:test", ""),
        (",", ""),
    ],
    calibrated: [("a.txt", "\udcff"), ("b.txt", "")],
    halves: [("a.txt", " \n")],
    documents.sources: [(["a.txt", "./a.txt"], "x"), ([], "x")],
    load_documents: [
        ("xsun", ""),
        ("hub:a/b:t:x", ""),
        ("a.jsonl", "\n\n"),
        ("a.jsonl", '{"document": "a"}'),
        ("a.jsonl", "{}"),
        ("a.jsonl:b:c", '{"b": "x"}'),
        ("a.jsonl", '\n{"document": "a", "summary": " "}'),
        ("a.jsonl", '{"document": 3, "summary": "a"}'),
        ("a.jsonl", '{"document": "a \\ud83d b", "summary": "s"}'),
        ("a.jsonl", '{"document": '),
        (
            "a.jsonl",
            '{"document": "a", "summary": "s", "id": 2}\n{"document": "a", "summary": "s"}',
        ),
    ],
}


@pytest.mark.parametrize("reader", REFUSED, ids=lambda reader: reader.__name__)
def test_sources_that_cannot_be_used(reader, snapshot):
    def read(given):
        name, content = given
        for file in ("a.txt", "a.jsonl"):
            write(file, f"{content}\n" if content else "")
        reader(name)

    assert refused(read, REFUSED[reader], ConfigError) == snapshot


def test_documents_with_each_kind_of_column():
    rows = [
        {"document": " A\u2028long text. ", "summary": "Short."},
        {"text": "t", "summary": ["One.", "Two."], "id": 7},
        {"article": "a", "highlights": "[\"it's\", 'x']", "id": "x"},
        {"report": "r", "summary": "[1] is a footnote [2]", "document": "first of them"},
    ]
    path = write("d.jsonl", "\ufeff\n", *rows)
    every = [
        Document("2", "A\u2028long text.", "Short."),
        Document("7", "t", "One.\nTwo."),
        Document("x", "a", "it's\nx"),
        Document("5", "first of them", "[1] is a footnote [2]"),
    ]
    assert load_documents(path) == every
    assert load_documents(f"{path}#2") == every[2:]
    two = write("two.jsonl", {"body": "b", "tldr": "t"})
    assert load_documents(f"{two}:body:tldr") == [Document("1", "b", "t")]


C4_TEST = "hub:allenai/c4/en:validation[:9]:text"

LEAKS = [
    ("a.txt", "folder/../a.txt", None, True),
    ("datasets/local.txt", "local", None, True),
    ("rows.jsonl#1", "rows.jsonl", 1, False),
    ("rows.jsonl#1", "rows.jsonl", 2, True),
    ("rows.jsonl#1", "rows.jsonl:text#1", 2, True),
    ("rows.jsonl:text", "rows.jsonl:document:summary", 1, True),
    (None, "a.txt", None, False),
    ("c4", "c4", None, False),  # what calibrates is the training split, what is scored is not
    (None, "c4_train", None, True),
    (C4_TEST, "c4", None, True),
    ("hub:EdinburghNLP/xsum:test:document", "xsum", 5, True),
    ("embedded", "embedded", None, True),
    ("mmlu", "mmlu-answers", None, True),
    ("hub:allenai/ai2_arc/ARC-Easy:test:question", "arc_easy", 4, True),
    ("hub:allenai/ai2_arc/ARC-Easy:test:question", "arc_challenge", None, False),
    ("hub:cais/mmlu/virology:test:question", "mmlu", None, True),
    ("hub:cais/mmlu/virology:test:question", "mmlu:anatomy+virology", None, True),
]


@pytest.mark.contract("nothing evaluated calibrates")
@pytest.mark.parametrize(("source", "evaluated", "rows", "leaks"), LEAKS)
def test_what_is_evaluated_never_calibrates(source, evaluated, rows, leaks):
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


def test_a_text_that_a_task_spreads_over_is_refused_from_any_row():
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


def letters(text):
    return Letters()(text)["input_ids"]


def test_windows_are_cut_from_the_joined_texts(monkeypatch):
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
