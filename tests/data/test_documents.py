"""Text arguments: what a name means, what is read from it, and what must not be evaluated too."""

import json
from pathlib import Path

import pytest

from dart_llm.data import documents
from dart_llm.data.documents import Document, check_disjoint, load_documents
from dart_llm.errors import ConfigError
from dart_llm.evaluation.tasks import check_calibration
from dart_llm.pruning.config import PruneConfig
from fake_hub import install_datasets


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


def calibration(name):
    return documents.load(documents.calibration_source(name))


def halves(name):
    return documents.sources([name])[0].documents


def test_c4_calibrates_on_its_training_split(hub):
    hub.rows = {("allenai/c4", "en", "train", True): [{"text": "c"}, {"text": "d"}]}
    for name in (None, "c4", "c4_train"):
        assert calibration(name) == ["c\n\nd"]


def test_rows_of_a_file_are_the_same_for_every_reader():
    """Both suffixes, for perplexity, calibration and the two halves of a comparison alike."""
    columns = {"text": "one", "document": "two", "article": "three", "page": "four"}
    write("rows.jsonl", *({name: row} for name, row in columns.items()))
    for file in ("more.jsonl", "folder/more.ndjson"):
        write(f"datasets/{file}", *({"body": row, "n": 1} for row in "five six seven".split()))
    for name, rows in {
        "rows.jsonl": ["one", "two", "three", "four"],
        "more.jsonl:body": ["five", "six", "seven"],
        "folder/more.ndjson:body": ["five", "six", "seven"],
    }.items():
        assert documents.read(name) == "\n\n".join(rows)
        assert calibration(name) == list(halves(name)) == rows
        source, middle = documents.sources([name])[0], len(rows) // 2
        every = list(enumerate(rows))
        assert source.half("choose") == every[:middle] and source.half("report") == every[middle:]
        assert documents.find_file(name) is not None


def test_plain_files_and_their_names():
    write("plain.txt", "some text\n")
    Path("marked.txt").write_bytes(b"\xef\xbb\xbfsome text")  # with a byte-order mark
    write("datasets/more.txt", "a\n\nb")
    write("odd:1", "a file may have such a name")
    assert documents.read("plain.txt") == "some text\n"
    assert documents.read("marked.txt") == "some text"
    assert documents.read("more") == documents.read("more.txt") == "a\n\nb"
    assert halves("more") == ("a", "b")
    assert calibration("odd:1") == ["a file may have such a name"]
    given = "plain.txt, more,c4,plain.txt,hub:x/y:test:z"
    assert documents.names(given) == ["plain.txt", "more", "c4", "hub:x/y:test:z"]
    rows = write("folder/rows.jsonl", {"text": "a"})
    assert documents.resolve(f"{rows}:text").label == "rows:text"
    assert documents.find_file("c4") is None


def test_an_unknown_name_lists_the_choices(hub):
    with pytest.raises(ConfigError, match=r'"wikitext" \(did you mean wikitext2\?\): use embedded'):
        documents.names("wikitext")
    for name in ("xsum", "gov_report", "hub:a/b:test:x:y", write("m.jsonl", {})):
        documents.check(name)
    with pytest.raises(ConfigError, match="unknown summarization data set"):
        documents.check("wikitext2")
    assert hub.calls == []


PAIR = '{"document": "a", "summary": "s"'
REFUSED = [
    (
        documents.read,
        "a.jsonl",
        '{"text": "x"}\n{"b": 1}',
        "line 2 of a.jsonl has no text in text or",
    ),
    (documents.read, "a.jsonl", '{"text": null}', "line 1 of a.jsonl has no text"),
    (documents.read, "a.jsonl:b", '{"text": "x"}', "no text in b, only columns text"),
    (documents.read, "a.jsonl", '["text"]', "line 1 of a.jsonl is not a JSON object"),
    (documents.names, "a.jsonl", '{"text": " "}', "a.jsonl has no text"),
    (documents.names, "a.txt:column", "x", "unknown text"),
    (documents.names, "hub:x:test", "", "is not a data set on the hub"),
    (documents.names, ",", "", "no text for perplexity"),
    (calibration, "a.txt", "\udcff", "cannot read a.txt as text"),
    (calibration, "b.txt", "", "unknown text"),
    (halves, "a.txt", " \n", '"a.txt" is empty'),
    (lambda name: documents.sources([name, f"./{name}"]), "a.txt", "x", '"a" was given twice'),
    (lambda name: documents.sources([]), "a.txt", "x", "no text was given"),
    (load_documents, "xsun", "", "did you mean xsum"),
    (load_documents, "hub:a/b:t:x", "", "columns for document and summary: write"),
    (load_documents, "a.jsonl", "\n\n", "no row with a document and a summary"),
    (load_documents, "a.jsonl", '{"document": "a"}', "has no summary in summary or highlights"),
    (load_documents, "a.jsonl", "{}", "has no document .*, only columns .none."),
    (load_documents, "a.jsonl:b:c", '{"b": "x"}', "has no summary in c, only columns b"),
    (load_documents, "a.jsonl", '\n{"document": "a", "summary": " "}', "line 2 .* no summary"),
    (load_documents, "a.jsonl", '{"document": 3, "summary": "a"}', "has no document"),
    (load_documents, "a.jsonl", '{"document": "\\ud83d", "summary": "s"}', "line 1 .* not JSON"),
    (load_documents, "a.jsonl", '{"document": ', "line 1 of a.jsonl is not JSON"),
    (load_documents, "a.jsonl", f'{PAIR}, "id": 2}}\n{PAIR}}}', 'lines 1 and 2 .* the same id "2"'),
]


