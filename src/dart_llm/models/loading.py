"""``load``: a hub id, folder, ``.gguf`` file or ``smollm2-135m`` becomes model and tokenizer.

The module is not called ``load``, for the import of a submodule sets the package's attribute of
that name: ``from dart_llm import load`` would give the module instead of the function.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dart_llm.cache import cache_folder, hub_cache
from dart_llm.errors import ConfigError, LoadError, UnknownName
from dart_llm.files import file_sha256, size_text
from dart_llm.hub import (
    INSTEAD,
    bars,
    check_download,
    hub_failure,
    no_stray_bars,
    not_reached,
    plain,
)
from dart_llm.models.bundled import (
    MEMBER,
    MODEL_HUB_ID,
    MODEL_NAME,
    MODEL_PACKAGE,
    MODEL_VERSION,
    default_folder,
)
from dart_llm.models.checkpoint import (
    Checkpoint,
    Size,
    check_room,
    remember,
    remember_tokenizer,
    stored_size,
    weights_size,
)
from dart_llm.models.devices import memory_failure, placement
from dart_llm.models.gguf import (
    Progress,
    check_architecture,
    convert,
    converted_folder,
    gguf_arguments,
    is_intact,
    read_source,
)
from dart_llm.models.gguf_facts import ARCHITECTURES, left_out
from dart_llm.models.gguf_file import ROUNDED, quick_gguf, read_gguf
from dart_llm.reporting.heartbeat import logged

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger("dart_llm")

DEFAULT = "smollm2-135m"

SHORT_NAMES = (DEFAULT, "smollm2")

LEGACY_HUB_NAMES = ("distilgpt2", "gpt2", "gpt2-large", "gpt2-medium", "gpt2-xl", "openai-gpt")
"""Hub models from before owners were part of the name."""

ONLY_HUB = "applies to hub models only"

CONVERT_UP_TO = 8_000_000_000
"""Bytes of the float32 copy above which a GGUF is read directly, slowly, at every load.

It is for architectures that are not read in blocks: of the others no copy is made.
"""

CONVERTED_PER_SECOND = 30_000_000
"""Bytes of such a copy, roughly."""


def is_default(model: str) -> bool:
    """Whether ``model`` is a short name of the embedded default."""
    return model.lower() in SHORT_NAMES


def _in_folder(folder: Path, name: str, source: str) -> Checkpoint:
    """The checkpoint in a folder, with the record of its conversion if there is one."""
    record = read_source(folder) or {}
    quantisation, sha256 = record.get("quantisation"), record.get("sha256")
    return Checkpoint(name, source, str(folder), folder, quantisation, sha256)


WEIGHTS = ("auto", "file", "dense", *ROUNDED)
"""Formats of weights, which ``load`` explains."""

SUFFIX = ".gguf"

TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"
"""Transformers' name of its warning about a sequence that is longer than the context."""


def resolve(
    model: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    verify: bool = False,
    packed: bool = False,
    say: Progress,
) -> Checkpoint:
    """The checkpoint that ``model`` names.

    Configuration and tokenizer of a ``.gguf`` file are written here; ``packed``: its blocks are
    kept.  The default comes from the cache or through pip.  Raises ``LoadError`` for a path without
    a checkpoint and a default that cannot be fetched, ``UnknownName`` for a name that is neither
    path nor hub id, ``ConfigError`` for a revision of something that has none.
    """
    cache = cache_folder(cache_dir)
    if is_default(model):
        if revision:
            raise ConfigError(f"revision {revision!r} {ONLY_HUB}; {DEFAULT} is pinned")
        folder = default_folder(cache, verify=verify, progress=say)
        file, blocks = Path(MEMBER).name, "as in the file" if packed else "dequantised"
        source = f"{file} of the pip package {MODEL_PACKAGE} {MODEL_VERSION}, {blocks}"
        checkpoint = _in_folder(folder, MODEL_NAME, source)
        return replace(checkpoint, file=folder / file, packed=packed)
    path = Path(model).expanduser()
    if path.exists() and revision:
        raise ConfigError(f"revision {revision!r} {ONLY_HUB}; {model} is a path")
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _gguf(path, cache, verify=verify, packed=packed, say=say)
    if _looks_like_path(model):
        raise LoadError(
            f"there is no file or folder {model}; give a hub id (owner/name), a folder, a .gguf "
            f"file or {DEFAULT}"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model, re.ASCII) and model not in LEGACY_HUB_NAMES:
        unknown = UnknownName("model", model, (*SHORT_NAMES, *LEGACY_HUB_NAMES))
        text, mark = str(unknown).removesuffix("?"), "?" if str(unknown).endswith("?") else ""
        unknown.args = (f"{text}, or a hub id (owner/name), a folder or a .gguf file{mark}",)
        raise unknown
    return hub_checkpoint(model, revision)


