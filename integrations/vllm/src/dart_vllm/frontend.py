"""What happens to a request before the engine sees it; an entry point that vLLM loads everywhere.

``register`` extends vLLM's ``InputProcessor``, in which every request is validated:

- a bad value is an error of this request alone (status 400 from the server);
- a request that asks for pruning is refused if this engine cannot prune, not answered dense;
- a pruned request neither reads the prefix cache, whose tokens would leave no evidence, nor leaves
  blocks there that a request with other settings could read.
"""

from __future__ import annotations

import functools
from typing import Any

from dart_llm.errors import ConfigError, DartError
from dart_vllm.report import count_request, share_metrics
from dart_vllm.settings import PREFIX, Asked, Requests, ServerSettings, shapes_of

WORKER = "dart_vllm.Worker"
SALT = "dart"
"""Part of the key of all blocks that pruned requests leave in the prefix cache."""

_MARK = "_dart_vllm"


def register() -> None:
    """Extend vLLM in this process; called again, it does nothing."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    if is_registered():
        return
    share_metrics()
    original = InputProcessor.process_inputs

    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        try:
            asked = _asked(self, request.sampling_params)
            if asked is not None:
                _prepare(request)
        except DartError as error:
            raise VLLMValidationError(str(error)) from None  # the server answers with status 400
        if asked is not None:
            count_request(asked.config.method if asked.shared is None else "shared")
        return request

    setattr(process_inputs, _MARK, True)
    InputProcessor.process_inputs = process_inputs
    _refuse_beam_search()


def is_registered() -> bool:
    """Whether ``register`` has run in this process."""
    from vllm.v1.engine.input_processor import InputProcessor

    return hasattr(InputProcessor.process_inputs, _MARK)


def is_pruning_worker(worker_cls: object) -> bool:
    """Whether vLLM's ``worker_cls`` is this package's worker, as a name or as a class."""
    name = worker_cls if isinstance(worker_cls, str) else getattr(worker_cls, "__module__", "")
    return name.startswith("dart_vllm.")


def _asked(processor: Any, sampling: Any) -> Asked | None:
    """What a request asks for; None if it is dense, or no generation."""
    if sampling is None:
        return None
    extra = sampling.extra_args or {}
    config = processor.vllm_config
    if not is_pruning_worker(config.parallel_config.worker_cls):
        names = [key for key in extra if key.startswith(PREFIX)]
        if names:
            raise ConfigError(
                f"{', '.join(names)}: this engine cannot prune; start it with --worker-cls {WORKER}"
            )
        return None
    requests = getattr(processor, _MARK, None)
    if requests is None:
        settings = ServerSettings.from_additional_config(config.additional_config)
        text = config.model_config.hf_text_config
        requests = Requests(settings, shapes_of(text), text.model_type)
        setattr(processor, _MARK, requests)
    return requests.read(extra)  # type: ignore[no-any-return]


def _prepare(request: Any) -> None:
    """Keep a pruned request apart from the prefix cache; refuse what cannot be pruned."""
    if request.resumable:
        raise ConfigError("a request whose input is streamed cannot be pruned: send it whole")
    if request.prompt_embeds is not None:
        raise ConfigError("a request of embeddings cannot be pruned: send text or token ids")
    request.sampling_params.skip_reading_prefix_cache = True
    request.cache_salt = SALT + (request.cache_salt or "")


def _refuse_beam_search() -> None:
    """Refuse beam search for requests that ask for pruning: vLLM drops their ``extra_args``."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.exceptions import VLLMValidationError

    for kind in (ChatCompletionRequest, CompletionRequest):
        original = kind.to_beam_search_params

        @functools.wraps(original)
        def to_beam_search_params(
            self: Any, *args: Any, _original: Any = original, **kwargs: Any
        ) -> Any:
            if any(key.startswith(PREFIX) for key in self.vllm_xargs or {}):
                raise VLLMValidationError("beam search cannot be pruned: drop use_beam_search")
            return _original(self, *args, **kwargs)

        kind.to_beam_search_params = to_beam_search_params
