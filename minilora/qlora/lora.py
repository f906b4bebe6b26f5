"""The LoRA linear layer over a frozen weight, and its backward pass.

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

DoRA gives each output a trained length, c = m / n, with which W x and the product are multiplied together (`dora.py`).
dz = c * dy then stands in the place of dy in all of these formulas.

A trained bias takes the place of the frozen one, dbias = sum over rows of dy. A layer of which nothing but the bias is
trained has an adapter of rank 0.

PiSSA takes the R largest singular directions out of W and trains them: y = x (W - s B0 A0)^T + s x A^T B^T. W stays as
it is and the difference to it is written as a product of rank 2 R, [A; A0] and [B, -B0], the second half frozen: that
is also how the adapter is saved, for everybody's W, in 4 bits or not.

Dropout is drawn again in backward (`dropout.py`). Layers that are computed together share a mask, because it belongs to
x; peft draws one for each.

Source: arXiv 2106.09685 (LoRA), 2305.14314 (QLoRA), 2312.03732 (rsLoRA), 2404.02948 (PiSSA).
Left out: DoRA and a trained bias of embeddings and norms; several adapters at once (of those that a layer has, one is
active).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from minilora.qlora.dora import magnitude_gradient, scaled, weight_norms
from minilora.qlora.dropout import DropoutSeed, dropout_mask
from minilora.qlora.nf4 import Linear4bit


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

    s includes dropout's 1 / (1 - p), but in n, which is of the weights alone. `trained` is A, B, m and bias of each
    adapted layer in turn, None for what it has not.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layers: Sequence["Projection"], again: Again | None, *trained: Any
    ) -> tuple[torch.Tensor, ...]:
        weights = [_weights(layer) for layer in layers]
        # The sources go through `save_for_backward` alone: an attribute would keep them from being freed layer by layer
        # in backward, and from being made again under gradient checkpointing.
        ctx.layers, ctx.weights, ctx.make = layers, weights, None if again is None else again.make
        ctx.dropout, ctx.seed = next(w for w in weights if w is not None).dropout_now()
        ranks = [len(own) for own in trained[::4]]
        a = torch.cat(trained[::4]).to(x.dtype)
        u = F.linear(_drop(x, ctx.dropout, ctx.seed), a)
        parts = iter(zip(u.split(ranks, dim=1), a.split(ranks), *(trained[i::4] for i in (1, 2, 3)), strict=True))
        ys, kept = [], []
        for layer, w in zip(layers, weights, strict=True):
            if w is None:
                y = _base(layer)(x)
            else:
                own_u, own_a, b, m, bias = next(parts)
                y, c = _forward_adapted(x, _base(layer), w, ctx.dropout, own_u, own_a, b, m, bias)
                kept += [b, m, bias, c, None if m is None else y]
            ys.append(y)
        ctx.save_for_backward(u, a, *kept, *((x,) if again is None else again.sources))
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        count = sum(w is not None for w in ctx.weights)
        u, a, *saved = ctx.saved_tensors
        kept, sources = [saved[5 * i : 5 * i + 5] for i in range(count)], saved[5 * count :]
        x = sources[0] if ctx.make is None else ctx.make(*sources)
        ranks = [b.shape[1] for b, *_ in kept]
        parts = iter(zip(u.split(ranks, dim=1), kept, strict=True))
        dzs, dus, others = [], [], []
        for dy, layer, w in zip(dys, ctx.layers, ctx.weights, strict=True):
            dz = dy
            if w is not None:
                own_u, (b, m, bias, c, y) = next(parts)
                dm = None if m is None else magnitude_gradient(dy, y, _base(layer).bias if bias is None else bias, m)
                dbias = None if bias is None else dy.sum(0, dtype=bias.dtype)
                dz = dy if c is None else scaled(dy, c, torch.empty_like(dy))
                s = w.scaling / (1 - ctx.dropout)
                dus.append((dz @ b.to(dz.dtype)).mul_(s))
                # u^T dz and not dz^T u: the wide matrix is read along its rows, in half the time.
                db = (own_u.T @ dz).T.to(b.dtype, memory_format=torch.contiguous_format).mul_(s)
                others.append((db, dm, dbias))
            dzs.append(dz)
        du = torch.cat(dus, dim=1)
        das = (du.T @ _drop(x, ctx.dropout, ctx.seed)).to(kept[0][0].dtype).split(ranks)
        dx = None
        if ctx.needs_input_grad[0]:  # nothing below the first layer is trained, so its x needs none
            dx = du @ a
            if ctx.dropout:
                dx.masked_fill_(dropout_mask(dx.shape, ctx.dropout, ctx.seed, dx.device), 0)
            for dz, layer in zip(dzs, ctx.layers, strict=True):
                dx.addmm_(dz, dense_weight(_base(layer), dz.dtype))
        return dx, None, None, *(one for da, rest in zip(das, others, strict=True) for one in (da, *rest))


def _forward_adapted(
    x: torch.Tensor,
    base: "Linear4bit | nn.Linear",
    w: "LoRAWeights",
    dropout: float,
    u: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    m: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y of one adapted layer and, with DoRA, its c."""
    dense = dense_weight(base, x.dtype)
    bias = base.bias if bias is None else bias.to(x.dtype)
    thin: dict[str, Any] = {"mat1": u, "mat2": b.to(x.dtype).T, "alpha": w.scaling / (1 - dropout)}
    if bias is None or m is not None:
        y = x.new_empty(len(x), base.out_features).addmm_(**thin, beta=0)
    else:
        y = torch.addmm(bias, **thin)
    y.addmm_(x, dense.T)  # last: to add the thin product to y would read y once more
    if m is None:
        return y, None
    c = m / weight_norms(w.base_squares(dense), dense, a, b, w.scaling)
    scaled(y, c, y)
    return (y if bias is None else y.add_(bias)), c


