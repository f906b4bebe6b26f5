"""DoRA's magnitude: what it adds to LoRA, and its gradient.

DoRA gives each output a trained magnitude m, in place of the norm that its weights happen to have. In the letters of
`lora.py`:

    z = x W^T + s * drop(x) A^T B^T          y = c * z          c = m / n,  n = |W + s B A| by output, (out,)

n counts as constant in the gradient (the paper's section 4.3), so dz = c * dy goes on into LoRA's formulas, and
dm = sum over tokens of dy * z / n = sum of dy * y / m. W + s B A is never made:

    n^2 = |W|^2 + 2 s * rowsum(B * (W A^T)) + s^2 * rowsum((B A A^T) * B)

costs one thin product and one more dequantisation, and |W| is computed once. m begins at n, so that c is 1 and an
untrained adapter changes nothing. peft drops the frozen product's input too when dropout is on; here dropout belongs to
the adapter.

Source: arXiv 2402.09353.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from minilora.qlora.lora import LoRAWeights

BLOCK_TOKENS = 256  # on a CPU PyTorch multiplies and sums across dtypes by wide copies: of so many tokens, not of all


class _Magnitude(torch.autograd.Function):
    """y = c * z in place of z, multiplied in the wider dtype and rounded once; dz = c * dy, dm = sum(dy * y) / m."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, m: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(z)
        for part in _blocks(z):
            torch.mul(part[0], c, out=part[0])
        ctx.save_for_backward(z, m, c)
        return z

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        y, m, c = ctx.saved_tensors
        dz, dm = torch.empty_like(dy), torch.zeros_like(m)
        for dy_part, y_part, dz_part in _blocks(dy, y, dz):
            dm += (dy_part * y_part).sum(0, dtype=m.dtype)
            torch.mul(dy_part, c, out=dz_part)
        return dz, dm / m, None  # m is as good as never 0, where that row of W would be 0 too


def apply_magnitude(z: torch.Tensor, w: "LoRAWeights", dense: torch.Tensor) -> torch.Tensor:
    """y = m / |W + s B A| * z, in the memory of z (T, out), the product without its bias; dense is W (out, in)."""
    m = w.lora_magnitude_vector
    assert m is not None
    with torch.no_grad():
        (a, b), s = w.factors(), w.scaling
        thin = a.to(dense.dtype)
        mixed = (b * (dense @ thin.T).to(b.dtype)).sum(1)
        thin = thin.to(b.dtype)
        own = ((b @ (thin @ thin.T)) * b).sum(1)
        c = m / (base_squares(w, dense) + 2 * s * mixed + s**2 * own).sqrt_()
    y: torch.Tensor = _Magnitude.apply(z, m, c)
    return y


def base_squares(w: "LoRAWeights", dense: torch.Tensor) -> torch.Tensor:
    """|W|^2 by output, (out,) float32 or wider, computed from the `dense` weight when it is first asked for."""
    if w.base_squares is None or w.base_squares.device != dense.device:
        wide = torch.promote_types(dense.dtype, w.factors()[0].dtype)
        w.base_squares = torch.linalg.vector_norm(dense, dim=1, dtype=wide).square_()
    return w.base_squares


def _blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors of T tokens each, some tokens at a time; on a GPU, which makes no wide copies, all at once."""
    size = len(tensors[0]) if tensors[0].is_cuda else BLOCK_TOKENS
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)
