"""docs/server.md names everything that the server takes, answers and limits."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import dart_llm
from dart_llm.engine.events import Timings
from dart_llm.server.app import ROUTES
from dart_llm.server.responses import ACCOUNTING, TYPES
from dart_llm.server.schemas import (
    IGNORED,
    NEUTRAL,
    ChatBody,
    CompletionBody,
    Dart,
    Message,
    StreamOptions,
    TextPart,
)
from dart_llm.server.service import SHOWN
from dart_llm.server.settings import LEAST
from serve_cases import running

SOURCE = Path(dart_llm.__file__).parent
TEXT = (Path(__file__).parents[2] / "docs/server.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"[\w.-]+", " ".join(re.findall(r"`([^`\n]+)`", TEXT))))


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_every_route(route: object) -> None:
    path = str(route.path).replace(":path", "")  # type: ignore[attr-defined]
    assert f"| `{route.method} {path}` |" in TEXT  # type: ignore[attr-defined]


def test_no_route_that_is_not_there() -> None:
    named = set(re.findall(r"\| `((?:GET|POST) [^`]+)` \|", TEXT))
    there = {f"{route.method} {route.path.replace(':path', '')}" for route in ROUTES}
    assert named == {*there, "GET /openapi.json"}


def test_every_field() -> None:
    kinds = (ChatBody, CompletionBody, Dart, Message, StreamOptions, TextPart)
    fields = {name for kind in kinds for name in kind.model_fields}
    assert {*fields, *IGNORED, *NEUTRAL} <= NAMED


def test_every_key_of_an_answer() -> None:
    timings = set(Timings(1, 1.0, 1, 1.0).to_dict())
    assert {*ACCOUNTING, *timings} <= NAMED
    for kind, fields in SHOWN.items():
        (line,) = re.findall(rf"^\| `{kind}` \|(.*)\|$", TEXT, re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", line)) == set(fields)


def test_every_error() -> None:
    codes: set[str] = set()
    for path in SOURCE.glob("serve_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Refusal", "_bad"):
                codes |= {
                    str(word.value.value)
                    for word in node.keywords
                    if word.arg == "code" and isinstance(word.value, ast.Constant)
                }
                places = node.args[3:4]
                codes |= {str(one.value) for one in places if isinstance(one, ast.Constant)}
    assert len(codes) > 12
    assert codes <= NAMED
    for status, kind in TYPES.items():
        assert re.search(rf"^\| (?:\d+, )*{status}(?:, \d+)* \| `{kind}` \|", TEXT, re.MULTILINE)


def test_every_metric_and_limit() -> None:
    with running() as server:
        families = list(server.service.metrics.registry.collect())
    names = {one.name + "_total" * (one.type == "counter") for one in families}
    assert len(names) == 13
    assert names <= NAMED
    flags = {f"--{name.replace('_', '-')}" for name in LEAST}
    flags |= {"--host", "--api-key", "--allow-host", "--methods", "--verbose", "--log-prompts"}
    assert flags <= set(re.findall(r"--[\w-]+", TEXT))


@pytest.mark.parametrize(
    ("package", "file"),
    [
        ("fastapi", "serve_app"),
        ("uvicorn", "serve_run"),
        ("prometheus_client", "serve_metrics"),
    ],
)
def test_optional_packages_are_imported_in_one_file(package: str, file: str) -> None:
    importing = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            packages = {name.split(".")[0] for name in names}
            assert "starlette" not in packages  # fastapi's own affair
            if package in packages:
                importing.add(path.stem)
    assert importing == {file}
