"""Whether a device has flash attention, tried once: a small case against its definition."""

import functools

import torch
from torch.nn import functional as F

from minilora.qlora.batch import pack_segments
from minilora.qlora.flash import flash_attention, lay_out


@functools.cache
def has_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """For a head size D: on a GPU in half precision, from sm80 on, and not in PyTorch for Windows."""
    is_taken = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return is_taken and head_dim % 8 == 0 and head_dim <= 256 and is_right(device, dtype, head_dim)


def is_right(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel exists and computes three queries behind two cached tokens, and their gradients."""
    draws = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [torch.randn(n, h, head_dim, generator=draws).requires_grad_() for n, h in ((3, 4), (5, 2), (5, 2))]
        q, k, v = (x.transpose(0, 1)[None] for x in inputs)
        mask = torch.ones(3, 5, dtype=torch.bool).tril(2)
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
        q, k, v = (x.detach().to(device, dtype).requires_grad_() for x in inputs)
        try:
            mixed = flash_attention(q, k, v, lay_out(pack_segments([3], 2), 3).to(device))
            found = [mixed, *torch.autograd.grad(mixed.sum(), (q, k, v))]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # PyTorch's, where it is compiled without the kernel or the GPU is too old
            return False
        expected = [exact, *torch.autograd.grad(exact.sum(), inputs)]
    # bfloat16's errors are some 1 %, those of a mask that is aligned at the first key several 10 %.
    return all((a.cpu() - b).norm().item() < 0.05 * b.norm().item() for a, b in zip(found, expected, strict=True))
