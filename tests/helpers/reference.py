"""`griffin` and `dart` a second time: docs/reference.md in plain torch and float64.

Shares no scoring, budget, drift, evidence or mask code with dart_llm.  One sequence, whose tokens
are given.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dart_llm.calibration.collect import opening_ids, start_tokens
from dart_llm.calibration.collect import sample_continuations as go_on
from steps import CACHE, new_cache

SINKS, MIN_EVIDENCE, OBSERVE = 4, 16, 32
PSEUDO_TOKENS, DECAY, BASIS_TOKENS = 32, 0.1, 1024


class Trace(NamedTuple):
    """What decoding gave: logits [T, V], and (decode step, kept ids per layer) of every mask."""

    logits: Tensor
    masks: list


@torch.no_grad()
def decode(model, ids, prompt, method):
    """Prefill the first tokens of ids [T], then feed the others one by one."""
    cache, masks = new_cache(model), []
    with Hooked(model) as hooked:
        found = [hooked.forward(ids[None, :prompt], cache)[0]]
        method.observe(hooked.seen, hooked.last)
        dense = max(0, method.wait - prompt)
        for step, token in enumerate(ids[prompt:]):
            if hooked.parts is None and dense == 0:
                hooked.parts = method.choose()
                masks.append((step, [part.keep.nonzero().flatten() for part in hooked.parts]))
            found.append(hooked.forward(token[None, None], cache)[0])
            if hooked.parts is None:
                method.observe(hooked.seen, hooked.last)
                dense -= 1
            elif method.watch(hooked.last, step + 1):
                hooked.parts, dense = None, OBSERVE
    return Trace(torch.cat(found), masks)


def kept(scores, count):
    """Ones for the largest ``count`` of scores [I], ties to the lower index; else zeros."""
    order = scores.sort(descending=True, stable=True).indices
    return torch.zeros(len(scores)).index_fill(0, order[:count], 1.0)


# griffin


class Griffin:
    """Norms of each token's share, the same share of every layer, one mask."""

    wait = 0

    def __init__(self, sparsity):
        self.sparsity = sparsity

    def observe(self, seen, last):
        self.sums = [F.normalize(one.u[0].double(), dim=-1).square().sum(0) for one in seen]

    def choose(self):
        counts = even([len(s) for s in self.sums], self.sparsity)
        return [Part(kept(s.sqrt(), n)) for s, n in zip(self.sums, counts, strict=True)]

    def watch(self, last, decoded):
        return False


def even(widths, sparsity):
    """The same share of every layer: largest remainder, ties by the lower layer."""
    exact = [(1 - sparsity) * width for width in widths]
    counts = [int(share) for share in exact]
    order = sorted(range(len(widths)), key=lambda layer: counts[layer] - exact[layer])
    for layer in order[: round((1 - sparsity) * sum(widths)) - sum(counts)]:
        counts[layer] += 1
    return counts


# what dart observes and learns


@dataclass
class Sums:
    """Sums over weighted tokens of one layer: u^2, u, f, u f, f f; ``n`` is their weight."""

    n: float = 0.0
    values: dict[str, Tensor] = field(default_factory=dict)

    def add(self, u, f):
        """Tokens u [T, I] with features f [T, r]."""
        new = {"uu": u.square().sum(0), "u": u.sum(0), "f": f.sum(0), "uf": u.T @ f, "ff": f.T @ f}
        self.values = {name: self.values.get(name, 0.0) + value for name, value in new.items()}
        self.n += len(u)

    def age(self):
        """What is known before new evidence comes; a long past counts as 256 tokens."""
        factor = DECAY * min(1.0, 256 / self.n) if self.n else 0.0
        self.values = {name: value * factor for name, value in self.values.items()}
        self.n *= factor

    def pooled(self, prior):
        """Means, with the prior's as so many pseudo-tokens beside them."""
        weight = PSEUDO_TOKENS / prior.n
        return {
            name: (self.values.get(name, 0.0) + weight * value) / (self.n + PSEUDO_TOKENS)
            for name, value in prior.values.items()
        }


