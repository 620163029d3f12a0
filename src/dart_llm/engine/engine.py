"""``Engine`` patches a model once, and answers many requests with it, each dense or pruned.

>>> from dart_llm.engine import Ask, Engine, Sampling            # doctest: +SKIP
>>> engine = Engine(model, tokenizer)                            # doctest: +SKIP
>>> ids = tuple(tokenizer("The sky is").input_ids)               # doctest: +SKIP
>>> answer = engine.run(Ask(ids, Sampling(max_tokens=20)))       # doctest: +SKIP
>>> print(answer.texts[0], answer.report)                        # doctest: +SKIP
>>> engine.close()                                               # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from dart_llm.engine.host import Conversation, PatchHost
from dart_llm.engine.request import Emit, Pieces, Request
from dart_llm.engine.requests import Failed, GenerationRequest, GenerationResult
from dart_llm.errors import AttachError, DartError
from dart_llm.pruning.config import PruneConfig

logger = logging.getLogger("dart_llm")


class Engine(contextlib.AbstractContextManager["Engine"]):
    """Answers requests with one model, one request at a time.

    Use it as a context manager, or call ``close`` at the end.

    ``conversations``: maximum number of conversations whose cache is kept; beyond it, the least
    recently used conversation is dropped.  ``executor``: name of the executor that runs the pruned
    FFNs of all requests, as in ``PruneConfig``.  ``calibration``: text for methods that need a
    calibration text, such as ``wanda``; None: C4 from the hub.  ``cache_dir``: folder of cached
    statistics; None: the default folder.  ``say`` is called with progress lines while a method
    calibrates.

    Raises ``AttachError`` if the model is already being pruned, and ``UnsupportedModel`` or
    ``ConfigError`` if it cannot be pruned.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        conversations: int = 4,
        executor: str = "auto",
        calibration: str | None = None,
        cache_dir: str | None = None,
        say: Callable[[str], None] = logger.info,
    ) -> None:
        self._lock = threading.Lock()
        self._host = PatchHost(model, tokenizer, executor, calibration, cache_dir, say)
        self._pieces = Pieces(tokenizer)
        self._ends = _end_tokens(model, tokenizer)
        self._limit = conversations
        self._conversations = OrderedDict[str, Conversation]()
        """Conversations by name; the most recently used is last."""
        self._closed = False

    @property
    def executor(self) -> str:
        """Name of the executor that runs pruned FFNs."""
        return self._host.executor

    def prepare(self, config: PruneConfig | None) -> None:
        """Compute the statistics that ``config`` needs, so that no request has to wait for them.

        Raises ``ConfigError`` for settings that this model does not support, ``LoadError`` if the
        calibration text cannot be loaded, ``AttachError`` while a request is running.
        """
        with self._exclusive():
            method = self._host.bind(config)
            try:
                self._host.serve(method.controller())
            finally:
                self._host.rest()

    def run(
        self,
        ask: GenerationRequest,
        emit: Emit = lambda record: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> GenerationResult:
        """Answer one request.

        ``emit`` is called with every record, in this thread.  ``cancelled`` is called after every
        token, and between chunks of a long prompt; if it returns True, generation stops.
        Afterwards, even after an error, the model keeps nothing of the request.  If the request
        names a conversation, the engine keeps the conversation, unless an error was raised.

        Raises ``ConfigError`` for a request that cannot be served, ``AttachError`` while another
        request is running.
        """
        with self._exclusive():
            method = self._host.bind(ask.config)
            name = ask.id or uuid.uuid4().hex
            request = Request(self._host, method, ask, self._pieces, name, self._ends)
            earlier = self._conversations.pop(ask.conversation or "", None)
            if earlier is not None and not earlier.continues(method.settings, ask.ids):
                earlier = None
            try:
                result = request.run(earlier, emit, cancelled)
                conversation = None if ask.conversation is None else request.conversation()
            except BaseException as error:
                message = str(error) if isinstance(error, DartError) else "the request failed"
                with contextlib.suppress(Exception):
                    emit(Failed(name, message))
                raise
            finally:
                request.release()
                self._host.rest()
            if ask.conversation is not None and conversation is not None:
                self._conversations[ask.conversation] = conversation
                while len(self._conversations) > self._limit:
                    self._conversations.popitem(last=False)
            emit(result)
            trim_heap()
            return result

    def forget(self, conversation: str) -> None:
        """Drop the conversation with this name, if there is one."""
        with self._exclusive():
            self._conversations.pop(conversation, None)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise AttachError("this engine is answering another request: wait until it has ended")
        try:
            if self._closed:
                raise AttachError("this engine is closed: create another one")
            yield
        finally:
            self._lock.release()

    def close(self) -> None:
        """Detach from the model, which is then exactly as it was before.  Safe to call twice."""
        if self._closed:
            return
        with self._exclusive():
            self._closed = True
            self._conversations.clear()
            self._host.patch.remove()

    def __exit__(self, *error: object) -> None:
        self.close()


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the ids of end tokens: from the generation settings, or else from the tokenizer."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = getattr(tokenizer, "eos_token_id", None) if ends is None else ends
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def trim_heap() -> None:
    """Return freed memory to the system, if the C library supports it.

    glibc keeps large freed blocks that lie between small used blocks, so the process would grow
    even though every request frees its memory.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # the C library is not glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
