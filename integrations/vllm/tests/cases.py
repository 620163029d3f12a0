"""Engines, tiny models and references that several tests use."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

VOCAB = 128

TEXTS = (
    "Write a short story about a lighthouse keeper who finds a letter in a bottle one night.",
    "def quicksort(values):\n    if len(values) <= 1:\n        return values\n",
    "The heart pumps blood through the body. Arteries carry it away, and veins bring it back.",
)

TINY_PROMPTS = tuple(
    torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (21, 34, 27)
)

_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA = {**_BASE, "query_pre_attn_scalar": 32, "sliding_window": 256}

CONFIGS = {
    "llama": ("llama", _BASE),
    "llama-bias": ("llama", {**_BASE, "mlp_bias": True}),
    "mistral": ("mistral", {**_BASE, "sliding_window": None}),
    "qwen2": ("qwen2", _BASE),
    "qwen3": ("qwen3", _BASE),
    "gemma": ("gemma", _BASE),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", _GEMMA),
    "mixtral": ("mixtral", {**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": ("gpt2", {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 3, "n_head": 2}),
}


def make_tiny(name: str, folder: Path) -> Path:
    """Write a tiny random model in float32."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, options = CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**options)).float().eval()
    with torch.no_grad():  # larger weights, so that tokens vary and pruning changes them
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in key:
                parameter.mul_(4 if name == "gemma2" else 8)
    model.save_pretrained(folder)
    return folder


class Answer(NamedTuple):
    """A generated sequence and the log-probabilities of its tokens."""

    tokens: list[int]
    logprobs: list[float]


def assert_same(answer: Answer, expected: Answer, tolerance: float = 2e-3) -> None:
    """Equal tokens; log-probabilities that differ by at most ``tolerance``."""
    count = min(len(answer.tokens), len(expected.tokens))
    assert count
    assert answer.tokens[:count] == expected.tokens[:count]
    pairs = zip(answer.logprobs[:count], expected.logprobs[:count], strict=True)
    assert max(abs(a - b) for a, b in pairs) <= tolerance


@functools.cache
def _loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@functools.cache
def _learner(folder: Path) -> Any:
    from dart_llm import load

    return load(str(folder), dtype="float32")[0]


@functools.cache
def _answer(folder: Path, ids: tuple[int, ...], count: int, method: str, settings: str) -> Answer:
    from dart_llm import prune

    model = _learner(folder) if method == "dart" else _loaded(folder)

    def run() -> Answer:
        with torch.no_grad():
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones((1, len(ids)), dtype=torch.long),  # of padding ids too
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        tokens = out.sequences[0, len(ids) :].tolist()
        scores = [logits[0].log_softmax(-1) for logits in out.logits]
        return Answer(tokens, [float(s[t]) for s, t in zip(scores, tokens, strict=True)])

    if method == "dense":
        return run()
    with prune(model, method, executor="masked", **json.loads(settings)):
        return run()


def reference(folder: Path, ids: Sequence[int], count: int, method: str, **settings: Any) -> Answer:
    """Greedy tokens of ``prune`` in transformers; ``count``: number of tokens."""
    return _answer(folder, tuple(ids), count, method, json.dumps(settings))


def arguments(method: str, sparsity: float | None = None, **settings: Any) -> dict[str, Any]:
    """The ``extra_args`` of a request."""
    given = {"dart": method, "dart_sparsity": sparsity, "dart_settings": settings or None}
    return {key: value for key, value in given.items() if value is not None}


class Engine:
    """vLLM in this process, step by step; ``dart``: the settings of the server."""

    def __init__(
        self,
        folder: Path,
        dart: Mapping[str, Any] | None = None,
        worker: str = "dart_vllm.Worker",
        **options: Any,
    ) -> None:
        from vllm import LLM

        options = {"max_model_len": 256, "max_num_seqs": 8, "seed": 0, **options}
        tokenizer = (folder / "tokenizer.json").exists()
        self.llm = LLM(
            str(folder),
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=not tokenizer,
            gpu_memory_utilization=0.2,
            worker_cls=worker,
            additional_config={} if dart is None else {"dart": dict(dart)},
            **options,
        )
        self.core = self.llm.llm_engine
        self.steps = 0

    @property
    def pruning(self) -> Any:
        """The ``Pruning`` of the worker."""
        return self.core.engine_core.engine_core.model_executor.driver_worker.worker.dart

    def add(
        self, name: str, ids: Sequence[int], count: int, extra: Any = None, **more: Any
    ) -> None:
        """Add a greedy request for ``count`` tokens."""
        from vllm import SamplingParams

        options = {"temperature": 0, "max_tokens": count, "min_tokens": count, "logprobs": 0}
        options |= {"ignore_eos": True, "detokenize": False, "extra_args": extra, **more}
        self.core.add_request(name, {"prompt_token_ids": [*ids]}, SamplingParams(**options))

    def run(self, abort: Mapping[int, str] | None = None) -> dict[str, list[Answer]]:
        """Run until no request is left; ``abort``: requests to abort, by step."""
        done: dict[str, list[Answer]] = {}
        while self.core.has_unfinished_requests():
            for output in self.core.step():
                if output.finished:
                    done[output.request_id] = [_answer_of(o) for o in output.outputs]
            self.steps += 1
            if abort and self.steps in abort:
                self.core.abort_request([abort[self.steps]])
        return done

    def answers(self, prompts: Sequence[Sequence[int]], count: int, extra: Any) -> list[Answer]:
        """The answers to some prompts in one batch."""
        for number, ids in enumerate(prompts):
            self.add(str(number), ids, count, extra)
        done = self.run()
        return [done[str(number)][0] for number in range(len(prompts))]


def _answer_of(output: Any) -> Answer:
    pairs = zip(output.logprobs, output.token_ids, strict=True)
    return Answer([*output.token_ids], [probs[token].logprob for probs, token in pairs])
