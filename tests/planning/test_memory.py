"""The ledger adds up and moves the way memory does."""

import functools
import gc
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from minilora.adapters.attach import attach, parameter_groups
from minilora.config import LoraConfig
from minilora.planning.memory import (
    CONTEXT_BYTES,
    MemoryEstimate,
    ParameterCounts,
    count_parameters,
    estimate_memory,
    moments_bytes,
)
from minilora.qlora.batch import MicroBatch, pack
from minilora.qlora.lora import DropoutSeed
from minilora.qlora.model import Qwen2Config, Qwen2ForCausalLM
from minilora.qlora.nf4 import Linear4bit
from minilora.qlora.optim import build_optimizer
from minilora.qlora.prompt import Example
from minilora.qlora.step import StepSettings, TrainState, train_step
from minilora.weights.hf_config import read_config
from minilora.weights.load import load_model
from tests.conftest import write_checkpoint

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory_estimate.py"

# Qwen2.5-0.5B.
SIZES = (151936, 896, 4864, 24, 14, 2, 1e-6, 1e6)


@functools.cache
def numbers(tied: bool = True, rank: int = 8, in_full: tuple[str, ...] = ()) -> ParameterCounts:
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(*SIZES, tied))
        attach(model, LoraConfig(r=rank, alpha=16, dropout=0))
    return count_parameters(model, in_full)


def ledger(
    rows: int = 400, tied: bool = True, rank: int = 8, in_full: tuple[str, ...] = (), **changes: Any
) -> MemoryEstimate:
    counted = numbers(tied, rank, in_full)
    arguments = {
        "supervised_positions": 16,
        "longest": 50,
        "compute_dtype": torch.bfloat16,
        "quantization": "nf4",
        "double_quantization": True,
        "gradient_checkpointing": False,
        "moments_bytes": moments_bytes("adamw_torch_fused", counted.trained, "cpu"),
        **changes,
    }
    return estimate_memory(counted, rows, **arguments)


def part(found: MemoryEstimate, beginning: str) -> int:
    (value,) = (value for name, value in found.parts.items() if name.startswith(beginning))
    return value


def test_the_total_is_the_sum_and_is_printed() -> None:
    found = MemoryEstimate({"weights": 2_000_000, "adapter": 500_000})
    assert found.total_bytes == 2_500_000
    assert [line.split() for line in str(found).splitlines()] == [
        ["weights", "2.0", "MB"],
        ["adapter", "0.5", "MB"],
        ["total", "2.5", "MB"],
    ]


def test_weights_by_hand() -> None:
    # Per layer: q and o 896 x 896, k and v 128 x 896, gate, up and down 4864 x 896.
    projections = 24 * (2 * 896 * 896 + 2 * 128 * 896 + 3 * 4864 * 896)
    # Embedding; per layer two norms and the biases of q, k and v; the last norm.
    dense = 151936 * 896 + 24 * (2 * 896 + 896 + 2 * 128) + 896
    assert part(ledger(quantization="none"), "projections") == 2 * projections
    assert part(ledger(double_quantization=False), "projections") == projections * 4.5 / 8
    # 4 bits, 8 bits a block of 64, 32 bits for 256 blocks.
    assert part(ledger(), "projections") == pytest.approx(projections * (4 + 1 / 8 + 1 / 512) / 8, abs=1)
    assert part(ledger(), "embedding") == 2 * dense
    assert part(ledger(tied=False), "embedding") == 2 * (dense + 151936 * 896)


def test_a_head_of_its_own_is_counted() -> None:
    tied, untied = ledger(), ledger(tied=False)
    assert untied.weight_bytes - tied.weight_bytes == 2 * 151936 * 896
    assert untied.total_bytes - tied.total_bytes == 2 * 151936 * 896


def test_the_adapter_takes_twelve_bytes_a_parameter_and_four_more_when_its_gradient_is_whole() -> None:
    inputs_and_outputs = (896 + 896) * 2 + (896 + 128) * 2 + (896 + 4864) * 3
    for rank in (8, 16):
        assert part(ledger(rank=rank), "adapter") == 4 * 24 * rank * inputs_and_outputs
        assert part(ledger(rank=rank), "AdamW's moments") == 8 * 24 * rank * inputs_and_outputs
    # With a large adapter and few rows a step is fullest when the gradients are there and the activations are gone.
    large = ledger(16, rank=256, gradient_checkpointing=True)
    assert part(large, "gradients") == part(large, "adapter")
    assert part(ledger(), "gradients") == 0


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_activations_are_linear_in_the_rows(gradient_checkpointing: bool) -> None:
    few, more, most = (
        part(ledger(rows, gradient_checkpointing=gradient_checkpointing), "activations") for rows in (800, 1600, 3200)
    )
    assert most - more == 2 * (more - few) > 0


