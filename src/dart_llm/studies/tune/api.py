"""``dart_llm.tune``: the study from Python, on a model that is loaded or on one by its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_llm.experiments.study import run_study
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.pruning.setting_file import KeptSetting
from dart_llm.reporting.console import Ui
from dart_llm.studies.tune import report
from dart_llm.studies.tune.settings import TuneSettings
from dart_llm.studies.tune.study import TuneStudy


@dataclass(frozen=True)
class TuneResult:
    """What ``tune`` found.

    ``rows``: a candidate each, as in tune.json: ``row`` (its name), ``loss`` with
    ``loss_interval``, ``kl`` (nats per token), ``ms`` per token (None: not timed), ``times_dense``,
    ``bytes_share``, ``achieved_sparsity``, ``dense_token_share``, ``remasks``.  ``recommended``:
    one of them.  ``setting``: what ``save`` writes; ``setting.config`` is for ``prune``.
    ``folder``: the results.
    """

    rows: tuple[dict[str, Any], ...]
    recommended: dict[str, Any]
    setting: KeptSetting
    folder: Path
    text: str

    def save(self, path: str | Path) -> Path:
        """Write the setting for ``prune(model, "file:...")``; raises ``ConfigError``."""
        return self.setting.save(path)

    def __str__(self) -> str:
        return self.text


def tune(
    model: Any,
    tokenizer: Any = None,
    max_loss: float = 0.02,
    *,
    results_dir: str | Path = "results",
    fresh: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> TuneResult:
    """Find the setting for ``model``: the fastest that loses at most ``max_loss``.

    ``model``: loaded, with its ``tokenizer``: then its weights are tried as they are held; or a
    name, as ``load`` takes it: then in several formats.  ``max_loss``: perplexity over dense minus
    1.  ``settings``: those of ``dart-llm tune`` by their names: ``text``, ``methods``,
    ``sparsities``, ``heads``, ``slices``, ``repeats``, ...  Resumes in ``results_dir`` unless
    ``fresh``.  ``quiet``: nothing is shown.

    Raises ``ConfigError`` and ``UnknownName`` for settings that do not fit, ``AttachError`` for a
    model that is being pruned.

    >>> found = tune(model, tokenizer)                      # doctest: +SKIP
    >>> found.save("setting.yaml")                          # doctest: +SKIP
    >>> with prune(model, "file:setting.yaml") as run:      # doctest: +SKIP
    ...     model.generate(**inputs, max_new_tokens=200)
    """
    loaded = not isinstance(model, str | Path)
    name = checkpoint_facts(model)["name"] if loaded else str(model)
    asked = {**settings, "model": str(name), "max_loss": max_loss, "results_dir": str(results_dir)}
    given = (model, tokenizer) if loaded else None
    study = run_study(TuneStudy(TuneSettings(**asked), Ui(quiet=quiet), given), fresh)
    rows = tuple(study.summary["rows"])
    best = next(row for row in rows if row["recommended"])
    said = "\n".join(report.sentences(study.summary))
    return TuneResult(rows, best, study.kept(study.summary), study.path, said)