@pytest.mark.parametrize(("reader", "name", "content", "problem"), REFUSED)
def test_sources_that_cannot_be_used(reader, name, content, problem):
    for file in ("a.txt", "a.jsonl"):
        write(file, f"{content}\n" if content else "")
    with pytest.raises(ConfigError, match=problem):
        reader(name)


def test_documents_with_each_kind_of_column():
    rows = [
        {"document": " A\u2028long text. ", "summary": "Short."},
        {"text": "t", "summary": ["One.", "", "Two."], "id": 7},
        {"article": "a", "highlights": "h", "id": "x"},
        {"report": "r", "summary": "[1] is a footnote [2]", "document": "first of them"},
    ]
    path = write("d.jsonl", "\ufeff\n", *rows)
    every = [
        Document("2", "A\u2028long text.", "Short."),
        Document("7", "t", "One.\nTwo."),
        Document("x", "a", "h"),
        Document("5", "first of them", "[1] is a footnote [2]"),
    ]
    assert load_documents(path) == every and load_documents(path, 2) == every[:2]
    two = write("two.jsonl", {"body": "b", "tldr": "t"})
    assert load_documents(f"{two}:body:tldr") == [Document("1", "b", "t")]


C4_TEST = "hub:allenai/c4/en:validation[:9]:text"
ARC_EASY = "hub:allenai/ai2_arc/ARC-Easy:test:question"
LEAKS = [
    ("a.txt", "folder/../a.txt", True),
    ("datasets/local.txt", "local", True),
    ("rows.jsonl:text", "rows.jsonl:document:summary", True),
    (None, "a.txt", False),
    ("c4", "c4", False),  # what calibrates is the training split, what is scored is not
    (None, "c4_train", True),
    (C4_TEST, "c4", True),
    ("hub:EdinburghNLP/xsum:test:document", "xsum", True),
    ("embedded", "embedded", True),
    ("mmlu", "mmlu:anatomy", True),
    (ARC_EASY, "arc_easy", True),
    (ARC_EASY, "arc_challenge", False),
    ("hub:cais/mmlu/virology:test:question", "mmlu", True),
    ("hub:cais/mmlu/virology:test:question", "mmlu:anatomy+virology", True),
]


@pytest.mark.contract("nothing evaluated calibrates")
@pytest.mark.parametrize(("source", "evaluated", "leaks"), LEAKS)
def test_what_is_evaluated_never_calibrates(source, evaluated, leaks):
    for name in ("a.txt", "b.txt", "datasets/local.txt", "folder/c.txt"):
        write(name, "x")
    write("rows.jsonl", {"text": "a"}, {"text": "b"})
    if not leaks:
        check_disjoint(source, [evaluated])
        return
    with pytest.raises(ConfigError, match=r"is evaluated and cannot .* give another text$"):
        check_disjoint(source, [evaluated])


def test_tasks_refuse_the_calibration_text():
    source, wanda = write("rows.jsonl", {"text": "a"}), PruneConfig.build("wanda")
    check_calibration(PruneConfig.build("griffin"), source, [f"perplexity:{source}"])
    check_calibration(wanda, source, ["summarize:xsum", "arc_easy"])
    for task in (f"summarize:{source}", f"perplexity:{source}", f"continuation:{source}"):
        with pytest.raises(ConfigError, match=r"rows\.jsonl is evaluated"):
            check_calibration(wanda, source, ["arc_easy", task])
