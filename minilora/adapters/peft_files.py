"""An adapter on disk, as peft reads and writes it.

    adapter_config.json         see `peft_config.py`
    adapter_model.safetensors   base_model.model.{path}.lora_A.weight           (R, in)
                                base_model.model.{path}.lora_B.weight           (out, R)
                                base_model.model.{path}.lora_magnitude_vector   (out,)   with DoRA
                                base_model.model.{path}.base_layer.bias         (out,)   with a trained bias
                                base_model.model.{path}.bias                    (out,)   of a layer without A and B

A PiSSA adapter is plain LoRA of twice the rank (`qlora/lora.py`) and is written so, which fits the unchanged base
model. Keys and target modules are sorted, so equal runs give equal bytes. Reading is strict where peft only warns:
tensors and parameters must correspond.

Source: peft 0.21, src/peft/utils/save_and_load.py (behaviour, tests/parity/test_adapter.py).
"""

import hashlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save

from minilora.adapters.attach import DEFAULT, active_adapter, attach, iter_lora_weights, remove_adapter, set_adapter
from minilora.adapters.peft_config import PEFT_KEYS, BaseModel, read_adapter_config, to_peft
from minilora.adapters.peft_keys import KEY_PREFIX, peft_keys, refuse_empty_tensors, without_base_tensors
from minilora.config import LoraConfig
from minilora.errors import UserError
from minilora.qlora.lora import LoRAWeights
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.system.files import json_bytes, read_json
from minilora.system.manifest import MANIFEST, read_manifest, verify_folder
from minilora.weights.load import is_finite
from minilora.weights.safetensors_io import find_mismatches, read_header, read_tensor, show_problems

CALIBRATION = "calibration.json"


def adapter_files(
    model: Qwen2ForCausalLM,
    lora_config: LoraConfig,
    base: BaseModel,
    save_format: str = "safetensors",
    save_dtype: torch.dtype = torch.float32,
    portable: bool = False,
) -> Iterator[tuple[str, bytes]]:
    """The active adapter's two files, as (name, content).

    Args:
        model: with LoRA layers.
        lora_config: how they were attached.
        base: what they belong to.
        save_format: "bin" is for tools that read adapter_model.bin only.
        save_dtype: of the tensors; float32 keeps every bit, bfloat16 halves the file.
        portable: multiply the scale into B, so that lora_alpha / r is 1: llama.cpp knows neither use_rslora nor
            alpha_pattern.
    """
    content = to_peft(lora_config, base, model, portable)
    tensors = adapter_tensors(model, save_dtype, content["lora_alpha"] if portable else None)
    yield "adapter_config.json", json_bytes(content)
    if save_format == "bin":
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        yield "adapter_model.bin", buffer.getvalue()
    else:
        yield "adapter_model.safetensors", save(tensors, metadata={"format": "pt"})


def adapter_tensors(
    model: Qwen2ForCausalLM, save_dtype: torch.dtype = torch.float32, portable_alpha: float | None = None
) -> dict[str, torch.Tensor]:
    """The adapter's tensors as the file has them, by sorted key, on the CPU.

    `portable_alpha` is the `lora_alpha` of a portable adapter, whose B has the rest of the scale in it.
    """
    tensors = {}
    for path, w in iter_lora_weights(model):
        for key, (parts, dim) in _slots(path, w).items():
            value = torch.cat(parts, dim)
            if portable_alpha is not None and key.endswith("lora_B.weight"):
                value = value * (w.scaling * value.shape[1] / portable_alpha)
            tensors[key] = value.detach().to("cpu", save_dtype).contiguous()
    return dict(sorted(tensors.items()))


def _slots(path: str, w: LoRAWeights) -> dict[str, tuple[list[torch.Tensor], int]]:
    """By key of the file, the parts of a tensor, and along which axis: PiSSA's A and B have a frozen half behind."""
    found: dict[str, tuple[list[torch.Tensor | None], int]] = {
        "lora_A.weight": ([w.lora_A, w.initial_A] if w.r else [], 0),
        "lora_B.weight": ([w.lora_B, w.initial_B] if w.r else [], 1),
        "lora_magnitude_vector": ([w.lora_magnitude_vector], 0),
        "base_layer.bias" if w.r else "bias": ([w.bias], 0),
    }
    slots = {name: ([part for part in parts if part is not None], dim) for name, (parts, dim) in found.items()}
    return {f"{KEY_PREFIX}{path}.{name}": slot for name, slot in slots.items() if slot[0]}


