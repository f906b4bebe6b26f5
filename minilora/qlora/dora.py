"""DoRA's lengths: what stands between LoRA and it, and its gradient.

DoRA gives each output a trained length m of its own, in place of the length that W and the product happen to have. In
the letters of `lora.py`:

    y = c * (x W^T + s * drop(x) A^T B^T) + bias          c = m / n,  n = |W + s B A| by rows, (out,)

n counts as constant in the gradient (the paper's section 4.3), so with z = (y - bias) / c and dz = c * dy all of LoRA's
formulas hold with dz in place of dy, and dm = sum over rows of dy * z / n = dy * (y - bias) / m. W + s B A is never
made:

    n^2 = |W|^2 + 2 s * rowsum(B * (W A^T)) + s^2 * rowsum((B A A^T) * B)

costs one thin product more, and the lengths of W's own rows are computed once. m begins at n, so that c is 1 and an
untrained adapter changes nothing. peft drops the frozen product's input too when dropout is on; here dropout belongs to
the adapter.

Source: arXiv 2402.09353.
"""

from collections.abc import Iterator

import torch

BLOCK_ROWS = 256  # on a CPU PyTorch multiplies and sums across types by wide copies: here of so many rows, not of all


def weight_norms(
    base_squares: torch.Tensor, dense: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """n, (out,) in the dtype of B.

    Args:
        base_squares: (out,) |W|^2 by rows.
        dense: (out, in) W in the compute dtype.
        a: (R, in) A in the compute dtype.
        b: (out, R) B, float32.
        scaling: s.
    """
    mixed = (b * (dense @ a.T).to(b.dtype)).sum(1)
    a = a.to(b.dtype)
    own = ((b @ (a @ a.T)) * b).sum(1)
    return (base_squares + 2 * scaling * mixed + scaling**2 * own).sqrt_()


def scaled(x: torch.Tensor, c: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """x * c in `out`, which may be x itself: (T, out) times (out,), multiplied in the wider type and rounded once."""
    for part, result in _blocks(x, out):
        torch.mul(part, c, out=result)
    return out


def magnitude_gradient(dy: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, m: torch.Tensor) -> torch.Tensor:
    """dm, (out,), of dy and y (T, out): m is as good as never 0, where the row of W would be 0 too."""
    total = torch.zeros_like(m)
    for dy_part, y_part in _blocks(dy, y):
        z = y_part if bias is None else y_part - bias.to(y.dtype)
        total += (dy_part * z).sum(0, dtype=m.dtype)
    return total / m


def _blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors of T rows each, some rows at a time; on a GPU, which makes no wide copies, all at once."""
    rows = len(tensors[0]) if tensors[0].is_cuda else BLOCK_ROWS
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
