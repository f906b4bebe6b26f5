"""What `--dry_run` shows of a configuration: its memory, its tokens, and an example as the model sees it."""

import math
from pathlib import Path

import numpy as np
import torch

from minilora.adapters.optimizers import check_optimizer
from minilora.build import build_prompt, choose_device, choose_dtype, note_other_system, read_splits, says_indices
from minilora.config import Config
from minilora.data.examples import class_weights, tell_of_class_weights, tell_of_labels
from minilora.data.sampler import epoch_order
from minilora.planning.budget import resolve_token_limit
from minilora.planning.plan import epoch_batches, estimate_run_memory, examples_per_step, largest_batch
from minilora.qlora.batch import count_packed_tokens
from minilora.qlora.prompt import ChatTokenizer
from minilora.system.memory import peak_memory_bytes
from minilora.weights.safetensors_io import dtype_name


def print_plan(config: Config, model_folder: Path, ranks: int = 1) -> None:
    """Prints what `--dry-run` shows of a run of so many ranks; reads only config.json, tokenizer.json and the data."""
    process_bytes = peak_memory_bytes(torch.device("cpu"))  # before the tokenizer and the data, as `fit` does
    check_optimizer(config.train.optim)
    tokenizer = ChatTokenizer(model_folder)
    prompt = build_prompt(config, tokenizer)
    note_other_system(prompt)
    splits = read_splits(config, prompt, may_write=False)
    device = choose_device(config)
    dtype = choose_dtype(config, device)
    examples = splits["train"].examples
    words = prompt.scored_ids if splits["train"].labelled else ()
    limit = resolve_token_limit(config, model_folder, examples, device, ranks=ranks, words=words)
    config = config.with_token_limit(limit)
    packed = [count_packed_tokens(batch) for batch in epoch_batches(config, examples, 0, ranks)]
    in_step = examples_per_step(config, ranks)

    shape = largest_batch(config, examples, ranks, words)
    estimate = estimate_run_memory(config, model_folder, shape, dtype=dtype, process_bytes=process_bytes)
    where = f"{device}, {dtype_name(dtype)}" + (f", each of {ranks} ranks" if ranks > 1 else "")
    print(f"memory estimate ({where}, largest micro-batch of the run):\n{estimate}\n")
    files = {f"{config.data.dir}/{name}.jsonl": split for name, split in splits.items()}
    tell_of_labels(files, prompt.labels, says_indices(config))
    weights = class_weights(config.train.class_weights, splits["train"], prompt.labels)
    tell_of_class_weights(weights, splits["train"], prompt.labels, in_step)
    for name, split in splits.items():
        print(f"{name}: {len(split.examples)} examples, {split.describe()}")
    print(
        f"an epoch: {math.ceil(len(examples) / in_step):,} steps of {in_step:,} examples"
        f"{f' on {ranks} ranks' if ranks > 1 else ''}; {examples.lengths.sum(dtype=np.int64):,} tokens in "
        f"{len(packed):,} micro-batches, {examples.num_supervised.sum(dtype=np.int64):,} supervised; "
        f"{sum(packed):,} computed (shared prefixes once)\n"
    )
    first = epoch_order(len(examples), config.train.seed, 0)[0]
    print(f"the first example:\n{tokenizer.decode(examples[first].input_ids)}")
