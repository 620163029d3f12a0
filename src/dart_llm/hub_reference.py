"""The syntax that names any data set of the hub: ``hub:owner/name/configuration:split:column``.

::

    hub:owner/name:test:text                    the text column of the test split, all rows
    hub:owner/name/en:validation[:500]:text     configuration en, the first 500 rows, streamed
    hub:owner/name:test:article:abstract        documents and their summaries (summarize)

Nothing is guessed: the split and the column are always written out.
"""

from __future__ import annotations

import re

from dart_llm.catalogue import DataSet, columns
from dart_llm.errors import ConfigError

PREFIX = "hub:"
EXAMPLES = {
    ("text",): "hub:Salesforce/wikitext/wikitext-2-raw-v1:test:text",
    ("document", "summary"): "hub:EdinburghNLP/xsum:test:document:summary",
}
"""By the roles that the columns of a reference have."""

_PART = r"[^/:\[\]\s]+"
_PATTERN = re.compile(
    rf"hub:(?P<id>{_PART}/{_PART})(?:/(?P<config>[^:]+))?"
    rf":(?P<split>{_PART})(?:\[:(?P<first>\d+)\])?(?P<columns>(?::[^:]+)+)"
)


def is_reference(name: str) -> bool:
    """Whether ``name`` means a data set of the hub rather than a name or a path."""
    return name.startswith(PREFIX)


def parse(name: str, roles: tuple[str, ...] = ("text",)) -> DataSet:
    """The data set that ``name`` refers to, with one column for each of ``roles``.

    Raises ``ConfigError``, with an example, for anything but the syntax above.
    """
    found = _PATTERN.fullmatch(name)
    given = found["columns"][1:].split(":") if found else []
    if not found or len(given) != len(roles) or found["first"] == "0":
        wanted = " and one for the ".join(roles)
        raise ConfigError(
            f'"{name}" is not a data set of the hub with a column for the {wanted}: write '
            f"hub:owner/name[/configuration]:split:{':'.join(f'{role}-column' for role in roles)}, "
            f"e.g. {EXAMPLES.get(roles, EXAMPLES['text',])}"
        )
    return DataSet(
        name,
        found["id"],
        found["config"],
        found["split"],
        columns(**dict(zip(roles, given, strict=True))),
        uses=(),
        first=int(found["first"]) if found["first"] else None,
    )
