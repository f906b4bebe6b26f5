"""Initial values that depend on the weights: the principal part of them, or of the 4-bit error."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minilora.adapters.attach import attach, iter_lora_layers, merged_weight
from minilora.adapters.init import initialize, low_rank_factors
from minilora.config import LoraConfig
from minilora.errors import UserError
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.nf4 import dense_weight
from minilora.weights.bnb_checkpoint import write_quantized
from minilora.weights.load import load_model

TinyModel = Callable[..., Qwen2ForCausalLM]


@pytest.mark.parametrize("shape", [(40, 17), (17, 40), (20, 20)])
def test_factors_are_the_nearest_matrix_of_their_rank(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    a, b = low_rank_factors(matrix, 5)
    torch.testing.assert_close(b @ a, u[:, :5] * s[:5] @ vh[:5])
    torch.testing.assert_close(a.norm(dim=1), s[:5].sqrt())  # the singular values are shared evenly
    torch.testing.assert_close(b.norm(dim=0), s[:5].sqrt())


def test_a_matrix_of_zeros_has_factors_of_zeros() -> None:
    a, b = low_rank_factors(torch.zeros(6, 4), 2)
    assert not a.any()
    assert not b.any()


def test_eigenvectors_are_computed_on_one_thread_and_the_rest_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    before, eigh, threads = torch.get_num_threads(), torch.linalg.eigh, []

    def recorded(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        threads.append(torch.get_num_threads())
        vectors: tuple[torch.Tensor, torch.Tensor] = eigh(matrix)
        return vectors

    monkeypatch.setattr(torch.linalg, "eigh", recorded)
    try:
        torch.set_num_threads(2)
        low_rank_factors(torch.ones(6, 4), 2)
        assert (threads, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_a_rank_above_that_of_the_weight_is_refused() -> None:
    with pytest.raises(UserError, match=r"lora\.r: 5 .*\(6, 4\)"):
        low_rank_factors(torch.ones(6, 4), 5)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_pissa_starts_from_the_principal_part_and_changes_nothing(
    tiny_checkpoint: Callable[..., Path], quantization: str, use_rslora: bool
) -> None:
    folder = tiny_checkpoint()
    model = load_model(folder, torch.float32, quantization)
    attach(model, LoraConfig(r=4, alpha=12, dropout=0, init_lora_weights="pissa", use_rslora=use_rslora))
    initialize(model, folder, "pissa")
    for _, layer in iter_lora_layers(model):
        w = layer.weights
        assert w is not None
        dense = dense_weight(layer.base, torch.float32)
        u, s, vh = torch.linalg.svd(dense, full_matrices=False)
        torch.testing.assert_close(w.scaling * w.lora_B @ w.lora_A, u[:, :4] * s[:4] @ vh[:4], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(merged_weight(layer, dense), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("alpha", [4, 12])
def test_loftq_starts_nearer_to_the_original_weights(
    tiny_checkpoint: Callable[..., Path], alpha: int, use_dora: bool
) -> None:
    folder = tiny_checkpoint()
    originals = load_model(folder, torch.float32, "none")
    model = load_model(folder, torch.float32)
    attach(model, LoraConfig(r=8, alpha=alpha, dropout=0, init_lora_weights="loftq", use_dora=use_dora))
    initialize(model, folder, "loftq")
    for path, layer in iter_lora_layers(model):
        original = originals.get_parameter(f"{path}.weight")
        rounded = dense_weight(layer.base, torch.float32)
        lost = original - rounded
        left = torch.linalg.svdvals(lost)[8:].norm()  # no product of rank 8 leaves less (Eckart and Young)
        assert (original - merged_weight(layer, rounded)).norm() == pytest.approx(left.item(), rel=1e-3)


def test_loftq_needs_the_original_weights(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    write_quantized(load_model(tiny_checkpoint(), torch.float32), tiny_checkpoint(), tmp_path / "4bit", {})
    model = load_model(tmp_path / "4bit", torch.float32)
    attach(model, LoraConfig(r=4, alpha=8, dropout=0, init_lora_weights="loftq"))
    with pytest.raises(UserError, match=r"4bit: is quantised already.*lora\.init_lora_weights"):
        initialize(model, tmp_path / "4bit", "loftq")
