"""A memory budget in, what fits it out: the largest micro-batches, and the options that would save most.

The memory estimate only grows with the tokens of a micro-batch, so the largest that fits is found by bisection,
exactly. Where real examples are split into micro-batches, a larger batch size may happen to have a smaller largest
micro-batch: then the result fits and one more does not.

Options are ordered by cost: first those that leave the result as it is, by the time they take, then those that change
it. A combination is found backwards: all options are taken, then dropped again, the most expensive first, wherever the
budget allows it. So none is taken where a cheaper one is enough.
"""

import bisect
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from minilora.build import DTYPES, build_prompt, choose_dtype
from minilora.config import Config, config_from_dict
from minilora.data.encode import Encoder
from minilora.data.records import Record
from minilora.data.token_store import TokenStore, build_store
from minilora.errors import UserError
from minilora.planning.memory import (
    BatchShape,
    Machine,
    MemoryEstimate,
    ParameterCounts,
    count_parameters,
    estimate_memory,
)
from minilora.planning.plan import ANSWER_TOKENS, LONGEST_TOKENS, SIZES, hub_name, largest_batch, next_smaller
from minilora.qlora.batch import round_up_tokens
from minilora.qlora.model import Qwen2Config
from minilora.qlora.prompt import ChatTokenizer, ClassificationPrompt
from minilora.weights.hf_config import read_config

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
TOKENS_KEY = "train.max_tokens_per_micro_batch"
SHORTEST_TOKENS = 16  # the least that the key takes, and data.max_length
MOST = 1 << 24  # tokens or examples: beyond any budget


def read_bytes(text: str, where: str) -> int:
    """The bytes in "12GB", "24564 MiB" or "8e9": GB are 10^9, GiB 2^30. UserError names `where`."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in UNITS or not 0 < float(match[1]) < 1e15:
        raise UserError(f"{where}: got {text!r}, expected an amount of memory, such as 12GB, 24564MiB or 0.5GB")
    return round(float(match[1]) * UNITS[match[2]])


@dataclass(frozen=True)
class Setup:
    """What a memory estimate is computed from: a configuration, a model, a machine, and the examples to train on."""

    config: Config
    architecture: Qwen2Config
    shape_of: Callable[[Config], BatchShape]  # the micro-batches of the examples under a configuration
    device_type: str  # "cpu" or "cuda"
    process_bytes: int | None  # see `Machine`
    folder: Path | None = None  # with the model's weights, where they are local
    counted: dict[tuple[Any, ...], ParameterCounts] = field(default_factory=dict)  # a cache: counting takes a while

    def with_keys(self, keys: Sequence[str]) -> "Setup":
        """A copy with other `section.key=value`."""
        return replace(self, config=config_from_dict(self.config.to_dict(), keys, "the configuration"))

    def with_size(self, size: str) -> "Setup":
        """A copy with another model, which is not local."""
        return replace(self, architecture=SIZES[size], folder=None)

    @cached_property
    def shape(self) -> BatchShape:
        """The shape of its micro-batches."""
        return self.shape_of(self.config)

    @cached_property
    def total_bytes(self) -> int:
        """The whole estimate."""
        return self.estimate().total_bytes

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype; a GPU of another machine is assumed to compute in bfloat16, as all since 2020 do."""
        if self.device_type == "cuda" and not torch.cuda.is_available():
            return DTYPES.get(self.config.model.compute_dtype, torch.bfloat16)
        return choose_dtype(self.config, torch.device(self.device_type))

    def estimate(self, shape: BatchShape | None = None) -> MemoryEstimate:
        """With its own micro-batches, or with others."""
        key = (self.architecture, self.folder, repr(self.config.lora))
        if key not in self.counted:
            self.counted[key] = count_parameters(self.architecture, self.config.lora, self.folder)
        machine = Machine(self.device_type, self.dtype, self.process_bytes)
        return estimate_memory(self.config, self.counted[key], shape or self.shape, machine)


def shapes_of_records(
    path: Path, read: Callable[[], Iterable[tuple[int, Record]]], tokenizer: ChatTokenizer
) -> Callable[[Config], BatchShape]:
    """`Setup.shape_of` for the records of a file, which `read` gives, rendered and truncated as in training."""
    examples: dict[int, tuple[TokenStore, ClassificationPrompt]] = {}
    shapes: dict[str, BatchShape] = {}

    def shape_of(config: Config) -> BatchShape:
        length = config.data.max_length
        if length not in examples:
            prompt = build_prompt(config, tokenizer)
            examples[length] = build_store(Encoder(prompt, str(path), read, config.data.overlong)), prompt
        key = repr((config.data, config.train))
        if key not in shapes:
            store, prompt = examples[length]
            words = prompt.scored_ids if (store.labels >= 0).all() else ()
            shapes[key] = largest_batch(config, store, words=words)
        return shapes[key]

    return shape_of


