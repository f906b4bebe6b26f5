"""The LoRA linear layer over a frozen weight, its backward pass, and where it goes in the model.

A frozen linear layer y = x W^T gets a trainable product of two thin matrices beside it:

    y = x W^T + s * drop(x) A^T B^T          A: (R, in), B: (out, R), s = alpha / R  (rsLoRA: alpha / sqrt(R))

With u = drop(x) A^T, (T, R), and dy the gradient of the loss with respect to y:

    dB = s * dy^T u                          du = s * dy B
    dA = du^T drop(x)                        dx = dy W + drop'(du A)

W is only ever multiplied with. So its dense form is made from 4 bits for the product in forward, thrown
away, and made again for dy W in backward: that is QLoRA. Nothing of size (T, out) is kept, and x only once
for all layers that read it.

Cost for T rows: 4 * T * in * out FLOP of frozen products against 6 * R * T * (in + out) of the adapter's; at
R = 8 in a Qwen2.5-0.5B that is 2 %. W has no gradient product, which is a third less than full training.

B starts at zero, so an untrained adapter changes nothing, to the bit. A and B stay float32 whatever the
compute type: a bfloat16 weight would swallow updates smaller than 1/256 of it.

Dropout without state: a mask is a function of (seed, step, micro-batch, layer). Backward draws it again in
place of keeping it, recomputed checkpoints see the same mask, and a resumed run needs no generator.

Source: arXiv 2106.09685 (LoRA), 2305.14314 (QLoRA), 2312.03732 (rsLoRA); initial values as in loralib and peft.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from minilora.errors import UserError
from minilora.model import Qwen2ForCausalLM
from minilora.nf4 import Linear4bit


class DropoutSeed:
    """What the masks of one micro-batch are drawn from; shared by all LoRA layers of a model."""

    def __init__(self) -> None:
        self.value = 0

    def set(self, seed: int, step: int, micro_batch: int) -> None:
        """Chooses the masks of one micro-batch; a hash, so that neighbouring numbers are unrelated."""
        digest = hashlib.blake2b(f"{seed}-{step}-{micro_batch}".encode(), digest_size=6).digest()
        self.value = int.from_bytes(digest, "big")


def dropped_places(shape: torch.Size, probability: float, seed: int, device: torch.device) -> torch.Tensor:
    """Which entries dropout sets to zero: bool of `shape`, the same for the same seed and device type.

    Four 16-bit draws come out of each 64-bit number, a quarter of the cost of drawing floats; the probability
    is met to 1 / 65536.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    words = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    draws = words.view(torch.int16)[: shape.numel()].view(shape)
    return draws < round(probability * 65536) - 32768


