"""``dart-llm serve``: model, engine, socket, loop.  The only file that imports uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import webbrowser
from collections.abc import Sequence
from socket import SO_ERROR, SOL_SOCKET
from typing import Any

from dart_llm.data.texts import read, subjects
from dart_llm.engine.requests import GenerationRequest, Sampling
from dart_llm.errors import AttachError, ConfigError, MissingExtra
from dart_llm.experiments.study import load_model
from dart_llm.pruning.config import PruneConfig
from dart_llm.reporting.console import Ui
from dart_llm.server.security import HEAD_BYTES
from dart_llm.server.service import ModelFacts, Service
from dart_llm.server.settings import ServeSettings

try:
    import uvicorn
    from h11 import InformationalResponse
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError:
    raise MissingExtra("uvicorn", "serve") from None

BACKLOG = 128
INTERIM = InformationalResponse(status_code=100, headers=[], reason="Continue")
PROBE_SECONDS = 0.1  # between two looks at a client that ended its side
KEPT_ALIVE_SECONDS = 15

TICKS, SILENT_CHECKS = 50, 6
"""Every 5 s; after 30 s a connection that sends no whole head is closed."""

WARM_CHARACTERS, WARM_TOKENS = 400, 4

EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses that are none to connect to, and one that is."""

LAST_SECONDS = 5  # beyond the grace period, for answers that are being sent when the server ends


class Server(uvicorn.Server):
    """uvicorn's server, which stops the model's thread before it waits for open connections."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self._silent: dict[Any, int] = {}
        """Connections without a request in progress, and how often each was found so."""

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; closes connections on which no request comes to its end."""
        if counter % TICKS == 0:
            silent = [one for one in self.server_state.connections if not _busy(one)]
            self._silent = {one: self._silent.get(one, 0) + 1 for one in silent}
            for one in silent:
                if self._silent[one] > SILENT_CHECKS and one.transport is not None:
                    one.transport.close()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """First our own end, in the background: it is what open connections wait for."""
        for server in self.servers:
            server.close()
        ending = asyncio.create_task(asyncio.to_thread(self.service.close))
        await super().shutdown(sockets)
        if self.force_exit:  # a second signal: nobody waits for the running answer
            self.service.worker.hurry()
        await ending


def _busy(connection: Any) -> bool:
    """Whether a request was read on ``connection`` and is not answered yet."""
    cycle = getattr(connection, "cycle", None)
    return cycle is not None and not getattr(cycle, "response_complete", False)


class Connection(H11Protocol):
    """uvicorn's connection, on which a client may end its side and still get its answer.

    Whether it ended its side or went away cannot be seen but by sending: an interim answer
    ("100 Continue", which every client passes over) makes the system of one that went away refuse.
    """

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection where a request came whole and is not answered yet."""
        cycle = self.cycle
        if cycle is None or cycle.more_body or cycle.response_complete:
            return False
        cycle.keep_alive = False
        self._probe()
        return True

    def _probe(self) -> None:
        if self.transport.is_closing() or self.cycle.response_complete:
            return
        if self.transport.get_extra_info("socket").getsockopt(SOL_SOCKET, SO_ERROR):
            self.transport.abort()
            return
        if not self.cycle.response_started:
            self.transport.write(self.conn.send(INTERIM))
        self.loop.call_later(PROBE_SECONDS, self._probe)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; raises ``ConfigError`` when the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}, port {port}: {error.strerror or error}; "
            "--port 0 takes a free port"
        ) from None
    return found


def link(settings: ServeSettings, listening: socket.socket) -> str:
    """The address of the page; of a server that listens at every address, this machine's own."""
    port = listening.getsockname()[1]
    host = EVERYWHERE.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}/"


def note_chats(ui: Ui, tokenizer: Any, config: Any) -> None:
    """Say, before weights are read, that a model cannot answer conversations."""
    if not getattr(tokenizer, "chat_template", None):
        ui.say(
            "note: this model has no chat template, so the page and /v1/chat/completions cannot "
            'answer; use /v1/completions, or dart-llm run --prompt "..."'
        )


def serve(settings: ServeSettings, ui: Ui) -> None:
    """Serve until SIGINT or SIGTERM; the model is detached at the end."""
    from dart_llm.engine.engine import Engine
    from dart_llm.server.app import build

    listening = bind(settings.host, settings.port)
    try:
        model, tokenizer, _ = load_model(settings, ui, lambda *given: note_chats(ui, *given))
        engine = Engine(
            model,
            tokenizer,
            conversations=settings.conversations,
            executor=settings.executor or "auto",
            calibration=settings.calibration,
            cache_dir=settings.cache_dir,
            say=ui.say,
        )
        try:
            configs = [
                config for config in settings.configs() if config.target > 0 or config.screens
            ]
            for config in configs:
                with ui.status(f"making {config.method} ready"):
                    engine.prepare(config)
            with ui.status("generating the first tokens"):
                facts = ModelFacts.of(model, settings.model)
                service = Service(engine, tokenizer, facts, settings)
                context = service.facts.context
                service.worker.start(lambda: warm(engine, tokenizer, configs, context))
            page = link(settings, listening)
            ui.say(f"serving {service.facts.name} at {page} (Ctrl-C ends)")
            if settings.open:  # some browsers return only when they are closed
                threading.Thread(target=webbrowser.open, args=(page,), daemon=True).start()
            server = Server(server_config(build(service), settings), service)
            with contextlib.suppress(KeyboardInterrupt):  # uvicorn hands the signal on at the end
                server.run(sockets=[listening])
        finally:
            with contextlib.suppress(AttachError):  # an answer that does not end keeps its model
                engine.close()
    finally:
        listening.close()
    ui.say("ended")


def warm(
    engine: Any, tokenizer: Any, configs: Sequence[PruneConfig], context: int | None = None
) -> None:
    """A few tokens dense and by every method: what is made once is made before the first request.

    In the model's own thread, whose pool of OpenMP threads begins with it.
    """
    ids = tuple(tokenizer(read(subjects()[0])[:WARM_CHARACTERS], verbose=False).input_ids)
    if context is not None:
        ids = ids[: max(1, context - WARM_TOKENS)]
    for config in (None, *configs):
        engine.run(GenerationRequest(ids, Sampling(max_tokens=WARM_TOKENS), config))


def server_config(application: Any, settings: ServeSettings) -> uvicorn.Config:
    """How uvicorn serves: no log of its own, no header that names it, no trust in proxies."""
    return uvicorn.Config(
        application,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        http=Connection,  # by h11, which bounds the head of a request, as httptools does not
        h11_max_incomplete_event_size=HEAD_BYTES,
        timeout_keep_alive=KEPT_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(settings.grace) + LAST_SECONDS,
    )