@dataclass
class Prior:
    basis: Tensor  # [r, D], in the model's dtype
    sums: Sums = field(default_factory=Sums)
    squares: Tensor | float = 0.0  # [I]: summed squared gradients

    @property
    def curvature(self):
        return torch.as_tensor(self.squares / self.sums.n)


def learn(model, ids, rank=32):
    """The priors of all layers from the model's own text ids [n, T]."""
    length = ids.shape[1]
    priors = [Prior(basis) for basis in bases(model, ids, rank)]
    wants = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    lift = model.get_input_embeddings().register_forward_hook(lambda _, a, x: x.requires_grad_())
    with Hooked(model) as hooked, torch.enable_grad():
        for part in ids.split(4):
            logits = hooked.forward(part)
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).double(), part[:, 1:].flatten(), reduction="sum"
            )
            gradients = torch.autograd.grad(loss, [one.u for one in hooked.seen])
            for prior, seen, g in zip(priors, hooked.seen, gradients, strict=True):
                inside = slice(SINKS, length - 1)
                u, h = (x.detach()[:, inside].flatten(0, 1).double() for x in (seen.u, seen.h))
                prior.sums.add(u, h @ prior.basis.double().T)
                prior.squares += g[:, inside].flatten(0, 1).double().square().sum(0)
    lift.remove()
    for parameter, wanted in zip(model.parameters(), wants, strict=True):
        parameter.requires_grad_(wanted)
    return priors


