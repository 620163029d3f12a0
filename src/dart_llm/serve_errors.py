"""Why the server refuses a request, in the shape that OpenAI's clients read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}
"""``error.type`` of each status that the server answers with."""


class Refusal(Exception):
    """A request that gets no answer: an HTTP status and one sentence for the client.

    ``param``: the field that is wrong; ``code``: a word for programs, of a 400 ``invalid_value``
    unless another is given; ``retry_after``: seconds; ``allow``: the methods that an address takes.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        allow: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or ("invalid_value" if status == 400 else None)
        self.retry_after = retry_after
        self.allow = allow

    def to_dict(self) -> dict[str, Any]:
        """``{"error": {message, type, param, code}}``."""
        return {
            "error": {
                "message": self.message,
                "type": TYPES[self.status],
                "param": self.param,
                "code": self.code,
            }
        }

    def body(self) -> bytes:
        """``to_dict`` as JSON."""
        return json.dumps(self.to_dict()).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What the answer carries beside its body's type and length."""
        found = []
        if self.retry_after is not None:
            found.append((b"retry-after", str(self.retry_after).encode()))
        if self.allow:
            found.append((b"allow", ", ".join(self.allow).encode()))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        if self.status in (408, 413):  # the rest of the body is not read
            found.append((b"connection", b"close"))
        return found


def internal(request_id: str) -> Refusal:
    """What a client is told of a fault of ours: the number under which the log has it."""
    return Refusal(
        500,
        f"the server failed on this request; its log says more under {request_id}",
        code="internal_error",
    )
