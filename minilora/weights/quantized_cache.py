"""4-bit copies of base models on disk, so that the next run quantises nothing and loads in a second or two.

    {cache}/{key}/model.safetensors, config.json, ...    the copy, as `bnb_checkpoint.py` writes it
    {cache}/{key}/manifest.json                          SHA-256 of its files, and what it was made from

The key is a hash of all that decides what is in a copy: which files the base model has, how they are quantised, and who
quantises, because the values may differ between devices. A file of the base model is identified without reading it: 15
GB of a 7B take ten seconds and more to hash, its 4-bit copy a third of that. In the hub's cache a file is a link to a
blob whose name is the hash that the download was verified against. Any other file is identified by path, size and time
of its last change, so a moved folder is quantised anew.

The copy itself is hashed before it is used: a damaged one is made anew. A cache that cannot be used costs the time that
it would have saved, and a line that says so, never the run.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minilora.errors import UserError
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.system import bnb
from minilora.system.console import warn
from minilora.system.locks import lock_folder
from minilora.system.manifest import read_manifest, recover_folders, verify_folder
from minilora.weights.bnb_checkpoint import is_quantized, write_quantized
from minilora.weights.hf_config import COMPANIONS
from minilora.weights.load import LoadSettings, load_model
from minilora.weights.safetensors_io import dtype_name

FORMAT = 1  # raised when the same weights would be quantised to other values


def load_through_cache(
    folder: Path, cache: Path, settings: LoadSettings, on_progress: Callable[[int, int], None] | None = None
) -> Qwen2ForCausalLM:
    """`load_model`, from the copy in `cache` if there is one, which is made if there is not.

    A model that stays unquantised, or is in 4 bits already, is loaded as it is.
    """

    def load(source: Path) -> Qwen2ForCausalLM:
        return load_model(source, **vars(settings), on_progress=on_progress)

    if settings.quantization == "none" or is_quantized(folder):
        return load(folder)
    made_from = _made_from(folder, settings)
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    copy = cache / key[:16]
    problem = _problem_of(copy, key)
    if problem is None:
        return load(copy)
    with contextlib.ExitStack() as stack:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_folder(cache, "model.quantized_cache"))
            recover_folders(cache)
            problem = _problem_of(copy, key)  # another process may have made it since
            if problem is not None and copy.exists():
                warn(f"{copy}: the 4-bit copy is damaged ({problem}); it is made anew")
        except (OSError, UserError) as error:
            _warn_unused(cache, error)
            return load(folder)
        if problem is None:
            return load(copy)
        model = load(folder)
        try:
            write_quantized(model, folder, copy, {"key": key, "made_from": made_from})
        except (OSError, UserError) as error:
            _warn_unused(cache, error)
        return model


def _made_from(folder: Path, settings: LoadSettings) -> dict[str, Any]:
    """All that decides what is in a copy."""
    companions = [folder / name for name in ("config.json", *COMPANIONS) if (folder / name).is_file()]
    kind = torch.device(settings.device).type
    return {
        "format": FORMAT,
        "files": {path.name: _identity(path) for path in [*companions, *sorted(folder.glob("*.safetensors"))]},
        "quantization": settings.quantization,
        "double_quantization": settings.double_quantization,
        "compute_dtype": dtype_name(settings.compute_dtype),
        "quantizer": "bitsandbytes" if kind == "cuda" and bnb.is_available() else f"minilora on {kind}",
    }


def _identity(path: Path) -> str:
    """Which file this is, without reading it."""
    try:
        found = path.resolve(strict=True)
        status = found.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if path.is_symlink() and found.parent.name == "blobs":
        return f"blob {found.name}"
    return f"{found}, {status.st_size} bytes, changed at {status.st_mtime_ns} ns"


def _problem_of(copy: Path, key: str) -> str | None:
    """What is wrong with a copy, None if every file is as it was written."""
    problem = verify_folder(copy)
    if problem is None and read_manifest(copy)["facts"].get("key") != key:
        return "its manifest is another one's"
    return problem


def _warn_unused(cache: Path, error: Exception) -> None:
    what = getattr(error, "strerror", None) or error
    warn(f"model.quantized_cache: {cache} cannot be used ({what}); continues without it")
