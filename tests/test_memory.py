"""The ledger adds up and moves the way memory does."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minilora import memory
from minilora.attach import attach
from minilora.batch import pack
from minilora.memory import Ledger, is_out_of_memory, peak_memory_bytes, predict_memory
from minilora.model import Qwen2Config, Qwen2ForCausalLM
from minilora.prompt import Example

# Qwen2.5-0.5B.
SIZES = (151936, 896, 4864, 24, 14, 2, 1e-6, 1e6)


def ledger(rows: int = 400, tied: bool = True, rank: int = 8, **changes: Any) -> Ledger:
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(*SIZES, tied))
        attach(model, rank, 16)
    arguments = {
        "supervised_rows": 16,
        "compute_dtype": torch.bfloat16,
        "quantization": "nf4",
        "double_quantization": True,
        "gradient_checkpointing": False,
        **changes,
    }
    return predict_memory(model, rows, **arguments)


def part(found: Ledger, beginning: str) -> int:
    (value,) = (value for name, value in found.parts.items() if name.startswith(beginning))
    return value


def test_the_total_is_the_sum_and_is_printed() -> None:
    found = Ledger({"weights": 2_000_000, "adapter": 500_000})
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


def test_adapter_takes_sixteen_bytes_a_parameter() -> None:
    inputs_and_outputs = (896 + 896) * 2 + (896 + 128) * 2 + (896 + 4864) * 3
    assert part(ledger(rank=8), "adapter") == 16 * 24 * 8 * inputs_and_outputs
    assert part(ledger(rank=16), "adapter") == 2 * part(ledger(rank=8), "adapter")


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_activations_are_linear_in_the_rows(gradient_checkpointing: bool) -> None:
    nothing, one, ten = (
        part(ledger(rows, gradient_checkpointing=gradient_checkpointing), "activations") for rows in (0, 100, 1000)
    )
    assert ten - nothing == 10 * (one - nothing) > 0


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


def test_what_is_kept_in_full_and_moments_in_8_bits_are_counted() -> None:
    projections = part(ledger(quantization="none"), "projections")
    assert part(ledger(cache_dequantized=True), "dense weights") == projections
    kept, plain = (ledger(quantization="none", cache_dequantized=flag).parts for flag in (True, False))
    assert kept.keys() == plain.keys()  # the process itself may have grown between the two
    assert all(kept[name] == plain[name] for name in kept if not name.startswith("Python"))
    assert part(ledger(moment_bits=8), "adapter") == part(ledger(), "adapter") * 10 // 16


def test_a_gigabyte_is_enough_for_a_small_model() -> None:
    """Qwen2.5-0.5B: weights, adapter and 400 rows, without Python and PyTorch themselves."""
    found = {name: value for name, value in ledger().parts.items() if not name.startswith("Python")}
    assert 0.6e9 < sum(found.values()) < 1.6e9


def test_checkpointing_keeps_nothing_of_an_mlp() -> None:
    """A source of `lora.Again` that an attribute held would stay, and all of the memory with it."""
    model = Qwen2ForCausalLM(Qwen2Config(50, 16, 24, 2, 4, 2, 1e-6, 1e4, True))
    model.model.gradient_checkpointing = True
    attach(model, 2, 4)
    batch = pack([Example([*range(38)], [False] * 37 + [True])])
    hidden = model.train()(batch)
    rows = len(batch.input_ids)
    # `type`, not isinstance, which asks lazy module attributes for their class and so makes them import things.
    held = [tuple(o.shape) for o in gc.get_objects() if type(o) is torch.Tensor and o.shape[:1] == (rows,)]
    assert hidden.requires_grad
    assert (rows, 16) in held  # the inputs of the layers
    assert (rows, 24) not in held


MEASURE = """
import sys, torch
from pathlib import Path
from minilora.batch import pack
from minilora.load import load_model, read_config
from minilora.attach import attach, parameter_groups
from minilora.lora import DropoutSeed
from minilora.memory import peak_memory_bytes, predict_memory
from minilora.model import Qwen2ForCausalLM
from minilora.optim import build_optimizer
from minilora.prompt import Example
from minilora.step import train_step

folder = Path(sys.argv[1])
with torch.device("meta"):
    shapes = Qwen2ForCausalLM(read_config(folder))
    attach(shapes, 8, 16)
rows = [640, 480, 720, 600]
checkpointing = sys.argv[2] == "True"
process = peak_memory_bytes(torch.device("cpu"))
ledger = predict_memory(
    shapes, max(rows), 16, torch.bfloat16, "nf4", True, checkpointing, process_bytes=process
)
model = load_model(folder, torch.bfloat16)
model.model.gradient_checkpointing = checkpointing
attach(model, 8, 16)
optimizer = build_optimizer(parameter_groups(model.train()))
for step, count in enumerate(rows, start=1):
    ids = [[7 + step] * (count // 8) + [5, 6] for _ in range(8)]
    batch = pack([Example(row, [False] * (len(row) - 2) + [True, True]) for row in ids], share_prefix=False)
    train_step(model, [batch], optimizer, 1e-4, 1.0, DropoutSeed(), 0, step)
print(ledger.total_bytes, peak_memory_bytes(torch.device("cpu")))
"""


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif("MINILORA_REAL_MODEL" not in os.environ, reason="needs MINILORA_REAL_MODEL")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read as on Linux")
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_ledger_is_within_ten_percent_of_what_training_takes(gradient_checkpointing: bool) -> None:
    command = [sys.executable, "-c", MEASURE, os.environ["MINILORA_REAL_MODEL"], str(gradient_checkpointing)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    predicted, measured = map(int, done.stdout.split())
    print(f"\n{predicted / 1e9:.3f} GB predicted, {measured / 1e9:.3f} GB measured")
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (
            RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            True,
        ),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_a_lack_of_memory_is_known_from_other_errors(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_what_pytorch_raises_for_too_large_a_tensor_is_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_the_peak_is_in_bytes() -> None:
    block = torch.ones(300_000_000, dtype=torch.uint8)
    peak = peak_memory_bytes(torch.device("cpu"))
    assert (peak is None) == (sys.platform not in ("linux", "darwin")), "these systems tell"
    assert peak is None or block.nbytes <= peak < 2**40  # kibibytes would be a thousand times less or more


def test_the_peak_is_this_process_own_and_not_that_of_the_one_that_started_it() -> None:
    block = torch.ones(700_000_000, dtype=torch.uint8)
    code = "import torch; from minilora.memory import peak_memory_bytes; print(peak_memory_bytes(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None" or int(done.stdout) < block.nbytes


def test_where_the_system_does_not_tell_the_peak_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "STATUS", tmp_path / "absent")
    monkeypatch.setattr(memory.sys, "platform", "win32")
    assert peak_memory_bytes(torch.device("cpu")) is None
    assert not any(name.startswith("Python") for name in ledger().parts)
