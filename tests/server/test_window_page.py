"""The window's files, read without a browser: names, references, policy, contrast."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

import dart_llm
from dart_llm.server.security import CONTENT_POLICY
from dart_llm.server.window import EXPORT, IMPORT, static_files
from html_page import Page

STATIC = Path(dart_llm.__file__).parent / "server" / "static"
SCRIPTS = sorted(STATIC.glob("*.js"))
TEXT = (STATIC / "index.html").read_text(encoding="utf-8")
PAGE = Page(TEXT)
CONTROLS = ("button", "input", "select", "textarea")


def ids() -> list[str]:
    return [attributes["id"] or "" for _, attributes in PAGE.seen if "id" in attributes]


def test_the_policy_holds_for_the_page() -> None:
    assert "script-src 'self'; style-src 'self'" in CONTENT_POLICY
    assert not re.search(
        r"<style|<script(?! type=\"module\" src=\"/static/\w+\.js\"></script>)", TEXT
    )
    names = {name for _, attributes in PAGE.seen for name in attributes}
    assert "style" not in names
    assert not [name for name in names if name.startswith("on")]
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\(|Function\(", text)
        assert not re.search(r"setAttribute\(\"style\"|document\.write", text)


def test_every_file_that_is_named_is_served_and_every_file_is_named() -> None:
    served = set(static_files())
    named = set(re.findall(r'(?:href|src)="/static/([\w.]+)"', TEXT))
    for script in SCRIPTS:
        named |= {name for _, name in IMPORT.findall(script.read_text(encoding="utf-8"))}
    assert served == named | {"index.html", "prompts.json"}
    assert {path.name for path in STATIC.iterdir()} == served


def test_no_address_of_another_host() -> None:
    for path in STATIC.iterdir():
        found = set(re.findall(r"https?://[^\s\"'<>)]+|//[\w-]+\.\w+/", path.read_text("utf-8")))
        assert found <= {"http://www.w3.org/2000/svg"}, path.name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_modules_import_what_is_exported(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    for names, other in IMPORT.findall(text):
        exported = {name for _, name in EXPORT.findall((STATIC / other).read_text("utf-8"))}
        assert {name.strip() for name in names.split(",")} <= exported
    for names, _ in IMPORT.findall(text):
        for name in names.split(","):
            assert len(re.findall(rf"\b{name.strip()}\b", text)) > 1, f"{name} is not used"
    assert len(text.splitlines()) <= 300
    assert text.startswith("// ")


def test_ids_are_unique_and_every_reference_leads_somewhere() -> None:
    found = ids()
    assert len(found) == len(set(found))
    for _, attributes in PAGE.seen:
        for name in ("for", "aria-labelledby", "aria-describedby"):
            assert set((attributes.get(name) or "").split()) <= set(found)
        link = attributes.get("href") or ""
        assert not link.startswith("#") or link[1:] in found
    for script in SCRIPTS:
        asked = re.findall(r'byId\("([\w-]+)"\)', script.read_text(encoding="utf-8"))
        assert set(asked) <= {*found, "records"}, script.name


def test_every_control_has_a_name() -> None:
    labelled = {attributes.get("for") for attributes in PAGE.attributes("label")}
    inside = re.findall(r"<label[^>]*><input[^>]*?(?:id=\"([\w-]+)\"|value=\"(\w+)\")", TEXT)
    held = {first or second for first, second in inside}
    seen = 0
    for tag, attributes in PAGE.seen:
        if tag not in CONTROLS:
            continue
        seen += 1
        name = attributes.get("id") or attributes.get("value")
        text = tag == "button" and re.search(rf'(?:id|value)="{name}"[^>]*>[^<]+</button>', TEXT)
        assert text or {name, attributes.get("value")} & {*labelled, *held}, attributes
    assert seen > 20


def test_headings_and_landmarks() -> None:
    tags = [tag for tag, _ in PAGE.seen]
    assert tags.count("h1") == 1
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h\d", tag)]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    shown = [attributes for attributes in PAGE.attributes("main") if "hidden" not in attributes]
    assert len(shown) == 1
    assert PAGE.attributes("html") == [{"lang": "en", "data-mode": "live"}]
    roles = {attributes.get("role") for _, attributes in PAGE.seen}
    assert {"status", "alert", "dialog"} <= roles


def test_the_ready_prompts() -> None:
    prompts = json.loads((STATIC / "prompts.json").read_text(encoding="utf-8"))
    assert len(prompts) == 3
    for prompt in prompts:
        assert set(prompt) - {"dart"} == {"title", "text", "note"}
        assert all(prompt[name] for name in ("title", "text", "note"))
    assert prompts[0]["dart"] == {"method": "dart", "sparsity": 0.1, "drift": ""}


def colours() -> list[dict[str, str]]:
    """The variables of the light and of the dark palette."""
    text = (STATIC / "base.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    both = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in (light, dark)]
    assert set(both[0]) == set(both[1]) and len(both[0]) > 20
    return both


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("palette", colours(), ids=["light", "dark"])
def test_contrast(palette: dict[str, str]) -> None:
    grounds = ("paper", "raised", "prefill", "observe", "pruned", "released", "wash")
    doubts = [f"doubt-{step}" for step in range(1, 5)]
    pairs = [("ink", ground, 4.5) for ground in (*grounds, *doubts)]
    pairs += [(text, ground, 4.5) for text in ("soft", "accent", "mark") for ground in grounds[:2]]
    pairs += [("on-accent", "accent", 4.5), ("warn", "warn-paper", 4.5), ("soft", "wash", 4.5)]
    pairs += [("edge", ground, 3.0) for ground in grounds[:2]]
    for text, ground, least in pairs:
        assert contrast(palette[text], palette[ground]) >= least, (text, ground)


def test_the_ramp_grows_lighter_all_the_way() -> None:
    text = (STATIC / "colour.js").read_text(encoding="utf-8")
    table = re.search(r"STOPS = \[(.*?)\];", text, re.DOTALL)
    assert table
    stops = [
        [int(part) for part in found] for found in re.findall(r"\[(\d+), (\d+), (\d+)\]", table[1])
    ]
    light = [luminance(f"#{red:02x}{green:02x}{blue:02x}") for red, green, blue in stops]
    assert len(light) == 10
    assert all(after > before for before, after in pairwise(light))
