"""Model and examples in, label probabilities and loss out: one prefill, no text generation.

The answer of a classification prompt is one of its label words, so its probability is read off directly:

    p(label | review) = softmax over labels of  sum over the word's tokens of log p(token | review, tokens before)

What is scored is the word, and the closing `<|im_end|>` only where the word begins another one: without it "手机" could
never lose against "手机壳", and with it the two are different answers, as they are in training. Behind other words it
would add nothing but the model's doubt whether the answer goes on.

Where every label word is one token, as in the default prompt, the hidden state of one position scores all of them and
the sum is a logit of that position (the normalising constant is common and cancels). Otherwise the words run behind
each review in the same pass (`label_trie.py`). Logits of labels are computed in float32: in bfloat16 two labels closer
than 0.8 % tie. Sampling settings in generation_config.json (temperature, repetition penalty) play no part.

All prompts share a prefix: its KV cache is computed once for all examples, and no batch has tokens for it.

Several ranks divide the same batches among themselves, so each result equals that of a single process to the bit.

Validation uses the training examples' own layout, so `eval_loss` comes out of the same pass: attention is causal, and
the answer follows the position that predicts it.
"""

import base64
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from minilora.evaluation.label_trie import LabelTrie
from minilora.qlora.batch import MicroBatch, common_prefix, pack
from minilora.qlora.kv_cache import KVCache
from minilora.qlora.loss import next_token_nll
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.prompt import ClassificationPrompt, Example
from minilora.system.distributed import SINGLE_RANK, Ranks

T = TypeVar("T")

# Tokens of a forward pass, the prefix counted in each example: 32 of the longest reviews at once took 4 GB in a 0.5B,
# and larger passes are no faster.
MAX_TOKENS = 4096
# Label words may have one token in so many of a pass behind each example. `planning/memory.py` caps passes at 1.5 times
# the tokens of the longest training example or more, so that both fit.
LABEL_SHARE = 3


@dataclass(frozen=True)
class ScoringOptions:
    """How the work is divided."""

    batch_size: int | None = None  # most examples in a forward pass
    max_tokens: int = MAX_TOKENS  # of a forward pass, the label words counted; a longer example has one of its own
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


@dataclass(frozen=True)
class LabelWords:
    """A prompt's label words as one trie, or, where they have too many tokens for a pass, as several.

    The review runs once more for each further trie: with passes of `MAX_TOKENS` from some thousand labels on.
    """

    num_labels: int
    parts: tuple[tuple[list[int], LabelTrie], ...]  # indices of labels, and the trie of their words

    @classmethod
    def of(cls, words: Sequence[Sequence[int]], max_tokens: int) -> "LabelWords":
        """Of `ClassificationPrompt.scored_ids`, for passes of at most `max_tokens`."""
        return cls(len(words), tuple(LabelTrie(words).parts(max(1, max_tokens // LABEL_SHARE))))

    @property
    def num_tokens(self) -> int:
        """Tokens that a pass has behind each example for them, at most."""
        return max(len(trie.inner_tokens) for _, trie in self.parts)

    def run(
        self, model: Qwen2ForCausalLM, prefix_cache: Sequence[KVCache] | None, examples: Sequence[Example]
    ) -> tuple[MicroBatch, torch.Tensor, torch.Tensor]:
        """The examples as a micro-batch, its (S, C) hidden states, and (n, labels) float64 scores on the CPU.

        Scores are the labels' log-probabilities, up to a constant for each example.
        """
        scores = torch.empty(len(examples), self.num_labels, dtype=torch.float64)
        (indices, trie), *others = self.parts
        batch, hidden, states = trie.run(model, prefix_cache, examples)
        scores[:, indices] = trie.log_probabilities(states, model.head_weight)
        for indices, trie in others:
            _, _, states = trie.run(model, prefix_cache, [_question(example) for example in examples])
            scores[:, indices] = trie.log_probabilities(states, model.head_weight)
        return batch, hidden, scores


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

    words = None if prompt is None else LabelWords.of(prompt.scored_ids, options.max_tokens)

    def score_batch(chosen: Sequence[Example]) -> tuple[float, int, str]:
        """Summed loss, supervised tokens, and the labels' scores as `_to_text` has them."""
        if words is None:
            batch = pack(chosen, cached_prefix=prefix.num_tokens).to(model.head_weight.device)
            hidden, scores = model(batch, prefix.cache), torch.empty(0)
        else:
            batch, hidden, scores = words.run(model, prefix.cache, chosen)
        nll, count = next_token_nll(hidden, batch.targets.to(hidden.device), model.head_weight)
        return nll.item(), count, _to_text(scores)

    batches = list(iter_batches(_lengths(examples, words), options))
    try:
        parts = _divide(batches, examples, score_batch, options)
    finally:
        model.train(was_training)
    loss = sum(nll for nll, _, _ in parts) / sum(count for _, count, _ in parts)
    scores = [text for _, _, text in parts]
    return Scores(loss, None if words is None else _softmax(batches, scores, words.num_labels))


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

    words = LabelWords.of(prompt.scored_ids, options.max_tokens)

    def score_batch(chosen: Sequence[Example]) -> str:
        return _to_text(words.run(model, prefix.cache, [_question(example) for example in chosen])[2])

    batches = list(iter_batches(_lengths(examples, words), options))
    return _softmax(batches, _divide(batches, examples, score_batch, options), words.num_labels)


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


def _to_text(scores: torch.Tensor) -> str:
    """Float64 scores, to the bit, as ranks exchange them: in a third of what Python's numbers take, or JSON of them."""
    return base64.b64encode(scores.numpy().tobytes()).decode()


def _softmax(batches: Sequence[list[int]], scores: Sequence[str], num_labels: int) -> np.ndarray:
    """(N, labels) float64 of the labels' scores by batch, each at the index of its example."""
    log_scores = np.empty((sum(map(len, batches)), num_labels))
    for indices, text in zip(batches, scores, strict=True):
        log_scores[indices] = np.frombuffer(base64.b64decode(text)).reshape(len(indices), num_labels)
    return torch.softmax(torch.from_numpy(log_scores), dim=-1).numpy()


def iter_batches(lengths: Sequence[int] | np.ndarray, options: ScoringOptions) -> Iterator[list[int]]:
    """Indices of examples of these lengths, longest first, so that a lack of memory shows at once."""
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    limit = len(order) if options.batch_size is None else options.batch_size
    while len(order):
        size = max(1, min(limit, options.max_tokens // int(lengths[order[0]])))
        yield order[:size].tolist()
        order = order[size:]


def _question(example: Example) -> Example:
    """The example up to the token that its answer begins with, which is a target only and so not computed."""
    start = example.answer_start
    return Example(example.input_ids[: start + 1], [*[False] * start, True])


def _lengths(examples: Sequence[Example], words: LabelWords | None) -> list[int]:
    """Tokens of each example in a pass, the label words counted."""
    return [len(example.input_ids) + (0 if words is None else words.num_tokens) for example in examples]