def hub_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """A hub model, by its id."""
    return Checkpoint(name=model, source="hub", reference=model, revision=revision)


def _looks_like_path(model: str) -> bool:
    return (
        model.startswith((".", "~", os.sep))
        or model.lower().endswith(".gguf")
        or model.count("/") > 1
        or "\\" in model
    )


def _folder(path: Path) -> Checkpoint:
    if not (path / "config.json").is_file():
        hint = "give the folder that save_pretrained wrote"
        for file in sorted(path.glob("*.gguf"))[:1]:
            hint = f"it contains {file.name}: give {file}"
        raise LoadError(f"{path} is not a checkpoint: it has no config.json; {hint}")
    path = path.resolve()
    return _in_folder(path, path.name, "folder")


def _gguf(path: Path, cache: Path, *, verify: bool, packed: bool, say: Progress) -> Checkpoint:
    """A GGUF file with its cached folder, written if it is missing.

    Of an architecture that is not read in blocks a dense copy, or the file itself if it is large.
    """
    path = path.resolve()
    file = read_gguf(path)
    sha256, in_blocks = file_sha256(path), file.architecture in ARCHITECTURES
    folder = converted_folder(cache, sha256, packed=in_blocks)
    checkpoint = Checkpoint(
        path.stem,
        "gguf file, as it is" if packed else "gguf file, dequantised",
        str(folder),
        path,
        file.quantisation,
        sha256,
        file=path if in_blocks or packed else None,
        packed=packed,
    )
    if is_intact(folder, sha256, full=verify, settings=left_out(file)):
        return checkpoint
    check_architecture(file)
    if file.float32_bytes > CONVERT_UP_TO and not in_blocks:
        say(f"reading {path.name} without a converted copy, which would be large")
        return replace(checkpoint, reference=str(path.parent), arguments=gguf_arguments(file))
    if in_blocks:
        say(f"reading the tokenizer of {path.name}, once (a few seconds)")
    else:
        check_room(path.name, Size(file.float32_bytes, "in float32 to be converted", {}))
        seconds = 5 + file.float32_bytes // CONVERTED_PER_SECOND
        say(f"converting {path.name} to safetensors, once (about {seconds} seconds)")
    convert(file, sha256, cache, {"file": path.name}, packed=in_blocks)
    return checkpoint


DTYPES = {
    "float32": ("float32", "fp32", "float"),
    "float16": ("float16", "fp16", "half"),
    "bfloat16": ("bfloat16", "bf16"),
}


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
    verify: bool = False,
    progress: Progress | None = None,
    check: Check | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, ready for inference, and its tokenizer.

    ``model``: a hub id (``owner/name``), a folder, a ``.gguf`` file, or ``smollm2-135m``.
    ``dtype``: default: the checkpoint's; bfloat16 for a GGUF.  By default, and where the CPU
    emulates products in that dtype, many tokens at a time are computed in float32, and one in its
    dtype.  ``weights``: ``file`` keeps the blocks of a GGUF file on a CPU, and every executor
    reads them; ``q8_0``, ``q4_0``, ``q4_1`` round a checkpoint to such blocks; ``dense`` stores
    every weight in ``dtype``; ``auto``: ``file`` for a GGUF on a CPU without a ``dtype``, else
    ``dense``.  ``device``: ``cpu``, ``cuda:0``, ``0``, ``0,1``, ``mps``, or ``auto`` for GPU 0 if
    there is one; by default the model stays on the CPU or goes where ``device_map`` puts it.
    ``cache_dir`` (else ``DART_CACHE``) moves fetched and converted models and the hub's cache.
    ``verify`` compares the checksums of cached conversions, not only their sizes.  ``progress``
    is called with a line of text at every step.  ``check`` is called with the tokenizer and the
    configuration before weights are read, and may raise an error.

    Raises ``LoadError`` when the checkpoint cannot be read or does not fit, ``UnknownName`` and
    ``ConfigError`` for invalid arguments.
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
        try:
            with bars(shown=progress is None):
                checkpoint = resolve(
                    name,
                    revision=revision,
                    cache_dir=cache_dir,
                    verify=verify,
                    packed=builder.weights == "file",
                    say=say,
                )
        except LoadError as error:
            if not is_default(name):
                raise
            return _default_from_hub(builder, error)
        return builder.build(checkpoint)