def largest_that_fits(fits: Callable[[int], bool], most: int = MOST) -> int:
    """The largest number up to `most` that fits, 0 if 1 does not; `fits` must be monotonic."""
    return bisect.bisect_left(range(1, most + 1), True, key=lambda number: not fits(number))


def largest_batch_size(setup: Setup, budget_bytes: int, most: int = MOST) -> int:
    """The largest train.per_device_train_batch_size that fits without train.max_tokens_per_micro_batch."""

    def fits(size: int) -> bool:
        tried = setup.with_keys([f"train.per_device_train_batch_size={size}", f"{TOKENS_KEY}=null"])
        return tried.total_bytes <= budget_bytes

    return largest_that_fits(fits, most)


def largest_micro_batch(setup: Setup, budget_bytes: int) -> int:
    """The largest train.max_tokens_per_micro_batch that fits, rounded as micro-batches are; 0 for none.

    The supervised positions are assumed to grow with it; a longer example is a micro-batch of its own.
    """
    own = setup.shape
    # Scoring is not capped then: wherever the adapter is scored later, it has the same passes.
    is_auto = setup.config.train.max_tokens_per_micro_batch == "auto"

    def fits(tokens: int) -> bool:
        tokens = max(tokens, own.longest)
        supervised = -(-own.supervised_positions * tokens // own.tokens)
        shape = replace(own, tokens=round_up_tokens(tokens), supervised_positions=supervised)
        limit = "auto" if is_auto else max(tokens, SHORTEST_TOKENS)
        return setup.with_keys([f"{TOKENS_KEY}={limit}"]).estimate(shape).total_bytes <= budget_bytes

    tokens = largest_that_fits(fits)
    if tokens <= own.longest:
        return round_up_tokens(own.longest) if tokens else 0
    step = 1 << max(tokens.bit_length() - 5, 0)
    return tokens // step * step  # rounded down as `round_up_tokens` rounds up


def resolve_token_limit(
    config: Config,
    model_folder: Path,
    examples: TokenStore,
    device: torch.device,
    ranks: int = 1,
    words: Sequence[Sequence[int]] = (),
) -> int | None:
    """What train.max_tokens_per_micro_batch=auto is on this device: what fits a GPU's free memory; None on a CPU.

    A tenth stays free, for the holes in what PyTorch's allocator has. What that has now, of an earlier run of a sweep
    with its base model, is free for this run.
    """
    if config.train.max_tokens_per_micro_batch != "auto" or device.type != "cuda":
        return None
    free_bytes = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    shape_of = partial(largest_batch, examples=examples, ranks=ranks, words=words)
    setup = Setup(config, read_config(model_folder), shape_of, "cuda", process_bytes=None, folder=model_folder)
    return max(largest_micro_batch(setup, free_bytes * 9 // 10), SHORTEST_TOKENS)


def longest_example(setup: Setup, budget_bytes: int) -> int:
    """Tokens of the longest example that fits as a micro-batch of its own; at most LONGEST_TOKENS."""

    def fits(tokens: int) -> bool:
        inputs = max(tokens - 1, 1)
        return setup.estimate(BatchShape(round_up_tokens(inputs), ANSWER_TOKENS, inputs)).total_bytes <= budget_bytes

    return largest_that_fits(fits, LONGEST_TOKENS)


@dataclass(frozen=True)
class Option:
    """A change of the configuration that takes less memory."""

    keys: tuple[str, ...]  # as `section.key=value`; the last one names the option
    cost: str  # as text
    total_bytes: int  # of the run with only this option


def list_options(setup: Setup) -> list[Option]:
    """The options that save memory, the cheapest first."""
    checkpointing, offload = "train.gradient_checkpointing=true", "train.offload_checkpoints=true"
    paged = "train.optim=paged_adamw_8bit"
    one_example = max(round_up_tokens(setup.shape.longest), SHORTEST_TOKENS)
    known = [
        ((f"{TOKENS_KEY}={one_example}",), "the same steps; below some 500 tokens each token takes longer"),
        (("model.cache_dequantized=false",), "weights are dequantised at every use"),
        ((checkpointing,), "a third more computation"),
        ((checkpointing, offload), "with gradient_checkpointing: a third more computation, and copies over the bus"),
        (("model.double_quantization=true",), "scales of the 4 bits are rounded to 8"),
        (("train.optim=adamw_bnb_8bit",), "moments are rounded to 8 bits"),
        ((paged,), "moments are rounded to 8 bits; slower steps where the GPU is full"),
        (("model.compute_dtype=bfloat16",), "activations are rounded to 8 bits of precision"),
        (("model.double_quantization=true", "model.quantization=nf4"), "weights are rounded to 4 bits"),
        ((f"lora.r={max(setup.config.lora.r // 2, 1)}",), "a smaller adapter"),
        (("lora.target_modules=[q_proj,k_proj,v_proj,o_proj]",), "no adapter in the MLPs"),
        ((f"data.max_length={max((setup.shape.longest + 1) // 2, SHORTEST_TOKENS)}",), "longer examples are truncated"),
    ]
    options = []
    for keys, cost in known:
        if setup.device_type == "cpu" and keys[-1] in (offload, paged):
            continue
        if keys[-1] == "model.quantization=nf4" and setup.config.model.quantization != "none":
            continue
        try:
            total_bytes = setup.with_keys(keys).total_bytes
        except UserError:  # the prompt leaves no room for a text in half the length
            continue
        if total_bytes < setup.total_bytes:
            options.append(Option(keys, cost, total_bytes))
    return options


def merge_keys(options: Sequence[Option]) -> list[str]:
    """The keys of several options; where two set the same key, the later one counts."""
    return [f"{key}={value}" for key, value in dict(k.split("=", 1) for o in options for k in o.keys).items()]


def cheapest_that_fits(setup: Setup, options: Sequence[Option], budget_bytes: int) -> list[str] | None:
    """The keys of the cheapest combination of `options` (cheapest first) that fits, None where all of them do not."""

    def fits(chosen: Sequence[Option]) -> bool:
        return setup.with_keys(merge_keys(chosen)).total_bytes <= budget_bytes

    chosen = list(options)
    if not fits(chosen):
        return None
    for option in reversed(options):
        fewer = [other for other in chosen if other is not option]
        if fits(fewer):
            chosen = fewer
    keys = merge_keys(chosen)
    if any(key.startswith(f"{TOKENS_KEY}=") for key in keys):  # no smaller than necessary
        others = [key for key in keys if not key.startswith(f"{TOKENS_KEY}=")]
        tokens = largest_micro_batch(setup.with_keys([*others, f"{TOKENS_KEY}=null"]), budget_bytes)
        keys = [f"{TOKENS_KEY}={max(tokens, 16)}", *others]
    return keys


def least_memory_estimate(setup: Setup) -> MemoryEstimate:
    """With all options."""
    return setup.with_keys(merge_keys(list_options(setup))).estimate()


def advise(setup: Setup, budget_bytes: int, num_examples: int = MOST) -> dict[str, Any]:
    """What fits `budget_bytes`, as --json prints it; `num_examples`, of the data, bounds the batch size.

    What is the largest that fits is 0 where nothing does. `knobs` begin with the option that saves most. `combination`
    are the keys that make it fit, None where nothing does; then `fitting_sizes` are those that do with all options, as
    `least_bytes` is with all options.
    """
    total, options = setup.total_bytes, list_options(setup)
    combination = [] if total <= budget_bytes else cheapest_that_fits(setup, options, budget_bytes)
    shown, smaller = list(options), next_smaller(setup.architecture)
    if smaller is not None:
        key = f"model.name_or_path={hub_name(smaller)}"
        shown.append(Option((key,), "a less able model", setup.with_size(smaller).total_bytes))
    least = least_memory_estimate(setup)
    sizes = [] if combination is not None else SIZES
    return {
        "model": setup.config.model.name_or_path,
        "device": setup.device_type,
        "budget_bytes": budget_bytes,
        "ledger": setup.estimate().parts,
        "total_bytes": total,
        "fits": total <= budget_bytes,
        "per_device_train_batch_size": largest_batch_size(setup, budget_bytes, num_examples),
        "max_tokens_per_micro_batch": largest_micro_batch(setup, budget_bytes),
        "longest_example_tokens": longest_example(setup, budget_bytes),
        "knobs": [
            {"keys": o.keys, "total_bytes": o.total_bytes, "saves_bytes": total - o.total_bytes, "costs": o.cost}
            for o in sorted(shown, key=lambda option: option.total_bytes)
        ],
        "combination": combination,
        "least_bytes": least.total_bytes,
        "least_weight_bytes": least.weight_bytes,
        "fitting_sizes": [s for s in sizes if least_memory_estimate(setup.with_size(s)).total_bytes <= budget_bytes],
    }


def train_command(config_path: str, overrides: Sequence[str], keys: Sequence[str]) -> str:
    """A command line for a shell: configuration file, overrides, and `keys` that replace them."""
    merged = dict(key.split("=", 1) for key in [*overrides, *keys])
    words = [f"{key}={value}" for key, value in merged.items()]
    return shlex.join(["python", "scripts/train.py", "--config", config_path, *words])
