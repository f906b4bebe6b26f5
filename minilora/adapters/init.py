"""Initial values of an adapter that depend on the base's weights: PiSSA and LoftQ.

Both take the R largest singular directions of a matrix, U S V^T, and share them evenly between the two factors:

    B = U sqrt(S / s)      A = sqrt(S / s) V^T      so that  s B A  is the matrix's best approximation of rank R

    PiSSA   of the weight itself: training starts from its principal part, which learns faster
    LoftQ   of W - Q(W), the error of rounding to 4 bits: training starts nearer to the original model

A frozen product subtracts PiSSA's principal part (`qlora/lora.py`), so the base does not change and other adapters fit
it. LoftQ is its first iteration, as in peft's `replace_lora_weights_loftq`, except that peft leaves s out.

The singular directions come from the eigenvectors of M M^T (of the smaller side) in float64: squaring costs half of the
digits, and float64 has twice as many as the result needs. A randomised decomposition (peft's pissa_niter_16) is off by
2 to 43 % of the principal part's norm in a Qwen2.5-0.5B at R = 8, because a weight's singular values fall slowly.

Source: arXiv 2404.02948 (PiSSA), 2310.08659 (LoftQ).
"""

from collections.abc import Callable
from pathlib import Path

import torch

from minilora.adapters.attach import iter_lora_layers
from minilora.errors import UserError
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.nf4 import dense_weight
from minilora.weights.bnb_checkpoint import split_entries
from minilora.weights.safetensors_io import read_checkpoint_entries, read_tensor

BY_WEIGHTS = ("pissa", "loftq")


def initialize(
    model: Qwen2ForCausalLM,
    folder: Path,
    init_lora_weights: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Gives the active adapter its initial values.

    Args:
        model: with an adapter that was attached for the same `init_lora_weights`, one of BY_WEIGHTS.
        folder: the base model's files; LoftQ reads the original weights, UserError where they are in 4 bits.
        init_lora_weights: "pissa" or "loftq".
        on_progress: called with (layers done, all layers).
    """
    layers = [(path, layer, w) for path, layer in iter_lora_layers(model) if (w := layer.weights) is not None and w.r]
    originals, quantized = split_entries(read_checkpoint_entries(folder)) if init_lora_weights == "loftq" else ({}, {})
    if quantized:
        raise UserError(
            f"{folder}: is quantised already, so the 4-bit error is not known; use the original checkpoint, or another "
            "lora.init_lora_weights than loftq"
        )
    for done, (path, layer, w) in enumerate(layers, start=1):
        matrix = dense = dense_weight(layer.base, torch.float32)
        if init_lora_weights == "loftq":
            matrix = read_tensor(originals[f"{path}.weight"]).to(dense.device, torch.float32) - dense
        a, b = low_rank_factors(matrix, w.r)
        with torch.no_grad():
            w.lora_A.copy_(a / w.scaling**0.5)
            w.lora_B.copy_(b / w.scaling**0.5)
            if w.initial_A is not None and w.initial_B is not None:
                w.initial_A.copy_(w.lora_A)
                w.initial_B.copy_(-w.lora_B)
            elif w.lora_magnitude_vector is not None:  # DoRA's c is 1 at the start, also where B is not 0
                merged = torch.addmm(dense, w.lora_B, w.lora_A, alpha=w.scaling)
                w.lora_magnitude_vector.copy_(torch.linalg.vector_norm(merged, dim=1))
        if on_progress is not None:
            on_progress(done, len(layers))


def low_rank_factors(matrix: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (R, in) and B (out, R) float64: B A is the best approximation of rank R of `matrix` (out, in)."""
    if r > min(matrix.shape):
        raise UserError(f"lora.r: {r} is more than the rank of a weight of shape {tuple(matrix.shape)}; lower it")
    wide = matrix.double()
    is_tall = wide.shape[0] > wide.shape[1]
    if is_tall:
        wide = wide.T
    square, threads = wide @ wide.T, torch.get_num_threads()
    torch.set_num_threads(1)  # beside other programs eigenvectors took twenty times as long on two threads
    try:
        squares, vectors = torch.linalg.eigh(square)
    finally:
        torch.set_num_threads(threads)
    u = vectors[:, -r:].flip(1)
    root = squares[-r:].flip(0).clamp(min=0).pow(0.25)  # sqrt of a singular value
    left, right = u * root, (u.T @ wide) / root.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    return (left.T, right.T) if is_tall else (right, left)