class _LoRALinear(torch.autograd.Function):
    """The module docstring's formulas, in its letters; s includes dropout's 1 / (1 - p)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        base: "Linear4bit | nn.Linear",
        scaling: float,
        dropout: float,
        seed: int,
    ) -> torch.Tensor:
        y = F.linear(x, dense_weight(base, x.dtype), base.bias)
        kept = x.masked_fill(dropped_places(x.shape, dropout, seed, x.device), 0) if dropout else x
        u = F.linear(kept, a.to(x.dtype))
        ctx.scaling = scaling / (1 - dropout)
        ctx.base, ctx.dropout, ctx.seed = base, dropout, seed
        ctx.save_for_backward(x, u, a, b)
        return y.addmm_(u, b.to(x.dtype).T, alpha=ctx.scaling)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        x, u, a, b = ctx.saved_tensors
        du = (dy @ b.to(dy.dtype)).mul_(ctx.scaling)
        db = (dy.T @ u).to(b.dtype).mul_(ctx.scaling)
        dropped = dropped_places(x.shape, ctx.dropout, ctx.seed, x.device) if ctx.dropout else None
        da = (du.T @ (x if dropped is None else x.masked_fill(dropped, 0))).to(a.dtype)
        dx = None
        if ctx.needs_input_grad[0]:  # nothing below the first layer is trained, so its x needs none
            dx = dy @ dense_weight(ctx.base, dy.dtype)
            if dropped is None:
                dx.addmm_(du, a.to(dy.dtype))
            else:
                dx += (du @ a.to(dy.dtype)).masked_fill_(dropped, 0)
        return dx, da, db, None, None, None, None


def dense_weight(base: "Linear4bit | nn.Linear", dtype: torch.dtype) -> torch.Tensor:
    """(out, in) `dtype`: the weight itself, or made from its 4 bits."""
    return base.dense_weight(dtype) if isinstance(base, Linear4bit) else base.weight.to(dtype)


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank product beside it.

    Attributes:
        base: the frozen layer, `nn.Linear` or `Linear4bit`.
        lora_A: (R, in) float32.
        lora_B: (out, R) float32.
        enabled: False leaves the base alone.
    """

    def __init__(
        self,
        base: "Linear4bit | nn.Linear",
        r: int,
        scaling: float,
        dropout: float,
        index: int,
        dropout_seed: DropoutSeed,
    ):
        super().__init__()
        device = base.weight.device if isinstance(base, nn.Linear) else base.device
        self.base = base
        self.scaling = scaling
        self.dropout = dropout
        self.index = index
        self.enabled = True
        self._dropout_seed = dropout_seed
        self.lora_A = nn.Parameter(torch.zeros(r, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, in) compute dtype -> (T, out) compute dtype."""
        if not self.enabled:
            return self.base(x)
        dropout = self.dropout if self.training else 0.0
        seed = self._dropout_seed.value * 4096 + self.index
        return _LoRALinear.apply(x, self.lora_A, self.lora_B, self.base, self.scaling, dropout, seed)


def lora_scaling(r: int, alpha: float, use_rslora: bool) -> float:
    """s: alpha / r, or alpha / sqrt(r), which keeps the update's size when r grows."""
    return alpha / (math.sqrt(r) if use_rslora else r)


def attach(
    model: Qwen2ForCausalLM,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    use_rslora: bool = False,
    seed: int = 0,
) -> DropoutSeed:
    """Puts a LoRA layer around every chosen linear layer and freezes all else.

    Args:
        model: changed in place.
        r: rank of the product.
        alpha: numerator of the scaling.
        dropout: probability with which an entry of the adapter's input is zero in training.
        target_modules: names as peft takes them ("q_proj", "layers.3.mlp.up_proj"), "all-linear", or a regular
            expression for the whole path.
        use_rslora: scale by alpha / sqrt(r).
        seed: of A's initial values, drawn on the CPU so that every device starts alike.

    Returns:
        The seed that training sets before each micro-batch.

    Raises:
        UserError: a target that matches no linear layer.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    dropout_seed = DropoutSeed()
    for index, path in enumerate(_match_targets(model, target_modules)):
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        base = getattr(parent, name)
        layer = LoRALinear(base, r, lora_scaling(r, alpha, use_rslora), dropout, index, dropout_seed)
        bound = 1 / math.sqrt(base.in_features)  # Kaiming-uniform with a = sqrt(5)
        initial = torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator)
        layer.lora_A.data.copy_(initial)
        layer.train(model.training)
        setattr(parent, name, layer)
    return dropout_seed


def _match_targets(model: Qwen2ForCausalLM, target_modules: str | Sequence[str]) -> list[str]:
    """Paths of the chosen linear layers, in the model's order."""
    candidates = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Linear4bit) and path != "lm_head"
    ]
    names = sorted({path.rpartition(".")[2] for path in candidates})
    choices = f"expected some of {', '.join(names)}, 'all-linear', or a regular expression for the whole path"
    if target_modules == "all-linear":
        return candidates
    if isinstance(target_modules, str):
        try:
            matched = [path for path in candidates if re.fullmatch(target_modules, path)]
        except re.error as error:
            raise UserError(f"lora.target_modules: {target_modules!r} is not a regular expression ({error})") from None
        if matched:
            return matched
        # A single name reads as a regular expression that matches no whole path: take it as the name it is.
        target_modules = [target_modules]
    missing = [t for t in target_modules if not any(_is_named(path, t) for path in candidates)]
    if missing or not target_modules:
        head = {"lm_head", "embed_tokens"} & set(missing)
        reason = "; head and embedding cannot be adapted (they are one matrix in tied models)" if head else ""
        raise UserError(f"lora.target_modules: {missing} match no linear layer; {choices}{reason}")
    return [path for path in candidates if any(_is_named(path, t) for t in target_modules)]


def _is_named(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def iter_lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(path, layer) of every LoRA layer, found by type, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every LoRA layer, in the model's order: all that is trained."""
    return [parameter for _, layer in iter_lora_layers(model) for parameter in (layer.lora_A, layer.lora_B)]


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """The model without its adapter, for as long as the block lasts."""
    layers = [layer for _, layer in iter_lora_layers(model)]
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
