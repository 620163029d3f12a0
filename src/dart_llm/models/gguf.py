"""Converted GGUF files: written once, and cached by the file's checksum.

For an architecture that is read in blocks, a folder ``gguf-<sha256>-packed`` has configuration and
tokenizer; the weights are read from the file at every load, also where they are dequantised.  For
any other, a folder ``gguf-<sha256>`` also has a dense copy in float32, as transformers reads it.
The configuration states bfloat16, so that the default load is bfloat16 and float32 is exact.

A folder is complete or absent: it is written in a scratch folder and renamed.  ``source.json``,
written last, names the origin of the file, its quantisation and every file of the folder with size
and sha256.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dart_llm.cache import SCRATCH, make_folder, require_space, sweep, sync
from dart_llm.errors import LoadError
from dart_llm.files import file_sha256
from dart_llm.hub import no_stray_bars, plain
from dart_llm.models.devices import memory_failure
from dart_llm.models.gguf_facts import ARCHITECTURES, Settings, check_facts, complete, left_out
from dart_llm.models.gguf_file import GgufFile, quick_gguf
from dart_llm.models.packed_loading import check_fit, empty_model

Progress = Callable[[str], None]
FILE_NAMES = {"mistral": "llama"}
"""Model types whose tensors are named as another's, where transformers does not know it."""

FORMAT = 1
SOURCE = "source.json"

PACKED_SPACE = 50_000_000
"""Bytes of configuration and tokenizer, with room for a large vocabulary."""


def converted_folder(cache: Path, sha256: str, *, packed: bool = False) -> Path:
    """The folder of the dense copy of the GGUF with this checksum.

    ``packed``: the folder of configuration and tokenizer of a file that is read in blocks.
    """
    return cache / (f"gguf-{sha256}-packed" if packed else f"gguf-{sha256}")


def read_source(folder: Path) -> dict[str, Any] | None:
    """The record of a converted folder; ``None`` for any other folder or a damaged record."""
    try:
        record = json.loads((folder / SOURCE).read_text())
    except (OSError, ValueError):
        return None
    keys = {"format", "sha256", "quantisation", "files"}
    if not isinstance(record, dict) or not keys <= record.keys():
        return None
    files = record["files"]
    each = files.values() if isinstance(files, dict) else [None]
    whole = all(isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in each)
    return record if whole else None


def is_intact(
    folder: Path, sha256: str, *, full: bool = False, settings: Settings | None = None
) -> bool:
    """Whether ``folder`` is complete: sizes always, checksums of all files if ``full``.

    ``settings``: those that its configuration must have in addition to what transformers reads.
    """
    record = read_source(folder)
    if record is None or record["format"] != FORMAT or record["sha256"] != sha256:
        return False
    if settings is not None and record.get("settings", {}) != settings:
        return False

    def is_whole(path: Path, expected: Mapping[str, Any]) -> bool:
        if not path.is_file() or path.stat().st_size != expected["size"]:
            return False
        return not full or file_sha256(path) == expected["sha256"]

    return all(is_whole(folder / name, expected) for name, expected in record["files"].items())


def check_architecture(file: GgufFile) -> None:
    """Raise ``LoadError`` for an architecture whose files transformers does not read."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    # transformers writes qwen2_moe for qwen2moe
    supported = {re.sub("[_-]", "", name) for name in GGUF_SUPPORTED_ARCHITECTURES}
    if re.sub("[_-]", "", file.architecture) not in supported:
        raise LoadError(
            f"{file.path.name} is of architecture {file.architecture}, whose GGUF files "
            "transformers does not read; give the model itself, a folder or hub id"
        )


def convert(
    file: GgufFile,
    sha256: str,
    cache: Path,
    origin: Mapping[str, str],
    *,
    packed: bool = False,
) -> Path:
    """Write the folder of ``file``, with a dense copy unless ``packed``, and return it.

    ``origin`` is added to ``source.json``.  With ``packed`` a file in a scratch folder of ``cache``
    moves into the folder.  Another process may do the same at the same time: the first one wins,
    and both return a complete folder.  Raises ``LoadError`` when the file cannot be read, or when
    disk or cache folder do not allow it.
    """
    sweep(make_folder(cache))
    settings, name = left_out(file), file.path.name
    space = PACKED_SPACE if packed else file.float32_bytes
    what = "what belongs to" if packed else "the converted copy of"
    require_space(space, cache, f"{what} {name}")
    with scratch_folder(cache) as scratch:
        fresh = scratch / "model"
        fresh.mkdir()
        try:
            with no_stray_bars(), quick_gguf():
                names = (_write_packed if packed else _write_dense)(file, fresh)
        except LoadError:
            raise
        except Exception as error:
            raise memory_failure(error, name, "float32") or LoadError(
                f"{name} could not be converted: {plain(error)}"
            ) from error
        record = {
            "format": FORMAT,
            **origin,
            "sha256": sha256,
            "quantisation": file.quantisation,
            "tensor_types": file.types,
            **({"tensors": names} if names else {}),
            **({"settings": settings} if settings else {}),
            "files": _inventory(fresh),
        }
        (fresh / SOURCE).write_text(json.dumps(record, indent=2) + "\n")
        folder = converted_folder(cache, sha256, packed=packed)
        publish(fresh, folder, lambda path: is_intact(path, sha256, full=True, settings=settings))
    return folder


def gguf_arguments(file: GgufFile) -> dict[str, Any]:
    """Keyword arguments that make ``from_pretrained`` read ``file`` as a dense model."""
    from transformers import GgufConfig

    config = {"config": _config(file)} if left_out(file) else {}
    return {
        "gguf_file": file.path.name,
        "quantization_config": GgufConfig(dequantize=True),
        **config,
    }


def _config(file: GgufFile) -> Any:
    """The configuration of a GGUF file, with what transformers leaves out."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(file.path.parent), gguf_file=file.path.name)
        return complete(config, left_out(file))
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"{file.path.name} could not be read: {plain(error)}") from error


