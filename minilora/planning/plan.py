"""What a configuration takes, before a weight is loaded: its largest micro-batch, its memory estimate, its plan.

Also the sizes of Qwen2.5 by name, for plans before anything is downloaded. Base, Instruct, Coder and Math models of one
size are alike in all that memory depends on. Source: config.json of Qwen/Qwen2.5-{size}-Instruct.
"""

import math
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from minilora.build import choose_device
from minilora.config import Config
from minilora.data.sampler import epoch_order, split_across_ranks, split_into_micro_batches
from minilora.data.token_store import TokenStore
from minilora.evaluation.label_trie import LabelTrie
from minilora.evaluation.score import LABEL_SHARE, MAX_TOKENS, ScoringOptions, iter_batches
from minilora.planning.memory import BatchShape, Machine, MemoryEstimate, count_parameters, estimate_memory
from minilora.qlora.batch import count_packed_scores, count_packed_tokens, round_up_tokens
from minilora.qlora.model import Qwen2Config
from minilora.qlora.prompt import Example
from minilora.weights.hf_config import read_config

ANSWER_TOKENS = 2  # a label word and <|im_end|>
LONGEST_TOKENS = 32_768  # that all sizes were trained on
SIZES = {
    size: Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=tied,
    )
    for size, hidden_size, intermediate_size, layers, heads, kv_heads, vocab_size, tied in (
        ("0.5B", 896, 4864, 24, 14, 2, 151_936, True),
        ("1.5B", 1536, 8960, 28, 12, 2, 151_936, True),
        ("3B", 2048, 11008, 36, 16, 2, 151_936, True),
        ("7B", 3584, 18944, 28, 28, 4, 152_064, False),
        ("14B", 5120, 13824, 48, 40, 8, 152_064, False),
        ("32B", 5120, 27648, 64, 40, 8, 152_064, False),
        ("72B", 8192, 29568, 80, 64, 8, 152_064, False),
    )
}


def hub_name(size: str) -> str:
    """The repository of a size's instruction-tuned model."""
    return f"Qwen/Qwen2.5-{size}-Instruct"


def size_of(name: str) -> str | None:
    """The size in the name of a repository, None where there is none: "Qwen/Qwen2.5-Coder-7B" is a 7B."""
    found = re.search(r"qwen2\.5-(?:coder-|math-)?([0-9.]+b)(?![a-z0-9])", name.lower())
    size = found[1].upper() if found else None
    return size if size in SIZES else None


def next_smaller(architecture: Qwen2Config) -> str | None:
    """The largest size that is narrower than `architecture`, or as wide with fewer layers; None for the smallest."""
    smaller = [size for size, other in SIZES.items() if _width_and_depth(other) < _width_and_depth(architecture)]
    return smaller[-1] if smaller else None


def _width_and_depth(config: Qwen2Config) -> tuple[int, int]:
    """What orders the sizes."""
    return config.hidden_size, config.num_hidden_layers


def examples_per_step(config: Config, ranks: int) -> int:
    """Training examples of a full optimizer step, of all ranks."""
    return config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps * ranks


