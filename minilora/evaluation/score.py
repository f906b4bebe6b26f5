"""Model and examples in, label probabilities and loss out: one prefill, no text generation.

The answer of a classification prompt is one of a few label words, so its probability is read off directly:

    p(label | review) = softmax over labels of  sum over the word's tokens of log p(token | review, tokens before)

For label words of one token, which is what the default prompt has, all of them are scored by the same row of
hidden states and the sum is that row's logit (the normalising constant is common and falls out). Otherwise
every review is run once with each word. Logits are computed in float32: in bfloat16 two labels closer than
0.8 % tie. Sampling settings in generation_config.json (temperature, repetition penalty) play no part.

All prompts begin alike, so the keys and values of what they share are computed once for a whole run of reviews, and no
batch has rows for it.

Several ranks deal the same batches among themselves, so each result is the one that a single process gets, to the bit.

Validation uses the training examples' own layout, so `eval_loss` comes out of the same pass: a row sees only
what stands before it, and the answer stands behind the row that predicts it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from minilora.qlora.batch import MicroBatch, common_prefix, pack
from minilora.qlora.kv_cache import KVCache
from minilora.qlora.loss import head_logits, next_token_nll, token_log_probabilities
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.prompt import ClassificationPrompt, Example
from minilora.system.distributed import SINGLE_RANK, Ranks

T = TypeVar("T")

# Tokens of a forward pass, the prefix counted in each example: 32 of the longest reviews at once took 4 GB in a 0.5B,
# and larger passes are no faster.
MAX_TOKENS = 4096


@dataclass(frozen=True)
class Scores:
    """What the model makes of N examples.

    Attributes:
        loss: mean negative log-likelihood of the supervised tokens, in nats.
        probabilities: (N, labels) float64, rows summing to 1; None for free-form chat.
    """

    loss: float
    probabilities: np.ndarray | None


@dataclass(frozen=True)
class Prefix:
    """What all examples of a run begin with, computed once.

    Attributes:
        rows: how many ids that is; 0 with a single example.
        past: its keys and values by layer.
    """

    rows: int
    past: Sequence[KVCache] | None

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Qwen2ForCausalLM, input_ids: Sequence[int]) -> "Prefix":
        """Runs the ids that all examples begin with; none is fine."""
        if not input_ids:
            return cls(0, None)
        return cls(len(input_ids), model.build_prefix_cache(torch.tensor(input_ids, device=model.head_weight.device)))

    def run(self, model: Qwen2ForCausalLM, examples: Sequence[Example]) -> tuple[MicroBatch, torch.Tensor]:
        """Some of the examples as a micro-batch behind the prefix, and its (S, C) hidden states."""
        batch = pack(examples, cached_prefix=self.rows).to(model.head_weight.device)
        return batch, model(batch, self.past)


@torch.inference_mode()
def score(
    model: Qwen2ForCausalLM,
    examples: Sequence[Example],
    prompt: ClassificationPrompt | None,
    batch_size: int,
    on_progress: Callable[[int], object] | None = None,
    ranks: Ranks = SINGLE_RANK,
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Scores:
    """Loss and label probabilities of all examples, in their order.

    Args:
        model: put into evaluation mode for the time of the call.
        examples: at least one, each with its true answer.
        prompt: whose labels are scored; None for free-form chat.
        batch_size: examples in a forward pass, fewer where they are so long that they exceed MAX_TOKENS. Examples of
            similar length go together, whatever their order.
        on_progress: called with the number of examples finished; the other ranks' are taken to be as far.
        ranks: that share the work; all of them get all of the result.
        interruptible: entered around the work of this rank.
    """
    was_training = model.training
    model.eval()
    batches = list(_iter_batches(examples, batch_size, MAX_TOKENS))
    prefix = Prefix.of(model, examples[0].input_ids[: common_prefix(examples)])

    def score_batch(chosen: Sequence[Example]) -> tuple[float, int, list[list[float]]]:
        """Summed loss, supervised tokens, and the labels' scores."""
        batch, hidden = prefix.run(model, chosen)
        nll, count = next_token_nll(hidden, batch.targets, model.head_weight)
        scores = [] if prompt is None else _label_scores(model, prefix, chosen, prompt, (batch, hidden)).tolist()
        return nll.item(), count, scores

    try:
        parts = _deal(batches, examples, score_batch, on_progress, ranks, interruptible)
    finally:
        model.train(was_training)
    loss = sum(nll for nll, _, _ in parts) / sum(count for _, count, _ in parts)
    return Scores(loss, None if prompt is None else _softmax(batches, [scores for _, _, scores in parts]))


