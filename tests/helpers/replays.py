"""What a GPU does with a recorded step, on a CPU."""

from dart_llm.patching.executors import graph_step
from dart_llm.patching.executors.graph_step import Recorded


class Replay(Recorded):
    """What a GPU does: the work runs once, and replays write into the tensors of that time."""

    made = 0

    def __init__(self, work, device):
        super().__init__(work, device)
        type(self).made += 1
        for _ in range(graph_step.WARM_UPS):
            work()
        self._output = work()

    def __call__(self):
        new = self._work()
        for old, fresh in zip(_tensors(self._output), _tensors(new), strict=True):
            old.copy_(fresh)
        return self._output


def _tensors(output):
    return [output.logits, output.hidden, *(t for layer in output.observed for t in layer)]
