"""adapter_config.json: what an adapter is, as peft writes it down.

    r, lora_alpha, lora_dropout, target_modules, use_rslora, rank_pattern, ..., base_model_name_or_path

Reading is strict where peft only warns or keeps silent. Nothing has a default that would change what the adapter does:
without `target_modules` peft falls back to q_proj and v_proj and drops the rest of the file, without `lora_alpha` it
scales by 8 / r.

Source: peft 0.21, src/peft/tuners/lora/config.py.
Left out: modules_to_save, and what else peft adds to LoRA, refused by name, as is every key that is not known to leave
the forward pass alone: peft adds some with every release.
"""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from minilora.adapters.attach import DEFAULT, attach, iter_lora_weights
from minilora.errors import UserError
from minilora.qlora.lora import DropoutSeed
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.system.files import read_json
from minilora.system.schema import limits, read_fields

# Keys that never change what an adapter does; ensure_weight_tying needs another, which is refused.
NEUTRAL_KEYS = frozenset(
    (
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
    )
)
# What other keys may hold when they are not empty. The other ways to initialize (pissa, olora, corda, loftq, lora_ga)
# change the base model's weights, so that on the plain base model their adapter is wrong.
PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
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
        layers_to_transform: see `target_modules.py`, like the next three.
        layers_pattern: what numbered modules are called.
        rank_pattern: other ranks.
        alpha_pattern: other alphas.
        bias: whose biases are trained: none, lora_only (of adapted layers), all.
        use_dora: see `lora.py`.
        init_lora_weights: how training begins; a file does not say it, see `read_adapter_config`.
    """

    r: int = field(metadata=limits(minimum=1, maximum=65_536))
    lora_alpha: float = field(metadata=limits(above=0, maximum=1e6))
    lora_dropout: float = field(metadata=limits(minimum=0, maximum=1))
    target_modules: str | tuple[str, ...]
    use_rslora: bool
    base_model_name_or_path: str | None = None
    revision: str | None = None
    layers_to_transform: int | tuple[int, ...] | None = field(default=None, metadata=limits(minimum=0))
    layers_pattern: str | tuple[str, ...] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata=limits(minimum=1, maximum=65_536))
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata=limits(above=0, maximum=1e6))
    bias: Literal["none", "lora_only", "all"] = "none"
    use_dora: bool = False
    init_lora_weights: Literal["kaiming", "gaussian", "pissa", "loftq"] = "kaiming"

    def to_dict(self, model: Qwen2ForCausalLM, portable: bool = False) -> dict[str, Any]:
        """Content of adapter_config.json for the model's adapter, with keys that every consumer of peft's format knows.

        "all-linear" and regular expressions are written as the names they matched: vLLM and llama.cpp read
        nothing else. Patterns are written as the paths that they matched, so that their order has no meaning.
        """
        weights = {path: w for path, w in iter_lora_weights(model) if w.r}
        halves = 2 if self.init_lora_weights == "pissa" else 1
        widened = math.sqrt(halves) if self.use_rslora else halves  # of alpha, lest the scale change with the rank
        alphas = {path: w.alpha for path, w in weights.items() if w.alpha != self.lora_alpha}
        return {
            "alpha_pattern": {} if portable else {path: _number(alpha * widened) for path, alpha in alphas.items()},
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": self.bias,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layers_pattern": self.layers_pattern,
            "layers_to_transform": self.layers_to_transform,
            "lora_alpha": self.r * halves if portable else _number(self.lora_alpha * widened),
            "lora_dropout": self.lora_dropout,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.r * halves,
            "rank_pattern": {path: w.r * halves for path, w in weights.items() if w.r != self.r},
            "revision": self.revision,
            "target_modules": _target_names(self.target_modules, list(weights)),
            "task_type": "CAUSAL_LM",
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora and not portable,
        }


def _number(value: float) -> float:
    """As JSON shows it best: 16, and not 16.0."""
    return int(value) if value == int(value) else value


def _target_names(target_modules: str | tuple[str, ...], matched_paths: list[str]) -> list[str]:
    """What the adapter covers, as names: short where all layers have it, whole paths where only some do."""
    if not isinstance(target_modules, str):
        return sorted(set(target_modules))
    if target_modules == "all-linear":
        return sorted({path.rpartition(".")[2] for path in matched_paths})
    return sorted(matched_paths)


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
    if content.get("modules_to_save"):
        raise UserError(
            f"{path}: modules_to_save is {content['modules_to_save']!r}, whole modules trained beside the adapter; all "
            "of the base is frozen here, also head and embedding, which in small models are one matrix; train without "
            "it, or merge the adapter with peft and use the merged model"
        )
    known = {item.name for item in fields(AdapterConfig)} - PLAIN_VALUES.keys()
    for name in sorted(set(content) - known - NEUTRAL_KEYS):
        value = content[name]
        if value and value not in PLAIN_VALUES.get(name, ()):
            raise UserError(
                f"{path}: {name} is {value!r}, which is more than plain LoRA and would be applied wrongly; train "
                "without it, or convert the adapter with peft"
            )
    given = {name: value for name, value in content.items() if value is not None and name not in PLAIN_VALUES}
    return read_fields(
        AdapterConfig,
        {"lora_dropout": 0.0, "use_rslora": False, **given},
        str(path),
        "without it the adapter would be applied wrongly, so take the file that was written with the weights",
    )


def attach_adapter(
    model: Qwen2ForCausalLM,
    config: AdapterConfig,
    seed: int = 0,
    device: torch.device | str | None = None,
    name: str = DEFAULT,
) -> DropoutSeed:
    """`attach.attach` with the values of an `AdapterConfig`."""
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
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        bias=config.bias,
        use_dora=config.use_dora,
        init_lora_weights=config.init_lora_weights,
        name=name,
    )
