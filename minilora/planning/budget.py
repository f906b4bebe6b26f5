"""A budget of memory in, what fits it out: the largest micro-batches, and the knobs that would help most.

Every answer asks the memory estimate (`plan.estimate_config_memory`). It only grows with the tokens of a micro-batch,
so the most that fits is found by halving an interval, exactly. Where real examples are cut into micro-batches, a larger
batch size may by luck make a smaller largest micro-batch: what is found fits then, and one more does not.

The knobs stand in the order of what they cost: first those that leave the result as it is, by the time they take, then
those that change it. A combination is found from the other end. All knobs are turned, and then turned back, the dearest
first, wherever the budget allows it: so nothing is paid for that a cheaper knob would do.
"""

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from minilora.build import DTYPES, build_examples, build_prompt, choose_dtype
from minilora.config import Config, config_from_dict
from minilora.data.records import Record
from minilora.errors import UserError
from minilora.planning.memory import MemoryEstimate, ParameterCounts
from minilora.planning.plan import (
    ANSWER_TOKENS,
    BatchShape,
    count_config,
    estimate_config_memory,
    largest_batch,
    uniform_batch,
)
from minilora.planning.sizes import LONGEST, SIZES, hub_name, next_smaller
from minilora.qlora.batch import round_up_tokens
from minilora.qlora.model import Qwen2Config
from minilora.qlora.prompt import ChatTokenizer, Example

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
ROWS = "train.max_tokens_per_micro_batch"
MOST = 1 << 24  # rows or examples: beyond any budget


def read_bytes(text: str, where: str) -> int:
    """The bytes in "12GB", "24564 MiB" or "8e9": GB are 10^9, GiB 2^30.

    Raises:
        UserError: it is no amount of memory.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in UNITS or not 0 < float(match[1]) < 1e15:
        raise UserError(f"{where}: got {text!r}, expected an amount of memory, such as 12GB, 24564MiB or 0.5GB")
    return round(float(match[1]) * UNITS[match[2]])


@dataclass(frozen=True)
class Setup:
    """A configuration on a model, and the examples that it trains on: what the ledger asks for.

    Attributes:
        config: of the run.
        architecture: of the model.
        shape_of: the micro-batches that the examples make under a configuration.
        device_type: "cpu" or "cuda".
        process_bytes: see `estimate_memory`.
        folder: with the model's weights, where they are at hand.
        counted: numbers of a model by itself and its adapter, once they are known; it takes a while.
    """

    config: Config
    architecture: Qwen2Config
    shape_of: Callable[[Config], BatchShape]
    device_type: str
    process_bytes: int | None
    folder: Path | None = None
    counted: dict[tuple[Any, ...], ParameterCounts] = field(default_factory=dict)

    def with_keys(self, keys: Sequence[str]) -> "Setup":
        """The same with other `section.key=value`."""
        return replace(self, config=config_from_dict(self.config.to_dict(), keys, "the configuration"))

    def with_size(self, size: str) -> "Setup":
        """The same with another model."""
        return replace(self, architecture=SIZES[size], folder=None)

    @cached_property
    def shape(self) -> BatchShape:
        """Its micro-batches."""
        return self.shape_of(self.config)

    @cached_property
    def total_bytes(self) -> int:
        """What it takes in all."""
        return self.ledger().total_bytes

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; a GPU that is not here is taken to multiply bfloat16, as all since 2020 do."""
        if self.device_type == "cuda" and not torch.cuda.is_available():
            return DTYPES.get(self.config.model.compute_dtype, torch.bfloat16)
        return choose_dtype(self.config, torch.device(self.device_type))

    def ledger(self, shape: BatchShape | None = None) -> MemoryEstimate:
        """What it takes, with its own micro-batches or with others."""
        key = (self.architecture, self.folder, repr(self.config.lora))
        if key not in self.counted:
            self.counted[key] = count_config(self.config, self.architecture, self.folder)
        return estimate_config_memory(
            self.config, self.counted[key], shape or self.shape, self.dtype, self.device_type, self.process_bytes
        )


def uniform_shapes(config: Config) -> BatchShape:
    """`Setup.shape_of` where no data is at hand: every example is as long as data.max_length allows."""
    return uniform_batch(config, config.data.max_length)


def shapes_of_rows(rows: Sequence[Record], tokenizer: ChatTokenizer) -> Callable[[Config], BatchShape]:
    """`Setup.shape_of` for the records of a data file, rendered and cut as training does it."""
    examples: dict[int, list[Example]] = {}
    shapes: dict[str, BatchShape] = {}

    def shape_of(config: Config) -> BatchShape:
        length = config.data.max_length
        if length not in examples:
            examples[length] = build_examples(rows, build_prompt(config, tokenizer)).examples
        key = repr((config.data, config.train))
        if key not in shapes:
            shapes[key] = largest_batch(config, examples[length])
        return shapes[key]

    return shape_of


