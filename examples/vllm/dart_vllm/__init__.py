"""A prototype of a plug-in for vLLM.  It was never run on a GPU: docs/integrations.md says more.

``masks`` and ``ffn`` need no vLLM and are tested; ``model`` is the thin part that touches it.
"""


def register() -> None:
    """Called by vLLM in every process that it starts; names the model class, and loads nothing."""
    from vllm import ModelRegistry

    ModelRegistry.register_model("LlamaForCausalLM", "dart_vllm.model:PrunedLlamaForCausalLM")