def parse_dtype(value: str | torch.dtype | None) -> torch.dtype | str:
    """A torch dtype, or ``"auto"`` for the checkpoint's own; anything else: ``ConfigError``."""
    import torch

    word = str(value or "auto").strip().lower().removeprefix("torch.")
    for name, spellings in DTYPES.items():
        if word in spellings:
            dtype: torch.dtype = getattr(torch, name)
            return dtype
    if word == "auto":
        return word
    raise ConfigError(f"unknown dtype {word!r}; write float32, float16, bfloat16 or auto")


def weight_format(model: str, weights: str | None, *, chosen: bool, away: bool) -> str:
    """The format in which ``load`` stores weights: ``file``, ``dense``, or a type of blocks.

    ``chosen``: the caller gave a dtype; ``away``: the model is not on the CPU.  Raises
    ``ConfigError`` for an unsupported format, ``LoadError`` for a file that cannot be read.
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
    """Why weights cannot be stored in blocks, and the way out; None if they can."""
    from dart_llm.native.build import why_not

    if away:
        return "blocks need the CPU; give device cpu, or weights dense"
    if reason := why_not():
        return f"{reason}; give weights dense"
    if kind in ROUNDED or is_default(model):
        return None
    if _looks_like_path(model) and not Path(model).expanduser().exists():
        return None  # ``resolve`` reports it
    if not is_file:
        return f"{model} is not a GGUF file; write {', '.join(ROUNDED)} to round its weights"
    file = read_gguf(Path(model).expanduser())
    check_architecture(file)
    if file.architecture not in ARCHITECTURES:
        return (
            f"files of architecture {file.architecture} are only read dense; give weights dense, "
            f"or {', '.join(ROUNDED)} to round them again"
        )
    return None


Check = Callable[[Any, Any], None]
"""Raises an error for an unsuitable tokenizer or configuration."""


def _gguf_file(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The file that ``from_pretrained`` reads instead of a folder's, if there is one."""
    return {key: value for key, value in arguments.items() if key == "gguf_file"}