def _deal(
    batches: Sequence[list[int]],
    examples: Sequence[Example],
    work: Callable[[Sequence[Example]], T],
    on_progress: Callable[[int], object] | None,
    ranks: Ranks,
    interruptible: Callable[[], AbstractContextManager[None]],
) -> list[T]:
    """What `work` makes of each batch, given by its places in `examples`: each is done by one of `ranks`, for all."""
    parts: list[T] = []
    with ranks.barrier(), interruptible():
        for number, places in enumerate(batches):
            if ranks.owns(number):
                parts.append(work([examples[place] for place in places]))
            if on_progress is not None:
                on_progress(len(places))
    return ranks.gather_in_order(parts)


def _softmax(batches: Sequence[list[int]], scores: Sequence[list[list[float]]]) -> np.ndarray:
    """(N, labels) float64 of the labels' scores by batch, each in the place of its example."""
    log_scores = torch.empty(sum(map(len, batches)), len(scores[0][0]), dtype=torch.float64)
    for places, values in zip(batches, scores, strict=True):
        log_scores[places] = torch.tensor(values, dtype=torch.float64)
    return torch.softmax(log_scores, dim=-1).numpy()


@torch.inference_mode()
def label_probabilities(
    model: Qwen2ForCausalLM,
    prefix: Prefix,
    examples: Sequence[Example],
    prompt: ClassificationPrompt,
    max_tokens: int,
    on_progress: Callable[[int], object] | None = None,
    ranks: Ranks = SINGLE_RANK,
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> np.ndarray:
    """(N, labels) float64, rows summing to 1: what `score` finds of the same examples, to rounding, without the loss.

    Args:
        model: in evaluation mode.
        prefix: begins all examples.
        examples: at least one; the answers that they carry have no say.
        prompt: whose labels are scored.
        max_tokens: of a forward pass, counted as for MAX_TOKENS; a longer example has one to itself.
        on_progress: as for `score`, like the other two.
        ranks: that share the work.
        interruptible: entered around the work of this rank.
    """

    def score_batch(chosen: Sequence[Example]) -> list[list[float]]:
        scores: list[list[float]] = _label_scores(model, prefix, chosen, prompt).tolist()
        return scores

    batches = list(_iter_batches(examples, len(examples), max_tokens))
    return _softmax(batches, _deal(batches, examples, score_batch, on_progress, ranks, interruptible))


def _iter_batches(examples: Sequence[Example], batch_size: int, max_tokens: int) -> Iterator[list[int]]:
    """Places in `examples`, longest first, so that a lack of memory shows at once."""
    order = sorted(range(len(examples)), key=lambda place: -len(examples[place].input_ids))
    while order:
        size = max(1, min(batch_size, max_tokens // len(examples[order[0]].input_ids)))
        yield order[:size]
        order = order[size:]


def _label_scores(
    model: Qwen2ForCausalLM,
    prefix: Prefix,
    examples: Sequence[Example],
    prompt: ClassificationPrompt,
    first_pass: tuple[MicroBatch, torch.Tensor] | None = None,
) -> torch.Tensor:
    """(N, labels) float64 on the CPU: scores that differ from the labels' log-probabilities by a constant a row.

    Args:
        model: in evaluation mode.
        prefix: begins all examples.
        examples: of one forward pass.
        prompt: whose labels are scored.
        first_pass: `prefix.run` of these examples, where the caller has it: words of one token need no other.
    """
    if all(len(ids) == 1 for ids in prompt.label_ids):
        batch, hidden = first_pass or prefix.run(model, [prompt.with_answer(example, 0) for example in examples])
        first_rows = torch.searchsorted(
            batch.example_indices, torch.arange(len(examples), device=batch.example_indices.device)
        )
        words = model.head_weight[[ids[0] for ids in prompt.label_ids]]
        return head_logits(hidden[first_rows].float(), words.float()).double().cpu()
    head_weight = model.head_weight.float()
    columns = []
    for label in range(len(prompt.labels)):
        batch, hidden = prefix.run(model, [prompt.with_answer(example, label) for example in examples])
        tokens = token_log_probabilities(hidden.float(), batch.targets, head_weight)
        columns.append(torch.zeros(len(examples), device=tokens.device).index_add_(0, batch.example_indices, tokens))
    return torch.stack(columns, dim=1).double().cpu()
