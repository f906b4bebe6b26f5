"""Model and examples in, label probabilities and loss out: one prefill, no text generation.

The answer of a classification prompt is one of a few label words, so its probability is read off directly:

    p(label | review) = softmax over labels of  sum over the word's tokens of log p(token | review, tokens before)

Where every label word is one token, as in the default prompt, the hidden state of one position scores all of them and
the sum is a logit of that position (the normalising constant is common and cancels). Otherwise every review is computed
with each word in turn. Logits are computed in float32: in bfloat16 two labels closer than 0.8 % tie. Sampling settings
in generation_config.json (temperature, repetition penalty) play no part.

All prompts share a prefix: its KV cache is computed once for all examples, and no batch has tokens for it.

Several ranks divide the same batches among themselves, so each result equals that of a single process to the bit.

Validation uses the training examples' own layout, so `eval_loss` comes out of the same pass: attention is causal, and
the answer follows the position that predicts it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from minilora.qlora.batch import MicroBatch, common_prefix, pack
from minilora.qlora.kv_cache import KVCache
from minilora.qlora.loss import chunk_positions, head_logits, next_token_nll
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.prompt import ClassificationPrompt, Example
from minilora.system.distributed import SINGLE_RANK, Ranks

T = TypeVar("T")

# Tokens of a forward pass, the prefix counted in each example: 32 of the longest reviews at once took 4 GB in a 0.5B,
# and larger passes are no faster.
MAX_TOKENS = 4096


@dataclass(frozen=True)
class ScoringOptions:
    """How the work is divided."""

    batch_size: int | None = None  # most examples in a forward pass
    max_tokens: int = MAX_TOKENS  # of a forward pass; a longer example has one of its own
    on_progress: Callable[[int], object] | None = None  # called with the number of examples finished
    ranks: Ranks = SINGLE_RANK  # share the work, and all get the whole result
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext  # entered around the work of this rank


@dataclass(frozen=True)
class Scores:
    """Loss: nats per supervised token. Probabilities: (N, labels) float64, rows sum to 1; None for conversations."""

    loss: float
    probabilities: np.ndarray | None


@dataclass(frozen=True)
class Prefix:
    """What all examples begin with, possibly nothing, and its KV cache by layer."""

    num_tokens: int
    cache: Sequence[KVCache] | None

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Qwen2ForCausalLM, input_ids: Sequence[int]) -> "Prefix":
        """Prefills with the ids."""
        if not input_ids:
            return cls(0, None)
        return cls(len(input_ids), model.build_prefix_cache(torch.tensor(input_ids, device=model.head_weight.device)))

    def run(self, model: Qwen2ForCausalLM, examples: Sequence[Example]) -> tuple[MicroBatch, torch.Tensor]:
        """Some of the examples as a micro-batch after the prefix, and its (S, C) hidden states."""
        batch = pack(examples, cached_prefix=self.num_tokens).to(model.head_weight.device)
        return batch, model(batch, self.cache)


@torch.inference_mode()
def score(
    model: Qwen2ForCausalLM,
    examples: Sequence[Example],
    prompt: ClassificationPrompt | None,
    options: ScoringOptions,
) -> Scores:
    """Loss and label probabilities of all examples, in their order; without a prompt (conversations) the loss only.

    There is at least one, each with its true answer. Examples of similar length share a pass, whatever their order.
    The model is in evaluation mode for the time of the call.
    """
    was_training = model.training
    model.eval()
    prefix = Prefix.of(model, examples[0].input_ids[: common_prefix(examples)])

    def score_batch(chosen: Sequence[Example]) -> tuple[float, int, list[list[float]]]:
        """Summed loss, supervised tokens, and the labels' scores."""
        batch, hidden = prefix.run(model, chosen)
        nll, count = next_token_nll(hidden, batch.targets, model.head_weight)
        scores = torch.empty(0)
        if prompt is not None and _are_single_tokens(prompt):
            scores = _single_token_scores(model, prompt, batch, hidden)
        elif prompt is not None:
            scores = _label_scores(model, prefix, chosen, prompt)
        return nll.item(), count, scores.tolist()

    batches = list(iter_batches([len(example.input_ids) for example in examples], options))
    try:
        parts = _divide(batches, examples, score_batch, options)
    finally:
        model.train(was_training)
    loss = sum(nll for nll, _, _ in parts) / sum(count for _, count, _ in parts)
    return Scores(loss, None if prompt is None else _softmax(batches, [scores for _, _, scores in parts]))


