"""The LoRA linear layer over a frozen weight, its backward pass, and where it goes in the model.

A frozen linear layer y = x W^T gets a trainable product of two thin matrices beside it:

    y = x W^T + s * drop(x) A^T B^T          A: (R, in), B: (out, R), s = alpha / R  (rsLoRA: alpha / sqrt(R))

With u = drop(x) A^T, (T, R), and dy the gradient of the loss with respect to y:

    dB = s * dy^T u                          du = s * dy B
    dA = du^T drop(x)                        dx = dy W + drop'(du A)

W is only ever multiplied with. So its dense form is made from 4 bits for the product in forward, thrown
away, and made again for dy W in backward: that is QLoRA. Nothing of size (T, out) is kept.

Layers that read the same x (q, k and v; gate and up) are computed together, by `project`: their A are stacked
to one matrix, so that u, dA and the adapter's share of dx are one thin product each and not three, and x is
kept once. Better still, x is often not kept at all. It is the output of a norm or of SwiGLU, functions that cost
next to nothing beside a product and whose own inputs are kept anyway, so `Again` says how to make it a second
time: a third of all that a layer would keep.

Cost for T rows: 4 * T * in * out FLOP of frozen products against 6 * R * T * (in + out) of the adapter's; at
R = 8 in a Qwen2.5-0.5B that is 2 %. W has no gradient product, which is a third less than full training.

B starts at zero, so an untrained adapter changes nothing, to the bit. A and B stay float32 whatever the
compute type: a bfloat16 weight would swallow updates smaller than 1/256 of it.

Dropout without state: a mask is a function of (seed, step, micro-batch, layer). Backward draws it again in
place of keeping it, recomputed checkpoints see the same mask, and a resumed run needs no generator. Layers that
are computed together share a mask, because it belongs to x; peft draws one for each.

Source: arXiv 2106.09685 (LoRA), 2305.14314 (QLoRA), 2312.03732 (rsLoRA); initial values as in loralib and peft.
"""

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from minilora.errors import UserError
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


@dataclass(frozen=True)
class Again:
    """How a layer's input is made a second time in backward, in place of being kept.

    Attributes:
        make: gives the input, bit for bit, from `sources`.
        sources: tensors that are kept anyway.
    """

    make: Callable[..., torch.Tensor]
    sources: tuple[torch.Tensor, ...]


