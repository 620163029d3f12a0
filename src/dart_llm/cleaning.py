"""Documents and reference summaries as plain text, whatever form a data set keeps them in."""

from __future__ import annotations

import ast
from typing import Any

SEPARATOR = "|||||"
"""Multi-News writes this between (and after) the articles of one document."""

NEWLINE = "NEWLINE_CHAR"
"""Multi-News writes this for a line break inside an article."""


def reference(value: Any) -> str:
    """A reference summary; a list of sentences becomes its sentences, one a line.

    A string that is a printed list (``"['One.', 'Two.']"``) is read back first: scored as it is,
    its brackets and quotes would count as text.  Returns "" when there is no summary.
    """
    if isinstance(value, str):
        printed = _printed_list(value)
        value = value if printed is None else printed
    if isinstance(value, list | tuple):
        parts = (reference(part) for part in value)
        return "\n".join(part for part in parts if part)
    return str(value).strip() if isinstance(value, str) else ""


def multi_news(text: str) -> str:
    """A document of Multi-News: its articles separated by blank lines, without its markers."""
    articles = (article.strip() for article in text.replace(NEWLINE, "\n").split(SEPARATOR))
    return "\n\n".join(article for article in articles if article)


def multi_news_summary(text: str) -> str:
    """A summary of Multi-News without the dash that each of them begins with."""
    return text.lstrip("–— \n")


def _printed_list(text: str) -> list[str] | None:
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return None
    try:
        value = ast.literal_eval(stripped)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    strings = isinstance(value, list) and all(isinstance(part, str) for part in value)
    return value if strings else None