def largest_that_fits(fits: Callable[[int], bool], most: int = MOST) -> int:
    """The largest number up to `most` that fits, 0 if not even 1 does; whatever is larger than one that does not fit
    does not fit either."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_batch_size(setup: Setup, budget_bytes: int, most: int = MOST) -> int:
    """The largest train.per_device_train_batch_size whose micro-batches, not cut by rows, fit."""

    def fits(size: int) -> bool:
        tried = setup.with_keys([f"train.per_device_train_batch_size={size}", f"{ROWS}=null"])
        return tried.total_bytes <= budget_bytes

    return largest_that_fits(fits, most)


def largest_rows(setup: Setup, budget_bytes: int) -> int:
    """The largest train.max_tokens_per_micro_batch that fits, as a number of rows that micro-batches have; 0 for none.

    The supervised rows are taken to grow with it; an example that is longer has a micro-batch to itself.
    """
    own = setup.shape

    def fits(rows: int) -> bool:
        rows = max(rows, own.longest)
        supervised = -(-own.supervised_positions * rows // own.rows)
        return setup.ledger(BatchShape(round_up_tokens(rows), supervised, own.longest)).total_bytes <= budget_bytes

    rows = largest_that_fits(fits)
    if rows <= own.longest:
        return round_up_tokens(own.longest) if rows else 0
    step = 1 << max(rows.bit_length() - 5, 0)
    return rows // step * step  # rounded down as `round_up_tokens` rounds up


def longest_example(setup: Setup, budget_bytes: int) -> int:
    """Tokens of the longest example that fits with a micro-batch to itself; no more than the model was trained on."""

    def fits(tokens: int) -> bool:
        rows = max(tokens - 1, 1)
        return setup.ledger(BatchShape(round_up_tokens(rows), ANSWER_TOKENS, rows)).total_bytes <= budget_bytes

    return largest_that_fits(fits, LONGEST)


@dataclass(frozen=True)
class Knob:
    """A change that takes less memory.

    Attributes:
        keys: what to set, as `section.key=value`; the last is the one that names it.
        cost: what it costs, in words.
        total_bytes: what the run takes with it alone.
    """

    keys: tuple[str, ...]
    cost: str
    total_bytes: int


def list_knobs(setup: Setup) -> list[Knob]:
    """What takes less, the cheapest first."""
    checkpointing, offload = "train.gradient_checkpointing=true", "train.offload_checkpoints=true"
    paged = "train.optim=paged_adamw_8bit"
    alone = max(round_up_tokens(setup.shape.longest), 16)
    known = [
        ((f"{ROWS}={alone}",), "the same steps; from some 500 rows downwards each row takes longer"),
        (("model.cache_dequantized=false",), "weights are made from 4 bits at every use"),
        ((checkpointing,), "half as much work again"),
        ((checkpointing, offload), "with gradient_checkpointing: half as much work again, and copies over the bus"),
        (("model.double_quantization=true",), "scales of the 4 bits are rounded to 8"),
        (("train.optim=adamw_bnb_8bit",), "moments are rounded to 8 bits"),
        ((paged,), "moments are rounded to 8 bits; slower steps where the GPU is full"),
        (("model.compute_dtype=bfloat16",), "activations are rounded to 8 bits of precision"),
        (("model.double_quantization=true", "model.quantization=nf4"), "weights are rounded to 4 bits"),
        ((f"lora.r={max(setup.config.lora.r // 2, 1)}",), "a smaller adapter"),
        (("lora.target_modules=[q_proj,k_proj,v_proj,o_proj]",), "no adapter in the MLPs"),
        ((f"data.max_length={max((setup.shape.longest + 1) // 2, 16)}",), "longer examples are cut"),
    ]
    knobs = []
    for keys, cost in known:
        if setup.device_type == "cpu" and keys[-1] in (offload, paged):
            continue
        if keys[-1] == "model.quantization=nf4" and setup.config.model.quantization != "none":
            continue
        try:
            total_bytes = setup.with_keys(keys).total_bytes
        except UserError:  # no room for a review in half the length
            continue
        if total_bytes < setup.total_bytes:
            knobs.append(Knob(keys, cost, total_bytes))
    return knobs


def merge_keys(knobs: Sequence[Knob]) -> list[str]:
    """The keys of several knobs; of two values the dearer knob's stays."""
    return [f"{key}={value}" for key, value in dict(k.split("=", 1) for knob in knobs for k in knob.keys).items()]


