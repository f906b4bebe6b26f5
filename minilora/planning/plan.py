"""What a configuration takes, before a weight is loaded: its largest micro-batch, its memory ledger, its plan."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minilora.adapters.attach import attach
from minilora.build import build_prompt, choose_device, choose_dtype, read_split
from minilora.config import Config
from minilora.data.prepare import SPLITS, epoch_order
from minilora.data.sampler import split_into_micro_batches
from minilora.planning.memory import MemoryEstimate, ParameterCounts, count_parameters, estimate_memory, moments_bytes
from minilora.qlora.batch import count_packed_tokens, round_up_tokens
from minilora.qlora.model import Qwen2Config, Qwen2ForCausalLM
from minilora.qlora.optim import BITSANDBYTES_OPTIMIZERS, check_optimizer
from minilora.qlora.prompt import ChatTokenizer, Example
from minilora.system.memory import peak_memory_bytes
from minilora.weights.bnb_checkpoint import unquantized_projections
from minilora.weights.hf_config import read_config
from minilora.weights.safetensors_io import dtype_name

ANSWER_TOKENS = 2  # a label word and <|im_end|>


@dataclass(frozen=True)
class BatchShape:
    """What memory depends on in the micro-batches of a run.

    Attributes:
        rows: T of the largest.
        supervised_positions: S of the one that has most of them.
        longest: rows of the longest example, with the prefix.
    """

    rows: int
    supervised_positions: int
    longest: int


def print_plan(config: Config, model_folder: Path) -> None:
    """Prints what `--dry-run` shows. Reads config.json, tokenizer.json and the data, and nothing else."""
    process_bytes = peak_memory_bytes(torch.device("cpu"))  # before the tokenizer and the data, as `fit` does
    check_optimizer(config.train.optim)
    tokenizer = ChatTokenizer(model_folder)
    prompt = build_prompt(config, tokenizer)
    splits = {name: read_split(config, prompt, name) for name in SPLITS}
    device = choose_device(config)
    dtype = choose_dtype(config, device)
    examples = splits["train"].examples
    batches = list(epoch_batches(config, examples, 0))
    real = sum(len(example.input_ids) for example in examples)
    supervised = sum(sum(example.supervised) for example in examples)

    ledger = estimate_run_memory(config, model_folder, examples, dtype, process_bytes)
    print(f"memory ({device}, {dtype_name(dtype)}, largest micro-batch of the run):\n{ledger}\n")
    for name, split in splits.items():
        cut = split.num_truncated
        print(f"{name}: {len(split.examples)} examples, {cut} cut to {config.data.max_length} tokens")
    print(
        f"an epoch: {real:,} tokens in {len(batches):,} micro-batches, {supervised:,} supervised; "
        f"{sum(map(count_packed_tokens, batches)):,} rows computed (common prefixes once)\n"
    )
    first = epoch_order(len(examples), config.train.seed, 0)[0]
    print(f"the first example:\n{tokenizer.decode(examples[first].input_ids)}")


def epoch_batches(config: Config, examples: Sequence[Example], epoch: int) -> Iterator[list[Example]]:
    """The examples of each micro-batch of an epoch."""
    order = epoch_order(len(examples), config.train.seed, epoch)
    train = config.train
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    for start in range(0, len(order), per_step):
        step_examples = [examples[place] for place in order[start : start + per_step]]
        yield from split_into_micro_batches(
            step_examples, train.per_device_train_batch_size, train.max_tokens_per_micro_batch
        )


def largest_batch(config: Config, examples: Sequence[Example]) -> BatchShape:
    """The shape of a run's micro-batches: the order of every epoch is known beforehand."""
    train = config.train
    epochs = train.num_train_epochs
    if train.max_steps is not None:
        per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
        epochs = math.ceil(train.max_steps / math.ceil(len(examples) / per_step))
    batches = [batch for epoch in range(epochs) for batch in epoch_batches(config, examples, epoch)]
    return BatchShape(
        max(map(count_packed_tokens, batches)),
        max(sum(sum(example.supervised) for example in batch) for batch in batches),
        max(len(example.input_ids) - 1 for example in examples),
    )


def uniform_batch(config: Config, length: int) -> BatchShape:
    """The shape of micro-batches of examples of `length` tokens each, which share no prefix and answer in a word."""
    train = config.train
    count = train.per_device_train_batch_size
    if train.max_tokens_per_micro_batch is not None:
        in_step = count * train.gradient_accumulation_steps
        at_most = next(
            (n for n in range(in_step, 1, -1) if round_up_tokens(n * (length - 1)) <= train.max_tokens_per_micro_batch),
            1,
        )
        count = math.ceil(in_step / math.ceil(in_step / at_most))  # evenly, as `split_into_micro_batches`
    return BatchShape(round_up_tokens(count * (length - 1)), count * ANSWER_TOKENS, length - 1)


def count_config(config: Config, architecture: Qwen2Config, folder: Path | None = None) -> ParameterCounts:
    """The numbers of a model with the adapter of `lora.*`.

    Args:
        config: of the run.
        architecture: of the model.
        folder: with its weights, which may hold some projections in full.
    """
    with torch.device("meta"):
        model = Qwen2ForCausalLM(architecture)
        attach(model, config.lora)
    return count_parameters(model, () if folder is None else unquantized_projections(folder))


def estimate_config_memory(
    config: Config,
    numbers: ParameterCounts,
    shape: BatchShape,
    dtype: torch.dtype,
    device_type: str,
    process_bytes: int | None,
) -> MemoryEstimate:
    """`estimate_memory` for a configuration.

    Args:
        config: of the run.
        numbers: by `count_config`.
        shape: of its micro-batches.
        dtype: of activations and dense weights.
        device_type: "cpu" or "cuda".
        process_bytes: see `estimate_memory`.
    """
    return estimate_memory(
        numbers,
        shape.rows,
        shape.supervised_positions,
        shape.longest,
        dtype,
        config.model.quantization,
        config.model.double_quantization,
        config.train.gradient_checkpointing,
        moments_bytes(config.train.optim, numbers.trained, device_type),
        config.model.cache_dequantized,
        config.train.offload_checkpoints,
        config.train.optim in BITSANDBYTES_OPTIMIZERS,
        device_type,
        process_bytes,
    )


def estimate_run_memory(
    config: Config, model_folder: Path, examples: Sequence[Example], dtype: torch.dtype, process_bytes: int | None
) -> MemoryEstimate:
    """What a run takes by its largest micro-batch.

    Args:
        config: of the run.
        model_folder: with config.json.
        examples: of training.
        dtype: of activations and dense weights.
        process_bytes: see `estimate_memory`.
    """
    numbers = count_config(config, read_config(model_folder), model_folder)
    shape = largest_batch(config, examples)
    return estimate_config_memory(config, numbers, shape, dtype, choose_device(config).type, process_bytes)
