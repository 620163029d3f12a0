"""A recording as one HTML file: the window's own page, scripts and styles, and the records.

The file asks nothing of anybody: a Content-Security-Policy in it allows its own script and style by
their hashes, and no connection.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from importlib.resources import files

from dart_llm.replay_records import Record
from dart_llm.results import page_json

ENTRY = "main.js"
IMPORT = re.compile(r'^import \{ ([^}]*) \} from "\./(\w+\.js)";\n', re.MULTILINE)
EXPORT = re.compile(r"^export ((?:async )?function\*?|class|const) (\w+)", re.MULTILINE)
STYLE = re.compile(r'<link rel="stylesheet" href="/static/(\w+\.css)">\n')
LINKS = re.compile(r'<(?:link rel="icon"|script type="module")[^>]*>(?:</script>)?\n')


def page(records: Sequence[Record]) -> str:
    """The whole page, which plays ``records`` without a model."""
    text = _static("index.html")
    style = "\n".join(_static(name) for name in STYLE.findall(text))
    script = bundle(ENTRY)
    text = LINKS.sub("", STYLE.sub("", text)).replace('data-mode="live"', 'data-mode="replay"')
    model = html.escape(str(records[0].get("model") or records[0]["method"]))
    text = text.replace("<title>DART for LLMs</title>", f"<title>DART for LLMs: {model}</title>")
    policy = _policy(script, style)
    text = text.replace("</head>\n", f"{policy}<style>{style}</style>\n</head>\n")
    data = page_json(list(records))
    return text.replace(
        "</body>\n",
        f'<script type="application/json" id="records">{data}</script>\n'
        f'<script type="module">{script}</script>\n</body>\n',
    )


def bundle(entry: str) -> str:
    """The module ``entry`` and all that it imports, each in a scope of its own, in one script."""
    order: list[str] = []
    _visit(entry, order, ())
    return "\n".join(_scoped(name) for name in order)


def _visit(name: str, order: list[str], inside: tuple[str, ...]) -> None:
    assert name not in inside, f"the page's modules import each other: {(*inside, name)}"
    if name in order:
        return
    for _, other in IMPORT.findall(_static(name)):
        _visit(other, order, (*inside, name))
    order.append(name)


def _scoped(name: str) -> str:
    text = _static(name)
    names = [found for _, found in EXPORT.findall(text)]
    text = IMPORT.sub(lambda found: f"const {{ {found[1]} }} = {_variable(found[2])};\n", text)
    text = EXPORT.sub(r"\1 \2", text)
    left = re.search(r"^(?:import|export)\b", text, re.MULTILINE)
    assert left is None, f"{name}: an import or export in a form that is not bundled"
    return f"const {_variable(name)} = (() => {{\n{text}\nreturn {{ {', '.join(names)} }};\n}})();"


def _variable(name: str) -> str:
    return f"module_{name.removesuffix('.js')}"


def _static(name: str) -> str:
    return (files("dart_llm") / "static" / name).read_text(encoding="utf-8")


def _policy(script: str, style: str) -> str:
    allowed = f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'"
    policy = f"{allowed}; base-uri 'none'; form-action 'none'"
    return f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
