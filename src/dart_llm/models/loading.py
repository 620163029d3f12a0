"""``load`` reads model and tokenizer from a hub id, folder, GGUF file or ``smollm2-135m``.

Quantised weights are stored as in GGUF files, in *blocks*: groups of weights that share a scale.
The module is not called ``load``, because ``from dart_llm import load`` could then return the
module instead of the function.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dart_llm import hub
from dart_llm.cache import cache_folder, hub_cache
from dart_llm.errors import ConfigError, LoadError, UnknownName, chain
from dart_llm.files import file_sha256, size_text
from dart_llm.models import cached
from dart_llm.models.cached import Progress
from dart_llm.models.checkpoint import (
    Checkpoint,
    Size,
    check_room,
    remember,
    remember_tokenizer,
    weights_size,
)
from dart_llm.models.gguf_file import ARCHITECTURES, ROUNDED, left_out, quick_gguf, read_gguf
from dart_llm.reporting.console import logged

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger("dart_llm")

DEFAULT = "smollm2-135m"

SHORT_NAMES = (DEFAULT, "smollm2")

LEGACY_HUB_NAMES = ("distilgpt2", "gpt2", "gpt2-large", "gpt2-medium", "gpt2-xl", "openai-gpt")
"""Hub models whose ids have no owner."""

WEIGHTS = ("auto", "file", "dense", *ROUNDED)
"""Values of the argument ``weights``, which ``load`` explains."""

TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"
"""The key of transformers' warning about sequences longer than the context."""

Check = Callable[[Any, Any], None]
"""A function of tokenizer and configuration that raises an error if one is unsuitable."""


def is_default(model: str) -> bool:
    """Whether ``model`` is a short name of the default model."""
    return model.lower() in SHORT_NAMES


def resolve(
    model: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    packed: bool = False,
    say: Progress,
) -> Checkpoint:
    """The checkpoint that ``model`` names.

    For a GGUF file, configuration and tokenizer are written to the cache; if ``packed``, the file's
    weights stay quantised.  The default model comes from the cache or through pip.  Raises
    ``LoadError`` for a path without a checkpoint or if the default model cannot be fetched,
    ``UnknownName`` for a name that is neither a path nor a hub id, and ``ConfigError`` for a
    revision of a model that is not on the hub.
    """
    cache, path = cache_folder(cache_dir), Path(model).expanduser()
    if revision and (is_default(model) or path.exists()):
        reason = f"{DEFAULT} is pinned" if is_default(model) else f"{model} is a path"
        raise ConfigError(f"revision {revision!r} applies to hub models only; {reason}")
    if is_default(model):
        folder = cached.default_folder(cache, progress=say)
        name, release = Path(cached.MEMBER).name, f"{cached.MODEL_PACKAGE} {cached.MODEL_VERSION}"
        blocks = "as in the file" if packed else "dequantised"
        source = f"{name} of the pip package {release}, {blocks}"
        checkpoint = _in_folder(folder, cached.MODEL_NAME, source)
        return replace(checkpoint, file=folder / name, packed=packed)
    if path.is_dir():
        path = path.resolve()
        if not (path / "config.json").is_file():
            hint = "give the folder that save_pretrained wrote"
            for file in sorted(path.glob("*.gguf"))[:1]:
                hint = f"it contains {file.name}: give {file}"
            raise LoadError(f"{path} is not a checkpoint: it has no config.json; {hint}")
        return _in_folder(path, path.name, "folder")
    if path.is_file():
        return _gguf(path.resolve(), cache, packed=packed, say=say)
    if _looks_like_path(model):
        raise LoadError(
            f"there is no file or folder {model}; give a hub id (owner/name), a folder, a .gguf "
            f"file or {DEFAULT}"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model, re.ASCII) and model not in LEGACY_HUB_NAMES:
        others = "or a hub id (owner/name), a folder or a .gguf file"
        raise UnknownName("model", model, (*SHORT_NAMES, *LEGACY_HUB_NAMES), others)
    return Checkpoint(name=model, source="hub", reference=model, revision=revision)


