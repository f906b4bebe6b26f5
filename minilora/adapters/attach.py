"""Adapters on a model: attach, list, switch, scale, disable, merge and unmerge them.

A model may have several adapters, each under a name, over one frozen base; at most one of them is active. Nothing here
changes the base: without the adapter, or after merging and unmerging it, every bit is as before.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from minilora.adapters.target_modules import Target, choose_targets
from minilora.config import LoraConfig
from minilora.qlora.dora import base_squares
from minilora.qlora.lora import Dropout, DropoutSeed, LoRALinear, LoRAWeights
from minilora.qlora.nf4 import Linear4bit, dense_weight

DEFAULT = "default"  # peft's name of an adapter without one


def lora_scaling(r: int, alpha: float, use_rslora: bool) -> float:
    """s: alpha / r, or alpha / sqrt(r), which keeps the update's size when r grows."""
    return alpha / (math.sqrt(r) if use_rslora else r)


def attach(
    model: nn.Module,
    lora_config: LoraConfig,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    name: str = DEFAULT,
) -> DropoutSeed:
    """Gives every chosen linear layer the weights of a new adapter, which becomes the active one, and freezes the base.

    Args:
        model: changed in place; ValueError where an adapter is merged.
        lora_config: of the adapter; for "pissa" and "loftq" `init.initialize` does the rest.
        seed: of A's initial values, drawn on the CPU so that every device starts alike.
        device: by default that of each layer.
        name: of the adapter; one of the same name is replaced.

    Returns:
        The seed of dropout, which training sets before each micro-batch.
    """
    remove_adapter(model, name)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    dropout_seed = DropoutSeed()
    for index, target in enumerate(_choose_layers(model, lora_config)):
        layer = _adaptable(model, target.path)
        base = layer.base
        scaling = lora_scaling(target.r, target.alpha, lora_config.use_rslora) if target.r else 0.0
        base_device = base.device if isinstance(base, Linear4bit) else base.weight.device
        size, where = (base.out_features, base.in_features), device or base_device
        dropout = Dropout(lora_config.dropout, index, dropout_seed)
        w = LoRAWeights(size, target.r, target.alpha, scaling=scaling, dropout=dropout, device=where)
        _draw(w, lora_config.init_lora_weights, generator)
        if lora_config.bias != "none" and base.bias is not None:
            w.bias = nn.Parameter(_values(base.bias.detach(), where))
        if lora_config.use_dora and target.r:
            w.lora_magnitude_vector = nn.Parameter(_values(_magnitudes(w, base), where))
        layer.adapters[name] = w.train(layer.training)
    set_adapter(model, name)
    return dropout_seed


def _choose_layers(model: nn.Module, lora_config: LoraConfig) -> list[Target]:
    """The layers with A and B, then those of which only the bias is trained (bias="all"): rank 0."""
    candidates = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Linear4bit | LoRALinear) and path != "lm_head" and not path.endswith(".base")
    }
    targets = choose_targets(list(candidates), lora_config)
    if lora_config.bias == "all":
        chosen = {target.path for target in targets}
        for path, layer in candidates.items():
            base = layer.base if isinstance(layer, LoRALinear) else layer
            if path not in chosen and base.bias is not None:
                targets.append(Target(path, 0, 0.0))
    return targets


def _adaptable(model: nn.Module, path: str) -> LoRALinear:
    """The `LoRALinear` at `path`; the first adapter wraps the linear layer there."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    layer = getattr(parent, name)
    if not isinstance(layer, LoRALinear):
        layer = LoRALinear(layer).train(layer.training)
        setattr(parent, name, layer)
    return layer


def _draw(w: LoRAWeights, init_lora_weights: str, generator: torch.Generator) -> None:
    """Initial values of A; B stays zero, so that an untrained adapter changes nothing."""
    shape = w.lora_A.shape
    if init_lora_weights == "gaussian":
        initial = torch.empty(shape).normal_(0, 1 / max(w.r, 1), generator=generator)
    else:
        bound = 1 / math.sqrt(shape[1])  # Kaiming-uniform with a = sqrt(5)
        initial = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    w.lora_A.data.copy_(initial)
    if init_lora_weights == "pissa":
        w.initial_A, w.initial_B = torch.zeros_like(w.lora_A.data), torch.zeros_like(w.lora_B.data)


def _values(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A float32 copy on `device`; zeros for a meta tensor, whose values will come from a file."""
    if tensor.is_meta:
        return torch.zeros(tensor.shape, device=device)
    return tensor.to(device, torch.float32, copy=True)