def project(x: torch.Tensor, layers: Sequence["Projection"], again: Again | None = None) -> tuple[torch.Tensor, ...]:
    """What linear layers make of the same input.

    Args:
        x: (T, in) compute dtype.
        layers: with or without an adapter.
        again: how x is made again in backward; None keeps it.

    Returns:
        One (T, out) for each layer, compute dtype.
    """
    adapted = [w for layer in layers if (w := _weights(layer)) is not None]
    if not adapted:
        return tuple(_without_adapter(layer, x) for layer in layers)
    if torch.is_inference_mode_enabled():
        straight = [y for layer in layers if (y := _straight_product(x, layer)) is not None]
        if len(straight) == len(layers):
            return tuple(straight)
    trained = [tensor for w in adapted for tensor in (*w.matrices(), w.lora_magnitude_vector, w.bias)]
    outputs: tuple[torch.Tensor, ...] = _Projections.apply(x, layers, again, *trained)
    return outputs


def _straight_product(x: torch.Tensor, layer: "Projection") -> torch.Tensor | None:
    """y of a few rows where the frozen product goes straight from 4 bits (`gemv.py`), None where it does not.

    The thin products are in float32 here: in bfloat16 one of a single row takes 20 us, nearly all of it to begin.
    """
    base, w = _base(layer), _weights(layer)
    if not isinstance(base, Linear4bit):
        return None
    if w is not None and (w.lora_magnitude_vector is not None or w.dropout_now()[0]):
        return None  # DoRA's n needs the dense weight
    bias = base.bias if w is None or w.bias is None else w.bias.to(x.dtype)
    y = base.gemv_product(x, bias)
    if y is None or w is None:
        return y
    a, b = w.matrices()
    return y.add_(F.linear(F.linear(x.to(a.dtype), a), b), alpha=w.scaling)


def _weights(layer: "Projection") -> "LoRAWeights | None":
    """The adapter that `layer` computes with, None where it does as its base does, or is merged."""
    return layer.weights if isinstance(layer, LoRALinear) and layer.merged is None else None


def _without_adapter(layer: "Projection", x: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, LoRALinear) and layer.merged is not None:
        return F.linear(x, *layer.merged)
    y: torch.Tensor = _base(layer)(x)
    return y


def _base(layer: "Projection") -> "Linear4bit | nn.Linear":
    return layer.base if isinstance(layer, LoRALinear) else layer


