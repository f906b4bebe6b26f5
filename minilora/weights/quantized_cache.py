"""4-bit copies of base models on disk, so that the next run has nothing to quantise and loads in a second or two.

    {cache}/{key}/model.safetensors, config.json, ...    the copy, as `bnb_checkpoint.py` writes it; transformers opens
    {cache}/{key}/manifest.json                          SHA-256 of its files, and all that it was made from

The key is a hash of all that decides what is in a copy: the base model's files, the way of quantising, and who
quantises, because bits may differ between devices. So a changed model has another copy, and a copy is never out of
date. Its own files are hashed before they are used: a damaged copy is made again. A cache that cannot be used costs the
time that it would have saved, and a line that says so, never the run.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minilora.errors import UserError
from minilora.qlora import bnb
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.system.console import warn
from minilora.system.files import lock_folder, sha256_once
from minilora.system.manifest import read_manifest, recover_folders, verify_folder
from minilora.weights.bnb_checkpoint import COMPANIONS, is_quantized, write_quantized
from minilora.weights.load import load_model
from minilora.weights.safetensors_io import dtype_name

FORMAT = 1  # raised when the same weights would be quantised to other bits


def load_through_cache(
    folder: Path,
    cache: Path,
    compute_dtype: torch.dtype,
    quantization: str,
    double_quantization: bool,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> Qwen2ForCausalLM:
    """`load_model`, from the copy in `cache` if there is one, which is made if there is not.

    A model that is not to be quantised, or is in 4 bits already, is loaded as it is.

    Args:
        folder: the base model's files.
        cache: where the copies are.
        compute_dtype: as for `load_model`, like all that follow.
        quantization: "nf4", "fp4" or "none".
        double_quantization: scales of the 4-bit blocks in 8 bits.
        device: where the model lives.
        on_progress: called with (tensors done, tensors in all).

    Raises:
        UserError: as `load_model`.
    """
    settings = (compute_dtype, quantization, double_quantization, device, on_progress)
    if quantization == "none" or is_quantized(folder):
        return load_model(folder, *settings)
    made_from = _made_from(folder, compute_dtype, quantization, double_quantization, device)
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    copy = cache / key[:16]
    problem = _problem_of(copy, key)
    if problem is None:
        return load_model(copy, *settings)
    with contextlib.ExitStack() as stack:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_folder(cache, "model.quantized_cache"))
            recover_folders(cache)
            problem = _problem_of(copy, key)  # another process may have made it since
            if problem is not None and copy.exists():
                warn(f"{copy}: the 4-bit copy is damaged ({problem}); it is made again")
        except (OSError, UserError) as error:
            _say_unused(cache, error)
            return load_model(folder, *settings)
        if problem is None:
            return load_model(copy, *settings)
        model = load_model(folder, *settings)
        try:
            write_quantized(model, folder, copy, {"key": key, "made_from": made_from})
        except (OSError, UserError) as error:
            _say_unused(cache, error)
        return model


def _made_from(
    folder: Path, compute_dtype: torch.dtype, quantization: str, double_quantization: bool, device: torch.device | str
) -> dict[str, Any]:
    """All that decides what is in a copy."""
    companions = [folder / name for name in ("config.json", *COMPANIONS) if (folder / name).is_file()]
    kind = torch.device(device).type
    return {
        "format": FORMAT,
        "files": {path.name: sha256_once(path) for path in [*companions, *sorted(folder.glob("*.safetensors"))]},
        "quantization": quantization,
        "double_quantization": double_quantization,
        "compute_dtype": dtype_name(compute_dtype),
        "quantizer": "bitsandbytes" if kind == "cuda" and bnb.is_available() else f"minilora on {kind}",
    }


def _problem_of(copy: Path, key: str) -> str | None:
    """What is wrong with a copy, None if every file is as it was written."""
    problem = verify_folder(copy)
    if problem is None and read_manifest(copy)["facts"].get("key") != key:
        return "its manifest is another one's"
    return problem


def _say_unused(cache: Path, error: Exception) -> None:
    what = getattr(error, "strerror", None) or error
    warn(f"model.quantized_cache: {cache} cannot be used ({what}); goes on without")
