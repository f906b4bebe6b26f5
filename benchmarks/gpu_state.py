"""The stages "tests", "state" and "resume" of `gpu_check.py`: what must be equal to the bit, and what must continue.

Gradients are computed twice, with and without checkpointing, offloading and dropout; every optimizer is saved and
restored in the middle; float16 has to find its loss scale; a step may wait for the device as often as its docstring
says. The stage "resume" stops `scripts/train.py` by a signal and runs it again.
"""

import copy
import hashlib
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_stage import (
    NOT_ON_CPU,
    ROOT,
    Findings,
    Options,
    fill_adapter,
    largest,
    random_model,
    relative_error,
    review_examples,
    review_lengths,
    write_reviews,
)
from torch import nn

from minilora.adapters.attach import iter_lora_layers, lora_parameters, parameter_groups
from minilora.adapters.optimizers import BITSANDBYTES_OPTIMIZERS, build_optimizer
from minilora.config import LoraConfig
from minilora.qlora.batch import MicroBatch, pack
from minilora.qlora.loss import next_token_nll
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.nf4 import Linear4bit
from minilora.qlora.ops import DropoutMask
from minilora.qlora.step import StepSettings, TrainState, train_step

LAYERS = 4  # of a 0.5B: one layer's kernels are all layers' kernels
RATE = 1e-3
# Three are long enough for PyTorch's fused attention, behind a prefix that all of them send gradients to.
LENGTHS = (*review_lengths(5), 800, 850, 900)
# Of all gradients in float32, the norm of their difference from float64: ten times the limit of one operation, which
# two layers pass through some twenty of. A single tensor may be further off, where its gradient nearly cancels.
FLOAT32_LIMIT = 1e-4
MOST_WAITS = 2  # `step.py`: loss and norm are read at its end, one behind the other
MASK_SHARE = 0.002  # 448,000 draws: six standard deviations
FIRST_SCALE = 2.0**26  # of float16's loss: too large, so that it has to be found; each step that overflows halves it
SCALE_STEPS = 24
INTERRUPTED = 128 + signal.SIGTERM


def run_tests(options: Options, findings: Findings) -> None:
    """The repository's own tests that are marked gpu."""
    name = "pytest -m gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "tests"], cwd=ROOT, capture_output=True, text=True)
    if "No module named pytest" in done.stderr:
        findings.skip(name, "pytest is not installed; pip install -e '.[test]'")
        return
    found = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout[-400:])}
    passed = done.returncode == 0 and (found.get("passed", 0) > 0 or not options.is_gpu)
    findings.check(name, passed, (done.stdout + done.stderr)[-1500:] if not passed else None, **found)


# ---- State


def check_state(options: Options, findings: Findings) -> None:
    """The whole stage."""
    batch = pack(review_examples(LENGTHS, options.sizes("0.5B").vocab_size))
    on_device = batch.to(torch.device(options.device))
    with findings.attempt("dropout masks"):
        check_masks(options, findings)
    for dropout in (0.0, 0.05):
        with findings.attempt(f"gradients, dropout {dropout}"):
            check_repeats(options, findings, on_device, dropout)
    for use_dora in (False, True):
        with findings.attempt("whole model beside float64"):
            check_whole_model(options, findings, batch, use_dora)
    for optim in ("adamw_torch_fused", *BITSANDBYTES_OPTIMIZERS):
        with findings.attempt(f"{optim} resumes to the bit"):
            check_optimizer_resumes(options, findings, on_device, optim)
    with findings.attempt("float16 finds its loss scale"):
        check_float16(options, findings, on_device)
    with findings.attempt("waits for the device in a step"):
        check_waits(options, findings, batch)


def check_masks(options: Options, findings: Findings) -> None:
    """The same masks as on a CPU, so that a run may move, with the right share of zeros."""
    mask, shape = DropoutMask(0.05, seed=1234567), torch.Size((500, 896))
    found = mask.draw(shape, torch.device(options.device)).cpu()
    share = found.double().mean().item()
    same = torch.equal(found, mask.draw(shape, torch.device("cpu")))
    findings.check("dropout masks as on a CPU, 5 % of zeros", same and abs(share - 0.05) < MASK_SHARE, share=share)