def _drop(x: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    return x.masked_fill(dropout_mask(x.shape, dropout, seed, x.device), 0) if dropout else x


def dense_weight(base: "Linear4bit | nn.Linear", dtype: torch.dtype) -> torch.Tensor:
    """(out, in) `dtype`: the weight itself, or made from its 4 bits."""
    return base.dense_weight(dtype) if isinstance(base, Linear4bit) else base.weight.to(dtype)


class LoRAWeights(nn.Module):
    """What one adapter has for one linear layer, all of it float32.

    Attributes:
        lora_A: (R, in).
        lora_B: (out, R).
        lora_magnitude_vector: (out,), DoRA's m, or None.
        bias: (out,) in place of the frozen layer's, or None.
        initial_A: (R, in) frozen, PiSSA's A0, or None.
        initial_B: (out, R) frozen, its B0 with the sign turned, or None.
        alpha: what s was made from; adapter_config.json names it.
        scaling: s.
        dropout: probability with which an entry of the adapter's input is zero in training.
        index: which layer of the model it is, for its dropout masks.
    """

    lora_magnitude_vector: nn.Parameter | None
    bias: nn.Parameter | None
    initial_A: torch.Tensor | None
    initial_B: torch.Tensor | None

    def __init__(
        self,
        size: tuple[int, int],
        r: int,
        alpha: float,
        scaling: float,
        dropout: float,
        index: int,
        dropout_seed: DropoutSeed,
        device: torch.device | str,
    ):
        """A and B of zeros for a layer of `size` (out, in)."""
        super().__init__()
        out_features, in_features = size
        self.alpha = alpha
        self.scaling = scaling
        self.dropout = dropout
        self.index = index
        self._dropout_seed = dropout_seed
        self._base_squares: torch.Tensor | None = None
        self.lora_A = nn.Parameter(torch.zeros(r, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, device=device))
        self.register_parameter("lora_magnitude_vector", None)
        self.register_parameter("bias", None)
        self.register_buffer("initial_A", None)
        self.register_buffer("initial_B", None)

    @property
    def r(self) -> int:
        """R, without what is frozen."""
        return len(self.lora_A)

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B as they are multiplied with: PiSSA's frozen half behind the trained one."""
        if self.initial_A is None or self.initial_B is None:
            return self.lora_A, self.lora_B
        return torch.cat((self.lora_A, self.initial_A)), torch.cat((self.lora_B, self.initial_B), dim=1)

    def dropout_now(self) -> tuple[float, int]:
        """Probability and seed of this micro-batch's mask; no dropout outside training."""
        return self.dropout if self.training else 0.0, self._dropout_seed.value * 4096 + self.index

    def base_squares(self, dense: torch.Tensor) -> torch.Tensor:
        """|W|^2 by rows, (out,) float32, computed from the `dense` weight when it is first asked for."""
        if self._base_squares is None or self._base_squares.device != dense.device:
            wide = torch.promote_types(dense.dtype, self.lora_A.dtype)
            self._base_squares = torch.linalg.vector_norm(dense, dim=1, dtype=wide).square_()
        return self._base_squares


class LoRALinear(nn.Module):
    """A frozen linear layer with the weights of one or more adapters beside it.

    Attributes:
        base: the frozen layer, `nn.Linear` or `Linear4bit`; never changed.
        adapters: `LoRAWeights` by the adapter's name.
        active: name of the adapter that is computed with, None for none of them.
        merged: weight (out, in) and bias that stand for base and adapter together while it is merged, else None.
    """

    def __init__(self, base: "Linear4bit | nn.Linear"):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.merged: tuple[torch.Tensor, torch.Tensor | None] | None = None

    @property
    def weights(self) -> LoRAWeights | None:
        """The active adapter's, None where there is none for this layer."""
        if self.active is None or self.active not in self.adapters:
            return None
        weights: LoRAWeights = self.adapters[self.active]  # type: ignore[assignment]
        return weights

    @property
    def bias(self) -> torch.Tensor | None:
        """(out,) float32 that the active adapter has in place of the frozen layer's, or None."""
        return None if self.weights is None else self.weights.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, in) compute dtype -> (T, out) compute dtype."""
        return project(x, (self,))[0]


Projection = LoRALinear | Linear4bit | nn.Linear


@torch.no_grad()
def merged_weight(layer: LoRALinear, weight: torch.Tensor) -> torch.Tensor:
    """The one weight that does what `layer` does with its active adapter, without dropout; `layer.bias` goes with it.

    Args:
        layer: its adapter on the device of `weight`; its own base is not looked at.
        weight: (out, in) of any floating-point type.

    Returns:
        (out, in) float32: W + s B A, with DoRA its rows at length m.
    """
    w = layer.weights
    if w is None:
        return weight.float()
    a, b = w.matrices()
    merged = torch.addmm(weight.float(), b, a, alpha=w.scaling)
    if w.lora_magnitude_vector is not None:
        merged *= (w.lora_magnitude_vector / torch.linalg.vector_norm(merged, dim=1))[:, None]
    return merged
