"""Stands in for the ``datasets`` library and records what was asked for."""

import sys
from types import ModuleType


class FakeDatasets:
    """``rows`` by call (id, configuration, split, streamed); ``error`` is raised when it is set."""

    def __init__(self):
        self.calls, self.revisions, self.rows, self.read, self.error = [], [], {}, 0, None

    def load_dataset(self, path, name, *, split, streaming, revision=None):
        self.calls.append((path, name, split, streaming))
        self.revisions.append(revision)
        if self.error is not None:
            raise self.error
        for row in self.rows[self.calls[-1]]:
            self.read += 1
            yield row


def install(monkeypatch):
    fake = FakeDatasets()
    module = ModuleType("datasets")
    module.load_dataset = fake.load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return fake
