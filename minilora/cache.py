"""4-bit copies of base models on disk, so that the next run has nothing to quantise and loads in a second.

    {cache}/{key}/model.safetensors, config.json, ...    the copy, as `quantized.py` writes it; transformers opens it
    {cache}/{key}/manifest.json                          SHA-256 of its files, and of what it was made from

The key is a hash of the base model's files and of how they are quantised, so a changed model has another copy, and a
copy is never out of date. Its own files are hashed before they are used: a damaged copy is made again.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from minilora.checkpoint import begin_folder, make_folder, replace_folder, write_json
from minilora.errors import UserError
from minilora.load import load_model, read_config
from minilora.model import Qwen2ForCausalLM
from minilora.quantized import save_quantized, split_entries
from minilora.rows import sha256
from minilora.tensorfile import read_checkpoint_entries, read_json

FORMAT = 1  # raised when the same weights would be quantised to other bits
MANIFEST = "manifest.json"


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
        UserError: as `load_model`, or nothing can be written to `cache`.
    """
    settings = (compute_dtype, quantization, double_quantization, device, on_progress)
    if quantization == "none" or split_entries(read_checkpoint_entries(folder))[1]:
        return load_model(folder, *settings)
    source = {path.name: sha256(path) for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]}
    how = {"format": FORMAT, "type": quantization, "double": double_quantization, "dtype": str(compute_dtype)}
    digest = hashlib.sha256(json.dumps([source, how], sort_keys=True).encode()).hexdigest()
    copy = cache / digest[:16]
    problem = _problem_of(copy, digest)
    if problem is None:
        return load_model(copy, *settings)
    if copy.exists():
        print(f"{copy}: the 4-bit copy is damaged ({problem}); it is made again", file=sys.stderr)
    model = load_model(folder, *settings)
    make_folder(cache, "model.quantized_cache")
    temporary = begin_folder(copy)
    save_quantized(model, folder, temporary, compute_dtype)
    files = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
    write_json(temporary / MANIFEST, {"key": digest, "made_from": source, **how, "files": files})
    replace_folder(temporary, copy)
    return model


def _problem_of(copy: Path, digest: str) -> str | None:
    """What is wrong with a copy, None if every byte of it is as it was written."""
    if not copy.is_dir():
        return "missing"
    try:
        manifest = read_json(copy / MANIFEST)
        files = manifest["files"]
        if manifest["key"] != digest or "model.safetensors" not in files:
            return "its manifest is another one's"
        differing = [name for name, expected in files.items() if sha256(copy / name) != expected]
        read_config(copy)
    except (UserError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return f"SHA-256 of {', '.join(differing)}" if differing else None
