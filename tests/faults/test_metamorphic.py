"""What must not matter does not: how a batch is cut, ordered and packed; an adapter of zeros; whether an adapter is
merged; the names of labels."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minilora.adapters.attach import attach, lora_parameters
from minilora.adapters.merge import open_merge
from minilora.adapters.peft_config import BaseModel
from minilora.config import LoraConfig
from minilora.evaluation.score import ScoringOptions, score
from minilora.qlora.batch import pack
from minilora.qlora.loss import head_logits, next_token_nll
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.prompt import ChatTokenizer, ClassificationPrompt, Example
from minilora.weights.load import LoadSettings
from tests.conftest import make_reviews, save_adapter

ADAPTER = LoraConfig(r=4, alpha=8, dropout=0)


@pytest.fixture
def prompt(chat_tokenizer: ChatTokenizer) -> ClassificationPrompt:
    return ClassificationPrompt(chat_tokenizer, "system text", "评论：", ("负面", "正面"), 256)


@pytest.fixture
def examples(prompt: ClassificationPrompt) -> list[Example]:
    texts, labels = zip(*make_reviews(12, seed=3), strict=True)
    return prompt.examples(texts, labels)


@pytest.fixture
def model(tiny_model: Callable[..., Qwen2ForCausalLM]) -> Qwen2ForCausalLM:
    """In float64, with a trained-looking adapter."""
    made = tiny_model(dtype=torch.float64)
    attach(made, ADAPTER, seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in lora_parameters(made):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return made.train()


def loss_and_gradients(
    model: Qwen2ForCausalLM, parts: list[list[Example]], share_prefix: bool = True
) -> tuple[float, list[torch.Tensor]]:
    total = 0.0
    for part in parts:
        batch = pack(part, share_prefix=share_prefix)
        nll, _ = next_token_nll(model(batch), batch.targets, model.head_weight)
        nll.backward()
        total += nll.item()
    gradients = [parameter.grad for parameter in lora_parameters(model)]
    model.zero_grad()
    assert all(gradient is not None for gradient in gradients)
    return total, [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("way", ["split", "one by one", "reordered", "prefix not shared"])
def test_how_a_batch_is_made_changes_nothing(model: Qwen2ForCausalLM, examples: list[Example], way: str) -> None:
    shuffled = random.Random(0).sample(examples, len(examples))
    parts = {
        "split": [examples[:5], examples[5:]],
        "one by one": [[one] for one in examples],
        "reordered": [shuffled],
        "prefix not shared": [examples],
    }[way]
    expected, expected_gradients = loss_and_gradients(model, [examples])
    loss, gradients = loss_and_gradients(model, parts, share_prefix=way != "prefix not shared")
    assert loss == pytest.approx(expected, rel=1e-12)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_an_adapter_of_zeros_changes_nothing(
    tiny_model: Callable[..., Qwen2ForCausalLM], examples: list[Example], prompt: ClassificationPrompt
) -> None:
    base, adapted = tiny_model(), tiny_model()
    attach(adapted, ADAPTER)  # B = 0
    plain, zero = (score(model, examples, prompt, ScoringOptions(4)) for model in (base, adapted))
    assert plain.loss == zero.loss
    np.testing.assert_array_equal(plain.probabilities, zero.probabilities)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_merged_equals_adapted(
    tiny_checkpoint: Callable[..., Path],
    tiny_model: Callable[..., Qwen2ForCausalLM],
    examples: list[Example],
    prompt: ClassificationPrompt,
    tmp_path: Path,
    quantization: str,
) -> None:
    adapted = tiny_model(quantization)
    base = score(adapted, examples, prompt, ScoringOptions(4))
    attach(adapted, ADAPTER, seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in lora_parameters(adapted):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    save_adapter(adapted, tmp_path, ADAPTER, BaseModel("tiny"))
    merge = open_merge(tiny_checkpoint(), tmp_path, LoadSettings(torch.float32, quantization))
    merged = merge.build(merge.variants[0], torch.float32, torch.float32, "cpu")  # of nf4, what training saw
    batch = pack(examples)
    with torch.no_grad():
        found, expected = (head_logits(model(batch), model.head_weight) for model in (merged, adapted))
    # Float32, W + s B A multiplied at once or apart: sums of 64 to 128 products in another order, logits up to 6.
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)
    trained, whole = (
        score(adapted, examples, prompt, ScoringOptions(4)),
        score(merged, examples, prompt, ScoringOptions(4)),
    )
    np.testing.assert_allclose(whole.probabilities, trained.probabilities, rtol=0, atol=1e-5)
    assert abs(trained.loss - base.loss) > 0.01  # the adapter does something


def test_swapped_labels_mirror_the_probabilities(
    model: Qwen2ForCausalLM, examples: list[Example], prompt: ClassificationPrompt
) -> None:
    mirrored = replace(prompt, labels=prompt.labels[::-1])
    plain, swapped = (score(model, examples, one, ScoringOptions(4)).probabilities for one in (prompt, mirrored))
    assert plain is not None
    assert swapped is not None
    np.testing.assert_array_equal(plain, swapped[:, ::-1])
