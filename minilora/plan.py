"""What a run would take: the memory ledger, tokens per epoch and one rendered example, without loading weights."""

from collections.abc import Sequence
from pathlib import Path

import torch

from minilora.adapterconfig import attach_adapter
from minilora.batch import MicroBatch, cut_micro_batches, pack
from minilora.build import adapter_config, build_prompt, choose_device, choose_dtype, read_split
from minilora.config import Config
from minilora.data import SPLITS, epoch_order
from minilora.load import read_config
from minilora.memory import Ledger, peak_memory_bytes, predict_memory
from minilora.model import Qwen2ForCausalLM
from minilora.optim import BITSANDBYTES_OPTIMIZERS, check_optimizer
from minilora.prompt import ChatTokenizer, Example
from minilora.tensorfile import dtype_name


def print_plan(config: Config, model_folder: Path) -> None:
    """Prints what `--dry-run` shows. Reads config.json, tokenizer.json and the data, and nothing else."""
    check_optimizer(config.train.optim)
    tokenizer = ChatTokenizer(model_folder)
    prompt = build_prompt(config, tokenizer)
    splits = {name: read_split(config, prompt, name) for name in SPLITS}
    device = choose_device(config)
    dtype = choose_dtype(config, device)
    examples = splits["train"].examples
    batches = epoch_batches(config, examples)
    real = sum(batch.num_real_tokens for batch in batches)
    computed = sum(len(batch.input_ids) for batch in batches)
    supervised = sum(batch.num_supervised for batch in batches)

    ledger = run_ledger(config, model_folder, examples, dtype, peak_memory_bytes(torch.device("cpu")))
    print(f"memory ({device}, {dtype_name(dtype)}, largest micro-batch of an epoch):\n{ledger}\n")
    for name, split in splits.items():
        cut = split.num_truncated
        print(f"{name}: {len(split.examples)} examples, {cut} cut to {config.data.max_length} tokens")
    print(
        f"an epoch: {real:,} tokens in {len(batches):,} micro-batches, {supervised:,} supervised; "
        f"{computed:,} rows computed (common prefixes once)\n"
    )
    first = epoch_order(len(examples), config.train.seed, 0)[0]
    print(f"the first example:\n{tokenizer.decode(examples[first].input_ids)}")


def epoch_batches(config: Config, examples: Sequence[Example]) -> list[MicroBatch]:
    """The micro-batches of the first epoch."""
    order = epoch_order(len(examples), config.train.seed, 0)
    train = config.train
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    return [
        pack(part)
        for start in range(0, len(order), per_step)
        for part in cut_micro_batches(
            [examples[i] for i in order[start : start + per_step]],
            train.per_device_train_batch_size,
            train.max_tokens_per_micro_batch,
        )
    ]


def run_ledger(
    config: Config, model_folder: Path, examples: Sequence[Example], dtype: torch.dtype, process_bytes: int | None
) -> Ledger:
    """What a run takes by its largest micro-batch.

    Args:
        config: of the run.
        model_folder: with config.json.
        examples: of training.
        dtype: of activations and dense weights.
        process_bytes: see `predict_memory`.
    """
    batches = epoch_batches(config, examples)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(read_config(model_folder))
        attach_adapter(model, adapter_config(config))
    return predict_memory(
        model,
        max(len(batch.input_ids) for batch in batches),
        max(batch.num_supervised for batch in batches),
        dtype,
        config.model.quantization,
        config.model.double_quantization,
        config.train.gradient_checkpointing,
        config.model.cache_dequantized,
        BITSANDBYTES_OPTIMIZERS.get(config.train.optim, (32, False))[0],
        process_bytes,
    )
