"""The peak is this process' own, in bytes; a lack of memory is told from other errors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minilora.system import memory
from minilora.system.memory import is_out_of_memory, peak_memory_bytes, reserved_memory_bytes, reset_peak_memory


def test_only_a_gpu_has_reserved_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 7 + device.index)
    assert reserved_memory_bytes(torch.device("cuda", 1)) == 8
    assert reserved_memory_bytes(torch.device("cpu")) is None


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
        (RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (RuntimeError("unable to mmap 988097824 bytes from file <x>: Cannot allocate memory (12)"), True),
        (RuntimeError("NCCL error in: x.cpp, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
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
    code = (
        "import torch; from minilora.system.memory import peak_memory_bytes; "
        "print(peak_memory_bytes(torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None" or int(done.stdout) < block.nbytes


def test_where_the_system_does_not_tell_the_peak_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "STATUS", tmp_path / "absent")
    monkeypatch.setattr(sys, "platform", "win32")
    assert peak_memory_bytes(torch.device("cpu")) is None


@pytest.mark.skipif(not memory.CLEAR_REFS.is_file(), reason="only Linux resets the peak of a process")
def test_a_peak_that_is_reset_forgets_what_was_freed() -> None:
    block = torch.ones(300_000_000, dtype=torch.uint8)
    before, size = peak_memory_bytes(torch.device("cpu")), block.nbytes
    del block
    reset_peak_memory(torch.device("cpu"))
    after = peak_memory_bytes(torch.device("cpu"))
    assert before is not None
    assert after is not None
    assert before - after > 0.9 * size


def test_a_gpu_resets_its_own_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", devices.append)
    reset_peak_memory(torch.device("cuda", 1))
    assert devices == [torch.device("cuda", 1)]
