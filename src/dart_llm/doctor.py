"""``dart-llm doctor``: what this installation has and lacks."""

from __future__ import annotations

import importlib.util
import os
import shutil
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dart_llm.cache import cache_folder
from dart_llm.provenance import machine, versions

EXTRAS: dict[str, tuple[str, ...]] = {
    "eval": ("datasets", "lm_eval", "rouge_score", "scipy"),
    "plots": ("matplotlib", "cmcrameri", "plotly"),
    "drift": ("sentence_transformers", "sacrebleu", "bert_score", "rouge_score", "scipy"),
    "native": ("ninja",),
    "serve": ("fastapi", "prometheus_client", "uvicorn"),
    "cluster": ("ray",),
    "trackio": ("trackio",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "dev": ("pytest", "hypothesis", "mypy", "ruff", "openai", "schemathesis", "httpx"),
}

NO_COMPILER = "none: decoding falls back to executor compact, slower"


def examine(cache_dir: str | None = None) -> dict[str, Any]:
    """Everything that explains why a run works or does not; a token's value is never read out."""
    import torch

    from dart_llm.native_build import state as native_state

    cache = cache_folder(cache_dir)
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    return {
        "versions": versions(),
        "machine": machine(),
        "devices": _devices(torch),
        "dtypes": _dtypes(torch),
        "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"),
        "native_kernels": native_state(cache_dir),
        "cache": str(cache),
        "free_disk_gib": round(shutil.disk_usage(existing).free / 2**30, 1),
        "hub_token": _has_token(),
        "hub_offline": os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"),
        "extras_missing": {extra: lacking for extra in EXTRAS if (lacking := _lacking(extra))},
        "summary": metadata("dart-llm")["Summary"],
    }


def _devices(torch: Any) -> list[str]:
    found = ["cpu"]
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        found += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(count)]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _dtypes(torch: Any) -> list[str]:
    """Dtypes in which a small matrix product works on the CPU."""
    found = []
    for name in ("float32", "float16", "bfloat16"):
        try:
            a = torch.ones(2, 2, dtype=getattr(torch, name))
            (a @ a).sum().item()
        except RuntimeError:
            continue
        found.append(name)
    return found


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _lacking(extra: str) -> list[str]:
    return [
        name
        for name in EXTRAS[extra]
        if importlib.util.find_spec(name) is None and not (name == "ninja" and shutil.which(name))
    ]


def print_report(found: dict[str, Any]) -> None:
    """The findings as a table on stdout."""
    table = Table(title="dart-llm doctor", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("found")
    for name, value in found["versions"].items():
        table.add_row(name, str(value or "missing"))
    table.add_row("system", f"{found['machine']['system']}, {found['machine']['processor']}")
    memory = found["machine"]["memory_gib"]
    table.add_row("cores, memory", f"{found['machine']['cores']}, {memory} GiB")
    table.add_row("devices", ", ".join(found["devices"]))
    table.add_row("dtypes on the CPU", ", ".join(found["dtypes"]))
    compiler = found["compiler"]
    table.add_row("C++ compiler", Path(compiler).name if compiler else NO_COMPILER)
    table.add_row("native CPU kernels", found["native_kernels"])
    table.add_row("cache", found["cache"])
    table.add_row("free disk", f"{found['free_disk_gib']} GiB")
    table.add_row("hub token", "present" if found["hub_token"] else "none (public models only)")
    table.add_row("hub", "offline (HF_HUB_OFFLINE)" if found["hub_offline"] else "online")
    table.add_row("OMP_WAIT_POLICY", found["machine"]["omp_wait_policy"] or "not set")
    for extra, lacking in found["extras_missing"].items():
        table.add_row(
            f"extra {extra}",
            f"lacks {', '.join(lacking)}: pip install 'dart-llm[{extra}]'",
        )
    if not found["extras_missing"]:
        table.add_row("extras", "all present")
    Console(markup=False).print(table)
