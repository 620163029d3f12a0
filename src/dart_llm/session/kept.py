"""Whether a setting that is kept in a file was measured on this model."""

from __future__ import annotations

from typing import Any

from dart_llm.models.checkpoint import checkpoint_facts, fingerprint
from dart_llm.pruning.setting_file import kept_setting, path_of

SAME = ("name", "sha256", "file_quantisation", "parameters")
"""What a setting file records of its checkpoint."""


def identity(model: Any) -> dict[str, Any]:
    """What distinguishes the checkpoint of ``model``; a digest of the weights where no file's
    is available, which is of one weight format alone."""
    facts = checkpoint_facts(model)
    recorded = {name: facts.get(name) for name in SAME}
    return recorded if recorded["sha256"] else {**recorded, "fingerprint": fingerprint(model)}


def stored_as(model: Any) -> str:
    """How ``model`` stores its weights: in blocks, or in a dtype."""
    facts = checkpoint_facts(model)
    return str(facts.get("weights") or facts["dtype"])


def other_model(method: str, model: Any, weights: bool = False) -> str:
    """A sentence where the setting ``file:...`` was measured on another checkpoint, else "".

    ``weights``: also where these are stored in another format.
    """
    kept, path = kept_setting(method), path_of(method)
    if kept is None or path is None or not kept.model:
        return ""
    facts = checkpoint_facts(model)
    digest = kept.model.get("sha256")
    if digest and facts["sha256"]:
        other = digest != facts["sha256"]
    elif recorded := kept.model.get("fingerprint"):
        other = recorded != fingerprint(model)
    else:
        other = kept.model.get("parameters") not in (None, facts["parameters"])
    if other:
        return (
            f"{path.name} was found for {kept.model.get('name')}, not for {facts['name']}: measure "
            "this model by dart-llm tune before you trust it"
        )
    before, now = kept.model.get("stored_as"), stored_as(model)
    if weights and before and before != now:
        return (
            f"{path.name} was found on weights stored as {before}, and this model's are "
            f"{now}: load it with weights={kept.weights!r}"
        )
    return ""
