"""The part that touches vLLM, written after the sources of vLLM 0.32.

Model runner V2, its default, asks a model for the class of its ``ModelState``, and tells that of
requests that begin and end and of every batch before the forward.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from dart_vllm.ffn import PrunedFfn
from dart_vllm.masks import RequestMasks


class PrunedState(DefaultModelState):
    """Requests, batches and their masks, beside what vLLM's own state does."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        _check(vllm_config)
        self.masks = RequestMasks()
        model.has_masks = True
        for number, layer in enumerate(model.model.layers):
            layer.mlp.forward = PrunedFfn(layer.mlp, number, self.masks)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        sampling = new_req_data.sampling_params
        self.masks.add(new_req_data.req_id, None if sampling is None else sampling.extra_args)

    def remove_request(self, req_id: str) -> None:
        self.masks.forget(req_id)  # preempted ones too, which are added again
        super().remove_request(req_id)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        starts = input_batch.query_start_loc_np[: input_batch.num_reqs + 1].tolist()
        reads = input_batch.is_prefilling_np[: input_batch.num_reqs].tolist()
        self.masks.begin(input_batch.req_ids[: input_batch.num_reqs], starts, reads)
        return super().prepare_inputs(input_batch, req_states)

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        self.masks.begin([], [0], [])
        return super().prepare_dummy_inputs(num_reqs, num_tokens)


def _check(config: Any) -> None:
    """Raise ``ValueError`` for what the prototype cannot do."""
    if not config.model_config.enforce_eager:
        raise ValueError(
            "the prototype chooses in Python whether a step is pruned, which no compiled or "
            "recorded step does: give --enforce-eager"
        )
    if config.parallel_config.world_size != 1:
        raise ValueError("the prototype runs on one GPU: leave parallelism off")
    if config.speculative_config is not None:
        raise ValueError("a step of drafts has several rows and would be dense: leave them off")


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    """vLLM's own model; its state replaces the FFNs' forwards when the weights are there.

    Without that state every answer would be dense, whatever a request asks for: the first forward,
    which vLLM makes before it serves anything, raises ``RuntimeError``.
    """

    has_masks = False

    @wraps(LlamaForCausalLM.forward)  # of which vLLM asks what it takes
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.has_masks:
            raise RuntimeError(
                "dart_vllm: vLLM did not ask the model for its state, as model runner V2 does, so "
                "that no request would be pruned: leave VLLM_USE_V2_MODEL_RUNNER alone and run "
                "on a GPU, or uninstall dart-vllm (on a CPU vLLM takes model runner V1)"
            )
        return super().forward(*args, **kwargs)

    @staticmethod
    def get_model_state_cls() -> type[PrunedState]:
        return PrunedState