def _looks_like_path(model: str) -> bool:
    has_parts = model.startswith((".", "~", os.sep)) or model.count("/") > 1 or "\\" in model
    return has_parts or model.lower().endswith(".gguf")


def _in_folder(folder: Path, name: str, source: str) -> Checkpoint:
    """The checkpoint in a folder, with data from its ``source.json`` if there is one."""
    record = cached.read_source(folder) or {}
    quantisation, sha256 = record.get("quantisation"), record.get("sha256")
    return Checkpoint(name, source, str(folder), folder, quantisation, sha256)


def _gguf(path: Path, cache: Path, *, packed: bool, say: Progress) -> Checkpoint:
    """The checkpoint of a GGUF file; the file's folder in the cache is written if missing.

    If the architecture is not in ``ARCHITECTURES``, transformers reads the file itself.
    """
    from transformers import GgufConfig

    file, sha256 = read_gguf(path), file_sha256(path)
    source = "gguf file, as it is" if packed else "gguf file, dequantised"
    checkpoint = Checkpoint(path.stem, source, str(path.parent), path, file.quantisation, sha256)
    cached.check_architecture(file)
    if file.architecture not in ARCHITECTURES:
        arguments = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
        return replace(checkpoint, arguments=arguments)
    folder = cached.converted_folder(cache, sha256)
    if not cached.is_intact(folder, sha256, settings=left_out(file)):
        say(f"reading the tokenizer of {path.name}, once (a few seconds)")
        cached.convert(file, sha256, cache, {"file": path.name})
    return replace(checkpoint, reference=str(folder), file=path, packed=packed)


