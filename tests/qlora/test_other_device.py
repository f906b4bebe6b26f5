"""A training pass and a decode step on a device that is not the CPU, without owning one (`benchmarks/fake_device.py`).

A tensor that was left on the CPU, a value that the processor would wait for and a view that a GPU's layout does not
allow are errors here.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from benchmarks.fake_device import DEVICE, moved_batch, on_device
from minilora.adapters.attach import attach, lora_parameters
from minilora.config import LoraConfig
from minilora.generation.decode import GenerationConfig, choose
from minilora.qlora import model as model_module
from minilora.qlora.attention import FusedGroup, HeadGroups
from minilora.qlora.batch import pack
from minilora.qlora.flash import FlashSegments
from minilora.qlora.kv_cache import KVCache
from minilora.qlora.lora import cast_once
from minilora.qlora.loss import next_token_nll
from minilora.qlora.model import Qwen2Config, Qwen2ForCausalLM
from minilora.qlora.nf4 import Linear4bit, quantize
from minilora.qlora.prompt import Example
from minilora.weights.stacked_scales import stack_scales

NOWHERE = torch.device("meta")  # of a gradient that is missing
CONFIG = Qwen2Config(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
)


def build(dtype: torch.dtype = torch.bfloat16, quantized: bool = True, **lora: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(CONFIG).to(dtype).requires_grad_(False)
    for path, module in list(model.model.named_modules()):
        if quantized and isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(model.model.get_submodule(parent), name, Linear4bit(quantize(module.weight), module.bias))
    for layer in model.model.layers:
        stack_scales(layer)
    attach(model, LoraConfig(r=4, alpha=8, **lora), seed=0)
    return model.train()


def examples(lengths: Sequence[int]) -> list[Example]:
    """Behind ten ids that all of them have; two tokens of each are supervised."""
    ids = [[*range(10), 10 + i, *[20] * (length - 11)] for i, length in enumerate(lengths)]
    return [Example(x, [False] * (len(x) - 2) + [True] * 2) for x in ids]


def train(
    model: Qwen2ForCausalLM, lengths: Sequence[int], weights: Sequence[float] = (), has_flash: bool = False
) -> set[torch.device]:
    """Where the gradients of one pass are."""
    batch = pack(examples(lengths), weights=weights)
    with on_device(model, has_flash):
        batch = moved_batch(batch)
        with cast_once(model, model.head_weight.dtype):
            nll, _ = next_token_nll(model(batch), batch.targets, model.head_weight, batch.weights)
            nll.backward()
        return {NOWHERE if p.grad is None else p.grad.device for p in lora_parameters(model)}


SHORT, LONG, MIXED = (20, 24, 31, 90), (900,), (20, 24, 900)
KINDS: list[dict[str, Any]] = [
    {},
    {"dropout": 0.1},
    {"use_dora": True, "dropout": 0.1},
    {"bias": "all"},
    {"init_lora_weights": "pissa"},
    {"target_modules": ["q_proj", "down_proj"]},
    {"quantized": False},
    {"dtype": torch.float16},
    {"dtype": torch.float32},
]


@pytest.mark.parametrize("lengths", [SHORT, LONG, MIXED])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_training_pass_mixes_no_devices_and_waits_for_no_value(
    lengths: tuple[int, ...], kind: dict[str, Any]
) -> None:
    assert train(build(**kind), lengths) == {DEVICE}


@pytest.mark.parametrize("has_flash", [False, True])
@pytest.mark.parametrize("lengths", [SHORT, LONG, MIXED])
def test_neither_does_one_with_checkpointing_and_weights(lengths: tuple[int, ...], has_flash: bool) -> None:
    model = build(dropout=0.1)
    model.model.gradient_checkpointing = True
    assert train(model, lengths, [0.5] * len(lengths), has_flash) == {DEVICE}


@pytest.mark.parametrize("lengths", [SHORT, LONG, MIXED])
def test_nor_does_one_with_flash_attention(lengths: tuple[int, ...]) -> None:
    assert train(build(), lengths, has_flash=True) == {DEVICE}


@pytest.mark.parametrize("has_flash", [False, True])
def test_nor_do_prefilling_and_decoding(has_flash: bool) -> None:
    model = build().eval()
    caches = [KVCache() for _ in model.model.layers]
    with on_device(model, has_flash), torch.inference_mode():
        for count in (7, 1):
            hidden = model.prefill(torch.zeros(count, dtype=torch.int64, device=DEVICE), caches)
            assert hidden.device.type == "lazy"
            assert hidden.shape == (1, CONFIG.hidden_size)


@pytest.mark.parametrize("config", [GenerationConfig(), GenerationConfig(top_k=0), GenerationConfig(do_sample=False)])
def test_nor_does_the_choice_of_a_token(config: GenerationConfig) -> None:
    with FakeTensorMode():
        token = choose(torch.empty(CONFIG.vocab_size, device=DEVICE), config, None)
        assert (token.device.type, token.shape) == ("lazy", ())


def test_a_mistake_would_show() -> None:
    with FakeTensorMode():
        there = torch.ones(3, device=DEVICE)
        with pytest.raises(RuntimeError, match="lazy and cpu"):
            there + torch.ones(3)
        with pytest.raises(DataDependentOutputException):
            there.sum().item()


@pytest.mark.parametrize(
    ("has_flash", "expected"), [(False, {HeadGroups, FusedGroup}), (True, {FlashSegments})], ids=["groups", "flash"]
)
def test_the_tables_are_of_all_kinds(has_flash: bool, expected: set[type]) -> None:
    model, kinds = build(), []
    make = model_module.split_heads
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            model_module, "split_heads", lambda *given, **named: kinds.append(make(*given, **named)) or kinds[-1]
        )
        train(model, MIXED, has_flash=has_flash)
    assert {type(group) for group in kinds[0]} == expected


@pytest.mark.parametrize(("tried", "expected"), [(torch.float32, True), (torch.bfloat16, False)])
def test_flash_attention_is_not_asked_of_a_dtype_that_was_not_tried(
    tried: torch.dtype, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a model that is moved after it was loaded."""
    model, asked, make = build(dtype=torch.float32), list[bool](), model_module.split_heads
    model.model.flash_attention = torch.device("cpu"), tried

    def split_heads(*given: Any, flash: bool = False, **named: Any) -> Any:
        asked.append(flash)
        return make(*given, **named)

    monkeypatch.setattr(model_module, "split_heads", split_heads)
    model(pack(examples(SHORT)))
    assert asked == [expected, False]  # all layers, and the last