def test_what_a_4_bit_checkpoint_holds_in_full_is_counted_in_full() -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    plain, found = ledger(), ledger(in_full=(name,))
    assert part(found, "projections that") == 2 * 896 * 4864
    assert part(found, "projections (nf4") == pytest.approx(part(plain, "projections") * (1 - 896 * 4864 / 357826560))
    assert ledger(in_full=(name,), quantization="none").parts == ledger(quantization="none").parts


def test_on_a_gpu_checkpoints_can_wait_in_the_computers_memory_and_on_a_cpu_they_are_there_already() -> None:
    how: dict[str, Any] = {"gradient_checkpointing": True, "rows": 2048}
    kept, offloaded = (
        part(ledger(**how, offload_checkpoints=offload, device_type="cuda"), "activations") for offload in (False, True)
    )
    assert kept - offloaded == 23 * 2048 * 896 * 2  # the inputs of all layers but the one whose turn it is
    assert ledger(**how, offload_checkpoints=True).parts == ledger(**how).parts


def test_on_a_gpu_the_context_is_counted_and_no_heap() -> None:
    with_context = ledger(device_type="cuda", process_bytes=10**9)
    assert part(with_context, "CUDA's context") == CONTEXT_BYTES
    assert with_context.total_bytes - CONTEXT_BYTES == ledger().total_bytes
    assert part(ledger(process_bytes=10**9), "Python and PyTorch") == 10**9


def test_long_examples_take_more_than_short_ones_of_as_many_rows() -> None:
    assert ledger(4096, longest=4096).total_bytes > ledger(4096, longest=512).total_bytes + 150_000_000


def test_memory_grows_with_the_rows_and_nothing_else_shrinks_it() -> None:
    for changes in ({}, {"gradient_checkpointing": True}, {"rank": 64}, {"device_type": "cuda"}, {"process_bytes": 1}):
        totals = [ledger(rows, longest=min(rows, 512), **changes).total_bytes for rows in range(16, 2048, 16)]
        assert totals == sorted(totals)


def test_quantised_is_smaller_than_dense_and_double_quantisation_smaller_still() -> None:
    dense, single, double = (
        ledger(quantization=name, double_quantization=double).total_bytes
        for name, double in (("none", False), ("nf4", False), ("nf4", True))
    )
    assert double < single < dense


def test_checkpointing_is_smaller() -> None:
    kept, computed_again = (part(ledger(gradient_checkpointing=flag), "activations") for flag in (False, True))
    assert computed_again < kept / 5


def test_a_wider_compute_type_takes_more() -> None:
    assert ledger(compute_dtype=torch.float32).total_bytes > ledger().total_bytes


def test_what_is_kept_in_full_is_counted() -> None:
    projections = part(ledger(quantization="none"), "projections")
    assert part(ledger(cache_dequantized=True), "dense weights") == projections
    kept, plain = (ledger(quantization="none", cache_dequantized=flag).parts for flag in (True, False))
    assert kept == plain


def test_a_gigabyte_is_enough_for_a_small_model() -> None:
    """Qwen2.5-0.5B: weights, adapter and 400 rows, without Python and PyTorch themselves."""
    assert 0.6e9 < ledger().total_bytes < 1.6e9


def test_checkpointing_keeps_nothing_of_an_mlp() -> None:
    """A source of `lora.Again` that an attribute held would stay, and all of the memory with it."""
    model = Qwen2ForCausalLM(Qwen2Config(50, 16, 24, 2, 4, 2, 1e-6, 1e4, True))
    model.model.gradient_checkpointing = True
    attach(model, LoraConfig(r=2, alpha=4, dropout=0))
    batch = pack([Example([*range(38)], [False] * 37 + [True])])
    hidden = model.train()(batch)
    rows = len(batch.input_ids)
    # `type`, not isinstance, which asks lazy module attributes for their class and so makes them import things.
    held = [tuple(o.shape) for o in gc.get_objects() if type(o) is torch.Tensor and o.shape[:1] == (rows,)]
    assert hidden.requires_grad
    assert (rows, 16) in held  # the inputs of the layers
    assert (rows, 24) not in held


