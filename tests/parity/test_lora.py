"""Every LoRA gradient and twenty AdamW steps equal peft's over transformers, which uses autograd throughout."""

from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import pytest
import torch

from minilora.adapters.attach import attach, parameter_groups
from minilora.adapters.optimizers import build_optimizer
from minilora.config import LoraConfig
from minilora.qlora.batch import pack
from minilora.qlora.lora import DropoutSeed
from minilora.qlora.loss import next_token_nll
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.optim import AdamWSettings, lr_at
from minilora.qlora.prompt import Example
from minilora.qlora.step import StepSettings, TrainState, train_step
from minilora.weights.load import load_model
from tests.parity.reference import (
    load_reference,
    our_tensors,
    peft_tensors,
    randomize_adapter,
    reference_loss,
    wrap_with_peft,
)

pytestmark = pytest.mark.parity

# A gradient is a sum over some hundred float32 rows, added here in another order than there (packed rows against
# padded sequences, formulas by hand against autograd): 2^-24 * sqrt(number of additions on the way, about 1e4).
GRADIENT_RTOL = 1e-5

ALL_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Length of the difference over the length of the reference, for one whole matrix."""
    return ((ours - reference).norm() / reference.norm()).item()


def worst_gradient(ours: Qwen2ForCausalLM, reference: peft.PeftModel) -> float:
    """Largest relative error of all gradients, none of which may be missing or zero."""
    mine, theirs = our_tensors(ours), peft_tensors(reference)
    assert mine.keys() == theirs.keys()
    errors = {}
    for name, tensor in mine.items():
        expected = theirs[name].grad
        assert tensor.grad is not None
        assert expected is not None
        assert expected.norm() > 0
        errors[name] = relative_error(tensor.grad, expected)
    return max(errors.values())


def backward_ours(model: Qwen2ForCausalLM, examples: Sequence[Example], share_prefix: bool = True) -> float:
    batch = pack(examples, share_prefix)
    nll, count = next_token_nll(model.train()(batch), batch.targets, model.head_weight)
    loss = nll / count
    loss.backward()
    return loss.item()


def build_pair(
    folder: Path,
    quantization: str = "none",
    targets: str | list[str] = "all-linear",
    use_rslora: bool = False,
    seed: int = 0,
) -> tuple[Qwen2ForCausalLM, peft.PeftModel]:
    """The same base with the same adapter, here and in peft."""
    ours = load_model(folder, torch.float32, quantization)
    attach(ours, LoraConfig(r=4, alpha=12, dropout=0, target_modules=targets, use_rslora=use_rslora), seed=seed)
    randomize_adapter(ours, seed)
    reference = wrap_with_peft(
        load_reference(folder, nf4=quantization == "nf4"),
        our_tensors(ours),
        r=4,
        lora_alpha=12,
        target_modules=targets,
        use_rslora=use_rslora,
    )
    return ours, reference


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (4, 1), (4, 4)])
def test_every_gradient_equals_pefts(
    reference_checkpoint: Callable[..., Path],
    examples: list[Example],
    quantization: str,
    tie: bool,
    heads: int,
    kv_heads: int,
) -> None:
    folder = reference_checkpoint(tie=tie, heads=heads, kv_heads=kv_heads)
    ours, reference = build_pair(folder, quantization)
    loss = reference_loss(reference, examples)
    loss.backward()
    assert backward_ours(ours, examples) == pytest.approx(loss.item(), rel=GRADIENT_RTOL)
    assert len(our_tensors(ours)) == 2 * 7 * 2
    assert worst_gradient(ours, reference) < GRADIENT_RTOL


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "v_proj"], ALL_NAMES, ["layers.1.mlp.up_proj"], r"model\.layers\.\d+\.self_attn\.[ko]_proj"],
    ids=["two names", "seven names", "one path", "expression"],
)
@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
def test_gradients_equal_for_every_kind_of_target_and_scaling(
    reference_checkpoint: Callable[..., Path], examples: list[Example], targets: str | list[str], use_rslora: bool
) -> None:
    ours, reference = build_pair(reference_checkpoint(), targets=targets, use_rslora=use_rslora)
    reference_loss(reference, examples).backward()
    backward_ours(ours, examples)
    assert worst_gradient(ours, reference) < GRADIENT_RTOL


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_checkpointed_gradients_equal_pefts(
    reference_checkpoint: Callable[..., Path], examples: list[Example], quantization: str
) -> None:
    ours, reference = build_pair(reference_checkpoint(), quantization)
    ours.model.gradient_checkpointing = True
    reference_loss(reference, examples).backward()
    backward_ours(ours, examples)
    assert worst_gradient(ours, reference) < GRADIENT_RTOL


@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared prefix", "own prefix"])
def test_sharing_the_prefix_keeps_pefts_gradients(
    reference_checkpoint: Callable[..., Path], examples: list[Example], share_prefix: bool
) -> None:
    ours, reference = build_pair(reference_checkpoint())
    reference_loss(reference, examples).backward()
    backward_ours(ours, examples, share_prefix)
    assert worst_gradient(ours, reference) < GRADIENT_RTOL


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_twenty_adamw_steps_follow_pefts_loss_curve(
    reference_checkpoint: Callable[..., Path], examples: list[Example], quantization: str
) -> None:
    """Ours cuts each step into two micro-batches of unequal length; the loop over peft takes it whole."""
    steps, peak, weight_decay, max_norm = 20, 5e-3, 0.01, 1.0
    ours, reference = build_pair(reference_checkpoint(), quantization)
    optimizer = build_optimizer(parameter_groups(ours), AdamWSettings(weight_decay=weight_decay))
    ours.train()

    parameters = list(peft_tensors(reference).values())
    reference_optimizer = torch.optim.AdamW(parameters, weight_decay=weight_decay)
    curve, expected = [], []
    largest_norm = 0.0
    for step in range(1, steps + 1):
        chosen = [examples[(step + offset) % len(examples)] for offset in range(4)]
        rate = lr_at(step, steps, peak=peak, warmup_ratio=0.1)
        micro_batches = [pack(chosen[:1]), pack(chosen[1:])]
        result = train_step(
            TrainState(ours, optimizer, DropoutSeed()), micro_batches, StepSettings(step, rate, max_norm)
        )
        curve.append(result.loss)
        largest_norm = max(largest_norm, result.grad_norm)

        for group in reference_optimizer.param_groups:
            group["lr"] = rate
        loss = reference_loss(reference, chosen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        reference_optimizer.step()
        reference_optimizer.zero_grad()
        expected.append(loss.item())
    assert largest_norm > max_norm  # clipping took part
    assert curve[-1] < 0.2 * curve[0]
    # Rounding of every step's gradient moves the next ones; what is measured is 1e-6, and AdamW with the rate of
    # the step before, or a mean of the micro-batches' means, is off by more than 1e-2.
    assert curve == pytest.approx(expected, rel=1e-5)
    for name, tensor in our_tensors(ours).items():
        assert relative_error(tensor, peft_tensors(reference)[name]) < 1e-5
