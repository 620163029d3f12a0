"""Made-up FFN weights and activations that drive the controller without a model."""

import torch

from dart_llm.pruning.accounting import Costs, run_report
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.controller import PruningController
from dart_llm.pruning.forward import ForwardCall, Kind
from dart_llm.pruning.observations import LayerObservation
from dart_llm.pruning.weights import FfnWeights

HIDDEN, WIDTH, LAYERS, VOCAB = 6, 20, 3, 11
KEEP = WIDTH // 2
"""Neurons that a layer keeps under ``config()``."""


def make_layers(count=LAYERS, width=WIDTH, hidden=HIDDEN, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(VOCAB, hidden, generator=generator)
    return tuple(
        FfnWeights(
            index=index,
            depth=index / max(1, count - 1),
            stored_up=torch.randn(width, hidden, generator=generator),
            gate=torch.randn(width, hidden, generator=generator),
            down=torch.randn(hidden, width, generator=generator),
            embedding=rows,
        )
        for index in range(count)
    )


class Stream:
    """What each layer sees at every position of a text: u, z, x, and v of the last layer."""

    def __init__(self, layers, rows=1, length=256, seed=0):
        generator = torch.Generator().manual_seed(100 + seed)

        def noise(*shape):
            return torch.randn(*shape, generator=generator)

        self.u, self.z, self.x = [], [], []
        for layer in layers:
            profile = noise(layer.width).exp()
            u = noise(rows, length, layer.width) * profile
            self.u.append(u)
            self.z.append(u @ layer.down.T)
            self.x.append(noise(rows, length, layer.hidden))
        hidden = layers[0].hidden
        self.v = noise(rows, length, hidden) + noise(hidden)


class Driver:
    """Feeds positions of a ``Stream`` to a controller, as the hooks of a model would."""

    def __init__(self, config, rows=1, layers=None, stream=None):
        self.layers = make_layers() if layers is None else layers
        self.stream = Stream(self.layers, rows) if stream is None else stream
        self.announced = []
        self.tracer = PruningController(
            config, self.layers, None, lambda remask, state: self.announced.append(remask)
        )
        self.rows = rows
        self.cached = 0
        self.plans = []

    @property
    def checks(self):
        return list(self.tracer.checks)

    @property
    def states(self):
        """Of all sequences, the oldest first; their evidence may not be up to date."""
        return list(self.tracer.all_sequences())

    @property
    def state(self):
        """Of the only sequence that runs, up to date."""
        self.tracer.flush()
        (state,) = self.tracer.sequences
        return state

    def tokens_until_change(self):
        return self.tracer.tokens_until_change()

    def interrupted(self):
        """A forward of one token that raised before it ended."""
        self.tracer.before_forward(ForwardCall(Kind.DECODE, self.cached, 1, self.rows))

    def report(self):
        self.tracer.flush()
        costs = Costs(self.layers, 10_000)
        return run_report(self.tracer.all_sequences(), costs, "masked", 0, "a test", 0.5)

    def forward(self, kind, tokens, **settings):
        """One forward of the next ``tokens`` positions."""
        call = ForwardCall(kind, self.cached, tokens, self.rows, **settings)
        plan = self.tracer.before_forward(call)
        part = slice(self.cached, self.cached + tokens)
        if plan.observe:
            for layer in range(len(self.layers)):
                s = self.stream
                u, z, x = (t[layer][:, part] for t in (s.u, s.z, s.x))
                self.tracer.observe(layer, LayerObservation(u, None, z, x))
        if plan.signal:
            self.tracer.observe_signal(self.stream.v[:, part])
        self.tracer.after_forward()
        self.cached += tokens
        self.plans.append(plan)
        return plan

    def prefill(self, tokens, **settings):
        return self.forward(Kind.PREFILL, tokens, **settings)

    def decode(self, tokens=1, **settings):
        return self.forward(Kind.DECODE, tokens, **settings)

    def steps(self, count, **settings):
        """``count`` decode forwards of one token; the phase that each ran in (of row 0)."""
        phases = []
        for _ in range(count):
            self.decode(**settings)
            phases.append(str(self.tracer.last_phase))
        return phases

    def roll_back(self, tokens):
        """The cache is cut by ``tokens`` before the next forward."""
        self.cached -= tokens


def ids_of(plan, row=0):
    """Kept neurons of every layer in one plan; None where dense."""
    return [None if mask is None else mask.ids.tolist() for mask in plan.masks[row] or (None,)]


def top(score, keep):
    return sorted(sorted(range(len(score)), key=lambda i: (-float(score[i]), i))[:keep])


def energy_of(stream, layer, positions, row=0):
    """Summed squared activations of one layer at ``positions`` of one row: [I]."""
    return stream.u[layer][row, list(positions)].square().sum(0)


def best(stream, positions, keep, row=0):
    """The neurons that ``magnitude`` keeps in every layer after seeing ``positions``."""
    return [top(energy_of(stream, layer, positions, row), keep) for layer in range(len(stream.u))]


def config(**settings):
    """Half of the neurons by ``magnitude``, evenly, unless said otherwise."""
    return PruneConfig.from_mapping({"sparsity": 0.5, "score": "magnitude", **settings})


def is_dense(plan):
    return plan.dense and all(masks is None for masks in plan.masks)
