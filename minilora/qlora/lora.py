"""The LoRA linear layer over a frozen weight: its definition, and the same with its backward pass derived.

A frozen linear layer y = W x gets a trainable product of two thin matrices beside it. For the T tokens of x, (T, in):

    y = x W^T + s * drop(x) A^T B^T          A: (R, in), B: (out, R), s = alpha / R  (rsLoRA: alpha / sqrt(R))

With u = drop(x) A^T, (T, R), and dy the gradient of the loss with respect to y:

    dB = s * dy^T u                          du = s * dy B
    dA = du^T drop(x)                        dx = dy W + drop'(du A)

W is only ever multiplied with. So its dense form is made from 4 bits for the product in forward, thrown away, and made
again for dy W in backward: that is QLoRA. W has no gradient product, a third less work than full training. The frozen
products cost 4 T in out FLOP, the adapter's 6 R T (in + out): at R = 8 in a Qwen2.5-0.5B that is 2 %.

What makes the derived form cheaper than autograd on the definition:

* Layers that read the same x (q, k and v; gate and up) are computed together. Their A are stacked to one matrix, so
  that u, dA and the adapter's share of dx are one thin product each and not three, and x is kept once.
* x is often not kept at all. It is the output of a norm or of SwiGLU, which cost next to nothing beside a product and
  whose own inputs are kept anyway, so `Recompute` says how to compute it in backward: a third of all activations.
* A dropout mask is a function of (seed, step, micro-batch, layer), drawn a second time in backward and kept nowhere.
  Layers that are computed together share one, because it belongs to x; peft draws one for each.

B starts at zero, so an untrained adapter changes nothing, to the bit. A and B stay float32: a bfloat16 weight would
swallow updates smaller than 1/256 of it. DoRA's magnitude (`dora.py`) and a trained bias are composed around the
product. PiSSA takes the R largest singular directions out of W and trains them: y = x (W - s B0 A0)^T + s x A^T B^T.
W stays as it is, and the difference to it is a product of rank 2 R, [A; A0] and [B, -B0], the second half frozen.

Source: arXiv 2106.09685 (LoRA), 2305.14314 (QLoRA), 2312.03732 (rsLoRA), 2404.02948 (PiSSA).
Left out: adapters of embeddings and norms; several adapters at once (of those that a layer has, one is active).
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from minilora.qlora.dora import apply_magnitude
from minilora.qlora.nf4 import Linear4bit, dense_weight, frozen_product
from minilora.qlora.ops import DropoutMask

Device = torch.device | str

# ---- The definition


class LoRALinear(nn.Module):
    """A frozen linear layer with the weights of one or more adapters beside it."""

    def __init__(self, base: "Linear4bit | nn.Linear"):
        super().__init__()
        self.base = base  # never changed
        self.adapters = nn.ModuleDict()  # `LoRAWeights` by the adapter's name
        self.active: str | None = None  # which of them is computed with
        # Weight (out, in) and bias that replace base and adapter while the adapter is merged.
        self.merged: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, in) -> (T, out), by autograd. The model calls `linear_layers`, which gives the same for less."""
        if self.merged is not None:
            return F.linear(x, *self.merged)
        if (w := self.weights) is None:
            return self.base(x)
        a, b = w.factors()
        y = frozen_product(self.base, x)  # W x
        y = y + (w.scaling * (w.dropout_mask().dropout(x).to(a.dtype) @ a.T) @ b.T).to(y.dtype)  # + s B A drop(x)
        if w.lora_magnitude_vector is not None:  # DoRA: each output times m / |W + s B A|
            norms = (dense_weight(self.base, a.dtype) + w.scaling * b @ a).norm(dim=1).detach()
            y = (y * (w.lora_magnitude_vector / norms)).to(y.dtype)
        return y if self.effective_bias is None else (y + self.effective_bias).to(y.dtype)

    @property
    def weights(self) -> "LoRAWeights | None":
        """The active adapter's, None where it has none for this layer."""
        if self.active is None or self.active not in self.adapters:
            return None
        return self.adapters[self.active]  # type: ignore[return-value]

    @property
    def effective_bias(self) -> torch.Tensor | None:
        """(out,) the active adapter's trained bias, else the frozen layer's, or None."""
        w = self.weights
        return self.base.bias if w is None or w.bias is None else w.bias