@dataclass
class _Builder:
    """Everything about a load but the checkpoint.  ``weights``: of ``weight_format``."""

    arguments: dict[str, Any]
    trust: bool
    cache: Path | None
    say: Progress
    bars_shown: bool
    instead: str = INSTEAD
    """The way out that is named when the hub cannot be reached."""
    cache_only: bool = False
    """Whether the hub is unreachable."""
    weights: str = "dense"
    check: Check | None = None

    def build(self, checkpoint: Checkpoint) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Read tokenizer and weights; whatever goes wrong becomes one ``LoadError``."""
        on_hub = checkpoint.source == "hub"
        common: dict[str, Any] = {"trust_remote_code": self.trust}
        if on_hub:
            common |= self._from_hub(checkpoint)
        located = self._located(checkpoint) if on_hub else checkpoint
        size = weights_size(located, self.arguments["dtype"], self.weights)
        self._check_room(checkpoint, size)
        self.say(f"loading {checkpoint.name}{f': {size}' if size else ''}")
        from_gguf = "gguf_file" in checkpoint.arguments
        with (
            bars(shown=on_hub or self.bars_shown),
            no_stray_bars() if from_gguf else nullcontext(),
            quick_gguf() if from_gguf else nullcontext(),
        ):
            with self._one_error(checkpoint):
                tokenizer = self._tokenizer(checkpoint, common)
                config = None if self.check is None else self._config(checkpoint, common)
            if self.check is not None:
                self.check(tokenizer, config)
            with self._one_error(checkpoint):
                model = self._model(checkpoint, common)
        if self.arguments["dtype"] == "auto" and "device_map" not in self.arguments:
            from dart_llm.models.float32_products import compute_prompts_in_float32

            compute_prompts_in_float32(model)
        remember(model, self._located(checkpoint) if on_hub else checkpoint)
        remember_tokenizer(model, tokenizer)
        return model, tokenizer

    @contextmanager
    def _one_error(self, checkpoint: Checkpoint) -> Iterator[None]:
        """Whatever goes wrong inside becomes one ``LoadError``."""
        try:
            yield
        except LoadError:
            raise
        except Exception as error:
            raise self._failure(error, checkpoint) from error

    def _from_hub(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` for a hub model; checks the room for it first."""
        needed = check_download(checkpoint.reference, checkpoint.revision, self.cache)
        self.cache_only = needed is None
        if needed:
            if self.arguments["dtype"] == "auto" and self.weights == "dense":
                self._check_room(checkpoint, stored_size(needed))
            self.say(f"downloading {checkpoint.name}: {size_text(needed)}")
        return {
            "revision": checkpoint.revision or "main",
            "cache_dir": self.cache,
            "local_files_only": self.cache_only,
        }

    def _check_room(self, checkpoint: Checkpoint, size: Size | None) -> None:
        """Only for models on the CPU, which use the system's memory."""
        if size is not None and "device_map" not in self.arguments:
            check_room(checkpoint.name, size)

    def _tokenizer(self, checkpoint: Checkpoint, common: dict[str, Any]) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        extra = _gguf_file(checkpoint.arguments)
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                checkpoint.reference, **common, **extra
            )
        except Exception as error:
            if checkpoint.source != "folder" or "trust_remote_code" in str(error):
                raise
            raise LoadError(
                f"{checkpoint.path} has no readable tokenizer; copy the tokenizer files of the "
                "original model into it"
            ) from error
        tokenizer.deprecation_warnings[TOO_LONG] = True  # dart-llm itself refuses it
        return tokenizer

    def _config(self, checkpoint: Checkpoint, common: dict[str, Any]) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(
            checkpoint.reference, **common, **_gguf_file(checkpoint.arguments)
        )

    def _model(self, checkpoint: Checkpoint, common: dict[str, Any]) -> PreTrainedModel:
        from dart_llm.native.memory import out_of_files

        read = self._pretrained if checkpoint.file is None else self._of_file
        model = read(checkpoint, common)
        if checkpoint.packed:
            return model
        model.train(False)
        if self.weights in ROUNDED:
            from dart_llm.models.packed_loading import round_weights

            round_weights(model, self.weights)
        else:
            out_of_files(model)
        return model

    def _pretrained(self, checkpoint: Checkpoint, common: dict[str, Any]) -> PreTrainedModel:
        """The model of a folder, a hub id, or a GGUF file that transformers reads."""
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

    def _of_file(self, checkpoint: Checkpoint, _common: dict[str, Any]) -> PreTrainedModel:
        """The model of a GGUF file, its blocks kept or dequantised."""
        import torch
        from transformers import AutoConfig, GenerationConfig

        from dart_llm.models.packed_loading import load_dense, load_packed

        assert checkpoint.file is not None
        folder = checkpoint.reference
        names = (read_source(Path(folder)) or {}).get("tensors", {})
        arguments = dict(self.arguments)
        dtype: Any = arguments.pop("dtype")
        read = load_packed if checkpoint.packed else load_dense
        model: Any = read(
            checkpoint.file,
            AutoConfig.from_pretrained(folder),
            torch.bfloat16 if dtype == "auto" else dtype,
            names,
            **arguments,
        )
        model.generation_config = GenerationConfig.from_pretrained(folder)
        return model  # type: ignore[no-any-return]

    def _failure(self, error: Exception, checkpoint: Checkpoint) -> LoadError:
        name, text = checkpoint.name, str(error)
        dtype = str(self.arguments["dtype"]).removeprefix("torch.").replace("auto", "it is stored")
        if failure := memory_failure(error, name, dtype):
            return failure
        if checkpoint.source == "hub":
            if failure := hub_failure(error, name, checkpoint.revision, self.instead):
                return failure
            if self.cache_only and isinstance(error, OSError):
                return LoadError(not_reached(name, self.instead))
        if "trust_remote_code" in text:
            return LoadError(
                f"{name} brings its own Python code; read that code, then allow it with "
                "--trust-remote-code"
            )
        return LoadError(f"{name} could not be loaded: {plain(error)}")

    def _located(self, checkpoint: Checkpoint) -> Checkpoint:
        """A hub checkpoint with the commit and the folder that it was read from."""
        from huggingface_hub import try_to_load_from_cache

        name, revision = checkpoint.reference, checkpoint.revision
        config = try_to_load_from_cache(
            name, "config.json", cache_dir=self.cache, revision=revision
        )
        if not isinstance(config, str):
            return checkpoint
        folder = Path(config).parent
        return replace(checkpoint, path=folder, revision=folder.name)


def _default_from_hub(
    builder: _Builder, first: LoadError
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The hub's original of the default, when the cache and pip did not give the pinned copy."""
    builder.say(f"{first}; trying {MODEL_HUB_ID} on the hub")
    builder.instead = "give a local folder or a .gguf file"
    try:
        loaded = builder.build(hub_checkpoint(MODEL_HUB_ID))
    except LoadError as second:
        raise LoadError(
            f"{DEFAULT} is not in the cache and could not be fetched: {first}; {second}"
        ) from first
    logger.warning("%s: loaded the hub's original %s instead (%s)", DEFAULT, MODEL_HUB_ID, first)
    return loaded
