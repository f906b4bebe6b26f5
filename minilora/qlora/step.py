"""One optimizer step: micro-batches -> loss -> gradient -> clip -> update.

    loss = sum of w nll / sum of w, both over the supervised tokens of all micro-batches; w = 1 without weights

The division is by the whole step's sum, before the first backward pass. Dividing each micro-batch by its own and
averaging, as other trainers did or do, weighs a token by the company it keeps: the same 16 examples then train
differently as 1 x 16 and as 4 x 4.

All of them means those of all ranks (`distributed.py`), which sum their gradients before the clipping. So every rank
judges and updates by the same bits, one that has no micro-batch as well.

A step whose loss or gradient is NaN or infinite changes nothing: one bad row would otherwise be in every weight, and in
AdamW's moments for good. With float16 it is how the loss scale is found.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch

from minilora.qlora.batch import MicroBatch
from minilora.qlora.lora import DropoutSeed, cast_once
from minilora.qlora.loss import next_token_nll
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.optim import Optimizer, parameters_of, set_rate
from minilora.system.distributed import SINGLE_RANK, Ranks


@dataclass
class TrainState:
    """What training changes, and the ranks that change it together."""

    model: Qwen2ForCausalLM  # in training mode, adapter attached
    optimizer: Optimizer  # over the adapter
    dropout_seed: DropoutSeed  # the model's, set before each micro-batch
    scaler: torch.amp.GradScaler | None = None  # for float16, whose small gradients would become zero
    ranks: Ranks = SINGLE_RANK


@dataclass(frozen=True)
class StepSettings:
    """What one optimizer step is told."""

    step: int  # its number, from 1
    learning_rate: float
    max_grad_norm: float = 1.0  # the gradient is scaled down to this global norm; 0 leaves it alone
    seed: int = 0  # of the run, for dropout
    total_weight: float | None = None  # of the supervised tokens of all ranks; None: of this rank's micro-batches


@dataclass(frozen=True)
class StepResult:
    """What one step did."""

    loss: float  # (weighted) mean negative log-likelihood of the supervised tokens, in nats, over all ranks
    grad_norm: float  # global norm of the gradient before clipping
    updated: bool  # False where loss or gradient was NaN or infinite: weights and moments are what they were


def train_step(
    state: TrainState,
    micro_batches: Sequence[MicroBatch],
    settings: StepSettings,
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> StepResult:
    """Moves the adapter by one optimizer step over this rank's micro-batches, of which there may be none.

    `interruptible` is entered around the work that may be thrown away: an exception in it leaves weights and moments
    as they were.
    """
    model, optimizer, ranks = state.model, state.optimizer, state.ranks
    scaler = state.scaler or torch.amp.GradScaler(enabled=False)  # which changes nothing
    total_weight = settings.total_weight
    if total_weight is None:
        total_weight = sum(b.num_supervised if b.weights is None else b.weights.sum().item() for b in micro_batches)
    total = torch.zeros((), device=model.head_weight.device)
    parameters = parameters_of(optimizer)
    try:
        with ranks.barrier(), interruptible(), cast_once(model, model.head_weight.dtype):
            for index, batch in enumerate(micro_batches):
                state.dropout_seed.set(settings.seed, settings.step, index * ranks.size + ranks.rank)
                nll, _ = next_token_nll(model(batch), batch.targets, model.head_weight, batch.weights)
                loss = nll / total_weight
                scaler.scale(loss).backward()
                total += loss.detach()

        total = ranks.all_reduce_gradients(parameters, total)
        scaler.scale(total)  # the first call makes the scale, and a rank without a micro-batch has made none yet
        scaler.unscale_(cast(torch.optim.Optimizer, optimizer))
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm or torch.inf, foreach=True)
        loss_value, grad_norm = total.item(), norm.item()  # the step's only wait for the device
        updated = math.isfinite(loss_value) and math.isfinite(grad_norm)
        set_rate(optimizer, settings.learning_rate)
        if updated:
            scaler.step(cast(torch.optim.Optimizer, optimizer))
        scaler.update()
    finally:
        optimizer.zero_grad()
    return StepResult(loss_value, grad_norm, updated)
