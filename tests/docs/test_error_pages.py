"""docs/errors.md: what is really said stands there, with a link to the FAQ where that has it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dart_llm import errors
from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.engine.requests import Sampling
from dart_llm.errors import DartError, MissingExtra
from dart_llm.files import read_yaml
from dart_llm.hub import not_reached
from dart_llm.models.loading import load
from dart_llm.pruning.config import PruneConfig
from dart_llm.server.settings import ServeSettings
from dart_llm.session.run import prune
from scripts_of import FOLDER, script
from tiny import tiny, tokens

ROOT = FOLDER.parent
error_pages, messages = script("error_pages"), script("messages")
PAGE = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
LISTS = dict(re.findall(r"^## (\w+)\n\n.+\n\n((?:- .+\n)+)", PAGE, re.MULTILINE))
FAQ = (ROOT / "docs/faq.md").read_text(encoding="utf-8")


def listed(kind: str) -> list[str]:
    """The sentences of one class, without links."""
    return [
        re.sub(r"`+ ?(.+?) ?`+( \(\[more.+)?$", r"\1", line[2:]) for line in LISTS[kind].split("\n")
    ]


def stands(error: DartError) -> bool:
    """Whether what an error says fits a sentence of its class on the page."""
    texts = listed(type(error).__name__)
    patterns = (".+".join(map(re.escape, text.split("…"))).replace(".+.+", ".+") for text in texts)
    return any(
        re.fullmatch(pattern + ".*", str(error), re.DOTALL) for pattern in patterns if pattern
    )


CASES: dict[str, Callable[[], object]] = {
    "sparsity": lambda: prune(tiny(), sparsity=2.0),
    "method": lambda: PruneConfig.build("grifin"),
    "setting": lambda: PruneConfig.build("dart", sparsty=0.5),
    "exclusive": lambda: PruneConfig.build("griffin", sparsity=0.5, budget={"table": "all:0.5"}),
    "file": lambda: read_yaml(Path("nowhere.yaml")),
    "model": lambda: load("./nowhere"),
    "name": lambda: load("smolm2-135m"),
    "masks": lambda: prune(tiny(), "griffin", sparsity=0.5).masks(),
    "no model": lambda: prune(object()),  # type: ignore[arg-type]
    "stop": lambda: Sampling(stop=("a",) * 99),
    "ids": lambda: Ask(()),
    "host": lambda: ServeSettings(host="0.0.0.0"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_stands_on_the_page(case: str) -> None:
    with pytest.raises(DartError) as caught:
        CASES[case]()
    assert stands(caught.value), str(caught.value)


def test_attached_twice_and_without_a_cache() -> None:
    model = tiny()
    with prune(model, "griffin", sparsity=0.5):
        with pytest.raises(DartError) as twice:
            prune(model, "griffin", sparsity=0.5).attach()
        with pytest.raises(DartError) as bare:
            model.generate(tokens(), use_cache=False, max_new_tokens=2)
    assert stands(twice.value) and stands(bare.value)


def test_sentences_that_are_put_together_elsewhere() -> None:
    assert stands(errors.LoadError(not_reached("a/b", "give a local folder")))
    assert stands(MissingExtra("ray", "cluster"))
    assert not stands(errors.LoadError("nobody ever says this"))


def test_every_class_of_errors_has_a_list() -> None:
    classes = [one for one in vars(errors).values() if isinstance(one, type)]
    own = [one.__name__ for one in classes if issubclass(one, errors.DartError)]
    assert sorted(own) == sorted(LISTS)
    assert sum(map(len, map(listed, LISTS))) > 400


def test_answers_of_the_server_are_listed_with_status_and_code() -> None:
    assert "| 429 | `rate_limit_exceeded` | `too many connections` |" in PAGE
    assert "| 401 | `invalid_api_key` | `this server needs an API key: send" in PAGE


def test_sections_of_the_faq_about_errors_are_linked() -> None:
    quoted = [told for told in messages.quoted(FAQ) if f"#{error_pages.faq(ROOT)[told]})" in PAGE]
    assert len(quoted) > 55
    for told in ("too many requests … wait already: try again in … s", "unknown task …"):
        assert told in quoted


def test_sentences_are_followed_to_where_they_are_put_together(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "WAY = 'go home'\n"
        "class DartError(Exception): pass\n"
        "class Bad(DartError):\n"
        "    def __init__(self, what: str) -> None:\n"
        "        super().__init__(f'{what} is bad')\n"
        "def why(n): return f'since {n} came' if n else None\n"
        "def fail(text): raise DartError(text)\n"
        "def go(x):\n"
        "    if x: raise Bad('this thing')\n"
        "    reason = why(x) or 'for no reason'\n"
        "    fail('it failed, ' + reason)\n"
        "    raise DartError(f'{x} is lost: {WAY}' if x else 'nothing is lost')\n"
    )
    found = [
        (one.kind, one.text.replace(messages.HOLE, "…")) for one in messages.sentences(tmp_path)
    ]
    assert found == [
        ("Bad", "this thing is bad"),
        ("DartError", "… is lost: go home"),
        ("DartError", "it failed, for no reason"),
        ("DartError", "it failed, since … came"),
        ("DartError", "nothing is lost"),
    ]