def check_repeats(options: Options, findings: Findings, batch: MicroBatch, dropout: float) -> None:
    """The same gradients twice, and with what saves memory: all equal to the bit."""
    model, seed = _model(options, LoraConfig(dropout=dropout))
    fill_adapter(model)

    def gradients(checkpointing: bool = False, offload: bool = False) -> list[torch.Tensor]:
        model.model.gradient_checkpointing, model.model.offload_checkpoints = checkpointing, offload
        seed.set(0, 1, 0)
        return _gradients(model, batch)

    first = gradients()
    for name, found in (
        ("twice", gradients()),
        ("with checkpointing", gradients(checkpointing=True)),
        ("with checkpoints offloaded", gradients(checkpointing=True, offload=True)),
    ):
        different = sum(not torch.equal(a, b) for a, b in zip(first, found, strict=True))
        values = {"tensors": len(first), "different": different}
        findings.check(f"the same gradients {name}, dropout {dropout}", different == 0, **values)


def check_whole_model(options: Options, findings: Findings, batch: MicroBatch, use_dora: bool) -> None:
    """Loss and gradients of two layers in float32 and bfloat16 beside the same weights in float64 on the CPU."""
    lora = LoraConfig(dropout=0, use_dora=use_dora)
    name = f"gradients of two layers{' with DoRA' if use_dora else ''}"
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = random_model(options.sizes("0.5B", layers=2), options.device, dtype, lora)
        fill_adapter(model)
        found = _gradients(model, batch.to(torch.device(options.device)))
        exact = _gradients(in_float64(model), batch)
        errors = [relative_error(a, b) for a, b in zip(found, exact, strict=True)]
        total = relative_error(*(torch.cat([g.double().cpu().flatten() for g in gs]) for gs in (found, exact)))
        values = {"all_together": total, "worst_tensor": largest(errors)}
        if dtype == torch.float32:
            findings.check(f"{name}, float32", total < FLOAT32_LIMIT, **values)
        else:
            findings.figure(f"{name}, bfloat16", **values)


