"""The model's elementary functions: each as a reference of a few lines, then with its backward pass derived by hand.

PyTorch's autograd gets every reference right. The derived forms exist because it keeps more than is needed (float32
copies, rotated halves, attention weights) and reads it more often, and because fine-tuning a frozen model is the place
to see what a backward pass costs. Each states what it computes, its gradient, and what it keeps. `test_ops.py` checks
every gradient in float64 (`gradcheck`) and every result against its reference.
Upper-case sizes are explained in `model.py`. dy means the gradient of the loss with respect to y.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

# ---- RMSNorm


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Each token's x, (T, C), at root mean square 1, times a learned weight (C,)."""
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


class _RMSNorm(torch.autograd.Function):
    """y = w * x / rms(x), with rms(x) = sqrt(mean(x^2) + eps).

    With n = x / rms(x) and g = w * dy:  dx = (g - n * mean(g * n)) / rms(x),  dw = sum over tokens of n * dy.
    The mean is over the C entries of a token: it is what the common divisor sends back to each of them.
    Keeps x and 1 / rms, one float32 a token; the mean is in float32 too, because a sum of squares overflows float16.
    Forward is PyTorch's own: one kernel on a GPU in place of nine, half the time on a CPU. Backward is too on a GPU; a
    CPU has none.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        y, inverse_rms = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.mark_non_differentiable(inverse_rms)
        ctx.set_materialize_grads(False)  # no zeros for a gradient that 1 / rms never has
        return y, inverse_rms

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dy, _ = grads
        x, weight, inverse_rms = ctx.saved_tensors
        if x.device.type != "cpu":
            wanted = list(ctx.needs_input_grad[:2])
            return *torch.ops.aten._fused_rms_norm_backward(dy, x, x.shape[-1:], inverse_rms, weight, wanted), None
        normed = x * inverse_rms  # in float32, as 1 / rms is
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            g = dy * weight.to(normed.dtype)
            mean = (g * normed).mean(-1, keepdim=True)
            dx = torch.mul(g.addcmul_(normed, mean, value=-1), inverse_rms, out=torch.empty_like(x))
        if ctx.needs_input_grad[1]:
            dweight = (dy * normed).sum(0).to(weight.dtype)
        return dx, dweight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm_reference` of x (T, C) and weight (C,), compute dtype; eps is 1e-6 or 1e-5 in Qwen2.5, by size.

    Source: arXiv 1910.07467. Rounds once, where transformers' Qwen2RMSNorm does twice.
    """
    return rms_norm_and_scale(x, weight, eps)[0]


rms_norm_and_scale = _RMSNorm.apply  # 1 / rms too, (T, 1) float32 or wider


def recompute_rms_norm(x: torch.Tensor, weight: torch.Tensor, inverse_rms: torch.Tensor, *, eps: float) -> torch.Tensor:
    """The same bits as before, for less where 1 / rms saves the mean; a GPU's one kernel is no more than that."""
    if x.device.type != "cpu":
        return rms_norm(x, weight, eps)
    return torch.mul(x * inverse_rms, weight, out=torch.empty_like(x))


# ---- SwiGLU


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, with silu(z) = z * s(z) and s the logistic function."""
    return gate * torch.sigmoid(gate) * up


class _SwiGLU(torch.autograd.Function):
    """h = silu(gate) * up.

    dup = dh * silu(gate);  dgate = dh * up * s * (1 + gate * (1 - s)), which is PyTorch's silu_backward.
    Keeps gate and up; silu(gate) is cheaper to recompute than to keep.
    """

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (dh,) = grads
        gate, up = ctx.saved_tensors
        dgate = dh * up
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        return dgate, F.silu(gate).mul_(dh)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`swiglu_reference`, all (T, F) compute dtype. Source: arXiv 2002.05202."""
    return _SwiGLU.apply(gate, up)


# ---- Rotary embedding


def rotary_table(
    position_ids: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and signed sine of each token's rotation angles, both (T, 1, D) `dtype`: cos, cos and -sin, sin.

    Pair i of the D / 2 turns by position * theta^(-2i / D), and both members of a pair by the same angle. Angles are
    computed in float32: bfloat16 cannot count past 256.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angle = position_ids.to(torch.float32)[:, None, None] * (1 / theta**exponent)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotary_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Each pair (x_i, x_{i + D/2}) turned by its angle: x_i cos - x_{i + D/2} sin, and x_{i + D/2} cos + x_i sin."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, first), dim=-1) * sin


class _Rotary(torch.autograd.Function):
    """A rotation's transpose is the rotation by the opposite angle: dx = rotate(dy, cos, -sin). Keeps nothing of x.

    The halves are exchanged by `roll`, and the second product is added before it is rounded.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        cos, sin = ctx.saved_tensors
        return (dy * cos).addcmul_(dy.roll(dy.shape[-1] // 2, -1), sin, value=-1), None, None


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rotary_reference` of x (T, heads, D) compute dtype with cos and sin (T, 1, D) from `rotary_table`.

    Source: arXiv 2104.09864, in the half-split layout of Hugging Face checkpoints.
    """
    return _Rotary.apply(x, cos, sin)


# ---- Dropout's mask


@dataclass(frozen=True)
class DropoutMask:
    """One mask, True where an entry is dropped: arithmetic of its seed, so the same whenever and wherever it is drawn.

    PyTorch's generators differ from device to device, and between GPUs by their number of multiprocessors. This hash of
    a counter costs half the time of the CPU's generator, which uses one core.
    """

    probability: float
    seed: int

    def draw(self, shape: torch.Size, device: torch.device) -> torch.Tensor:
        """Bool of `shape`, met to 1 / 65536: each 32-bit hash of the counter decides about two entries."""
        digest = hashlib.blake2b(self.seed.to_bytes(8, "big"), digest_size=8).digest()
        start, key = int.from_bytes(digest[:4], "big") >> 2, int.from_bytes(digest[4:], "big", signed=True)
        word = torch.arange(start, start + (shape.numel() + 1) // 2, dtype=torch.int32, device=device)
        word.bitwise_xor_(word >> 16)  # two rounds of Wellons' lowbias32, a key between them
        word = torch.rsub(word, key, alpha=-0x7FEB352D)  # key + 0x7FEB352D * word
        word.bitwise_xor_(word >> 15).mul_(-0x7B935975)
        return word.view(torch.int16)[: shape.numel()].view(shape) < round(self.probability * 65536) - 32768

    def zero(self, x: torch.Tensor, dropped: torch.Tensor | None = None) -> torch.Tensor:
        """x with zeros where it is dropped, not yet divided by 1 - p; x itself where p is 0. `dropped`: as `draw`n."""
        if not self.probability:
            return x
        return x.masked_fill(self.draw(x.shape, x.device) if dropped is None else dropped, 0)

    def dropout(self, x: torch.Tensor) -> torch.Tensor:
        """drop(x), as `F.dropout` defines it."""
        return self.zero(x) / (1 - self.probability) if self.probability else x