@torch.inference_mode()
def label_probabilities(
    model: Qwen2ForCausalLM,
    prefix: Prefix,
    examples: Sequence[Example],
    prompt: ClassificationPrompt,
    options: ScoringOptions,
) -> np.ndarray:
    """`score` to rounding, without the loss: of a model in evaluation mode, the answers of `examples` playing no part.

    `prefix` begins all examples.
    """

    def score_batch(chosen: Sequence[Example]) -> list[list[float]]:
        return _label_scores(model, prefix, chosen, prompt).tolist()

    batches = list(iter_batches([len(example.input_ids) for example in examples], options))
    return _softmax(batches, _divide(batches, examples, score_batch, options))


def _divide(
    batches: Sequence[list[int]],
    examples: Sequence[Example],
    work: Callable[[Sequence[Example]], T],
    options: ScoringOptions,
) -> list[T]:
    """The result of `work` on each batch of indices into `examples`; the ranks divide the batches and all get all."""
    parts: list[T] = []
    with options.ranks.barrier(), options.interruptible():
        for number, indices in enumerate(batches):
            if options.ranks.owns(number):
                parts.append(work([examples[index] for index in indices]))
            if options.on_progress is not None:
                options.on_progress(len(indices))
    return options.ranks.gather_in_order(parts)


def _softmax(batches: Sequence[list[int]], scores: Sequence[list[list[float]]]) -> np.ndarray:
    """(N, labels) float64 of the labels' scores by batch, each at the index of its example."""
    log_scores = torch.empty(sum(map(len, batches)), len(scores[0][0]), dtype=torch.float64)
    for indices, values in zip(batches, scores, strict=True):
        log_scores[indices] = torch.tensor(values, dtype=torch.float64)
    return torch.softmax(log_scores, dim=-1).numpy()


def iter_batches(lengths: Sequence[int] | np.ndarray, options: ScoringOptions) -> Iterator[list[int]]:
    """Indices of examples of these lengths, longest first, so that a lack of memory shows at once."""
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    limit = len(order) if options.batch_size is None else options.batch_size
    while len(order):
        size = max(1, min(limit, options.max_tokens // int(lengths[order[0]])))
        yield order[:size].tolist()
        order = order[size:]


def _are_single_tokens(prompt: ClassificationPrompt) -> bool:
    return all(len(ids) == 1 for ids in prompt.label_ids)


def _single_token_scores(
    model: Qwen2ForCausalLM, prompt: ClassificationPrompt, batch: MicroBatch, hidden: torch.Tensor
) -> torch.Tensor:
    """(N, labels) float64 on the CPU: the logits of the label words at the position before each answer."""
    indices = torch.arange(int(batch.example_indices[-1]) + 1, device=batch.example_indices.device)
    positions = torch.searchsorted(batch.example_indices, indices)
    words = model.head_weight[[ids[0] for ids in prompt.label_ids]]
    return head_logits(hidden[positions].float(), words.float()).double().cpu()


def _label_scores(
    model: Qwen2ForCausalLM, prefix: Prefix, examples: Sequence[Example], prompt: ClassificationPrompt
) -> torch.Tensor:
    """(N, labels) float64 on the CPU: the labels' log-probabilities, up to a constant for each example."""
    if _are_single_tokens(prompt):
        first_word = prefix.run(model, [prompt.with_answer(example, 0) for example in examples])
        return _single_token_scores(model, prompt, *first_word)
    hidden, targets, entries = [], [], []
    for label in range(len(prompt.labels)):
        batch, states = prefix.run(model, [prompt.with_answer(example, label) for example in examples])
        hidden.append(states)
        targets.append(batch.targets)
        entries.append(batch.example_indices * len(prompt.labels) + label)
    tokens = token_log_probabilities(torch.cat(hidden), torch.cat(targets), model.head_weight)
    scores = tokens.new_zeros(len(examples) * len(prompt.labels)).index_add_(0, torch.cat(entries), tokens)
    return scores.view(len(examples), -1).double().cpu()


def token_log_probabilities(hidden: torch.Tensor, targets: torch.Tensor, head_weight: torch.Tensor) -> torch.Tensor:
    """log p(target) at each position: (S,) float32 or wider, as the products are; for scoring, no gradient is kept.

    A piece of the vocabulary at a time: a float32 copy of a 7B's head would be 2 GB.
    """
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    pieces = head_weight.split(chunk_positions(sum(hidden.shape), hidden.device.type))  # with their logits (size, S)
    normalizers = [(hidden @ piece.to(hidden.dtype).T).logsumexp(1) for piece in pieces]
    return (hidden * head_weight[targets]).sum(1) - torch.stack(normalizers).logsumexp(0)
