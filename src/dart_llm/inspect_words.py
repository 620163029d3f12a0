"""One plain sentence per section of an inspection, made of its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dart_llm.sentences import percent

Record = Mapping[str, Any]


def sentences(sections: Record) -> dict[str, str]:
    """A sentence for every section that is there."""
    return {name: WORDS[name](data) for name, data in sections.items()}


def _ends(values: Sequence[float], write: Callable[[float], str]) -> str:
    """ "0.1 (layer 3) to 0.9 (layer 7)"."""
    low, high = values.index(min(values)), values.index(max(values))
    return f"{write(values[low])} (layer {low}) to {write(values[high])} (layer {high})"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _layers(data: Record) -> str:
    change = [layer["residual"]["change"]["median"] for layer in data["layers"]]
    cosine = [layer["residual"]["cosine"]["median"] for layer in data["layers"]]
    return (
        f"The FFNs change the residual stream by {_ends(change, _two)} of its length, and leave a "
        f"cosine of {_ends(cosine, _two)} between before and after (medians over tokens)."
    )


def _weights(data: Record) -> str:
    down = [layer["down"]["median"] for layer in data["weights"]["layers"]]
    found = f"Half of a layer's neurons have output columns longer than {_ends(down, _two)}."
    if not data["activations"]:
        return found
    holds = [layer["holds"] for layer in data["activations"]]
    return f"{found} 90 % of a token's squared activations lie in {_ends(holds, percent)} of them."


def _neurons(data: Record) -> str:
    held = [layer["concentration"]["0.01"] for layer in data["layers"]]
    return f"The strongest 1 % of the neurons hold {_ends(held, percent)} of a layer's scores."


def _overlap(data: Record) -> str:
    mean = {key: f"{value:.3f}" for key, value in data["mean"].items()}
    return (
        f"With {percent(data['removed'])} removed, the neurons kept for A and for B have a Jaccard "
        f"of {mean['jaccard']}, where chance gives {mean['chance']}; with half the evidence it is "
        f"{mean['same_text']} within one text and {mean['across']} across the two."
    )


def _ablation(data: Record) -> str:
    own = {row["text"]: row for row in data["rows"] if row["arm"] == "a_only"}
    if not own["A"]["neurons"]:
        return "A and B have the same strongest neurons: there is nothing to remove."
    parts = []
    for label, row in own.items():
        rise, random = row["loss"] - row["dense_loss"], row["random_loss"] - row["dense_loss"]
        parts.append(
            f"on {label} by {rise:+.3f} nats per token (as many random ones {random:+.3f})"
        )
    a, b = (own[label]["over_dense"] for label in "AB")
    clear = "; the intervals overlap"
    if not a or not b:
        clear = "; no intervals: this needs scipy (pip install 'dart-llm[drift]')"
    elif a["low"] > b["high"] or a["high"] < b["low"]:
        clear = "; the intervals do not overlap"
    share = percent(own["A"]["achieved_sparsity"])
    return (
        f"Without A's own neurons ({share} of all) the loss changes {' and '.join(parts)}{clear}."
    )


def _space(data: Record) -> str:
    cosine = [layer["cosine"] for layer in data["layers"]]
    return (
        f"The mean vectors of A and B have a cosine of {_ends(cosine, _two)}; the first "
        f"{data['sinks']} tokens are left out."
    )


WORDS: dict[str, Callable[[Record], str]] = {
    "layers": _layers,
    "weights": _weights,
    "neurons": _neurons,
    "overlap": _overlap,
    "ablation": _ablation,
    "space": _space,
}
