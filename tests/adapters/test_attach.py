"""Adapters on a model: what attaching makes, and switching, scaling and merging, which leave every bit of the base."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from minilora.adapters.attach import (
    DEFAULT,
    active_adapter,
    adapter_disabled,
    adapter_scaled,
    attach,
    iter_lora_layers,
    iter_lora_weights,
    lora_parameters,
    lora_scaling,
    merge_adapter,
    parameter_groups,
    remove_adapter,
    set_adapter,
    unmerge_adapter,
)
from minilora.config import LoraConfig
from minilora.qlora.batch import pack_segments
from minilora.qlora.lora import LoRAWeights
from minilora.qlora.model import Qwen2Config, Qwen2ForCausalLM

TinyModel = Callable[..., Qwen2ForCausalLM]


def random_model(tied: bool = True) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(50, 16, 24, 2, 4, 2, 1e-6, 1e4, tied)).eval()


def randomize(model: Qwen2ForCausalLM, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(model):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def outputs(model: Qwen2ForCausalLM) -> torch.Tensor:
    ids = torch.arange(3, 12)
    hidden: torch.Tensor = model.model(ids, torch.arange(9), pack_segments([9]))
    return hidden


def test_initial_values_are_kaiming_uniform_and_zero() -> None:
    model = random_model()
    attach(model, LoraConfig(r=8, alpha=16, dropout=0))
    for _, layer in iter_lora_weights(model):
        bound = 1 / math.sqrt(layer.lora_A.shape[1])
        assert layer.lora_A.abs().max() <= bound
        assert layer.lora_A.abs().max() > 0.8 * bound
        assert not layer.lora_B.any()
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


def test_attach_trains_the_adapter_only() -> None:
    model = random_model()
    attach(model, LoraConfig(r=2, alpha=4, dropout=0))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.endswith(("lora_A", "lora_B")) for name in trained)
    assert len(trained) == len(lora_parameters(model)) == 2 * 7 * 2


def test_scaling() -> None:
    assert lora_scaling(8, 16, use_rslora=False) == 2
    assert lora_scaling(16, 16, use_rslora=True) == 4


def test_disabled_adapter_is_the_base_and_comes_back() -> None:
    model = random_model()
    attach(model, LoraConfig(r=2, alpha=4, dropout=0))
    layers = [layer for _, layer in iter_lora_layers(model)]
    for layer in layers:
        nn.init.normal_(layer.weights.lora_B)  # type: ignore[union-attr]
    x = torch.randn(3, 16)
    with adapter_disabled(model):
        assert torch.equal(layers[0](x), layers[0].base(x))
    assert not torch.equal(layers[0](x), layers[0].base(x))


def test_initial_values_can_be_gaussian() -> None:
    model = random_model()
    attach(model, LoraConfig(r=8, alpha=16, dropout=0, init_lora_weights="gaussian"))
    values = torch.cat([w.lora_A.detach().flatten() for _, w in iter_lora_weights(model)])
    assert values.std() == pytest.approx(1 / 8, rel=0.1)  # peft's 1 / r


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    "kind", [{}, {"use_dora": True}, {"bias": "all"}, {"use_dora": True, "bias": "lora_only"}, {"use_rslora": True}]
)
def test_an_untrained_adapter_of_any_kind_changes_nothing_to_the_bit(
    tiny_model: TinyModel, quantization: str, kind: dict[str, Any]
) -> None:
    model = tiny_model(quantization)
    before = outputs(model)
    attach(model, LoraConfig(r=4, alpha=8, dropout=0, **kind))
    assert torch.equal(outputs(model), before)
    randomize(model)
    assert not torch.equal(outputs(model), before)


def test_biases_are_trained_where_asked() -> None:
    """Of q, k and v, which have one; "all" also reaches the k that is no target, by an adapter of rank 0."""
    counts = {}
    for bias in ("none", "lora_only", "all"):
        model = random_model()
        attach(model, LoraConfig(r=2, alpha=4, dropout=0, target_modules=["q_proj", "v_proj", "o_proj"], bias=bias))
        counts[bias] = sum(w.bias is not None for _, w in iter_lora_weights(model))
        names = {path.rpartition(".")[2] for path, w in iter_lora_weights(model) if not w.r}
        assert names == ({"k_proj"} if bias == "all" else set())
        assert all(parameter.numel() for parameter in lora_parameters(model))
    assert counts == {"none": 0, "lora_only": 4, "all": 6}


def test_patterns_give_layers_their_own_rank_and_alpha() -> None:
    model = random_model()
    attach(model, LoraConfig(r=4, alpha=8, dropout=0, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*": 6}))
    found = {path: (w.r, w.scaling) for path, w in iter_lora_weights(model)}
    assert found["model.layers.0.self_attn.q_proj"] == (2, 8 / 2)
    assert found["model.layers.1.self_attn.q_proj"] == (2, 6 / 2)
    assert found["model.layers.0.mlp.up_proj"] == (4, 8 / 4)
    assert found["model.layers.1.mlp.up_proj"] == (4, 6 / 4)


def test_loraplus_lets_all_parameters_except_a_learn_faster() -> None:
    model = random_model()
    attach(model, LoraConfig(r=2, alpha=4, dropout=0, use_dora=True, bias="all"))
    ((slow, one), (fast, ratio)) = parameter_groups(model, 16.0)
    assert (one, ratio) == (1.0, 16.0)
    assert {id(p) for p in slow} == {id(w.lora_A) for _, w in iter_lora_weights(model)}
    assert {id(p) for p in slow} | {id(p) for p in fast} == {id(p) for p in lora_parameters(model)}
    assert len(slow) + len(fast) == len(lora_parameters(model))


def test_adapters_are_switched_by_name() -> None:
    model = random_model()
    base = outputs(model)
    expected = {}
    for seed, (name, targets) in enumerate({"all": "all-linear", "few": ["q_proj", "down_proj"]}.items()):
        attach(model, LoraConfig(r=2, alpha=4, dropout=0, target_modules=targets), name=name)
        randomize(model, seed)
        expected[name] = outputs(model)
    assert not torch.equal(expected["all"], expected["few"])
    for name in ("all", "few", "all"):
        set_adapter(model, name)
        assert torch.equal(outputs(model), expected[name])
    assert len(list(iter_lora_layers(model))) == 14
    set_adapter(model, None)
    assert torch.equal(outputs(model), base)
    assert not list(iter_lora_layers(model))
    with pytest.raises(ValueError, match=r"name: got 'other', expected one of \['all', 'few'\]"):
        set_adapter(model, "other")
    remove_adapter(model, "all")
    with pytest.raises(ValueError, match=r"expected one of \['few'\]"):
        set_adapter(model, "all")
    set_adapter(model, "few")
    remove_adapter(model, "few")
    assert active_adapter(model) is None  # in the layers that it did not have either


def test_attaching_under_a_name_that_is_taken_replaces_that_adapter() -> None:
    model = random_model()
    attach(model, LoraConfig(r=2, alpha=4, dropout=0))
    attach(model, LoraConfig(r=3, alpha=4, dropout=0, target_modules=["q_proj"]))
    assert [(path, w.r) for path, w in iter_lora_weights(model)] == [
        ("model.layers.0.self_attn.q_proj", 3),
        ("model.layers.1.self_attn.q_proj", 3),
    ]


def test_a_scaled_adapter_is_between_the_base_and_itself_and_comes_back() -> None:
    model = random_model()
    attach(model, LoraConfig(r=2, alpha=4, dropout=0, target_modules=["q_proj"]))
    randomize(model)
    full = outputs(model)
    with adapter_scaled(model, 0.0):
        nothing = outputs(model)
    with adapter_scaled(model, 0.5):
        half = outputs(model)
    with adapter_disabled(model):
        torch.testing.assert_close(nothing, outputs(model))
    assert 0 < (half - nothing).norm() < (full - nothing).norm()
    assert torch.equal(outputs(model), full)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kind", [{}, {"use_dora": True, "bias": "all"}])
def test_merged_does_the_same_and_unmerged_is_as_before_to_the_bit(
    tiny_model: TinyModel, quantization: str, kind: dict[str, Any]
) -> None:
    model = tiny_model(quantization)
    base = outputs(model)
    attach(model, LoraConfig(r=4, alpha=8, dropout=0, **kind))
    randomize(model)
    before = outputs(model)
    merge_adapter(model, torch.float32)
    torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-4)  # products in another order
    with adapter_disabled(model):
        assert torch.equal(outputs(model), base)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        set_adapter(model, None)
    unmerge_adapter(model)
    assert torch.equal(outputs(model), before)
    set_adapter(model, None)
    assert torch.equal(outputs(model), base)


def test_a_merged_adapter_refuses_every_change_and_none_is_half_done() -> None:
    model = random_model()
    attach(model, LoraConfig(r=2, alpha=4, dropout=0))
    randomize(model)
    merge_adapter(model, torch.float32)
    merged = outputs(model)
    for change in (
        lambda: attach(model, LoraConfig(r=3, alpha=4, dropout=0), name="other"),
        lambda: set_adapter(model, None),
        lambda: remove_adapter(model, "default"),
        lambda: adapter_scaled(model, 0.5).__enter__(),
    ):
        with pytest.raises(ValueError, match="unmerge_adapter"):
            change()
    assert torch.equal(outputs(model), merged)
    unmerge_adapter(model)
    assert {w.r for _, w in iter_lora_weights(model)} == {2}
    with pytest.raises(ValueError, match=r"expected one of \['default'\]"):
        set_adapter(model, "other")


def test_a_base_on_the_meta_device_can_have_an_adapter_in_memory() -> None:
    with torch.device("meta"):
        model = random_model()
    attach(
        model, LoraConfig(r=2, alpha=4, dropout=0, use_dora=True, bias="all", init_lora_weights="pissa"), device="cpu"
    )
    weights: list[LoRAWeights] = [w for _, w in iter_lora_weights(model)]
    assert all(not tensor.is_meta for w in weights for tensor in (*w.parameters(), *w.buffers()))
    assert DEFAULT in next(iter_lora_layers(model))[1].adapters