@contextmanager
def scratch_folder(cache: Path) -> Iterator[Path]:
    """A folder inside ``cache`` that is gone after the block."""
    with tempfile.TemporaryDirectory(dir=cache, prefix=SCRATCH, ignore_cleanup_errors=True) as name:
        yield Path(name)


def _write_dense(file: GgufFile, folder: Path) -> dict[str, str]:
    """No names: the folder uses transformers' names."""
    import torch
    from transformers import AutoModelForCausalLM

    gguf = file.path
    if file.architecture in ARCHITECTURES:
        _checked(file)  # whose sentences name the tensor
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), dtype=torch.float32, output_loading_info=True, **gguf_arguments(file)
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise LoadError(
            f"{gguf.name} is missing {len(missing)} of the model's weights: {missing[0]}"
        )
    model.save_pretrained(folder)
    _write_rest(gguf, model.config, folder)
    return {}


def _write_packed(file: GgufFile, folder: Path) -> dict[str, str]:
    """Names in the file -> names of the model's parameters."""
    gguf, (model, names) = file.path, _checked(file)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    _write_rest(gguf, model.config, folder)
    if gguf.parent.name.startswith(SCRATCH):
        gguf.rename(folder / gguf.name)
    return names


def _checked(file: GgufFile) -> tuple[Any, dict[str, str]]:
    """The model of a file without its weights, and the names that the file has for them.

    Raises ``LoadError`` where its facts and tensors do not fit.
    """
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    check_facts(file)
    config = _config(file)
    model: Any = empty_model(config)
    make: Any = TensorProcessor
    names = dict(get_gguf_hf_weights_map(model, make(), FILE_NAMES.get(config.model_type)))
    if stray := [name for name in file.tensors if name.endswith(".bias") and name not in names]:
        raise LoadError(
            f"{file.path.name} has {stray[0]}, but transformers' {type(model).__name__} has no "
            "such bias: without it, it would be another model"
        )
    check_fit(file.path.name, model, file.of(names))
    return model, names


def _write_rest(gguf: Path, config: Any, folder: Path) -> None:
    """The tokenizer, and a configuration that states bfloat16."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    tokenizer.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values.pop("_model_name_or_path", None)
    values["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def _inventory(folder: Path) -> dict[str, dict[str, Any]]:
    mode = folder.stat().st_mode & 0o666  # safetensors writes 0600; a shared cache needs the umask
    files = {}
    for path in sorted(folder.iterdir()):
        path.chmod(mode)
        files[path.name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    return files


def publish(fresh: Path, folder: Path, intact: Callable[[Path], bool]) -> None:
    """Move ``fresh`` to ``folder``, over a damaged copy but not over an ``intact`` one.

    Raises ``LoadError`` when the folder can be neither written nor replaced.
    """
    problem: OSError | None = None
    for path in (*fresh.rglob("*"), fresh):  # or a power cut leaves names without content
        sync(path)
    for _ in range(3):
        try:
            fresh.rename(folder)
            sync(folder.parent)
            return
        except OSError as error:
            problem = error
        if intact(folder):
            return
        try:
            folder.rename(fresh.parent / f"damaged-{os.urandom(4).hex()}")
        except OSError as error:  # another process moved it first, or nothing may be renamed here
            problem = error
    raise LoadError(f"the model could not be put into {folder}: {problem}")
