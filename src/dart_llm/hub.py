"""The Hugging Face hub: error messages without secrets, download sizes and progress bars."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from dart_llm.cache import require_space
from dart_llm.errors import LoadError, chain

logger = logging.getLogger("dart_llm")

# transformers' progress bars are shown only on a terminal, and only on request.


@contextmanager
def bars(*, shown: bool) -> Iterator[None]:
    """Hide transformers' progress bars in the block, unless ``shown`` and stderr is a terminal."""
    from transformers.utils import logging

    switch: Any = logging
    if (shown and sys.stderr.isatty()) or not switch.is_progress_bar_enabled():
        yield
        return
    switch.disable_progress_bar()
    try:
        yield
    finally:
        switch.enable_progress_bar()


@contextmanager
def no_stray_bars() -> Iterator[None]:
    """Inside a ``bars`` block that hides bars, also hide bars that transformers cannot switch off.

    transformers' GGUF reader has such a bar.  Log records still appear, because log handlers keep
    the stream that they were created with.
    """
    from transformers.utils import logging

    switch: Any = logging
    with nullcontext() if switch.is_progress_bar_enabled() else redirect_stderr(io.StringIO()):
        yield


INSTEAD = "give a local folder, a .gguf file or smollm2-135m"
"""The suggestion in messages if the hub cannot be reached."""

UNREACHABLE = {
    *("ConnectError", "ConnectTimeout", "ConnectionError", "LocalEntryNotFoundError"),
    *("NameResolutionError", "PoolTimeout", "ProxyError", "SSLError"),
}
"""Names of exception classes that mean that the hub is unreachable."""

_CUT_OFF = {"ChunkedEncodingError", "ReadError", "ReadTimeout", "RemoteProtocolError"}
"""Names of exception classes that mean that a download was cut off."""


def hub_failure(
    error: BaseException, model: str, revision: str | None, instead: str = INSTEAD
) -> LoadError | None:
    """Return a ``LoadError`` that explains ``error``, raised while loading ``model`` from the hub.

    ``instead``: what to suggest if the hub cannot be reached.  Returns None if no cause of the
    error comes from the hub or the network.
    """
    from huggingface_hub import constants

    causes = list(chain(error))
    names = {base.__name__ for cause in causes for base in type(cause).__mro__}
    text = " ".join(str(cause) for cause in causes)
    responses = (getattr(getattr(cause, "response", None), "status_code", None) for cause in causes)
    status = next((code for code in responses if isinstance(code, int)), 0)
    login = "run `hf auth login` or set HF_TOKEN"
    failures: tuple[tuple[bool, str], ...] = (
        (
            "Invalid credentials in Authorization header" in text,
            f"the hub refused the access token while loading {model}; run `hf auth login` again "
            "or correct HF_TOKEN",
        ),
        (
            "GatedRepoError" in names or status == 403,
            f"{model} is gated: accept the licence on {constants.ENDPOINT}/{model}, then {login}",
        ),
        (
            "RevisionNotFoundError" in names,
            f"{model} has no revision {revision!r} on the hub; check --revision",
        ),
        (
            "RepositoryNotFoundError" in names or status == 401,
            f"the hub has no model {model!r} that you may read; check the name, and if it is "
            f"private {login}",
        ),
        (status == 429, f"the hub limits requests for {model}; wait a few minutes and retry"),
        (
            status >= 500,
            f"the hub answered {status} while loading {model}; try again later, or {instead}",
        ),
        (
            bool(names & _CUT_OFF) or "Consistency check failed" in text,
            f"the download of {model} was cut off; run the same command again to continue it",
        ),
        (
            bool(names & UNREACHABLE) or "couldn't connect to" in text.lower(),
            not_reached(model, instead),
        ),
    )
    return next((LoadError(message) for applies, message in failures if applies), None)


def not_reached(model: str, instead: str = INSTEAD) -> str:
    """Return the message for a model that is not in the cache while the hub is unreachable."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        reason = "is not in the hub's cache and HF_HUB_OFFLINE is set; unset it to download"
        return f"{model} {reason}, or {instead}"
    reason = f"the hub at {constants.ENDPOINT} could not be reached to load {model}"
    return f"{reason}; check the network, or {instead}"


def plain(error: BaseException) -> str:
    """Return the first line of an error's message without secrets, to use in another message."""
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return redact(first).rstrip(".")


def redact(text: str) -> str:
    """Return ``text`` without access tokens and without credentials in URLs."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    text = re.sub(r"\bhf_[A-Za-z0-9]{6,}", "***", text)
    return re.sub(r"(\w+://)[^/\s@]+@", r"\1***@", text)


TIMEOUT = 10.0
"""Seconds to wait for the hub to report file sizes; without an answer, space is not checked."""

_WEIGHTS = (
    r"model\.safetensors",
    r"model-\d+-of-\d+\.safetensors",
    r"pytorch_model\.bin",
    r"pytorch_model-\d+-of-\d+\.bin",
)


def weight_files(names: Iterable[str]) -> list[str]:
    """Return the weight files that transformers downloads: those of the first format present."""
    listed = list(names)
    by_kind = ([name for name in listed if re.fullmatch(kind, name)] for kind in _WEIGHTS)
    return next(filter(None, by_kind), [])


def check_download(model: str, revision: str | None, cache: Path | None) -> int | None:
    """Return how many bytes of weights of ``model`` must still be downloaded.

    Raises ``LoadError`` if fewer bytes are free on the disk, or if the repository has no
    transformers checkpoint.  Returns None if the hub is unreachable, so that only the cache can be
    used.  Returns 0 after any other failure, which loading will report.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        info = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=TIMEOUT)
    except Exception as error:
        logger.debug("no sizes for %s: %s", model, type(error).__name__)
        names = {base.__name__ for base in type(error).__mro__}
        return None if names & UNREACHABLE else 0
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if "config.json" not in sizes:
        raise LoadError(
            f"{model} has no transformers checkpoint (no config.json); if it has a .gguf file, "
            "download that and give its path"
        )
    needed = sum(
        sizes[name]
        for name in weight_files(sizes)
        if not isinstance(try_to_load_from_cache(model, name, cache, info.sha), str)
    )
    require_space(needed, cache or Path(constants.HF_HUB_CACHE), f"the download of {model}")
    return needed
