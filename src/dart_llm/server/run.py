"""``dart-llm serve``: loads the model and runs the server.  The only file that imports uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import webbrowser
from collections.abc import Sequence
from typing import Any

from dart_llm.data.texts import read, subjects
from dart_llm.engine.requests import GenerationRequest, Sampling
from dart_llm.errors import AttachError, ConfigError, MissingExtra
from dart_llm.experiments.study import load_model
from dart_llm.pruning.config import PruneConfig
from dart_llm.reporting.console import Ui
from dart_llm.server.service import ModelFacts, Service
from dart_llm.server.settings import ServeSettings

try:
    import uvicorn
except ImportError:
    raise MissingExtra("uvicorn", "serve") from None

CONNECTIONS = 512  # maximum number of simultaneous connections; others get status 503
KEEP_ALIVE_SECONDS = 15  # an idle connection is closed after this time

WARM_CHARACTERS, WARM_TOKENS = 400, 4  # warm-up: characters in the prompt, tokens in the answer

LAST_SECONDS = 5  # further seconds, after the grace period, to send the last bytes of answers


class Server(uvicorn.Server):
    """A uvicorn server that also stops the model's thread at shutdown."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the sockets and stop the service.

        Meanwhile, open connections receive the last bytes of their answers.
        """
        for server in self.servers:
            server.close()
        ending = asyncio.create_task(asyncio.to_thread(self.service.close))
        await super().shutdown(sockets)
        await ending


def bind(host: str, port: int) -> socket.socket:
    """Open a listening socket; raises ``ConfigError`` if the address is not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise ConfigError(
            f"cannot listen at {host}, port {port}: {reason}; --port 0 selects a free port"
        ) from None


def page_address(settings: ServeSettings, listening: socket.socket) -> str:
    """The window's URL for a browser on this machine."""
    loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # for servers that listen at all addresses
    host = loopback.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{listening.getsockname()[1]}/"


def serve(settings: ServeSettings, ui: Ui) -> None:
    """Load the model and serve it until SIGINT or SIGTERM; then close the engine."""
    from dart_llm.engine.engine import Engine
    from dart_llm.server.app import build

    with contextlib.closing(bind(settings.host, settings.port)) as listening:
        model, tokenizer, _ = load_model(settings, ui)
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
                with ui.status(f"preparing {config.method}"):
                    engine.prepare(config)
            with ui.status("generating the first tokens"):
                facts = ModelFacts.from_model(model, settings.model)
                service = Service(engine, tokenizer, facts, settings)
                service.worker.start(lambda: warm_up(engine, tokenizer, configs, facts.context))
            page = page_address(settings, listening)
            ui.say(f"serving {facts.name} at {page} (Ctrl-C ends)")
            if settings.open:  # in a thread, because the call can block until the browser is closed
                threading.Thread(target=webbrowser.open, args=(page,), daemon=True).start()
            server = Server(server_config(build(service), settings), service)
            with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again
                server.run(sockets=[listening])
        finally:
            with contextlib.suppress(AttachError):  # raised if an answer still runs on the model
                engine.close()
    ui.say("ended")


def warm_up(
    engine: Any, tokenizer: Any, configs: Sequence[PruneConfig], context: int | None = None
) -> None:
    """Generate a few tokens, dense and with every configuration, to make the first requests fast.

    This must run in the model's thread, so that OpenMP creates its thread pool there.
    """
    ids = tuple(tokenizer(read(subjects()[0])[:WARM_CHARACTERS], verbose=False).input_ids)
    if context is not None:
        ids = ids[: max(1, context - WARM_TOKENS)]
    for config in (None, *configs):
        engine.run(GenerationRequest(ids, Sampling(max_tokens=WARM_TOKENS), config))


def server_config(application: Any, settings: ServeSettings) -> uvicorn.Config:
    """The configuration of uvicorn: no log, no ``server`` header, no trust in proxy headers."""
    return uvicorn.Config(
        application,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        http="h11",  # unlike httptools, it limits the headers of a request to 64 KiB
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(settings.grace) + LAST_SECONDS,
    )