@torch.no_grad()
def bases(model, ids, rank):
    """Per layer the directions [r, D] in which h varies most, each over its deviation."""
    rows = -(-BASIS_TOKENS // (ids.shape[1] - SINKS))
    with Hooked(model) as hooked:
        hooked.forward(ids[:rows])
        found = []
        for seen in hooked.seen:
            h = seen.h[:, SINKS:].flatten(0, 1).double()
            variances, directions = torch.linalg.eigh(h.T.cov(correction=0))
            floor = 0.01 * variances.mean()
            largest = variances.argsort(descending=True)[:rank]
            scaled = directions[:, largest] / (variances[largest] + floor).sqrt()
            found.append(scaled.T.to(seen.h.dtype))
    return found


# the drift rule `dart` with its guards

WINDOW, DEVIATIONS, LOW_WINDOWS = 10, 1.5, 3
LEAST, MOST = 4, 128  # windows of a reference
MIN_DISTANCE, DENSE_SHARE, ALLOWANCE, NEED = 64, 0.05, 32, 32


class Detector:
    """Compares windows of the last hidden state with what was observed; sees no sinks."""

    def __init__(self):
        self.observed = []
        self.window = []
        self.centroid = None
        self.threshold = 0.0
        self.low = self.refresh_tokens = 0
        self.last = None  # decoded tokens at the newest trigger

    def observe(self, v):
        """Observed tokens [T, D]."""
        self.observed += [*v]

    def arm(self):
        """Masks are made from the observed tokens: so is the reference, if they are enough."""
        self.window, self.low, self.centroid = [], 0, None
        if len(self.observed) >= LEAST * WINDOW:
            self._refer()
        self.observed = []

    def _refer(self):
        tokens = torch.stack(self.observed)
        total, count = tokens.sum(0), len(tokens)
        windows = [w.sum(0) for w in tokens.split(WINDOW) if len(w) == WINDOW][-MOST:]
        others = [(total - w) / (count - WINDOW) for w in windows]
        pairs = zip(windows, others, strict=True)
        alike = torch.stack([F.cosine_similarity(w / WINDOW, o, dim=0) for w, o in pairs])
        self.centroid = total / count
        self.threshold = float(alike.mean() - DEVIATIONS * alike.std())

    def watch(self, v, decoded):
        """One pruned token [D], the ``decoded``-th of the sequence: whether it is a trigger."""
        self.window.append(v)
        if len(self.window) < WINDOW:
            return False
        window, self.window = torch.stack(self.window), []
        if self.centroid is None:
            self.observed = [*self.observed, *window]
            if len(self.observed) >= LEAST * WINDOW:
                self._refer()
                self.observed = []
            return False
        low = bool(F.cosine_similarity(window.mean(0), self.centroid, dim=0) < self.threshold)
        self.low = self.low + 1 if low else max(0, self.low - 1)
        if not low or self.low < LOW_WINDOWS or not self._allowed(decoded):
            return False
        self.refresh_tokens, self.last = self.refresh_tokens + NEED, decoded
        return True

    def _allowed(self, decoded):
        near = self.last is not None and decoded - self.last < MIN_DISTANCE
        most = ALLOWANCE + DENSE_SHARE * (decoded + NEED)
        return not near and self.refresh_tokens + NEED <= most


# dart


class Dart:
    """Fisher scores ranked over all layers, re-masks by drift, low-rank compensation."""

    wait = MIN_EVIDENCE

    def __init__(self, model, sparsity, priors):
        self.sparsity, self.priors = sparsity, priors
        self.columns = Hooked(model).columns()
        self.sums = [Sums() for _ in priors]
        self.detector = Detector()
        self.counts = []
        self.tokens = 0

    def observe(self, seen, last):
        sinks = max(0, SINKS - self.tokens)
        for sums, prior, one in zip(self.sums, self.priors, seen, strict=True):
            u, h = one.u[0, sinks:].double(), one.h[0, sinks:].double()
            sums.add(u, h @ prior.basis.double().T)
        self.detector.observe(last[0, sinks:].double())
        self.tokens += last.shape[1]

    def choose(self):
        means = [own.pooled(p.sums) for own, p in zip(self.sums, self.priors, strict=True)]
        scores = [m["uu"] * p.curvature for m, p in zip(means, self.priors, strict=True)]
        self.counts = self.counts or ranked(scores, self.sparsity)
        self.detector.arm()
        return [
            compensated(kept(score, count), column, prior.basis, mean)
            for score, count, column, prior, mean in zip(
                scores, self.counts, self.columns, self.priors, means, strict=True
            )
        ]

    def watch(self, last, decoded):
        self.tokens += 1
        drifted = self.detector.watch(last[0, 0].double(), decoded)
        if drifted:
            for sums in self.sums:
                sums.age()
        return drifted


def ranked(scores, sparsity):
    """Counts of one ranking over all layers in which 10 % of every layer stay."""
    widths = [len(s) for s in scores]
    floors = [-(-width // 10) for width in widths]
    total = round((1 - sparsity) * sum(widths))
    if sum(floors) > total:
        return even(widths, sparsity)
    own = [s.sort(descending=True).values for s in scores]
    free = torch.cat([s[floor:] for s, floor in zip(own, floors, strict=True)])
    layer = torch.cat(
        [torch.full((w - f,), i) for i, (w, f) in enumerate(zip(widths, floors, strict=True))]
    )
    best = free.sort(descending=True, stable=True).indices[: total - sum(floors)]
    extra = layer[best].bincount(minlength=len(widths))
    return [floor + int(more) for floor, more in zip(floors, extra, strict=True)]


def compensated(keep, column, basis, mean):
    """A layer that says for its removed neurons what the FFN's input tells of them."""
    covariance = mean["ff"] - mean["f"].outer(mean["f"])
    shared = mean["uf"] - mean["u"].outer(mean["f"])
    ridge = covariance + 0.1 * torch.eye(len(covariance), dtype=torch.float64)
    slopes = torch.linalg.solve(ridge, shared.T).T  # [I, r]
    removed = keep == 0
    adds = column[:, removed] @ slopes[removed]
    constant = column[:, removed] @ mean["u"][removed] - adds @ mean["f"]
    return Part(keep, constant.to(basis.dtype), basis, adds.to(basis.dtype))


# a model whose FFNs are read and masked by hooks

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
