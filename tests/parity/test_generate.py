"""Greedy decoding equals transformers' `generate` token by token, and what is drawn from equals its processors'."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers.generation import logits_process

from minilora.generation.decode import DecodeState, GenerationConfig, candidates, generate, penalize
from minilora.qlora.prompt import ChatTokenizer
from minilora.weights.load import load_model
from tests.parity.reference import VOCAB_SIZE, load_reference

pytestmark = pytest.mark.parity
REAL_MODEL = os.environ.get("MINILORA_REAL_MODEL")
QUESTIONS = (
    "用一句话介绍杭州。",
    "这家酒店怎么样？房间干净，早餐也不错，就是隔音太差。",
    "Write a Python function that reverses a list in place.",
    "17 乘以 23 等于多少？",
)


def greedy(penalty: float) -> GenerationConfig:
    return GenerationConfig(do_sample=False, repetition_penalty=penalty, max_new_tokens=64)


def reference_tokens(
    model: transformers.PreTrainedModel, ids: list[int], count: int, penalty: float, stop_ids: list[int] | None = None
) -> list[int]:
    settings = transformers.GenerationConfig(
        max_new_tokens=count, do_sample=False, repetition_penalty=penalty, eos_token_id=stop_ids, pad_token_id=0
    )
    found = model.generate(torch.tensor([ids]), generation_config=settings, attention_mask=torch.ones(1, len(ids)))
    return found[0, len(ids) :].tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.1])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_greedy_tokens_equal(reference_checkpoint: Callable[..., Path], tie: bool, penalty: float) -> None:
    folder = reference_checkpoint(tie=tie)
    ours, theirs = load_model(folder, torch.float32, "none"), load_reference(folder)
    for seed in range(4):
        ids = torch.randint(0, VOCAB_SIZE, (9 + seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        found = list(generate(DecodeState(ours, ids), greedy(penalty)))
        assert found == reference_tokens(theirs, ids, 64, penalty)


@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.3])
@pytest.mark.parametrize("top_k", [0, 1, 20])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_what_is_drawn_from_equals(temperature: float, top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, ids = 4 * torch.randn(1, 300, generator=generator), torch.randint(0, 300, (1, 12), generator=generator)
    processors = [
        logits_process.RepetitionPenaltyLogitsProcessor(1.1),
        logits_process.TemperatureLogitsWarper(temperature),
        *([logits_process.TopKLogitsWarper(top_k)] if top_k else []),
        *([logits_process.TopPLogitsWarper(top_p)] if top_p < 1 else []),
    ]
    theirs = logits
    for processor in processors:
        theirs = processor(ids, theirs)
    seen = torch.zeros(300, dtype=torch.bool)
    seen[ids[0]] = True
    tokens, left = candidates(penalize(logits[0], seen, 1.1), temperature, top_k, top_p)
    ours = torch.full((300,), -torch.inf).index_copy_(0, tokens, left)
    torch.testing.assert_close(ours.softmax(0), theirs[0].softmax(0))


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(REAL_MODEL is None, reason="MINILORA_REAL_MODEL is not set")
@pytest.mark.parametrize("penalty", [1.0, 1.1])
def test_greedy_answers_of_a_real_checkpoint_equal_token_by_token(penalty: float) -> None:
    folder = Path(str(REAL_MODEL))
    ours, theirs, tokenizer = load_model(folder, torch.float32, "none"), load_reference(folder), ChatTokenizer(folder)
    stop_ids = [tokenizer.im_end]
    for question in QUESTIONS:
        ids = [*tokenizer.open_turn("system", "You are a helpful assistant."), *tokenizer.close_turn()]
        ids += [*tokenizer.open_turn("user", question), *tokenizer.close_turn(), *tokenizer.open_turn("assistant")]
        found = list(generate(DecodeState(ours, ids), greedy(penalty), stop_ids=stop_ids))
        expected = reference_tokens(theirs, ids, 64, penalty, stop_ids)
        assert found == expected[: -1 if expected[-1] in stop_ids else None]
        assert tokenizer.decode(found).strip()