class LoRAWeights(nn.Module):
    """What one adapter has for one linear layer, all of it float32: lora_A (R, in), lora_B (out, R), and more of some.

    `scaling` is s, computed from `alpha`, which adapter_config.json has. R is 0 where only the bias is trained.
    """

    lora_magnitude_vector: nn.Parameter | None  # (out,), DoRA's m
    bias: nn.Parameter | None  # (out,) trained in place of the frozen layer's
    initial_A: torch.Tensor | None  # (R, in) frozen, PiSSA's A0
    initial_B: torch.Tensor | None  # (out, R) frozen, PiSSA's B0 with the sign turned
    cast: "tuple[torch.Tensor, torch.Tensor] | None" = None  # `factors` in the compute dtype, inside `cast_once`

    def __init__(self, size: tuple[int, int], r: int, alpha: float, scaling: float, dropout: "Dropout", device: Device):
        """A and B of zeros for a layer of `size` (out, in)."""
        super().__init__()
        out_features, in_features = size
        self.alpha = alpha
        self.scaling = scaling
        self.dropout = dropout
        self.base_squares: torch.Tensor | None = None  # |W|^2, kept by `dora.base_squares`
        self.lora_A = nn.Parameter(torch.zeros(r, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, device=device))
        self.register_parameter("lora_magnitude_vector", None)
        self.register_parameter("bias", None)
        self.register_buffer("initial_A", None)
        self.register_buffer("initial_B", None)

    @property
    def is_plain(self) -> bool:
        """Whether A and B are all there is."""
        return self.bias is None and self.lora_magnitude_vector is None

    @property
    def r(self) -> int:
        """R, without PiSSA's frozen half."""
        return len(self.lora_A)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B as they are multiplied with: with PiSSA's frozen half behind the trained one."""
        if self.initial_A is None or self.initial_B is None:
            return self.lora_A, self.lora_B
        return torch.cat((self.lora_A, self.initial_A)), torch.cat((self.lora_B, self.initial_B), dim=1)

    def dropout_mask(self) -> DropoutMask:
        """The mask of this micro-batch; of probability 0 outside training."""
        dropout = self.dropout
        seed = dropout.seed.value * 4096 + dropout.layer
        return DropoutMask(dropout.probability if self.training else 0.0, seed)