def load(
    model: str | Path = DEFAULT,
    *,
    dtype: str | torch.dtype | None = None,
    weights: str | None = None,
    device: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    check: Check | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, ready for inference, and its tokenizer.

    ``model``: a hub id (``owner/name``), a folder, a ``.gguf`` file, or ``smollm2-135m``.
    ``dtype``: by default the checkpoint's, or bfloat16 for a GGUF file.  Without ``dtype``, prompts
    are computed in float32 on CPUs that emulate products in the checkpoint's dtype.
    ``weights``: ``file`` keeps a GGUF file's quantised weights (only on the CPU; every executor
    reads them); ``q8_0``, ``q4_0`` and ``q4_1`` round the weights to blocks of that type; ``dense``
    stores every weight in ``dtype``; ``auto`` (default) means ``file`` for a GGUF file on the CPU
    if no ``dtype`` is given, else ``dense``.
    ``device``: ``cpu``, ``cuda:0``, ``0``, ``mps``, or ``auto`` for GPU 0 if there is one; by
    default the CPU, or the devices of ``device_map``.  ``cache_dir`` (default: ``DART_CACHE``): the
    folder for fetched and converted models and for the hub's cache.  ``progress`` is called with a
    line of text at every step.  ``check`` is called with the tokenizer and the configuration before
    weights are read, and may raise an error.

    Raises ``LoadError`` when the checkpoint cannot be read or does not fit in memory, and
    ``UnknownName`` and ``ConfigError`` for invalid arguments.
    """
    name = str(model)
    with nullcontext(progress) if progress else logged(logger, f"loading {name}") as say:
        arguments: dict[str, Any] = {"dtype": parse_dtype(dtype), **placement(device, device_map)}
        if attn_implementation:
            arguments["attn_implementation"] = attn_implementation
        chosen, away = dtype is not None, "device_map" in arguments
        builder = _Builder(
            arguments,
            trust_remote_code,
            hub_cache(cache_dir),
            say,
            bars_shown=progress is None,
            weights=weight_format(name, weights, chosen=chosen, away=away),
            check=check,
        )
        where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
        with hub.bars(shown=progress is None):
            checkpoint = resolve(name, **where, packed=builder.weights == "file", say=say)
        return builder.build(checkpoint)


def parse_dtype(value: str | torch.dtype | None) -> torch.dtype | str:
    """A torch dtype, or ``"auto"`` (the checkpoint's); raises ``ConfigError`` for other values."""
    import torch

    word = str(value or "auto").strip().lower().removeprefix("torch.")
    short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    dtype = word if word == "auto" else getattr(torch, short.get(word, word), None)
    if dtype not in ("auto", torch.float32, torch.float16, torch.bfloat16):
        raise ConfigError(f"unknown dtype {word!r}; write float32, float16, bfloat16 or auto")
    return dtype


def weight_format(model: str, weights: str | None, *, chosen: bool, away: bool) -> str:
    """The format in which ``load`` stores weights: ``file``, ``dense``, or a block type.

    ``chosen``: True if the caller set a dtype.  ``away``: True if the model is not on the CPU.
    Raises ``ConfigError`` for an unsupported format, ``LoadError`` for a file that cannot be read.
    """
    kind = str(weights or "auto").strip().lower()
    if kind not in WEIGHTS:
        names = f"{', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]}"
        raise ConfigError(f"unknown weights {weights!r}; write {names}")
    is_file = is_default(model) or Path(model).expanduser().is_file()
    if kind == "dense" or (kind == "auto" and (chosen or away or not is_file)):
        return "dense"
    reason = _blocks_unsupported_reason(kind, model, is_file, away)
    if reason and kind != "auto":
        raise ConfigError(f"weights {kind!r} cannot be used: {reason}")
    return "dense" if reason else "file" if kind == "auto" else kind


def _blocks_unsupported_reason(kind: str, model: str, is_file: bool, away: bool) -> str | None:
    """Why weights cannot be quantised as ``kind``, and what to do instead; None if they can."""
    from dart_llm.native.build import why_not

    if away:
        return "quantised weights need the CPU; give device cpu, or weights dense"
    if reason := why_not():
        return f"{reason}; give weights dense"
    if kind in ROUNDED or is_default(model):
        return None
    if _looks_like_path(model) and not Path(model).expanduser().exists():
        return None  # ``resolve`` reports it
    if not is_file:
        return f"{model} is not a GGUF file; write {', '.join(ROUNDED)} to round its weights"
    file = read_gguf(Path(model).expanduser())
    cached.check_architecture(file)
    if file.architecture not in ARCHITECTURES:
        return (
            f"files with architecture {file.architecture} can only be read dense; give weights "
            f"dense, or {', '.join(ROUNDED)} to round them again"
        )
    return None


@dataclass
class _Builder:
    """Loads a checkpoint with the settings of one call of ``load``.

    ``arguments``: arguments of ``from_pretrained``.  ``weights``: the result of ``weight_format``.
    """

    arguments: dict[str, Any]
    trust: bool
    cache: Path | None
    say: Progress
    bars_shown: bool
    cache_only: bool = False
    """True if the hub is unreachable, so that only cached files can be used."""
    weights: str = "dense"
    check: Check | None = None

    def build(self, checkpoint: Checkpoint) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Read tokenizer and weights; raise ``LoadError`` if either fails."""
        from transformers import AutoConfig

        common: dict[str, Any] = {"trust_remote_code": self.trust}
        on_cpu = "device_map" not in self.arguments
        if on_hub := checkpoint.source == "hub":
            common |= self._from_hub(checkpoint, on_cpu)
        located = self._located(checkpoint) if on_hub else checkpoint
        size = weights_size(located, self.arguments["dtype"], self.weights)
        if size is not None and on_cpu:
            check_room(checkpoint.name, size)
        self.say(f"loading {checkpoint.name}{f': {size}' if size else ''}")
        file = {key: v for key, v in checkpoint.arguments.items() if key == "gguf_file"}
        with (
            hub.bars(shown=on_hub or self.bars_shown),
            hub.no_stray_bars() if file else nullcontext(),
            quick_gguf() if file else nullcontext(),
        ):
            with self._one_error(checkpoint):
                tokenizer = self._tokenizer(checkpoint, {**common, **file})
            if self.check is not None:
                with self._one_error(checkpoint):
                    config = AutoConfig.from_pretrained(checkpoint.reference, **common, **file)
                self.check(tokenizer, config)
            with self._one_error(checkpoint):
                model = self._model(checkpoint, common)
        if on_cpu and self.arguments["dtype"] == "auto":
            from dart_llm.models.float32_products import compute_prompts_in_float32

            compute_prompts_in_float32(model)
        remember(model, self._located(checkpoint) if on_hub else checkpoint)
        remember_tokenizer(model, tokenizer)
        return model, tokenizer

    @contextmanager
    def _one_error(self, checkpoint: Checkpoint) -> Iterator[None]:
        """Turn every exception inside the block into a ``LoadError``."""
        try:
            yield
        except LoadError:
            raise
        except Exception as error:
            raise self._failure(error, checkpoint) from error

    def _from_hub(self, checkpoint: Checkpoint, on_cpu: bool) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` for a hub model; checks free disk and memory first."""
        needed = hub.check_download(checkpoint.reference, checkpoint.revision, self.cache)
        self.cache_only = needed is None
        if needed:
            if on_cpu and self.arguments["dtype"] == "auto" and self.weights == "dense":
                check_room(checkpoint.name, Size(needed, "as stored"))
            self.say(f"downloading {checkpoint.name}: {size_text(needed)}")
        return {
            "revision": checkpoint.revision or "main",
            "cache_dir": self.cache,
            "local_files_only": self.cache_only,
        }

    def _tokenizer(self, checkpoint: Checkpoint, extra: dict[str, Any]) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            checkpoint.reference, **extra
        )
        tokenizer.deprecation_warnings[TOO_LONG] = True  # dart-llm raises an error instead
        return tokenizer

    def _model(self, checkpoint: Checkpoint, common: dict[str, Any]) -> PreTrainedModel:
        from dart_llm.models.packed_loading import round_weights
        from dart_llm.native.memory import out_of_files

        if checkpoint.file is not None:
            model = self._of_file(checkpoint, checkpoint.file)
        else:
            model = self._pretrained(checkpoint, common)
        model.train(False)
        if self.weights in ROUNDED:
            round_weights(model, self.weights)
        elif not checkpoint.packed:
            out_of_files(model)
        return model

    def _pretrained(self, checkpoint: Checkpoint, common: dict[str, Any]) -> PreTrainedModel:
        """The model in a folder, on the hub, or in a GGUF file that transformers reads."""
        import torch
        from transformers import AutoModelForCausalLM

        arguments = {**self.arguments, **checkpoint.arguments, **common}
        if "gguf_file" in checkpoint.arguments and arguments["dtype"] == "auto":
            arguments["dtype"] = torch.bfloat16
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.reference, output_loading_info=True, **arguments
        )
        model: PreTrainedModel
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise LoadError(
                f"{checkpoint.name} is missing {len(missing)} of the model's weights, such as "
                f"{missing[0]}; it is incomplete, or not a causal language model"
            )
        return model

    def _of_file(self, checkpoint: Checkpoint, file: Path) -> PreTrainedModel:
        """The model in a GGUF file that dart-llm reads; weights stay quantised if ``packed``."""
        import torch
        from transformers import AutoConfig, GenerationConfig

        from dart_llm.models.packed_loading import load_gguf

        folder, arguments = checkpoint.reference, dict(self.arguments)
        names = (cached.read_source(Path(folder)) or {}).get("tensors", {})
        if arguments["dtype"] == "auto":
            arguments["dtype"] = torch.bfloat16
        config = AutoConfig.from_pretrained(folder)
        model: Any = load_gguf(file, config, names, packed=checkpoint.packed, **arguments)
        model.generation_config = GenerationConfig.from_pretrained(folder)
        return model  # type: ignore[no-any-return]

    def _failure(self, error: Exception, checkpoint: Checkpoint) -> LoadError:
        name = checkpoint.name
        dtype = str(self.arguments["dtype"]).removeprefix("torch.").replace("auto", "it is stored")
        if failure := memory_failure(error, name, dtype):
            return failure
        if checkpoint.source == "hub":
            if failure := hub.hub_failure(error, name, checkpoint.revision):
                return failure
            if self.cache_only and isinstance(error, OSError):
                return LoadError(hub.not_reached(name))
        if "trust_remote_code" in str(error):
            return LoadError(
                f"{name} contains Python code; read that code, then allow it with "
                "--trust-remote-code"
            )
        return LoadError(f"{name} could not be loaded: {hub.plain(error)}")

    def _located(self, checkpoint: Checkpoint) -> Checkpoint:
        """``checkpoint`` with the commit and folder in the hub's cache; unchanged if not cached."""
        from huggingface_hub import try_to_load_from_cache

        name, revision = checkpoint.reference, checkpoint.revision
        config = try_to_load_from_cache(
            name, "config.json", cache_dir=self.cache, revision=revision
        )
        if not isinstance(config, str):
            return checkpoint
        folder = Path(config).parent
        return replace(checkpoint, path=folder, revision=folder.name)


