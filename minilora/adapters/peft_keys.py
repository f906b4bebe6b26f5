"""Adapters that other programs wrote: their keys as peft spells them, and what is no peft adapter named as what it is.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight            peft's file
    ...q_proj.lora_A.default.weight                                           a state_dict of the model in memory
    _orig_mod.base_model.model...., module.base_model.model....               of a compiled or a wrapped one
    base_model.model.base_model.model...., model.layers....                   a prefix too many or missing

A spelling is read only if all keys of the file have it, and is said. The shapes decide whether it fits the base.

peft also saves embedding and head where it is not sure that they are unchanged (`save_embedding_layers="auto"`). Where
they equal the base's they are left out, otherwise the adapter is refused: it is more than LoRA.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from minilora.errors import UserError
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.system.console import warn

KEY_PREFIX = "base_model.model."
WRAPPER = re.compile(r"\b(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
ADAPTER_NAME = re.compile(r"\.(lora_[AB])\.[^.]+\.weight$|\.(lora_magnitude_vector)\..+$")
LAYER = re.compile(r"(?:^|\.)(?=layers\.\d+\.)")
UNQUANTIZED = re.compile(r"(?:embed_tokens|lm_head|norm)\.weight$")
TOWER = "language_model"  # a prefix within a model that sees or hears: another base than Qwen2.5
MERGE = "merge the adapter with the program that wrote it, and use the merged model"
Tensors = Mapping[str, torch.Tensor]


def peft_keys(path: Path, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors of the file `path` by the keys that peft gives them; a note where those of the file are others."""
    short = {key: ADAPTER_NAME.sub(r".\1\2.weight", WRAPPER.sub("", key)) for key in tensors}
    short = {key: new.replace("lora_magnitude_vector.weight", "lora_magnitude_vector") for key, new in short.items()}
    prefixes = {new[: match.end()] for new in short.values() if (match := LAYER.search(new))}
    prefix = min(prefixes, default="")
    if len(prefixes) == 1 and TOWER not in prefix:
        short = {key: _with_peft_prefix(new, prefix) for key, new in short.items()}
    changed = {key: new for key, new in short.items() if key != new}
    if len(set(short.values())) < len(short):
        raise UserError(f"{path}: holds several adapters, expected one; save each to a folder of its own")
    if changed:
        key = min(changed)
        warn(f"note: {path}: its keys are not peft's; {key} is read as {changed[key]}, and so on")
    return {short[key]: tensor for key, tensor in tensors.items()}


def _with_peft_prefix(key: str, prefix: str) -> str:
    """`prefix` is what stands before "layers.0"; the head has one `model.` less."""
    if key.startswith(prefix) and not key.startswith(f"{prefix}lm_head."):
        return f"{KEY_PREFIX}model.{key.removeprefix(prefix)}"
    outer = prefix.removesuffix("model.")
    return f"{KEY_PREFIX}{key.removeprefix(outer)}" if key.startswith(f"{outer}lm_head.") else key


def without_base_tensors(
    path: Path, tensors: Tensors, model: Qwen2ForCausalLM, base: Callable[[str], torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The adapter's tensors without those that only repeat the base's embedding, head or norms; a note names them.

    Args:
        path: the adapter's file.
        tensors: of the adapter, by peft's keys.
        model: the base; what it has on the meta device is not compared, the caller has done so.
        base: gives a tensor to compare with in place of the model's, by its name there.

    Raises:
        UserError: one is another than the base's.
    """
    own = dict(model.named_parameters())
    repeated = {key: key.removeprefix(KEY_PREFIX) for key in tensors if UNQUANTIZED.search(key)}
    for key, name in repeated.items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        if name not in own or not _equals(tensors[key], own[name] if base is None else base(name)):
            raise UserError(
                f"{path}: {key} {tuple(tensors[key].shape)} is not as in the base model: it was trained, or the "
                f"vocabulary resized, which is more than LoRA; check --base, or {MERGE}"
            )
    if repeated:
        warn(f"note: {path}: {', '.join(repeated.values())}: equal to the base model's, left out")
    return {key: tensor for key, tensor in tensors.items() if key not in repeated}


def _equals(saved: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether they are one tensor, in the dtype of either."""
    if saved.shape != own.shape or not saved.dtype.is_floating_point:
        return False
    if own.is_meta:
        return True
    own = own.detach().cpu()
    return torch.equal(saved.to(own.dtype), own) or torch.equal(own.to(saved.dtype), saved)


def refuse_empty_tensors(path: Path, tensors: Tensors) -> None:
    """Raises UserError for an adapter that was saved while its values were spread over the GPUs."""
    empty = sorted(key for key, tensor in tensors.items() if tensor.numel() == 0)
    if empty:
        raise UserError(
            f"{path}: {empty[0]} has the shape {list(tensors[empty[0]].shape)} ({len(empty)} of {len(tensors)} tensors "
            "are empty), as DeepSpeed ZeRO-3 leaves it; save the adapter with "
            "stage3_gather_16bit_weights_on_model_save=true, or recover it with zero_to_fp32.py of its checkpoint"
        )


def refuse_other_kinds(folder: Path, content: Mapping[str, Any]) -> None:
    """Raises UserError for an adapter that is not in peft's format; `content` is that of adapter_config.json."""
    if "lora_parameters" in content or ("peft_type" not in content and any(folder.glob("adapters.*"))):
        raise UserError(
            f"{folder}: is an adapter of MLX, which is stored otherwise; merge it with `python -m mlx_lm fuse` and "
            "use the merged model, or convert it to peft's format"
        )
