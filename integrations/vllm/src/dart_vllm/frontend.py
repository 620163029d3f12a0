"""What happens to a request before the engine sees it; an entry point that vLLM loads everywhere.

``register`` extends vLLM's ``InputProcessor``, in which every request is validated:

- a bad value is an error of this request alone (status 400 from the server);
- a request that asks for pruning is refused if this engine cannot prune, not answered dense;
- a pruned request neither reads the prefix cache, whose tokens would leave no evidence, nor leaves
  blocks there that a request with other settings could read.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from dart_llm.errors import ConfigError, DartError
from dart_vllm.report import count_request, share_metrics
from dart_vllm.settings import PREFIX, Asked, Requests, ServerSettings, shapes_of

WORKER = "dart_vllm.Worker"
SALT = f"dart-{secrets.token_hex(8)}-"
"""Part of the key of all blocks that pruned requests leave in the prefix cache.

No request can name it, so that a dense request never reads them.
"""

_MARK = "_dart_vllm"


def register() -> None:
    """Extend vLLM in this process; called again, it does nothing."""
    if is_registered():
        return
    share_metrics()
    _check_engines()
    _check_requests()
    _refuse_beam_search()


def is_registered() -> bool:
    """Whether ``register`` has run in this process."""
    from vllm.v1.engine.input_processor import InputProcessor

    return hasattr(InputProcessor.process_inputs, _MARK)


def _check_engines() -> None:
    """Read the server's settings when an engine starts; refuse those that nothing would follow."""
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.__init__

    @functools.wraps(original)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        setattr(self, _MARK, requests_of(vllm_config))
        original(self, vllm_config, *args, **kwargs)

    InputProcessor.__init__ = init


def _check_requests() -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs

    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        try:
            asked = _asked(getattr(self, _MARK), request.sampling_params)
            if asked is not None:
                _prepare(request)
        except DartError as error:
            raise VLLMValidationError(str(error)) from None  # the server answers with status 400
        if asked is not None:
            count_request(asked.config.method if asked.shared is None else "shared")
        return request

    setattr(process_inputs, _MARK, True)
    InputProcessor.process_inputs = process_inputs


def is_pruning_worker(worker_cls: object) -> bool:
    """Whether vLLM's ``worker_cls`` is this package's worker, as a name or as a class."""
    name = worker_cls if isinstance(worker_cls, str) else getattr(worker_cls, "__module__", "")
    return name.startswith("dart_vllm.")


def requests_of(config: Any) -> Requests | None:
    """What reads the requests of an engine; None for an engine that cannot prune.

    Raises ``ConfigError`` if such an engine has settings of this package.
    """
    additional = config.additional_config
    if is_pruning_worker(config.parallel_config.worker_cls):
        settings = ServerSettings.from_additional_config(additional)
        text = config.model_config.hf_text_config
        return Requests(settings, shapes_of(text), text.model_type)
    if isinstance(additional, Mapping) and PREFIX in additional:
        raise ConfigError(
            f"additional_config has settings for {PREFIX}, but this engine cannot prune; start it "
            f"with --worker-cls {WORKER}"
        )
    return None


def _asked(requests: Requests | None, sampling: Any) -> Asked | None:
    """What a request asks for; None if it is dense, or no generation."""
    if sampling is None:
        return None
    extra = sampling.extra_args or {}
    if requests is not None:
        return requests.read(extra)
    names = [key for key in extra if key.startswith(PREFIX)]
    if names:
        raise ConfigError(
            f"{', '.join(names)}: this engine cannot prune; start it with --worker-cls {WORKER}"
        )
    return None


def _prepare(request: Any) -> None:
    """Keep a pruned request apart from the prefix cache; refuse what cannot be pruned."""
    if request.resumable:
        raise ConfigError("a request whose input is streamed cannot be pruned: send it whole")
    if request.prompt_embeds is not None:
        raise ConfigError("a request of embeddings cannot be pruned: send text or token ids")
    if request.mm_features:
        raise ConfigError("a request with images or sound cannot be pruned: send text only")
    request.sampling_params.skip_reading_prefix_cache = True
    request.cache_salt = SALT + (request.cache_salt or "")


def _refuse_beam_search() -> None:
    """Refuse beam search for requests that ask for pruning, or do so by default.

    vLLM makes requests of one token from it, without their ``extra_args``: they would run dense.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams
    from vllm.v1.engine.input_processor import InputProcessor

    def refuse(kind: Any, method: str, is_asked: Callable[..., bool]) -> None:
        original = getattr(kind, method)

        @functools.wraps(original)
        def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
            if is_asked(self, *args):
                raise VLLMValidationError("beam search cannot be pruned: ask for sampling instead")
            return original(self, *args, **kwargs)

        setattr(kind, method, checked)

    def names_pruning(request: Any, *args: Any) -> bool:
        return any(key.startswith(PREFIX) for key in request.vllm_xargs or {})

    def prunes_by_default(processor: Any, params: Any, *args: Any) -> bool:
        requests = getattr(processor, _MARK)
        return isinstance(params, BeamSearchParams) and bool(requests and requests.default)

    for kind in (ChatCompletionRequest, CompletionRequest):
        refuse(kind, "to_beam_search_params", names_pruning)
    # called once at the start of every beam search, and nowhere else with its parameters
    refuse(InputProcessor, "resolve_watermarking", prunes_by_default)
