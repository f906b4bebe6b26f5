"""An adapter on disk, as peft reads and writes it.

    adapter_config.json         r, lora_alpha, target_modules, ...
    adapter_model.safetensors   base_model.model.{path}.lora_A.weight  (R, in)
                                base_model.model.{path}.lora_B.weight  (out, R)

Only LoRA tensors go in: no head, no embedding, no base weight. Keys and target modules are sorted, so equal
runs give equal bytes. Reading is strict where peft only warns or keeps silent: every tensor of the file has a
slot, every slot a tensor, and nothing has a default: without `target_modules` peft falls back to q_proj and
v_proj and drops the rest of the file, without `lora_alpha` it scales by 8 / r.

Source: peft 0.21, src/peft/tuners/lora/config.py and save_and_load.py (behaviour, tests/parity/test_adapter.py).
Left out: what peft adds to LoRA (DoRA, biases, rank patterns, modules_to_save), refused by name, as is every key that
is not known to leave the forward pass alone: peft adds some with every release.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from minilora.errors import UserError
from minilora.fields import limits, read_fields
from minilora.files import json_bytes, read_json, write_file
from minilora.lora import DropoutSeed, attach, iter_lora_layers
from minilora.manifest import MANIFEST, read_manifest, verify_folder
from minilora.model import Qwen2ForCausalLM
from minilora.tensorfile import read_header, read_tensor

KEY_PREFIX = "base_model.model."
# Keys that never change what an adapter does; layers_pattern and ensure_weight_tying need others, which are refused.
NEUTRAL_KEYS = frozenset(
    (
        "auto_mapping",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "layers_pattern",
        "loftq_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "runtime_config",
        "task_type",
    )
)
# What other keys may hold when they are not empty. The other ways to initialise (pissa, olora, corda, loftq, lora_ga)
# change the base model's weights, so that on the plain base model their adapter is wrong.
PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva", "mica"),
}


@dataclass(frozen=True)
class AdapterConfig:
    """The part of adapter_config.json that has a meaning here.

    Attributes:
        r: rank.
        lora_alpha: the scale is lora_alpha / r.
        lora_dropout: used in training alone.
        target_modules: names, or a text: "all-linear" or a regular expression.
        use_rslora: scale by alpha / sqrt(r).
        base_model_name_or_path: what the adapter belongs to.
        revision: of the base model on the hub.
    """

    r: int = field(metadata=limits(minimum=1, maximum=65_536))
    lora_alpha: float = field(metadata=limits(above=0, maximum=1e6))
    lora_dropout: float = field(metadata=limits(minimum=0, maximum=1))
    target_modules: str | tuple[str, ...]
    use_rslora: bool
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def to_dict(self, matched_paths: list[str]) -> dict[str, Any]:
        """Content of adapter_config.json, with keys that every consumer of peft's format knows.

        "all-linear" and regular expressions are written as the names they matched: vLLM and llama.cpp read
        nothing else.
        """
        alpha = int(self.lora_alpha) if self.lora_alpha == int(self.lora_alpha) else self.lora_alpha
        return {
            "alpha_pattern": {},
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "lora_alpha": alpha,
            "lora_dropout": self.lora_dropout,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": {},
            "revision": self.revision,
            "target_modules": _target_names(self.target_modules, matched_paths),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": self.use_rslora,
        }


def _target_names(target_modules: str | tuple[str, ...], matched_paths: list[str]) -> list[str]:
    """What the adapter covers, as names: short where all layers have it, whole paths where only some do."""
    if not isinstance(target_modules, str):
        return sorted(set(target_modules))
    if target_modules == "all-linear":
        return sorted({path.rpartition(".")[2] for path in matched_paths})
    return sorted(matched_paths)


def adapter_files(
    model: Qwen2ForCausalLM,
    config: AdapterConfig,
    save_format: str = "safetensors",
    save_dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[str, bytes]]:
    """The adapter's two files, as (name, content).

    Args:
        model: with LoRA layers.
        config: how it was attached.
        save_format: "safetensors", or "bin" for tools that read adapter_model.bin alone.
        save_dtype: of the tensors; float32 keeps every bit, bfloat16 halves the file.
    """
    tensors = {}
    paths = []
    for path, layer in iter_lora_layers(model):
        paths.append(path)
        for name in ("lora_A", "lora_B"):
            value = getattr(layer, name).detach().to("cpu", save_dtype).contiguous()
            tensors[f"{KEY_PREFIX}{path}.{name}.weight"] = value
    tensors = dict(sorted(tensors.items()))
    yield "adapter_config.json", json_bytes(config.to_dict(paths))
    if save_format == "bin":
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        yield "adapter_model.bin", buffer.getvalue()
    else:
        yield "adapter_model.safetensors", save(tensors, metadata={"format": "pt"})


def save_adapter(model: Qwen2ForCausalLM, folder: Path, config: AdapterConfig) -> None:
    """Writes `adapter_files` into `folder`, which is made if needed; in a run they go through `write_folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in adapter_files(model, config):
        write_file(folder / name, content)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """What adapter_config.json says, its own or peft's.

    Raises:
        UserError: a key is missing or impossible, or the adapter is of a kind that is not applied here in full.
    """
    path = folder / "adapter_config.json"
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected an object; write the adapter again")
    if content.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {content.get('peft_type')!r}, expected 'LORA'; give a LoRA adapter")
    for name in sorted(set(content) - {item.name for item in fields(AdapterConfig)} - NEUTRAL_KEYS):
        value = content[name]
        if value and value not in PLAIN_VALUES.get(name, ()):
            raise UserError(
                f"{path}: {name} is {value!r}, which is more than plain LoRA and would be applied wrongly; train "
                "without it, or convert the adapter with peft"
            )
    given = {name: value for name, value in content.items() if value is not None}
    return read_fields(
        AdapterConfig,
        {"lora_dropout": 0.0, "use_rslora": False, **given},
        str(path),
        "without it the adapter would be applied wrongly, so take the file that was written with the weights",
    )


def attach_adapter(
    model: Qwen2ForCausalLM, config: AdapterConfig, seed: int = 0, device: torch.device | str | None = None
) -> DropoutSeed:
    """`lora.attach` with the values of an `AdapterConfig`."""
    targets = config.target_modules
    return attach(
        model,
        r=config.r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=config.use_rslora,
        seed=seed,
        device=device,
    )


def load_adapter(
    model: Qwen2ForCausalLM, folder: Path, allow_bin: bool = False, device: torch.device | str | None = None
) -> AdapterConfig:
    """Attaches the adapter in `folder` to `model`, a base without LoRA layers.

    Args:
        model: the base.
        folder: with the adapter's two files, and maybe a manifest.
        allow_bin: see `load_adapter_weights`.
        device: of the adapter; by default the model's. A base on the meta device can have an adapter on the CPU.

    Raises:
        UserError: see `read_adapter_config` and `load_adapter_weights`.
    """
    config = read_adapter_config(folder)
    path, tensors = _read_adapter_tensors(folder, allow_bin)
    attach_adapter(model, config, device=device)
    _fill(model, path, tensors)
    return config


def damage_of_adapter(folder: Path) -> str | None:
    """What is wrong with an adapter's folder by its manifest, None if nothing is. A README.md may be edited."""
    try:
        names = [name for name in read_manifest(folder)["files"] if name != "README.md"]
    except UserError as error:
        return str(error)
    return verify_folder(folder, names)


def load_adapter_weights(model: Qwen2ForCausalLM, folder: Path, allow_bin: bool = False) -> None:
    """Fills the model's LoRA layers from `folder`; all of them and all of the file, or nothing.

    Args:
        model: with LoRA layers.
        folder: with the adapter's two files; where it has a manifest, they are verified first.
        allow_bin: read adapter_model.bin where there is no adapter_model.safetensors. That is a pickle, which PyTorch
            reads with `weights_only`; ways around that have been found (CVE-2025-32434, CVE-2026-24747).

    Raises:
        UserError: damaged files; missing, unexpected, misshapen, integer or non-finite tensors, named.
    """
    _fill(model, *_read_adapter_tensors(folder, allow_bin))


def _fill(model: Qwen2ForCausalLM, path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Puts the tensors that `path` held into the LoRA layers, all of them or none."""
    slots = {
        f"{KEY_PREFIX}{name}.{matrix}.weight": getattr(layer, matrix)
        for name, layer in iter_lora_layers(model)
        for matrix in ("lora_A", "lora_B")
    }
    problems = [f"{name}: missing from the file" for name in sorted(set(slots) - set(tensors))]
    problems += [f"{name}: has no place in the model" for name in sorted(set(tensors) - set(slots))]
    for name in sorted(set(tensors) & set(slots)):
        if tensors[name].shape != slots[name].shape:
            expected = tuple(slots[name].shape)
            problems.append(
                f"{name}: file has {tuple(tensors[name].shape)}, model and adapter_config.json ask {expected}"
            )
        elif not tensors[name].is_floating_point():
            problems.append(f"{name}: file has {tensors[name].dtype}, expected a floating-point type")
        elif not torch.isfinite(tensors[name]).all():
            problems.append(f"{name}: holds NaN or infinite values")
    if problems:
        # The first and the last few: with a wrong prefix all slots are missing, and only the extra names show it.
        shown = (
            problems if len(problems) <= 10 else [*problems[:5], f"... {len(problems) - 10} more ...", *problems[-5:]]
        )
        lines = "\n  ".join(shown)
        raise UserError(f"{path}: does not fit the base model; check --base and adapter_config.json\n  {lines}")
    with torch.no_grad():
        for name, slot in slots.items():
            slot.copy_(tensors[name])


def _read_adapter_tensors(folder: Path, allow_bin: bool) -> tuple[Path, dict[str, torch.Tensor]]:
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
    if (folder / MANIFEST).is_file():
        problem = damage_of_adapter(folder)
        if problem is not None:
            raise UserError(f"{folder}: is damaged ({problem}); take another copy of it")
    if path != binary:
        return path, {name: read_tensor(entry) for name, entry in read_header(path).items()}
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types for a bad or hostile file
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: refused, it is not a file of plain tensors ({reason}); use safetensors") from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise UserError(f"{path}: refused, it is not a table of named tensors; use safetensors")
    if not all(isinstance(v, torch.Tensor) and v.layout is torch.strided for v in tensors.values()):
        raise UserError(f"{path}: refused, it holds something else than dense tensors; use safetensors")
    return path, tensors