@contextmanager
def cast_once(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside it A and B must not change: all passes read the same copies of them, in `dtype`, the compute dtype."""
    weights = [m.weights for m in model.modules() if isinstance(m, LoRALinear) and m.weights is not None]
    factors = [factor.detach() for w in weights for factor in w.factors()]
    try:
        if factors and factors[0].dtype != dtype:
            # In one buffer: as many small tensors between large ones would keep the heap in pieces.
            sizes = [f.numel() for f in factors]
            parts = torch.empty(sum(sizes), dtype=dtype, device=factors[0].device).split(sizes)
            copies = [part.view(f.shape) for part, f in zip(parts, factors, strict=True)]
            torch._foreach_copy_(copies, factors)
            for w, a, b in zip(weights, copies[::2], copies[1::2], strict=True):
                w.cast = a, b
        del factors  # PiSSA's are copies
        yield
    finally:
        for w in weights:
            w.cast = None


# ---- Dropout without state


class DropoutSeed:
    """What the masks of one micro-batch are drawn from; shared by all LoRA layers of a model."""

    def __init__(self) -> None:
        self.value = 0

    def set(self, seed: int, step: int, micro_batch: int) -> None:
        """Chooses the masks of one micro-batch; a hash, so that neighbouring numbers are unrelated."""
        digest = hashlib.blake2b(f"{seed}-{step}-{micro_batch}".encode(), digest_size=6).digest()
        self.value = int.from_bytes(digest, "big")


@dataclass
class Dropout:
    """Dropout of one layer's adapter: the probability of a zero, the layer's index in the model, the model's seed."""

    probability: float
    layer: int
    seed: DropoutSeed


# ---- The same, with its gradient derived


@dataclass(frozen=True)
class Recompute:
    """How a layer's input is computed a second time in backward, in place of being kept.

    `function` gives the input, bit for bit, from `sources`, tensors that are kept in its place.
    """

    function: Callable[..., torch.Tensor]
    sources: tuple[torch.Tensor, ...]


class _Part(NamedTuple):
    """One of several layers that read the same x: frozen weight, B, bias (None: none, or added later), s / (1 - p)."""

    base: "Linear4bit | nn.Linear"
    b: torch.Tensor
    bias: torch.Tensor | None
    scaling: float


class _Group(NamedTuple):
    """Layers that read the same x, their A, stacked, the mask, what computes x in backward, and if any y is read."""

    parts: Sequence[_Part]
    a: torch.Tensor
    mask: DropoutMask
    recompute: Callable[..., torch.Tensor]
    is_read: bool


class _LoRA(torch.autograd.Function):
    """The module docstring's formulas, in its letters. factors: all A, then all B, for autograd; the group has both."""

    @staticmethod
    def forward(
        ctx: Any, group: _Group, sources: Sequence[torch.Tensor], x: torch.Tensor, *factors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        u = F.linear(group.mask.zero(x), group.a)
        us = u.split([part.b.shape[1] for part in group.parts], dim=1)
        ys = []
        for (base, b, bias, s), u_i in zip(group.parts, us, strict=True):
            if not group.is_read:
                ys.append(x.new_empty(1).expand(len(x), base.out_features))
                continue
            y = _product(u_i, b.T, s) if bias is None else torch.addmm(bias, u_i, b.T, alpha=s)
            ys.append(y.addmm_(x, dense_weight(base, x.dtype).T))  # last, or y would be read once more
        ctx.group = group
        # Sources go through `save_for_backward`: an attribute would keep them from being freed layer by layer.
        ctx.save_for_backward(u, *sources)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        group: _Group = ctx.group
        u, *sources = ctx.saved_tensors
        x = group.recompute(*sources)
        ranks = [part.b.shape[1] for part in group.parts]
        wide = torch.promote_types(u.dtype, torch.float32)
        du, dbs = torch.empty_like(u), []
        us, dus = (x.split(ranks, dim=1) for x in (u, du))
        for dy, (_, b, _, s), u_i, du_i in zip(dys, group.parts, us, dus, strict=True):
            du_i.addmm_(dy, b, alpha=s, beta=0)
            # u^T dy and not dy^T u: the wide matrix is read along its rows, in half the time.
            dbs.append(_product(u_i.T, dy, s).T.to(wide, memory_format=torch.contiguous_format))
        dropped = group.mask.draw(x.shape, x.device) if group.mask.probability else None
        da = (du.T @ group.mask.zero(x, dropped)).to(wide)
        dx = None
        if ctx.needs_input_grad[2]:  # nothing below the first layer is trained, so its x needs none
            dx = group.mask.zero(du @ group.a, dropped)
            for dy, part in zip(dys, group.parts, strict=True):
                dx.addmm_(dy, dense_weight(part.base, dy.dtype))
        return None, None, dx, *da.split(ranks), *dbs


def _product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * left @ right, scaled before it is rounded."""
    return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, alpha=scale, beta=0)


# ---- Which of the two

Linear = LoRALinear | Linear4bit | nn.Linear


def linear_layers(
    x: torch.Tensor, layers: Sequence[Linear], recompute: Recompute | None = None, *, is_read: bool = True
) -> list[torch.Tensor]:
    """What linear layers make of the same x (T, in): each one's own `forward`, (T, out), for less time and memory.

    A layer without an adapter takes part with rank 0. `recompute` computes x in backward; without it x is kept. Where
    only a backward pass follows, no result `is_read`: its values may be anything.
    """
    adapters = [layer.weights if isinstance(layer, LoRALinear) and layer.merged is None else None for layer in layers]
    first = next((w for w in adapters if w is not None), None)
    bases = [layer.base if isinstance(layer, LoRALinear) else layer for layer in layers]
    if first is None or all(isinstance(base, Linear4bit) and base.uses_gemv(x) for base in bases):
        return [layer(x) for layer in layers]
    mask = first.dropout_mask()
    parts, stacked, factors = [], [], []
    for base, w in zip(bases, adapters, strict=True):
        # DoRA scales before a bias is added, and a trained one is autograd's: both are left to `_finish`.
        bias = base.bias if w is None or w.is_plain else None
        own = (first.lora_A[:0], x.new_empty(base.out_features, 0)) if w is None else w.factors()
        a, b = (factor.detach().to(x.dtype) for factor in own) if w is None or w.cast is None else w.cast
        parts.append(_Part(base, b, bias, 0.0 if w is None else w.scaling / (1 - mask.probability)))
        stacked.append(a)
        factors.append(own)
    kept = recompute or Recompute(lambda x: x, (x,))
    is_read = is_read or any(w is not None and not w.is_plain for w in adapters)  # `_finish` reads
    group = _Group(parts, stacked[0] if len(stacked) == 1 else torch.cat(stacked), mask, kept.function, is_read=is_read)
    ys = _LoRA.apply(group, kept.sources, x, *(a for a, _ in factors), *(b for _, b in factors))
    return [_finish(y, layer) for y, layer in zip(ys, layers, strict=True)]


def _finish(y: torch.Tensor, layer: Linear) -> torch.Tensor:
    """y with DoRA's magnitude and the bias where `_LoRA` left them out."""
    if not isinstance(layer, LoRALinear) or (w := layer.weights) is None or w.is_plain:
        return y
    if w.lora_magnitude_vector is not None:
        y = apply_magnitude(y, w, dense_weight(layer.base, y.dtype))
    bias = layer.effective_bias
    return y if bias is None else (y + bias).to(y.dtype)
