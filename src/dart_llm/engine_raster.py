"""Masks in a form that a small picture needs: which parts of each layer are kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dart_llm.engine_records import BINS, Mask
from dart_llm.masks import LayerMask
from dart_llm.token_select import TokenMask


def mask_record(
    masks: Sequence[LayerMask | None], widths: Sequence[int], number: int, token: int
) -> Mask:
    """The record of ``masks`` (None: the layer is dense); ``widths``: neurons per layer."""
    shares = tuple(
        1.0 if mask is None else mask.kept / width
        for mask, width in zip(masks, widths, strict=True)
    )
    bins = min(BINS, *widths)
    rows = tuple(
        _row(mask, width, bins, share)
        for mask, width, share in zip(masks, widths, shares, strict=True)
    )
    return Mask(number, token, shares, rows)


def _row(mask: LayerMask | None, width: int, bins: int, share: float) -> bytes:
    if mask is None or isinstance(mask, TokenMask):
        return bytes([round(255 * share)]) * bins
    kept = torch.bincount(mask.ids.cpu() * bins // width, minlength=bins).tolist()
    edges = [-(-width * at // bins) for at in range(bins + 1)]  # the first neuron of each group
    return bytes(
        round(255 * count / (end - start))
        for count, start, end in zip(kept, edges, edges[1:], strict=False)
    )
