"""The worker class: it prunes the model that vLLM has loaded, in both of vLLM's model runners.

vLLM's interfaces for this are internal, so a version that was not tested is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import vllm
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.platforms import current_platform

from dart_llm.errors import ConfigError, UnsupportedModel
from dart_llm.experiments.artifacts import read_masks
from dart_llm.pruning.masks import Masks, user_masks
from dart_llm.pruning.weights import FfnWeights
from dart_vllm import runners
from dart_vllm.ffn import (
    PrunedFfn,
    StepState,
    decoder_layers,
    gated_ffns,
    narrow_in_place,
    weights_kept,
    weights_of,
)
from dart_vllm.frontend import is_registered
from dart_vllm.learn import learned_layers
from dart_vllm.policy import PrunedRequest, RunningRequests
from dart_vllm.report import Totals, describe
from dart_vllm.settings import Asked, Requests, ServerSettings, learning_key

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Base
else:
    from vllm.v1.worker.gpu_worker import Worker as Base

logger = init_logger("vllm.dart")

TESTED = ("0.32.",)
"""Prefixes of the versions of vLLM with which this package was tested."""


def check_engine(config: Any) -> None:
    """Raise ``ConfigError`` for the first feature of vLLM that pruning does not support."""
    for unsupported, reason in _obstacles(config):
        if unsupported:
            raise ConfigError(f"dart-vllm does not support {reason}")


def _obstacles(config: Any) -> Iterator[tuple[bool, str]]:
    version, parallel, model = vllm.__version__, config.parallel_config, config.model_config
    yield (
        not version.startswith(TESTED),
        f"vLLM {version}: it was tested with {', '.join(f'{v}*' for v in TESTED)}",
    )
    yield (
        not is_registered(),
        "an engine in which its plug-in is turned off: let VLLM_PLUGINS include dart",
    )
    for name in ("tensor", "pipeline", "data", "prefill_context", "decode_context"):
        size = getattr(parallel, f"{name}_parallel_size", 1)
        yield size > 1, f"{name.replace('_', '-')} parallelism: use a size of 1, not {size}"
    yield getattr(parallel, "enable_dbo", False), "dual batch overlap: drop --enable-dbo"
    compilation = config.compilation_config
    modes = (compilation.mode, compilation.cudagraph_mode)
    is_eager = all(mode is None or mode.name == "NONE" for mode in modes)
    yield not is_eager, "compiled models and CUDA graphs: add --enforce-eager"
    yield config.speculative_config is not None, "speculative decoding: drop its settings"
    yield config.lora_config is not None, "LoRA adapters: drop --enable-lora"
    yield config.kv_transfer_config is not None, "KV cache transfer: drop --kv-transfer-config"
    yield config.weight_transfer_config is not None, "replacing weights while it serves"
    yield (
        config.cache_config.kv_sharing_fast_prefill,
        "prompts that skip layers: drop --kv-sharing-fast-prefill",
    )
    yield bool(model.enable_sleep_mode), "sleep mode: drop --enable-sleep-mode"
    yield (
        model.quantization is not None,
        f"quantised weights ({model.quantization}): serve the checkpoint that is not quantised",
    )
    yield model.runner_type != "generate", f"models that run as {model.runner_type!r}"
    yield model.is_encoder_decoder, "encoder-decoder models"


class Worker(Base):  # type: ignore[misc]
    """vLLM's worker for this platform, which prunes FFN neurons of the requests that ask for it."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        check_engine(vllm_config)
        self.dart_settings = ServerSettings.from_additional_config(vllm_config.additional_config)
        super().__init__(vllm_config, *args, **kwargs)

    def load_model(self, **kwargs: Any) -> None:
        """Load the model and prepare its FFNs."""
        with weights_kept():
            super().load_model(**kwargs)
        with torch.inference_mode():
            self.dart = Pruning(self.model_runner, self.vllm_config, self.dart_settings)

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a step; add new requests before it, and forget those that have ended."""
        self.dart.update(scheduler_output)
        with self.dart.step():
            return super().execute_model(scheduler_output)

    def dart_counts(self) -> dict[str, int]:
        """Numbers of steps by the way in which they ran, and of running requests that are pruned.

        For ``LLM.collective_rpc("dart_counts")``.
        """
        running = sum(r is not None for r in self.dart.running.requests.values())
        return {**self.dart.state.counts, "running": running}


class Pruning:
    """Everything that pruning adds to one loaded model."""

    def __init__(self, runner: Any, config: Any, settings: ServerSettings) -> None:
        self.runner, self.model = runner, runner.get_model()
        text = config.model_config.hf_text_config
        mlps = list(gated_ffns(self.model, text.num_hidden_layers))
        self.layers = weights_of(mlps)
        self.total_bytes = sum(p.nbytes for p in self.model.parameters())
        self.running, self.totals = RunningRequests(), Totals()
        self.state, self._in_step = StepState(), False
        self.requests = Requests(settings, self.layers, text.model_type)
        self.ffns = [PrunedFfn(mlp, index, self.state) for index, mlp in enumerate(mlps)]
        for ffn, layer in zip(self.ffns, self.layers, strict=True):
            ffn.check(layer.width)
        if settings.masks is not None:
            masks = load_masks(settings.masks, self.layers)
            for mlp, mask in zip(mlps, masks, strict=True):
                if mask is not None:
                    narrow_in_place(mlp, mask)
            self.layers = ()
            logger.info("DART: all requests are narrowed to %s", settings.masks)
            return
        path, dtype = config.model_config.model, config.model_config.dtype
        configs = settings.learned_configs()
        self.learned = learned_layers(configs, self.layers, path, dtype, settings.cache_dir)
        self.shared = {
            name: load_masks(file, self.layers) for name, file in settings.shared.items()
        }
        self.state.pinned = tuple(self.shared.values())
        for ffn in self.ffns:
            ffn.mlp.forward = ffn.__call__
        self._hook_model(text.num_hidden_layers)
        runners.hook(runner, self._begin, lambda: self._in_step)
        logger.info("DART: %d FFNs are pruned per request (%s)", len(mlps), type(runner).__module__)

    def _hook_model(self, count: int) -> None:
        """Hook what the controllers read besides the FFNs."""
        layers = decoder_layers(self.model, count)
        for layer, ffn in zip(layers, self.ffns, strict=True):
            norm = getattr(layer, "pre_feedforward_layernorm", None)
            norm = getattr(layer, "post_attention_layernorm", None) if norm is None else norm
            if norm is not None:
                norm.register_forward_hook(_stream_hook(ffn))
        attention = getattr(getattr(layers[-1], "self_attn", None), "o_proj", None)
        if attention is None:
            raise UnsupportedModel(
                f"{type(layers[-1]).__name__} has no self_attn.o_proj, whose output drift rules "
                "watch, so dart-vllm cannot prune it"
            )
        attention.register_forward_hook(self._read_attention)
        self.model.register_forward_hook(self._end)

    def update(self, scheduled: Any) -> None:
        """Follow the scheduler: forget the requests that have ended, and add the new ones."""
        if not self.layers:
            return
        for name, request in self.running.drop(scheduled.finished_req_ids).items():
            report = request.report(self.layers, self.total_bytes)
            self.totals.add(report)
            logger.info("%s", describe(name, report))
            for masks in request.used_masks():
                self.state.forget(masks)
        for new in scheduled.scheduled_new_reqs:
            if new.req_id not in self.running.requests:  # else it continues after a preemption
                extra = None if new.sampling_params is None else new.sampling_params.extra_args
                asked = self.requests.read(extra)
                made = None if asked is None else self._pruned(asked, new.prompt_len)
                self.running.requests[new.req_id] = made

    def _pruned(self, asked: Asked, prompt: int) -> PrunedRequest:
        if asked.shared is not None:
            return PrunedRequest(asked.config, self.layers, prompt, self.shared[asked.shared])
        layers = self.layers
        if asked.config.self_stats is not None:
            layers = self.learned[learning_key(asked.config)]
        return PrunedRequest(asked.config, layers, prompt)

    @contextmanager
    def step(self) -> Iterator[None]:
        """A context for a step of the engine; forwards outside of it belong to no request."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
            self.state.end()

    def _begin(self, tokens: list[tuple[str, int, int]]) -> None:
        self.state.begin(self.running.plan(tokens))

    def _read_attention(self, module: nn.Module, args: Any, output: Any) -> None:
        self._signal("attention", output[0] if isinstance(output, tuple) else output)

    def _signal(self, name: str, v: Tensor) -> None:
        """Pass a signal [T, D] of this step's tokens to the controllers that watch it."""
        if self.state.step is not None:
            for request, tokens in self.state.step.observed("signal"):
                if request.controller.config.drift.signal == name:
                    request.controller.observe_signal(v[None, tokens])

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the model's forward, whose output is the last hidden state."""
        self._signal("hidden", output)
        step = self.state.end()
        if step is not None:
            self.running.end(step)


def _stream_hook(ffn: PrunedFfn) -> Any:
    def read_stream(norm: nn.Module, args: Any, output: Any) -> None:
        step = ffn.state.step
        if step is not None and step.observed("stream"):
            ffn.stream = output[1]  # vLLM's norms return their output and the residual stream

    return read_stream


def load_masks(path: str, layers: tuple[FfnWeights, ...]) -> Masks:
    """Read the last masks of a masks.safetensors; raises ``ConfigError`` if they do not fit."""
    return user_masks(layers, read_masks(path), None)