def cheapest_that_fits(setup: Setup, knobs: Sequence[Knob], budget_bytes: int) -> list[str] | None:
    """The keys of the combination that costs least and fits, None where all knobs together do not fit.

    Args:
        setup: as it is.
        knobs: the cheapest first.
        budget_bytes: what there is.
    """

    def fits(chosen: Sequence[Knob]) -> bool:
        return setup.with_keys(merge_keys(chosen)).total_bytes <= budget_bytes

    chosen = list(knobs)
    if not fits(chosen):
        return None
    for knob in reversed(knobs):
        spared = [other for other in chosen if other is not knob]
        if fits(spared):
            chosen = spared
    keys = merge_keys(chosen)
    if any(key.startswith(f"{ROWS}=") for key in keys):  # no smaller than it has to be
        others = [key for key in keys if not key.startswith(f"{ROWS}=")]
        rows = largest_rows(setup.with_keys([*others, f"{ROWS}=null"]), budget_bytes)
        keys = [f"{ROWS}={max(rows, 16)}", *others]
    return keys


@dataclass(frozen=True)
class Advice:
    """All answers about a budget.

    Attributes:
        setup: what they are about.
        budget_bytes: what there is.
        batch_size: largest train.per_device_train_batch_size that fits; 0 for none.
        rows: largest train.max_tokens_per_micro_batch that fits; 0 for none.
        example_tokens: longest single example that fits; 0 for none.
        knobs: what would take less, that which saves most first.
        combination: keys that make it fit, none where it does already; None where nothing does.
        least: the ledger with all knobs at once.
        fitting_sizes: where this one does not fit in any way, those that do with all knobs at once.
    """

    setup: Setup
    budget_bytes: int
    batch_size: int
    rows: int
    example_tokens: int
    knobs: list[Knob]
    combination: list[str] | None
    least: MemoryEstimate
    fitting_sizes: list[str]

    @property
    def fits(self) -> bool:
        """Whether the configuration fits as it is."""
        return self.setup.total_bytes <= self.budget_bytes

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        total = self.setup.total_bytes
        return {
            "model": self.setup.config.model.name_or_path,
            "device": self.setup.device_type,
            "budget_bytes": self.budget_bytes,
            "ledger": self.setup.ledger().parts,
            "total_bytes": total,
            "fits": self.fits,
            "per_device_train_batch_size": self.batch_size,
            "max_tokens_per_micro_batch": self.rows,
            "longest_example_tokens": self.example_tokens,
            "knobs": [
                {"keys": k.keys, "total_bytes": k.total_bytes, "saves_bytes": total - k.total_bytes, "costs": k.cost}
                for k in self.knobs
            ],
            "combination": self.combination,
            "least_bytes": self.least.total_bytes,
            "least_weight_bytes": self.least.weight_bytes,
            "fitting_sizes": self.fitting_sizes,
        }


def least_memory_estimate(setup: Setup) -> MemoryEstimate:
    """The ledger with all knobs at once."""
    return setup.with_keys(merge_keys(list_knobs(setup))).ledger()


def advise(setup: Setup, budget_bytes: int, num_examples: int = MOST) -> Advice:
    """All answers.

    Args:
        setup: what they are about.
        budget_bytes: what there is.
        num_examples: of the data, more than which no batch can have.
    """
    knobs = list_knobs(setup)
    combination = [] if setup.total_bytes <= budget_bytes else cheapest_that_fits(setup, knobs, budget_bytes)
    shown = list(knobs)
    if (smaller := next_smaller(setup.architecture)) is not None:
        total = setup.with_size(smaller).total_bytes
        shown.append(Knob((f"model.name_or_path={hub_name(smaller)}",), "a less able model", total))
    return Advice(
        setup=setup,
        budget_bytes=budget_bytes,
        batch_size=largest_batch_size(setup, budget_bytes, num_examples),
        rows=largest_rows(setup, budget_bytes),
        example_tokens=longest_example(setup, budget_bytes),
        knobs=sorted(shown, key=lambda knob: knob.total_bytes),
        combination=combination,
        least=least_memory_estimate(setup),
        fitting_sizes=[]
        if combination is not None
        else [s for s in SIZES if least_memory_estimate(setup.with_size(s)).total_bytes <= budget_bytes],
    )


def train_command(config_path: str, overrides: Sequence[str], keys: Sequence[str]) -> str:
    """A command line for a shell: the configuration, what was asked for beside it, and what makes it fit."""
    merged = dict(key.split("=", 1) for key in [*overrides, *keys])
    words = [f"{key}={value}" for key, value in merged.items()]
    return shlex.join(["python", "scripts/train.py", "--config", config_path, *words])