def load_adapter(
    model: Qwen2ForCausalLM,
    folder: Path,
    allow_bin: bool = False,
    device: torch.device | str | None = None,
    name: str = DEFAULT,
    is_verified: bool = False,
) -> LoraConfig:
    """Attaches the adapter in `folder` to `model` and makes it the active one.

    Args:
        model: the base, with or without other adapters.
        folder: with the adapter's two files, verified where there is a manifest.
        allow_bin: read adapter_model.bin where there is no adapter_model.safetensors. That is a pickle, which PyTorch
            reads with `weights_only`; ways around that have been found (CVE-2025-32434, CVE-2026-24747).
        device: see `attach`. A base on the meta device can have an adapter on the CPU.
        name: of the adapter in the model; one of the same name is replaced.
        is_verified: the caller has compared the folder with its manifest.
    """
    lora_config, _ = read_adapter_config(folder)
    path, tensors = read_adapter_tensors(folder, allow_bin, is_verified)
    before = active_adapter(model)
    try:
        attach(model, lora_config, device=device, name=name)
    except UserError as error:
        raise UserError(f"{folder / 'adapter_config.json'}: {error}") from None
    try:
        _fill(model, path, tensors)
    except UserError:
        remove_adapter(model, name)
        set_adapter(model, None if before == name else before)
        raise
    return lora_config


def damage_of_adapter(folder: Path) -> str | None:
    """What differs from the manifest of an adapter's folder, or None.

    README.md may be edited, and adapter_config.json name another place of the base model. calibration.json is compared
    by whoever uses it: the adapter is sound without.
    """
    try:
        entries = read_manifest(folder)["files"]
    except UserError as error:
        return str(error)
    names = [name for name in entries if name not in ("README.md", CALIBRATION)]
    problem, config = verify_folder(folder, names), "adapter_config.json"
    if problem is not None and problem.startswith(config) and _digest_before_move(folder) == entries[config]["sha256"]:
        return verify_folder(folder, [name for name in names if name != config])
    return problem


def _digest_before_move(folder: Path) -> str | None:
    """SHA-256 of adapter_config.json with the base model that the run's configuration names; None if that is gone."""
    path = folder / ("state.json" if (folder / "state.json").is_file() else "training_args.json")
    try:
        content, run = read_json(folder / "adapter_config.json"), read_json(path)
        model = run.get("config", run)["model"]
        content |= {PEFT_KEYS["name_or_path"]: model["name_or_path"], "revision": model["revision"]}
        return hashlib.sha256(json_bytes(content)).hexdigest()
    except (UserError, AttributeError, KeyError, TypeError, ValueError):
        return None


def load_adapter_weights(model: Qwen2ForCausalLM, folder: Path, is_verified: bool = False) -> None:
    """Fills the model's LoRA layers from `folder`: all of them and all of the file, or nothing and a UserError."""
    _fill(model, *read_adapter_tensors(folder, is_verified=is_verified))


def _fill(model: Qwen2ForCausalLM, path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Copies the tensors of the file `path` into the LoRA layers, all of them or none."""
    slots = {key: slot for name, w in iter_lora_weights(model) for key, slot in _slots(name, w).items()}
    refuse_empty_tensors(path, tensors)
    if tensors.keys() != slots.keys():
        tensors = without_base_tensors(path, peft_keys(path, tensors), model)
    problems = find_mismatches({key: torch.cat(*slot).shape for key, slot in slots.items()}, tensors)
    if not problems:
        problems = [f"{name}: holds NaN or infinite values" for name in sorted(tensors) if not is_finite(tensors[name])]
    if problems:
        raise UserError(
            f"{path}: does not fit the base model; check --base and adapter_config.json{show_problems(problems)}"
        )
    with torch.no_grad():
        for name, (parts, dim) in slots.items():
            for part, value in zip(parts, tensors[name].chunk(len(parts), dim), strict=True):
                part.copy_(value)


def weights_file(folder: Path) -> Path:
    """The file of the adapter's tensors: the pickle only where there is no adapter_model.safetensors."""
    path, binary = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    return binary if binary.is_file() and not path.is_file() else path


def read_adapter_tensors(
    folder: Path, allow_bin: bool = False, is_verified: bool = False
) -> tuple[Path, dict[str, torch.Tensor]]:
    """The adapter's file and its tensors by key; see `load_adapter`."""
    path, binary = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if not path.is_file():
        if not binary.is_file():
            raise UserError(f"{folder}: holds no adapter_model.safetensors; give the folder that training wrote")
        if not allow_bin:
            raise UserError(
                f"{binary}: is a pickle, which can run code, and is not read unasked; convert it to safetensors, or "
                "read it with --allow-bin if you trust whoever made it"
            )
        path = binary
    if not is_verified and (folder / MANIFEST).is_file():
        problem = damage_of_adapter(folder)
        if problem is not None:
            raise UserError(f"{folder}: is damaged ({problem}); take another copy of it")
    if path != binary:
        return path, {name: read_tensor(entry) for name, entry in read_header(path).items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch 2.14, about sparse tensors, which are refused below
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types for a bad or hostile file
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: refused, it is not a file of plain tensors ({reason}); use safetensors") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout is torch.strided
        for name, value in tensors.items()
    ):
        raise UserError(f"{path}: refused, it is not a table of named dense tensors; use safetensors")
    return path, tensors
