"""One model, attached once, that answers many requests: dense ones and pruned ones in turn.

>>> from dart_llm.engine.engine import Ask, Engine, Sampling            # doctest: +SKIP
>>> engine = Engine(model, tokenizer)                            # doctest: +SKIP
>>> ids = tuple(tokenizer("The sky is").input_ids)               # doctest: +SKIP
>>> answer = engine.run(Ask(ids, Sampling(max_tokens=20)))       # doctest: +SKIP
>>> print(answer.texts[0], answer.report)                        # doctest: +SKIP
>>> engine.close()                                               # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from dart_llm.engine.decoding import Pieces
from dart_llm.engine.events import Done, Failed, Record
from dart_llm.engine.host import Conversation, ConversationCache, PatchHost, trim_heap
from dart_llm.engine.request import Emit, Request
from dart_llm.engine.requests import GenerationRequest, GenerationResult
from dart_llm.errors import AttachError, DartError
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.run import MethodOnModel

logger = logging.getLogger("dart_llm")


def nobody(record: Record) -> None:
    """Takes records that nobody wants."""


def never() -> bool:
    """A request that nobody cancels."""
    return False


class Engine(contextlib.AbstractContextManager["Engine"]):
    """Answers requests on one model, one at a time; use it as a context manager, or ``close`` it.

    ``conversations``: how many named ones are kept, those used last, shared fairly between the
    owners that requests name.  ``executor``: what runs the
    pruned FFNs of all requests, as in ``PruneConfig``.  ``calibration``: the text that static
    methods learn from.  ``cache_dir``: where what is learnt is kept.  ``say`` is called with a line
    while something is learnt.

    Raises ``AttachError`` for a model that is being pruned, ``UnsupportedModel`` and
    ``ConfigError`` for one that cannot be.
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
        self._ends = _ends(model, tokenizer)
        self._kept = ConversationCache(conversations)
        self._closed = False

    @property
    def executor(self) -> str:
        """What runs the pruned FFNs."""
        return self._host.executor

    def prepare(self, config: PruneConfig | None) -> None:
        """Learn, calibrate or copy what ``config`` needs, so that no request waits for it.

        Raises ``ConfigError`` for what cannot run on this model, ``LoadError`` for a calibration
        text that cannot be had, ``AttachError`` while a request runs.
        """
        with self._alone():
            ready = self._host.ready(config)
            try:
                self._host.serve(ready.controller())
            finally:
                self._host.rest()

    def run(
        self, ask: GenerationRequest, emit: Emit = nobody, cancelled: Callable[[], bool] = never
    ) -> GenerationResult:
        """Answer one request.

        ``emit`` is called with every record, in this thread; ``cancelled`` is asked after every
        token, and between pieces of a long prompt.  Whatever happens, nothing of the request is
        left on the model afterwards; a conversation is kept unless an error was raised.

        Raises ``ConfigError`` for a request that cannot be served, ``AttachError`` while another
        one runs.
        """
        with self._alone():
            ready = self._host.ready(ask.config)
            name = ask.id or uuid.uuid4().hex
            request = Request(self._host, ready, ask, self._pieces, name, self._ends)
            going_on = self._conversation(ask, ready)
            try:
                answer = request.run(going_on, emit, cancelled)
                kept = None if ask.conversation is None else request.keep()
            except BaseException as error:
                with contextlib.suppress(Exception):
                    known = isinstance(error, DartError)
                    emit(Failed(name, str(error) if known else "the request failed"))
                raise
            finally:
                request.let_go()
                self._host.rest()
            if ask.conversation is not None and kept is not None:
                self._kept.put(ask.conversation, kept, ask.owner)
            told = (answer.id, answer.finish, answer.texts, answer.usage, answer.timings)
            emit(Done(*told, answer.report))
            trim_heap()
            return answer

    def _conversation(self, ask: GenerationRequest, ready: MethodOnModel) -> Conversation | None:
        """What ``ask`` goes on from; what was kept under its name is given up otherwise."""
        found = self._kept.take(ask.conversation)
        if found is None or found.ready.config != ready.config or not found.shared(ask.ids):
            return None
        return found

    def forget(self, conversation: str) -> None:
        """Drop what is kept of a conversation, if anything is."""
        with self._alone():
            self._kept.take(conversation)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise AttachError("this engine is answering another request: wait until it has ended")
        try:
            if self._closed:
                raise AttachError("this engine is closed: make another one")
            yield
        finally:
            self._lock.release()

    def close(self) -> None:
        """Detach: the model is exactly what it was.  Safe to call twice."""
        if self._closed:
            return
        with self._alone():
            self._closed = True
            self._kept.clear()
            self._host.close()

    def __exit__(self, *error: object) -> None:
        self.close()


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: those of ``generate``, else the tokenizer's own."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = getattr(tokenizer, "eos_token_id", None)
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)
