"""The newest mask that a run's sequences hold, or how far they are from the first."""

from __future__ import annotations

from collections.abc import Sequence

from dart_llm.errors import AttachError
from dart_llm.life import Life
from dart_llm.masks import LayerMask
from dart_llm.select import Selector


def newest_masks(lives: Sequence[Life], selector: Selector) -> tuple[LayerMask | None, ...]:
    """Per layer; None: dense.  Raises ``AttachError`` where no mask has been built."""
    for life in reversed(lives):
        if life.selection is not None:
            return life.selection.masks
    if selector.removes_nothing:
        raise AttachError("no mask is built where nothing is removed: ask for a sparsity above 0")
    seen, left = 0.0, max(1, selector.config.min_evidence)
    if lives:
        seen, left = lives[-1].evidence_tokens, lives[-1].tokens_to_mask
    raise AttachError(
        f"no mask has been built yet: {seen:.0f} tokens were seen and {seen + left:.0f} are "
        f"needed, so decode at least {left + 1} more"
    )
