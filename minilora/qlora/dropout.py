"""Dropout without state: a mask is a function of (seed, step, micro-batch, layer).

Backward draws it again in place of keeping it, recomputed checkpoints see the same mask, and a resumed run needs no
generator.
"""

import hashlib

import torch


class DropoutSeed:
    """What the masks of one micro-batch are drawn from; shared by all LoRA layers of a model."""

    def __init__(self) -> None:
        self.value = 0

    def set(self, seed: int, step: int, micro_batch: int) -> None:
        """Chooses the masks of one micro-batch; a hash, so that neighbouring numbers are unrelated."""
        digest = hashlib.blake2b(f"{seed}-{step}-{micro_batch}".encode(), digest_size=6).digest()
        self.value = int.from_bytes(digest, "big")


def dropout_mask(shape: torch.Size, probability: float, seed: int, device: torch.device) -> torch.Tensor:
    """Which entries dropout sets to zero: bool of `shape`, the same for the same seed and device type.

    Four 16-bit draws come out of each 64-bit number, a quarter of the cost of drawing floats; the probability
    is met to 1 / 65536.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    words = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    draws = words.view(torch.int16)[: shape.numel()].view(shape)
    return draws < round(probability * 65536) - 32768
