"""Track with TensorBoard event files, through torch's writer; needs the package tensorboard."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dart_llm.results import finite
from dart_llm.trackers import optional


class TensorboardBackend:
    """One folder of event files."""

    def __init__(self, writer: Any, where: str) -> None:
        self.where = where
        self._writer = writer

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


def open_backend(
    project: str, run_name: str, config: dict[str, Any], folder: Path
) -> TensorboardBackend:
    """Event files in ``folder / "tensorboard" / project / run_name``; settings as a text."""
    library = optional("torch.utils.tensorboard", "tensorboard")
    data = folder / "tensorboard"
    writer = library.SummaryWriter(log_dir=str(data / project / run_name))
    settings = json.dumps(finite(config), indent=1, default=str)
    writer.add_text("settings", "\n".join(f"    {line}" for line in settings.splitlines()))
    writer.flush()
    quoted = shlex.quote(str(data))
    return TensorboardBackend(writer, f"tracking to {quoted}; tensorboard --logdir {quoted}")