def epoch_batches(config: Config, examples: Sequence[Example], epoch: int, ranks: int = 1) -> Iterator[list[Example]]:
    """The examples of each micro-batch of an epoch, of all ranks."""
    order = epoch_order(len(examples), config.train.seed, epoch)
    size, max_tokens = config.train.per_device_train_batch_size, config.train.token_limit
    in_step = examples_per_step(config, ranks)
    for start in range(0, len(order), in_step):
        step_examples = [examples[index] for index in order[start : start + in_step]]
        for share in split_across_ranks(step_examples, ranks, in_step // ranks):
            yield from split_into_micro_batches(share, size, max_tokens)


def largest_batch(
    config: Config, examples: TokenStore, ranks: int = 1, words: Sequence[Sequence[int]] = ()
) -> BatchShape:
    """The shape of a run's micro-batches; the order of every epoch is known beforehand.

    `words` are those that a validation scores behind each example, `ClassificationPrompt.scored_ids`; none for chat.

    Where a micro-batch has a number of examples, it has at most the tokens that it would have with the prefix that all
    examples share, so only those that could be the largest are made.
    """
    train = config.train
    epochs = train.num_train_epochs
    if train.max_steps is not None:
        epochs = math.ceil(train.max_steps / math.ceil(len(examples) / examples_per_step(config, ranks)))
    inputs, counts, size = examples.lengths, examples.num_supervised, train.per_device_train_batch_size
    # Validation and test set are assumed to be as long as the training set; their prefix is in a KV cache.
    label_tokens = len(LabelTrie(words).inner_tokens)
    behind = min(label_tokens, MAX_TOKENS // LABEL_SHARE)
    inputs += behind
    scored = next(iter_batches(inputs, ScoringOptions(train.per_device_eval_batch_size)))
    scored_tokens = round_up_tokens(int((inputs[scored] - 1 - examples.common_prefix).sum()))
    inputs -= 1 + behind
    longest = int(inputs.max())
    tokens, supervised, padding = 0, 0, 1.0
    if train.max_tokens_per_micro_batch is not None or ranks > 1:
        for batch in chain.from_iterable(epoch_batches(config, examples, epoch, ranks) for epoch in range(epochs)):
            tokens, padding = max((tokens, padding), _size(batch, longest))
            supervised = max(supervised, sum(sum(example.supervised) for example in batch))
        return BatchShape(tokens, supervised, longest, scored_tokens, label_tokens, padding)
    starts = np.arange(0, len(examples), size)
    others = np.diff(starts, append=len(examples)) - 1
    for epoch in range(epochs):
        order = np.asarray(epoch_order(len(examples), train.seed, epoch))
        supervised = max(supervised, int(np.add.reduceat(counts[order], starts, dtype=np.int64).max()))
        at_most = np.add.reduceat(inputs[order], starts, dtype=np.int64) - examples.common_prefix * others
        for index in np.argsort(-at_most):
            if round_up_tokens(int(at_most[index])) <= tokens:
                break
            chosen = order[starts[index] : starts[index] + size]
            tokens, padding = max((tokens, padding), _size([examples[i] for i in chosen], longest))
    return BatchShape(tokens, supervised, longest, scored_tokens, label_tokens, padding)


def _size(batch: Sequence[Example], longest: int) -> tuple[int, float]:
    """`tokens` and `padding` of a `BatchShape`; at least 1, for one with fewer tokens may have longer examples."""
    tokens = count_packed_tokens(batch)
    return tokens, max(1.0, count_packed_scores(batch) / (tokens * longest))


def uniform_batch(config: Config) -> BatchShape:
    """The shape of micro-batches whose examples have `data.max_length` tokens each, share no prefix, answer a word."""
    train, inputs = config.train, config.data.max_length - 1
    count = train.per_device_train_batch_size
    if train.token_limit is not None:
        in_step = count * train.gradient_accumulation_steps
        fitting = (n for n in range(in_step, 1, -1) if round_up_tokens(n * inputs) <= train.token_limit)
        at_most = next(fitting, 1)
        count = math.ceil(in_step / math.ceil(in_step / at_most))  # evenly, as `split_into_micro_batches`
    scored = max(1, min(train.per_device_eval_batch_size, MAX_TOKENS // (inputs + 1)))
    tokens, scored_tokens = round_up_tokens(count * inputs), round_up_tokens(scored * inputs)
    return BatchShape(tokens, count * ANSWER_TOKENS, inputs, scored_tokens)


def estimate_run_memory(
    config: Config, model_folder: Path, shape: BatchShape, dtype: torch.dtype, process_bytes: int | None
) -> MemoryEstimate:
    """What training takes with micro-batches of up to `shape`; `process_bytes` as in `Machine`."""
    counts = count_parameters(read_config(model_folder), config.lora, model_folder)
    machine = Machine(choose_device(config).type, dtype, process_bytes)
    return estimate_memory(config, counts, shape, machine)
