"""A model whose FFNs are read and masked by hooks: what the reference decodes with."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dart_llm.calibration.collect import opening_ids, start_tokens
from dart_llm.calibration.collect import sample_continuations as go_on
from steps import CACHE

DOWN = ("down_proj", "c_proj")
"""Names of the down projection: in gated FFNs, and in GPT-2's."""


@dataclass(frozen=True)
class Part:
    """What one layer runs while pruned, in the model's dtype."""

    keep: Tensor  # [I]: ones and zeros
    constant: Tensor | float = 0.0  # [D], added to the output
    basis: Tensor | None = None  # [r, D], of the FFN's input ...
    adds: Tensor | None = None  # [D, r]: ... and what each feature adds to the output


@dataclass
class Seen:
    """What the newest forward showed of one layer: u [B, T, I] and the FFN's input h [B, T, D]."""

    h: Tensor
    u: Tensor


class Hooked:
    """``model`` with hooks while the block lasts.

    ``parts``: what the layers run, None: dense.  After a forward ``seen`` holds what the layers
    showed, and ``last`` the last hidden state [B, T, D].
    """

    def __init__(self, model):
        self.model, self.parts, self.seen = model, None, []
        activated = [m for m in model.modules() if hasattr(m, "act_fn") or hasattr(m, "act")]
        self.ffns = [m for m in activated if any(hasattr(m, name) for name in DOWN)]
        self.downs = [next(getattr(m, n) for n in DOWN if hasattr(m, n)) for m in self.ffns]

    def columns(self):
        """The weights [D, I] of the down projections, float64; GPT-2's lie the other way round."""
        weights = [(down, down.weight.detach().double()) for down in self.downs]
        return [w if isinstance(down, nn.Linear) else w.T for down, w in weights]

    def __enter__(self):
        def enter(ffn, args):
            self.seen.append(Seen(args[0], args[0]))

        def end(head, args):
            self.last = args[0]

        hooks = [ffn.register_forward_pre_hook(enter) for ffn in self.ffns]
        for index, down in enumerate(self.downs):
            hooks.append(down.register_forward_pre_hook(lambda _, a, i=index: self._mask(i, a[0])))
            hooks.append(down.register_forward_hook(lambda _, a, z, i=index: self._add(i, z)))
        hooks.append(self.model.get_output_embeddings().register_forward_pre_hook(end))
        self.handles = hooks
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()

    def _mask(self, index, u):
        self.seen[index].u = u
        return u if self.parts is None else u * self.parts[index].keep

    def _add(self, index, z):
        if self.parts is None:
            return z
        part = self.parts[index]
        if part.basis is not None:
            z = z + self.seen[index].h @ part.basis.T @ part.adds.T
        return z + part.constant

    def forward(self, ids, cache=None):
        """Logits [B, T, V] of ids [B, T]."""
        self.seen = []
        given = {} if cache is None else {"use_cache": True, CACHE: cache}
        return self.model(ids, **given).logits


def own_text(model, sequences=32, length=128, opening=24):
    """Token ids [n, T] of the text that the model writes with seed 0.

    They alone come from dart_llm: in which order tokens are sampled is not specified.
    """
    generator = torch.Generator().manual_seed(0)
    first = opening_ids(model, sequences, opening)
    if first is None:
        vocabulary = model.config.get_text_config().vocab_size
        first = torch.randint(vocabulary, (sequences, 1), generator=generator)
        first.fill_(start_tokens(model)[0])
    return go_on(model, first, length, generator, lambda text: None, 0.8, 0.95).clone()