def _magnitudes(w: LoRAWeights, base: nn.Linear | Linear4bit) -> torch.Tensor:
    """DoRA's initial m, (out,): the norm of each row of W, as the forward pass computes it: c is 1 while B is 0."""
    dense = dense_weight(base, torch.float32 if isinstance(base, Linear4bit) else base.weight.dtype)
    return dense.new_empty(len(dense)) if dense.is_meta else base_squares(w, dense).sqrt()


def iter_lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(path, layer) of every layer that the active adapter adapts, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear) and module.weights is not None:
            yield path, module


def iter_lora_weights(model: nn.Module) -> Iterator[tuple[str, LoRAWeights]]:
    """(path, weights) of the active adapter, in the model's order."""
    for path, layer in iter_lora_layers(model):
        assert layer.weights is not None
        yield path, layer.weights


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters of the active adapter, in the model's order: A, B, and a layer's magnitude and bias."""
    return [parameter for _, w in iter_lora_weights(model) for parameter in w.parameters() if parameter.numel()]


def parameter_groups(model: nn.Module, lr_ratio: float = 1.0) -> list[tuple[list[nn.Parameter], float]]:
    """`lora_parameters`, grouped by the factor of their learning rate.

    LoRA+ (arXiv 2402.12354): all but A learn `lr_ratio` times as fast as A. With one rate for both, A and B of a wide
    model cannot both learn efficiently.
    """
    if lr_ratio == 1.0:
        return [(lora_parameters(model), 1.0)]
    slow = [w.lora_A for _, w in iter_lora_weights(model) if w.r]
    slow_ids = set(map(id, slow))
    return [(slow, 1.0), ([p for p in lora_parameters(model) if id(p) not in slow_ids], lr_ratio)]


def adapted_layers(model: nn.Module) -> list[LoRALinear]:
    """All layers that have an adapter, active or not."""
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def _unmerged_layers(model: nn.Module) -> list[LoRALinear]:
    """`adapted_layers`; ValueError if one is merged, whose weight would not follow a change of its adapter."""
    layers = adapted_layers(model)
    if any(layer.merged is not None for layer in layers):
        raise ValueError("an adapter is merged; unmerge_adapter comes first")
    return layers


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters that the model has, sorted."""
    return sorted({name for layer in adapted_layers(model) for name in layer.adapters})


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Makes an adapter the active one, or none. ValueError where there is none of that name, or one is merged."""
    layers = _unmerged_layers(model)
    names = adapter_names(model)
    if name is not None and name not in names:
        raise ValueError(f"name: got {name!r}, expected one of {names}")
    for layer in layers:
        layer.active = name


def active_adapter(model: nn.Module) -> str | None:
    """Name of the active adapter, or None."""
    return next((layer.active for layer in adapted_layers(model) if layer.active is not None), None)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Removes an adapter; if it was the active one, none is active then. ValueError if one is merged."""
    for layer in _unmerged_layers(model):
        if name in layer.adapters:
            del layer.adapters[name]
        if layer.active == name:
            layer.active = None


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """The model without its adapter, inside the block."""
    before = [(layer, layer.active, layer.merged) for layer in adapted_layers(model)]
    try:
        for layer, _, _ in before:
            layer.active = layer.merged = None
        yield
    finally:
        for layer, active, merged in before:
            layer.active, layer.merged = active, merged


@contextmanager
def adapter_scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """The active adapter's scaling times `factor`, inside the block. ValueError if it is merged."""
    _unmerged_layers(model)
    before = [(w, w.scaling) for _, w in iter_lora_weights(model)]
    try:
        for w, scaling in before:
            w.scaling = scaling * factor
        yield
    finally:
        for w, scaling in before:
            w.scaling = scaling


@torch.no_grad()
def merged_weight(layer: LoRALinear, weight: torch.Tensor) -> torch.Tensor:
    """(out, in) float32: W + s B A, with DoRA its rows scaled to norm m; `weight` (out, in) is W in any dtype."""
    w = layer.weights
    if w is None:
        return weight.float()
    a, b = w.factors()
    merged = torch.addmm(weight.float(), b, a, alpha=w.scaling)
    if w.lora_magnitude_vector is not None:
        merged *= (w.lora_magnitude_vector / torch.linalg.vector_norm(merged, dim=1))[:, None]
    return merged


def merge_adapter(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives each adapted layer one dense weight in `dtype` that replaces base and adapter: faster to generate with.

    It takes 2 bytes per parameter in bfloat16 beside the base, which does not change.
    """
    for _, layer in iter_lora_layers(model):
        bias = layer.effective_bias
        weight = merged_weight(layer, dense_weight(layer.base, dtype)).to(dtype)
        layer.merged = weight, None if bias is None else bias.detach().to(dtype)


def unmerge_adapter(model: nn.Module) -> None:
    """Drops the merged weights: base and adapter are separate again, bit for bit."""
    for layer in adapted_layers(model):
        layer.merged = None
