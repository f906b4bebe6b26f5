"""Logits, loss and scores equal transformers' on every layout of a Qwen2.5 checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.evaluation.score import ScoringOptions, score
from minilora.qlora.batch import pack
from minilora.qlora.loss import next_token_nll
from minilora.qlora.prompt import ChatTokenizer, Example
from minilora.weights.load import load_model
from tests.parity.reference import (
    VOCAB_SIZE,
    build_examples,
    build_prompt,
    load_reference,
    our_logits,
    reference_logits,
    reference_loss,
)

pytestmark = pytest.mark.parity

# Logits here reach 6 and differ by 4e-6: float32 additions in another order than transformers'. The smallest mistake,
# rms_norm_eps 1e-6 in place of 1e-5, moves them by 4e-3.
LOGITS_ATOL = 3e-5


def assert_same_logits(ours: list[torch.Tensor], reference: list[torch.Tensor]) -> None:
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=LOGITS_ATOL)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (4, 1), (4, 4), (2, 1), (8, 2)])
def test_logits_equal_in_every_head_layout(
    reference_checkpoint: Callable[..., Path], examples: list[Example], tie: bool, heads: int, kv_heads: int
) -> None:
    folder = reference_checkpoint(tie=tie, heads=heads, kv_heads=kv_heads)
    ours = our_logits(load_model(folder, torch.float32, "none"), examples)
    assert_same_logits(ours, reference_logits(load_reference(folder), examples))


@pytest.mark.parametrize("dialect", ["classic", "transformers-5"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_logits_equal_however_the_checkpoint_is_written(
    reference_checkpoint: Callable[..., Path],
    examples: list[Example],
    dialect: str,
    sharded: bool,
    dtype: torch.dtype,
) -> None:
    folder = reference_checkpoint(tie=False, dialect=dialect, sharded=sharded, dtype=dtype)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert ("rope_theta" in config, "rope_parameters" in config) == (dialect == "classic", dialect != "classic")
    assert (folder / "model.safetensors").is_file() != sharded
    ours = our_logits(load_model(folder, torch.float32, "none"), examples)
    assert_same_logits(ours, reference_logits(load_reference(folder), examples))


@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared prefix", "own prefix"])
def test_packing_changes_no_logit(
    reference_checkpoint: Callable[..., Path], examples: list[Example], share_prefix: bool
) -> None:
    folder = reference_checkpoint()
    prefix = pack(examples, share_prefix).groups[-1].prefix
    assert (prefix > 0) == share_prefix
    reference = reference_logits(load_reference(folder), examples)
    model = load_model(folder, torch.float32, "none")
    assert_same_logits(our_logits(model, examples, share_prefix), reference)
    alone = [our_logits(model, [example])[0] for example in examples]
    assert_same_logits(alone, reference)


def test_logits_equal_with_nf4_on_both_sides(
    reference_checkpoint: Callable[..., Path], examples: list[Example]
) -> None:
    folder = reference_checkpoint(tie=False)
    ours = our_logits(load_model(folder, torch.float32, "nf4"), examples)
    assert_same_logits(ours, reference_logits(load_reference(folder, nf4=True), examples))
    dense = our_logits(load_model(folder, torch.float32, "none"), examples)
    assert max((a - b).abs().max().item() for a, b in zip(ours, dense, strict=True)) > 0.1  # NF4 was used


def test_loss_equals_the_padded_batch_loss(reference_checkpoint: Callable[..., Path], examples: list[Example]) -> None:
    folder = reference_checkpoint()
    model = load_model(folder, torch.float32, "none")
    batch = pack(examples)
    with torch.no_grad():
        nll, count = next_token_nll(model(batch), batch.targets, model.head_weight)
        expected = reference_loss(load_reference(folder), examples).item()
    # A mean of 10 numbers, each off by a logit's rounding.
    assert (nll / count).item() == pytest.approx(expected, abs=LOGITS_ATOL)


def test_a_head_in_a_tied_file_is_not_used(
    reference_checkpoint: Callable[..., Path], examples: list[Example], tmp_path: Path
) -> None:
    folder = reference_checkpoint()
    copied = shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(copied / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    ours = our_logits(load_model(copied, torch.float32, "none"), examples)
    assert_same_logits(ours, reference_logits(load_reference(copied), examples))


def test_scores_are_the_label_probabilities_whatever_generation_config_says(
    reference_checkpoint: Callable[..., Path], chat_tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    folder = reference_checkpoint()
    examples, prompt = build_examples(chat_tokenizer), build_prompt(chat_tokenizer)
    wild = shutil.copytree(folder, tmp_path / "model")
    sampling = {"do_sample": True, "temperature": 9.0, "top_k": 1, "top_p": 0.01, "repetition_penalty": 5.0}
    (wild / "generation_config.json").write_text(json.dumps(sampling), "utf-8")

    reference = load_reference(wild)
    assert reference.generation_config.temperature == 9.0
    rows = torch.stack([logits[-2] for logits in reference_logits(reference, examples)])
    expected = torch.softmax(rows[:, [ids[0] for ids in prompt.label_ids]].double(), dim=-1).numpy()

    plain = score(load_model(folder, torch.float32, "none"), examples, prompt, ScoringOptions(2))
    with_sampling = score(load_model(wild, torch.float32, "none"), examples, prompt, ScoringOptions(2))
    assert plain.probabilities is not None
    assert with_sampling.probabilities is not None
    assert np.array_equal(plain.probabilities, with_sampling.probabilities)
    np.testing.assert_allclose(plain.probabilities, expected, rtol=0, atol=LOGITS_ATOL)


def test_several_token_labels_are_scored_by_the_sum_of_their_tokens(
    reference_checkpoint: Callable[..., Path], chat_tokenizer: ChatTokenizer
) -> None:
    folder = reference_checkpoint(tie=False)
    prompt = build_prompt(chat_tokenizer)
    prompt = type(prompt)(chat_tokenizer, prompt.system, prompt.instruction, ("差评", "好"), prompt.max_length)
    examples = prompt.examples(["房间很好。", "差"], [1, 0])
    assert len({len(ids) for ids in prompt.label_ids}) == 2
    reference = load_reference(folder)
    log_scores = torch.zeros(len(examples), 2, dtype=torch.float64)
    for row, example in enumerate(examples):
        for label, word in enumerate(prompt.label_ids):
            ids = torch.tensor(example.input_ids[: example.answer_start] + word)
            with torch.no_grad():
                log_p = reference(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            log_scores[row, label] = log_p[-len(word) - 1 : -1].gather(1, ids[-len(word) :, None]).sum()
    scores = score(load_model(folder, torch.float32, "none"), examples, prompt, ScoringOptions(2))
    np.testing.assert_allclose(scores.probabilities, log_scores.softmax(-1).numpy(), rtol=0, atol=LOGITS_ATOL)


def test_the_vocabulary_has_rows_beyond_the_tokenizer(
    reference_checkpoint: Callable[..., Path], chat_tokenizer: ChatTokenizer
) -> None:
    assert chat_tokenizer.vocab_size < VOCAB_SIZE == load_reference(reference_checkpoint()).config.vocab_size