def in_float64(model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """A copy on the CPU whose frozen weights are dense, with the values that the 4 bits stand for."""
    exact = copy.deepcopy(model).to("cpu")
    for _, layer in iter_lora_layers(exact):
        base = layer.base
        if isinstance(base, Linear4bit):
            dense = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
            dense.weight = nn.Parameter(base.dense_weight(torch.float32), requires_grad=False)
            if base.bias is not None:
                dense.bias = nn.Parameter(base.bias, requires_grad=False)
            layer.base = dense
    return exact.double()


def check_optimizer_resumes(options: Options, findings: Findings, batch: MicroBatch, optim: str) -> None:
    """Four steps in one go, and two, a new optimizer with the saved state, and two."""
    ends = []
    for resumes in (False, True):
        model, seed = _model(options, LoraConfig(r=64, alpha=128, dropout=0))  # large enough for 8-bit, paged moments
        optimizer = build_optimizer(parameter_groups(model), optim=optim)
        for step in range(1, 5):
            if resumes and step == 3:
                saved = optimizer.tensors()
                optimizer = build_optimizer(parameter_groups(model), optim=optim)
                optimizer.load_tensors(saved)
            train_step(TrainState(model, optimizer, seed), [batch], StepSettings(step, RATE))
        ends.append([parameter.detach().clone() for parameter in lora_parameters(model)])
    different = sum(not torch.equal(a, b) for a, b in zip(*ends, strict=True))
    findings.check(f"{optim} resumes to the bit", different == 0, tensors=len(ends[0]), different=different)


def check_float16(options: Options, findings: Findings, batch: MicroBatch) -> None:
    """Training in float16: the scale falls until gradients fit, and then every step counts."""
    model, seed = _model(options, LoraConfig(dropout=0), torch.float16)
    optimizer = build_optimizer(parameter_groups(model))
    scaler = torch.amp.GradScaler(options.device, init_scale=FIRST_SCALE)
    state = TrainState(model, optimizer, seed, scaler)
    steps = [train_step(state, [batch], StepSettings(step, RATE)) for step in range(1, SCALE_STEPS + 1)]
    updated, losses = sum(step.updated for step in steps), [step.loss for step in steps]
    passed = not steps[0].updated and updated >= SCALE_STEPS // 2 and losses[-1] < losses[0]
    values = {"updated": updated, "steps": SCALE_STEPS, "scale": scaler.get_scale()}
    findings.check(
        "float16 finds its loss scale", passed, losses, **values, loss=f"{losses[0]:.3g} to {losses[-1]:.3g}"
    )


def check_waits(options: Options, findings: Findings, batch: MicroBatch) -> None:
    """How often a step makes the processor wait for the device, from packed examples on, and where."""
    name = "waits for the device in a step"
    if not options.is_gpu:
        findings.skip(name, NOT_ON_CPU)
        return
    model, seed = _model(options, LoraConfig())
    state = TrainState(model, build_optimizer(parameter_groups(model)), seed)

    def take_step(number: int) -> None:
        train_step(state, [batch.to(torch.device(options.device))], StepSettings(number, RATE))

    take_step(1)  # allocates the moments
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            take_step(2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    where = count_waits(caught)
    findings.check(name, where.total() <= MOST_WAITS, dict(where), waits=where.total())


def count_waits(caught: Sequence[warnings.WarningMessage]) -> Counter[str]:
    """How often each line waited; not the notice that the mode "does not yet detect all synchronizing operations"."""
    waits = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
    return Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in waits)


def _model(options: Options, lora: LoraConfig, dtype: torch.dtype = torch.bfloat16) -> tuple[Qwen2ForCausalLM, Any]:
    return random_model(options.sizes("0.5B", LAYERS), options.device, dtype, lora)


def _gradients(model: Qwen2ForCausalLM, batch: MicroBatch) -> list[torch.Tensor]:
    parameters = lora_parameters(model)
    nll, count = next_token_nll(model(batch), batch.targets, model.head_weight)
    return list(torch.autograd.grad(nll / count, parameters))


# ---- Resume


def check_resume(options: Options, findings: Findings) -> None:
    """A run that SIGTERM stops and the same command continues ends in the bytes of one that nothing stopped."""
    work = Path(options.work_dir)
    for split, count in (("train", 1200), ("validation", 60), ("test", 60)):
        write_reviews(work / "data" / f"{split}.jsonl", count)
    steps = 12 if options.small else 36
    command = [
        sys.executable,
        "scripts/train.py",
        "--config",
        "scripts/configs/quickstart.yaml",
        f"data.dir={work / 'data'}",
    ]
    command += [f"train.max_steps={steps}", "train.save_steps=5", "train.eval_steps=10", "lora.dropout=0.05"]
    command += ["train.learning_rate=1e-3", f"model.device={options.device}"]
    started = time.perf_counter()
    whole, broken = work / "whole", work / "broken"
    statuses = [_train([*command, f"train.output_dir={whole}"])]
    seconds = time.perf_counter() - started
    statuses.append(_train([*command, f"train.output_dir={broken}"], stop_at=(broken / "metrics.jsonl", steps // 3)))
    statuses.append(_train([*command, f"train.output_dir={broken}"]))
    expected = [0, INTERRUPTED, 0]
    findings.check("exit statuses of a run, a stopped one, a resumed one", statuses == expected, statuses=statuses)
    digests = [_digest(folder / "checkpoints" / "final" / "adapter_model.safetensors") for folder in (whole, broken)]
    same = digests[0] is not None and digests[0] == digests[1]
    findings.check("a stopped and resumed run ends in the same bytes", same, digests, steps=steps, seconds=seconds)


def _train(command: Sequence[str], stop_at: tuple[Path, int] | None = None) -> int:
    """Exit status; with a log and a number of its lines, SIGTERM is sent when it has them."""
    process = subprocess.Popen(command, cwd=ROOT)  # its output goes to the stage's log
    while stop_at is not None and process.poll() is None:
        log, lines = stop_at
        if log.is_file() and log.read_bytes().count(b"\n") >= lines:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.01)
    return process.wait()


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
