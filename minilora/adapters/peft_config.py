"""adapter_config.json: a `LoraConfig` and the base model that the adapter belongs to, under peft's names.

    r, lora_alpha, lora_dropout, target_modules, use_rslora, rank_pattern, ..., base_model_name_or_path, revision

Reading is strict where peft warns or is silent. A key that changes what the adapter does has no default: without
`target_modules` peft falls back to q_proj and v_proj and drops the rest of the file, without `lora_alpha` it scales by
8 / r.

Source: peft 0.21, src/peft/tuners/lora/config.py.
Left out: modules_to_save, and what else peft adds to LoRA. Every key that is not known to leave the forward pass
unchanged is refused by name: peft adds some with every release.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from minilora.adapters.attach import iter_lora_weights
from minilora.adapters.peft_keys import refuse_other_kinds
from minilora.config import LoraConfig
from minilora.data.hub import those_within
from minilora.errors import UserError
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.system.files import read_json
from minilora.system.schema import coerce

# Keys that never change what an adapter does; ensure_weight_tying needs another, which is refused.
NEUTRAL_KEYS = {
    "auto_mapping",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
    "task_type",
}
# What other keys may hold when they are not empty. The other initialisations (pissa, olora, corda, loftq, lora_ga)
# change the base model's weights, so on the unchanged base model their adapter is wrong.
PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva", "mica"),
}
REQUIRED_KEYS = ("peft_type", "r", "lora_alpha", "target_modules")
ADVICE = "without it the adapter would be applied wrongly, so take the file that was written with the weights"


@dataclass(frozen=True)
class BaseModel:
    """What an adapter belongs to: a folder or a name on the hub, and a revision there."""

    name_or_path: str | None = None
    revision: str | None = None


# peft's keys of the fields whose names differ.
PEFT_KEYS = {"alpha": "lora_alpha", "dropout": "lora_dropout", "name_or_path": "base_model_name_or_path"}
T = TypeVar("T", LoraConfig, BaseModel)


def to_peft(
    lora_config: LoraConfig, base: BaseModel, model: Qwen2ForCausalLM, portable: bool = False
) -> dict[str, Any]:
    """Content of adapter_config.json for the model's active adapter, with keys that every reader of the format knows.

    "all-linear" and regular expressions are written as the names that they matched: vLLM and llama.cpp read nothing
    else. Patterns are written as the paths that they matched, so their order has no meaning. A PiSSA adapter has twice
    the rank (`qlora/lora.py`), and alpha grows with it so that the scale stays the same. `portable`: see
    `peft_files.adapter_files`.
    """
    weights = {path: w for path, w in iter_lora_weights(model) if w.r}
    halves = 2 if lora_config.init_lora_weights == "pissa" else 1
    widened = math.sqrt(halves) if lora_config.use_rslora else halves
    alphas = {path: w.alpha for path, w in weights.items() if w.alpha != lora_config.alpha}
    return {
        "alpha_pattern": {} if portable else {path: _number(alpha * widened) for path, alpha in alphas.items()},
        PEFT_KEYS["name_or_path"]: base.name_or_path,
        "bias": lora_config.bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": lora_config.layers_pattern,
        "layers_to_transform": lora_config.layers_to_transform,
        PEFT_KEYS["alpha"]: lora_config.r * halves if portable else _number(lora_config.alpha * widened),
        PEFT_KEYS["dropout"]: lora_config.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora_config.r * halves,
        "rank_pattern": {path: w.r * halves for path, w in weights.items() if w.r != lora_config.r},
        "revision": base.revision,
        "target_modules": _target_names(lora_config.target_modules, list(weights)),
        "task_type": "CAUSAL_LM",
        "use_dora": lora_config.use_dora,
        "use_rslora": lora_config.use_rslora and not portable,
    }


def _number(value: float) -> float:
    """16.0 as 16, which is how peft writes it."""
    return int(value) if value == int(value) else value


def _target_names(target_modules: str | list[str], matched_paths: list[str]) -> list[str]:
    """The adapted layers: short names where all layers have them, whole paths where only some do."""
    if not isinstance(target_modules, str):
        return sorted(set(target_modules))
    if target_modules == "all-linear":
        return sorted({path.rpartition(".")[2] for path in matched_paths})
    return sorted(matched_paths)


def read_adapter_config(folder: Path) -> tuple[LoraConfig, BaseModel]:
    """What adapter_config.json says, written by minilora or by peft. UserError for what cannot be applied exactly."""
    path = folder / "adapter_config.json"
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected an object; write the adapter again")
    refuse_other_kinds(folder, content)
    known = {PEFT_KEYS.get(item.name, item.name) for kind in (LoraConfig, BaseModel) for item in fields(kind)}
    for name in sorted(set(content) - (known - PLAIN_VALUES.keys()) - NEUTRAL_KEYS):
        value = content[name]
        if value and value not in PLAIN_VALUES.get(name, ()):
            raise UserError(
                f"{path}: {name} is {value!r}, which is more than plain LoRA and would be applied wrongly; train "
                "without it, or merge the adapter with peft and use the merged model"
            )
    given = {"lora_dropout": 0.0} | {name: value for name, value in content.items() if value not in (None, "")}
    missing = [name for name in REQUIRED_KEYS if name not in given]
    if missing:
        raise UserError(f"{path}: has no {', '.join(missing)}; {ADVICE}")
    given.pop("init_lora_weights", None)  # its values are others in `LoraConfig`
    return _take(LoraConfig, given, path), _take(BaseModel, given, path)


def no_adapter(folder: Path) -> str:
    """Why a folder cannot be used as an adapter, and what to do."""
    if folder.is_file():
        is_part = (folder.parent / "adapter_config.json").is_file()
        return f"is a file; give {f'its folder, {folder.parent}' if is_part else 'the folder of an adapter'}"
    if not folder.is_dir():
        return "is neither a folder nor a name on the hub; give the folder that training wrote, as checkpoints/final"
    if (folder / "config.json").is_file():
        return "is a base model, without adapter_config.json; give an adapter"
    levels = ("*", "*/*", "*/*/*")  # outputs/ has quickstart/checkpoints/final
    inner = those_within(folder, *(f"{level}/adapter_config.json" for level in levels))
    return f"holds no adapter_config.json{inner or '; give the folder that training wrote, as checkpoints/final'}"


def _take(kind: type[T], given: Mapping[str, Any], path: Path) -> T:
    """The dataclass `kind` from the keys that peft gives its fields."""
    values, problems = {}, []
    for item in fields(kind):
        key = PEFT_KEYS.get(item.name, item.name)
        if key in given:
            try:
                values[item.name] = coerce(given[key], item)
            except ValueError as error:
                problems.append(f"{key} is {given[key]!r}, expected {error}")
    if problems:
        raise UserError(f"{path}: {', '.join(problems)}; {ADVICE}")
    return kind(**values)
