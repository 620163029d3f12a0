"""Every route of the server, and how ``/openapi.json`` describes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from dart_llm.serve_errors import TYPES
from dart_llm.serve_schemas import ChatBody, CompletionBody

REFERENCE = "#/components/schemas/{model}"


@dataclass(frozen=True)
class Route:
    """One address.  ``body``: what it is sent; ``answers``: media type of the 200."""

    method: str
    path: str
    handler: str
    body: type[BaseModel] | None = None
    answers: tuple[str, ...] = ("application/json",)
    described: bool = True


JSON, EVENTS = "application/json", "text/event-stream"

ROUTES = (
    Route("GET", "/v1/models", "models"),
    Route("GET", "/v1/models/{name:path}", "model"),
    Route("POST", "/v1/chat/completions", "chat", ChatBody, (JSON, EVENTS)),
    Route("POST", "/v1/completions", "completion", CompletionBody, (JSON, EVENTS)),
    Route("POST", "/api/events", "ask_events", ChatBody, (EVENTS,)),
    Route("GET", "/api/events", "watch_events", answers=(EVENTS,), described=False),
    Route("GET", "/api/methods", "methods"),
    Route("GET", "/api/prompts", "prompts"),
    Route("GET", "/api/runs", "runs"),
    Route("GET", "/api/runs/{name:path}", "run"),
    Route("GET", "/healthz", "health"),
    Route("GET", "/metrics", "metrics", answers=("text/plain",)),
    Route("GET", "/", "page", answers=("text/html",), described=False),
    Route("GET", "/static/{name:path}", "static", answers=("*/*",), described=False),
)
"""All of them; ``/openapi.json`` is the framework's own."""

REFUSALS = {
    "GET": (403, 404, 429, 503),
    "POST": (400, 403, 404, 408, 413, 415, 429, 503),
}


def operation(route: Route) -> dict[str, Any]:
    """What the framework cannot know of a route: its body, and its answers."""
    refusal = {"application/json": {"schema": {"$ref": REFERENCE.format(model="Error")}}}
    found: dict[str, Any] = {
        "responses": {
            "200": {"description": "OK", "content": {kind: {} for kind in route.answers}},
            "401": {"description": "no API key, or a wrong one", "content": refusal},
            **{
                str(status): {"description": TYPES[status], "content": refusal}
                for status in REFUSALS[route.method]
            },
        }
    }
    if route.body is not None:
        schema = {"$ref": REFERENCE.format(model=route.body.__name__)}
        found["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    return found


def components() -> dict[str, Any]:
    """The schemas that ``operation`` refers to."""
    _, bodies = models_json_schema(
        [(ChatBody, "validation"), (CompletionBody, "validation")], ref_template=REFERENCE
    )
    text = {"type": ["string", "null"]}
    error = {
        "type": "object",
        "required": ["message", "type", "param", "code"],
        "properties": {
            "message": {"type": "string"},
            "type": {"enum": sorted(set(TYPES.values()))},
            "param": text,
            "code": text,
        },
    }
    return {
        **bodies["$defs"],
        "Error": {"type": "object", "required": ["error"], "properties": {"error": error}},
    }