def allocated_peak(work: Callable[[], object]) -> int:
    """The most that PyTorch's allocator has handed out at once while `work` ran, beside what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    sizes, pending = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        if event.typed[0].name == "Allocation":
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
        pending += event.children
    return max(itertools.accumulate(size for _, size in sorted(sizes)))


@dataclass(frozen=True)
class Step:
    """A training step whose memory is predicted and measured."""

    quantization: str = "nf4"
    double: bool = True
    dtype: torch.dtype = torch.bfloat16
    checkpointing: bool = False
    cached: bool = False
    rank: int = 8
    dropout: float = 0.0
    first_layer: int = 0
    optim: str = "adamw_torch_fused"
    use_dora: bool = False
    init_lora_weights: str = "kaiming"
    examples: int = 8
    rows: int = 1024
    answer: int = 2

    def batch(self) -> MicroBatch:
        length = self.rows // self.examples
        flags = [False] * (length + 1 - self.answer) + [True] * self.answer
        return pack([Example([3] * (length + 1), flags)] * self.examples, share_prefix=False)

    def attach(self, model: Qwen2ForCausalLM) -> DropoutSeed:
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        kind: dict[str, Any] = {"use_dora": self.use_dora, "init_lora_weights": self.init_lora_weights}
        kind["layers_to_transform"] = list(range(self.first_layer, model.config.num_hidden_layers))
        return attach(model, LoraConfig(r=self.rank, alpha=16, dropout=self.dropout, target_modules=names, **kind))

    def predict(self, folder: Path) -> int:
        with torch.device("meta"):
            shapes = Qwen2ForCausalLM(read_config(folder))
            self.attach(shapes)
        counted, batch = count_parameters(shapes), self.batch()
        return estimate_memory(
            counted,
            len(batch.input_ids),
            batch.num_supervised,
            self.rows // self.examples,
            self.dtype,
            self.quantization,
            self.double,
            self.checkpointing,
            moments_bytes(self.optim, counted.trained, "cpu"),
            self.cached,
        ).total_bytes

    def measure(self, folder: Path) -> int:
        model = load_model(folder, self.dtype, self.quantization, self.double)
        model.model.gradient_checkpointing = self.checkpointing
        frozen = [module for module in model.modules() if isinstance(module, Linear4bit)]
        for module in frozen:
            module.cache_dequantized = self.cached
        dropout_seed = self.attach(model)
        optimizer = build_optimizer(parameter_groups(model.train()), optim=self.optim)
        batch = self.batch()

        def step() -> None:
            train_step(TrainState(model, optimizer, dropout_seed), [batch], StepSettings(1, 0.0001, 1.0))

        step()  # makes the moments, and the dense weights that are kept
        held = [*model.parameters(), *model.buffers(), *optimizer.tensors().values()]
        if self.cached:
            held += [module.dense_weight(self.dtype) for module in frozen]
        return sum(tensor.nbytes for tensor in held) + allocated_peak(step)


@pytest.mark.parametrize(
    "step",
    [
        Step(),
        Step(quantization="none"),
        Step(quantization="fp4", double=False),
        Step(dtype=torch.float32),
        Step(cached=True),
        Step(rank=64),
        Step(rank=64, optim="adamw_bnb_8bit"),
        Step(dropout=0.1),
        Step(first_layer=2),
        Step(first_layer=2, checkpointing=True, rows=2048),
        Step(answer=100),
        Step(examples=1),
        Step(checkpointing=True),
        Step(checkpointing=True, rank=64),
        Step(checkpointing=True, rank=64, rows=64),
        Step(checkpointing=True, examples=1),
        Step(use_dora=True),
        Step(use_dora=True, first_layer=3, rows=2048),
        Step(use_dora=True, dtype=torch.float32),
        Step(use_dora=True, quantization="none"),
        Step(use_dora=True, dropout=0.1),
        Step(use_dora=True, answer=100),
        Step(use_dora=True, examples=1),
        Step(use_dora=True, checkpointing=True),
        Step(use_dora=True, checkpointing=True, rank=64),
        Step(init_lora_weights="pissa", rank=64),
        Step(init_lora_weights="pissa", rank=64, checkpointing=True),
    ],
    ids=lambda step: ", ".join(f"{f.name}={v}" for f in fields(step) if (v := getattr(step, f.name)) != f.default),
)
def test_the_ledger_is_what_pytorch_hands_out_in_a_step(step: Step, tmp_path: Path) -> None:
    sizes = {"hidden": 256, "heads": 8, "kv_heads": 2, "intermediate": 1024, "layers": 6}
    folder = write_checkpoint(tmp_path, "{}", dtype=torch.bfloat16, **sizes)
    # On a Qwen2.5-0.5B it is within 2 %; here what is left out is larger beside the rest: places, small copies.
    assert step.predict(folder) == pytest.approx(step.measure(folder), rel=0.05)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif("MINILORA_REAL_MODEL" not in os.environ, reason="needs MINILORA_REAL_MODEL")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read as on Linux")
@pytest.mark.parametrize("keys", [[], ["train.gradient_checkpointing=true"]])
def test_the_ledger_is_within_ten_percent_of_what_training_takes(keys: list[str]) -> None:
    case = {"model": os.environ["MINILORA_REAL_MODEL"], "device": "cpu", "rows": 640, "keys": keys, "steps": 6}
    command = [sys.executable, str(BENCHMARK), json.dumps(case)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"\n{found['predicted'] / 1e9:.3f} GB predicted, {found['measured'] / 1e9:.3f} GB measured")
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.1)