class _Projections(torch.autograd.Function):
    """The module docstring's formulas, in its letters, for layers that read the same x; A is all of theirs, stacked.

    s includes dropout's 1 / (1 - p).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layers: Sequence["Projection"],
        again: Again | None,
        *matrices: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        adapted = _adapted(layers)
        # The sources go through `save_for_backward` alone: an attribute would keep them from being freed layer by layer
        # in backward, and from being made again under gradient checkpointing.
        ctx.layers, ctx.make = layers, None if again is None else again.make
        ctx.dropout, ctx.seed = adapted[0].dropout_now()
        a = torch.cat(matrices[::2]).to(x.dtype)
        u = F.linear(_drop(x, ctx.dropout, ctx.seed), a)
        parts = iter(zip(u.split([len(matrix) for matrix in matrices[::2]], dim=1), matrices[1::2], strict=True))
        ys = []
        for layer in layers:
            base = _base(layer)
            if layer in adapted:
                part, b = next(parts)
                thin = {"mat1": part, "mat2": b.to(x.dtype).T, "alpha": layer.scaling / (1 - ctx.dropout)}
                if base.bias is None:
                    y = x.new_empty(len(x), base.out_features).addmm_(**thin, beta=0)
                else:
                    y = torch.addmm(base.bias, **thin)
                y.addmm_(x, dense_weight(base, x.dtype).T)  # last: to add the thin product to y would read y once more
            else:
                y = F.linear(x, dense_weight(base, x.dtype), base.bias)
            ys.append(y)
        ctx.save_for_backward(u, a, *matrices[1::2], *((x,) if again is None else again.sources))
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        adapted = _adapted(ctx.layers)
        u, a, *kept = ctx.saved_tensors
        bs, sources = kept[: len(adapted)], kept[len(adapted) :]
        x = sources[0] if ctx.make is None else ctx.make(*sources)
        ranks = [b.shape[1] for b in bs]
        dus, dbs = [], []
        parts = iter(zip(u.split(ranks, dim=1), bs, strict=True))
        for dy, layer in zip(dys, ctx.layers, strict=True):
            if layer in adapted:
                part, b = next(parts)
                s = layer.scaling / (1 - ctx.dropout)
                dus.append((dy @ b.to(dy.dtype)).mul_(s))
                # u^T dy and not dy^T u: the wide matrix is read along its rows, in half the time.
                dbs.append((part.T @ dy).T.to(b.dtype, memory_format=torch.contiguous_format).mul_(s))
        du = torch.cat(dus, dim=1)
        das = (du.T @ _drop(x, ctx.dropout, ctx.seed)).to(bs[0].dtype).split(ranks)
        dx = None
        if ctx.needs_input_grad[0]:  # nothing below the first layer is trained, so its x needs none
            dx = du @ a
            if ctx.dropout:
                dx.masked_fill_(dropped_places(dx.shape, ctx.dropout, ctx.seed, dx.device), 0)
            for dy, layer in zip(dys, ctx.layers, strict=True):
                dx.addmm_(dy, dense_weight(_base(layer), dy.dtype))
        gradients = (matrix for pair in zip(das, dbs, strict=True) for matrix in pair)
        return dx, None, None, *gradients


def project(x: torch.Tensor, layers: Sequence["Projection"], again: Again | None = None) -> tuple[torch.Tensor, ...]:
    """What linear layers make of the same input.

    Args:
        x: (T, in) compute dtype.
        layers: with or without an adapter.
        again: how x is made again in backward; None keeps it.

    Returns:
        One (T, out) for each layer, compute dtype.
    """
    adapted = _adapted(layers)
    if not adapted:
        return tuple(_base(layer)(x) for layer in layers)
    matrices = [matrix for layer in adapted for matrix in (layer.lora_A, layer.lora_B)]
    outputs: tuple[torch.Tensor, ...] = _Projections.apply(x, layers, again, *matrices)
    return outputs


def _adapted(layers: Sequence["Projection"]) -> list["LoRALinear"]:
    return [layer for layer in layers if isinstance(layer, LoRALinear) and layer.enabled]


def _base(layer: "Projection") -> "Linear4bit | nn.Linear":
    return layer.base if isinstance(layer, LoRALinear) else layer


def _drop(x: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    return x.masked_fill(dropped_places(x.shape, dropout, seed, x.device), 0) if dropout else x


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
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if device is None:
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
        return project(x, (self,))[0]

    def dropout_now(self) -> tuple[float, int]:
        """Probability and seed of this micro-batch's mask; no dropout outside training."""
        return self.dropout if self.training else 0.0, self._dropout_seed.value * 4096 + self.index


Projection = LoRALinear | Linear4bit | nn.Linear


def merged_weight(layer: LoRALinear, weight: torch.Tensor) -> torch.Tensor:
    """W + s B A: the one weight that does what `layer` does without dropout.

    Args:
        layer: its A and B on the device of `weight`; its own base is not looked at.
        weight: (out, in) of any floating-point type.

    Returns:
        (out, in) float32.
    """
    return torch.addmm(weight.float(), layer.lora_B.detach(), layer.lora_A.detach(), alpha=layer.scaling)


def lora_scaling(r: int, alpha: float, use_rslora: bool) -> float:
    """s: alpha / r, or alpha / sqrt(r), which keeps the update's size when r grows."""
    return alpha / (math.sqrt(r) if use_rslora else r)


def attach(
    model: nn.Module,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    use_rslora: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
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
        device: of A and B; by default that of the layer they belong to.

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
        layer = LoRALinear(base, r, lora_scaling(r, alpha, use_rslora), dropout, index, dropout_seed, device)
        bound = 1 / math.sqrt(base.in_features)  # Kaiming-uniform with a = sqrt(5)
        initial = torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator)
        layer.lora_A.data.copy_(initial)
        layer.train(model.training)
        setattr(parent, name, layer)
    return dropout_seed


def _match_targets(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
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
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)  # "[[": Python does not yet say what it will mean
                matched = [path for path in candidates if re.fullmatch(target_modules, path)]
        except (re.error, FutureWarning) as error:
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
