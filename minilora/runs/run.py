"""A run's objects and its state, what is due in it, and the micro-batches of its steps.

Which training examples a step takes is a function of (seed, step), so any step's micro-batches can be made on their
own (`batches`).
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minilora.adapters.peft_config import BaseModel
from minilora.build import choose_dtype
from minilora.config import Config, LoraConfig
from minilora.data.examples import Examples, lacking_classes
from minilora.data.sampler import epoch_order, split_across_ranks, split_into_micro_batches
from minilora.evaluation.score import Scores
from minilora.planning.memory import BatchShape, MemoryEstimate
from minilora.planning.plan import estimate_run_memory, examples_per_step, largest_batch
from minilora.qlora.batch import MicroBatch, pack
from minilora.qlora.lora import DropoutSeed
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.optim import Optimizer, lr_at
from minilora.qlora.prompt import ClassificationPrompt, Example
from minilora.qlora.step import StepSettings, TrainState
from minilora.runs.checkpoint import RunState
from minilora.runs.trackers import Tracker
from minilora.system.distributed import Ranks


@dataclass(frozen=True)
class StepBatch:
    """The training examples of one optimizer step."""

    settings: StepSettings
    examples: list[Example]  # of all ranks
    micro_batches: list[MicroBatch]  # this rank's, on its device
    split: Examples  # that they are from
    indices: Sequence[int]  # of the examples in it

    @property
    def records(self) -> list[str]:
        """Where each of the examples is from, file and line."""
        return [self.split.records[index].where for index in self.indices]


@dataclass
class Run:
    """A run's objects, and its state."""

    config: Config
    directory: Path  # the output folder
    device: torch.device
    process_bytes: int | None  # what the process took before anything was loaded; None where it cannot be measured
    prompt: ClassificationPrompt
    splits: dict[str, Examples]
    model: Qwen2ForCausalLM
    dropout_seed: DropoutSeed
    optimizer: Optimizer
    scaler: torch.amp.GradScaler | None
    ranks: Ranks
    state: RunState  # as of now
    saved: RunState = field(init=False)  # the newest that is in a checkpoint, or that no checkpoint can have
    class_weights: dict[str, float] = field(default_factory=dict)  # of each label word in the loss; none: all 1
    scoring: str | None = None  # the split that is being scored
    validated: dict[int, Scores] = field(default_factory=dict)  # of the last and the best validation, by step
    tracker: Tracker = field(default_factory=Tracker)  # gets the log's entries; on rank 0

    def __post_init__(self) -> None:
        self.saved = self.state

    @property
    def adapter(self) -> tuple[LoraConfig, BaseModel]:
        """What adapter_config.json names: the adapter and its base model."""
        return self.config.lora, BaseModel(self.config.model.name_or_path, self.config.model.revision)

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def final(self) -> Path:
        return self.checkpoints / "final"

    @property
    def resolved_config(self) -> Config:
        """With what train.max_tokens_per_micro_batch=auto was resolved to."""
        return self.config.with_token_limit(self.state.auto_tokens)

    @property
    def batch_shape(self) -> BatchShape:
        """The shape of the largest micro-batch."""
        train = self.splits["train"]
        words = self.prompt.scored_ids if train.labelled else ()
        return largest_batch(self.resolved_config, train.examples, self.ranks.size, words)

    @property
    def memory_estimate(self) -> MemoryEstimate:
        """What each rank takes, by part."""
        folder, shape = self.prompt.tokenizer.folder, self.batch_shape
        dtype, config = choose_dtype(self.config, self.device), self.resolved_config
        return estimate_run_memory(config, folder, shape, dtype=dtype, process_bytes=self.process_bytes)

    def weights_of(self, examples: Sequence[Example]) -> list[float]:
        """Of each example's supervised tokens in the loss, as train.class_weights has it; none: 1."""
        words = enumerate(self.prompt.labels)
        by_class: dict[int | None, float] = {i: self.class_weights[w] for i, w in words if w in self.class_weights}
        return [by_class[example.label] for example in examples] if by_class else []

    @property
    def train_state(self) -> TrainState:
        """What an optimizer step changes."""
        return TrainState(self.model, self.optimizer, self.dropout_seed, scaler=self.scaler, ranks=self.ranks)

    @property
    def samples_per_rank(self) -> int:
        """Most training examples that one rank has in an optimizer step."""
        return examples_per_step(self.config, 1)

    @property
    def samples_per_step(self) -> int:
        """Training examples of a full optimizer step, of all ranks."""
        return examples_per_step(self.config, self.ranks.size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data; the last one may be short."""
        return math.ceil(len(self.splits["train"].examples) / self.samples_per_step)

    @property
    def total_steps(self) -> int:
        train = self.config.train
        return train.max_steps or train.num_train_epochs * self.steps_per_epoch

    @property
    def best_by(self) -> str:
        """The metric that decides which checkpoint is best: F1 for labelled data unless the user chose."""
        chosen = self.config.train.metric_for_best_model
        has_f1 = self.splits["validation"].labelled and not self.lacks_a_class_for_f1
        return ("eval_f1" if has_f1 else "eval_loss") if chosen == "auto" else chosen

    @property
    def lacks_a_class_for_f1(self) -> bool:
        """Whether F1 would decide, but may be 1 from the first validation on, because no example is of some class."""
        is_open = self.config.train.metric_for_best_model == "auto"
        return is_open and bool(lacking_classes({"validation": self.splits["validation"]}, self.prompt.labels))

    @property
    def has_stalled(self) -> bool:
        """Whether `early_stopping_patience` validations in a row were no better."""
        patience = self.config.train.early_stopping_patience
        return patience is not None and self.state.evals_without_improvement >= patience

    @property
    def logged_steps(self) -> int:
        """Steps whose entry the log has: not one that is pending."""
        return self.state.step - (self.state.pending_entry is not None)

    @property
    def is_at_the_end(self) -> bool:
        return self.state.step >= self.total_steps

    @property
    def is_done(self) -> bool:
        """Whether neither a step nor a pending entry is left."""
        return self.state.pending_entry is None and (self.is_at_the_end or self.has_stalled)

    @property
    def is_validation_due(self) -> bool:
        """Every `eval_steps` and at the end."""
        step = self.state.step
        is_due = step % self.config.train.eval_steps == 0 or self.is_at_the_end
        return is_due and step != self.state.validated_step

    def is_logging_due(self, entry: dict[str, Any]) -> bool:
        """Every `logging_steps`, and where there is a validation or a skipped step to log."""
        return entry["step"] % self.config.train.logging_steps == 0 or "eval_loss" in entry or "skipped" in entry

    @property
    def is_save_due(self) -> bool:
        """Every `save_steps`, or at the first step after them that was not skipped; and at the end."""
        every, step = self.config.train.save_steps, self.state.step
        is_due = step // every > self.saved.step // every and not self.state.skipped_in_a_row
        return is_due or self.is_at_the_end or self.has_stalled


def batches(run: Run, step: int) -> StepBatch:
    """The examples of optimizer step `step`, a function of (seed, step), and this rank's micro-batches of them."""
    train, split = run.resolved_config.train, run.splits["train"]
    epoch, index = divmod(step - 1, run.steps_per_epoch)
    order = epoch_order(len(split.examples), train.seed, epoch)
    chosen = order[index * run.samples_per_step : (index + 1) * run.samples_per_step]
    examples = [split.examples[i] for i in chosen]
    own = split_across_ranks(examples, run.ranks.size, run.samples_per_rank)[run.ranks.rank]
    parts = split_into_micro_batches(own, train.per_device_train_batch_size, train.token_limit)
    peak, schedule, warmup = train.learning_rate, train.lr_scheduler_type, train.warmup_ratio
    settings = StepSettings(
        step=step,
        learning_rate=lr_at(step, run.total_steps, peak=peak, schedule=schedule, warmup_ratio=warmup),
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        total_weight=_total_weight(examples, run.weights_of(examples)),
    )
    packed = [pack(part, weights=run.weights_of(part)).to(run.device) for part in parts]
    return StepBatch(settings, examples, packed, split=split, indices=chosen)


def _total_weight(examples: Sequence[Example], weights: Sequence[float]) -> float:
    """Of all supervised tokens, which without weights is their number: whatever the cut, the same bits."""
    counts = [sum(example.supervised) for example in examples]
    return math.fsum(map(operator.mul, weights, counts)) if weights else sum(counts)