# The device on which a model is loaded.


def parse_device(text: str | None) -> str:
    """The device that ``text`` names on this machine, as torch spells it: ``cuda:0``, ``cpu``.

    ``None``, ``""`` and ``auto`` mean GPU 0 if there is one, else the CPU.  If a GPU is requested
    and the machine has none, a warning is logged and the CPU is used.  Raises ``ConfigError`` for
    other text, and for the index of a GPU that does not exist.
    """
    import torch

    word = (text or "auto").strip().lower()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if word == "cpu" or (word == "auto" and not count):
        return "cpu"
    if word == "mps" and torch.backends.mps.is_available():
        return word
    match = re.fullmatch(r"auto|mps|cuda|(?:cuda:)?(\d+)", word)
    if match is None:
        raise ConfigError(f"{text!r} is not a device; write 0, cuda:0, cpu, mps or auto")
    if word == "mps" or not count:
        logger.warning("device %s: PyTorch finds no such device here; using the CPU", word)
        return "cpu"
    index = int(match[1] or 0)
    if index >= count:
        raise ConfigError(
            f"GPU {index} of device {text!r} does not exist: this machine has {count} "
            f"(0 to {count - 1})"
        )
    return f"cuda:{index}"


def placement(device: str | None, device_map: str | dict[str, Any] | None) -> dict[str, Any]:
    """Keyword arguments with which ``from_pretrained`` loads a model on the requested device.

    Without ``device`` and ``device_map`` the model stays on the CPU, as in transformers, so that it
    accepts the tokenizer's tensors unchanged.
    """
    if device and device_map:
        raise ConfigError("device and device_map exclude each other; give one of them")
    if isinstance(device_map, str) and device_map.lstrip().startswith("{"):
        try:
            device_map = json.loads(device_map)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"device map {device_map!r} is not JSON ({error.msg} at character {error.pos}); "
                'write auto, or a table such as {"model.layers.0": 0, "": "cpu"}'
            ) from None
    if device_map:
        return {"device_map": device_map}
    chosen = parse_device(device or "cpu")
    return {} if chosen == "cpu" else {"device_map": {"": chosen}}


def memory_failure(error: BaseException, model: str, dtype: str) -> LoadError | None:
    """A ``LoadError`` with next steps if ``error`` means that memory ran out, else ``None``."""
    for cause in chain(error):
        full = re.search("out of memory|can't allocate memory", str(cause), re.IGNORECASE)
        if isinstance(cause, MemoryError) or (isinstance(cause, RuntimeError) and full):
            return LoadError(
                f"{model} does not fit in memory as {dtype}; try --dtype bfloat16, a smaller "
                "batch, a shorter --prompt-length, or --device-map auto to spread it over "
                "several devices"
            )
    return None
