"""Data-parallel training: N processes (ranks) train one adapter together.

torchrun starts the ranks, on one machine or on several (`torchrun.py`). Each has the whole base in 4 bits, the whole
adapter and its moments. A step's examples are cut into N shares of about as many tokens
(`sampler.split_across_ranks`), and

    gradient = sum over the ranks of the gradient of  (losses of its share / supervised tokens of all shares),
               both weighted where classes have weights

is the one that a single process computes from the same examples, except for the order of the sum. One all-reduce a step
sums it, in one buffer with the loss: 4 bytes per trainable parameter. Every rank gets the same bits and makes the same
update, so weights are broadcast only once, when a run starts or resumes.

Barriers are all-reduces of 8 bytes. All ranks pass the same ones in the same order. What a rank does on its own may
fail, or be interrupted by a signal that only this rank got, so it is done within `barrier`, at whose end every rank
learns how the others ended. So all stop at the same place, in the same state, with the same exit status.

Rank 0 writes files and prints. Every rank that fails prints its own error with its rank. A rank that is killed closes
its connections, so the others notice at the next exchange (`LostRankError`); a machine that disappears is noticed after
TIMEOUT. Nothing is pickled: ranks exchange JSON, safetensors and numbers.

Left out: sharding, for a base that does not fit one GPU in 4 bits (a Qwen2.5-72B takes 41 GB). With FSDP2 every forward
would become an exchange, and each micro-batch would move all 4-bit weights to every rank twice.

Source: torch.distributed (gloo on CPUs, NCCL between GPUs); data parallel as in arXiv 2006.15704, section 2.
"""

import json
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save

from minilora.errors import UserError
from minilora.system.memory import is_out_of_memory
from minilora.system.signals import Interrupted

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)  # how long ranks that do the same work wait for each other
LONG_TIMEOUT = timedelta(days=1)  # and for what rank 0 does for all: a download, a 4-bit copy, a checkpoint
POLL_S = 0.001  # how often ranks with GPUs ask each other whether a sum is done
FAILED = 255  # a rank's status at a barrier; else 0 or the number of a signal


class LostRankError(UserError):
    """Another rank was killed, lost its machine, or does not answer."""


class FailedElsewhereError(UserError):
    """Another rank failed and prints why; this one prints nothing."""


@dataclass(frozen=True)
class Ranks:
    """This process as one of the ranks. A single process exchanges nothing: every method returns its own values."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on its own machine; the index of its GPU
    long_timeout_group: dist.ProcessGroup | None = None  # waits for LONG_TIMEOUT; None for a single process
    agreed_signals: set[int] = field(default_factory=set, compare=False)  # raised on all ranks; rank 0 prints them

    @property
    def is_rank_0(self) -> bool:
        """The rank that writes and prints."""
        return self.rank == 0

    def detached(self) -> "Ranks":
        """The same rank without exchanges: the others are gone, or elsewhere in the program."""
        return replace(self, long_timeout_group=None)

    @contextmanager
    def barrier(self, is_long: bool = False) -> Iterator[None]:
        """Around work that each rank does on its own: what ends it on one rank ends it on all, here.

        With `is_long` the ranks wait for each other until LONG_TIMEOUT.

        Raises:
            Interrupted: one of the ranks got a signal.
            FailedElsewhereError: another rank failed.
            LostRankError: another rank is gone.
        """
        if self.long_timeout_group is None:
            yield
            return
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
        own = 0 if failure is None else failure.signum if isinstance(failure, Interrupted) else FAILED
        code = torch.tensor([own])
        try:
            with _lost_rank_errors():
                dist.all_reduce(code, dist.ReduceOp.MAX, self.long_timeout_group if is_long else None)
        except LostRankError:
            if own != FAILED:
                raise
        if failure is not None and own == FAILED:
            raise failure
        if int(code) == FAILED:
            raise FailedElsewhereError("another rank failed")
        if int(code):
            self.agreed_signals.add(int(code))
            raise Interrupted(int(code)) from failure

    @contextmanager
    def rank_0_first(self) -> Iterator[None]:
        """Around work that leaves files: rank 0, then local rank 0 of each other machine, then the rest.

        Each finds the files of those before it, whether machines share a disk or not. An error that all ranks would
        have is raised on rank 0 only. Raises as `barrier` does.
        """
        own_turn = 0 if self.is_rank_0 else 1 if self.local_rank == 0 else 2
        for turn in range(3):
            with self.barrier(is_long=True):
                if turn == own_turn:
                    yield

    def run_on_rank_0(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0; the other ranks get it as JSON. Raises as `barrier` does."""
        result: Any = None
        with self.barrier(is_long=True):
            if self.is_rank_0:
                result = work()
        found = self.all_gather(result)[0]
        return result if self.is_rank_0 else found

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order; anything that JSON has."""
        if self.long_timeout_group is None:
            return [value]
        content = json.dumps(value).encode()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _lost_rank_errors():
            dist.all_gather(lengths, torch.tensor([len(content)]))
            longest = max(int(length) for length in lengths)
            parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(parts, _bytes_tensor(content.ljust(longest)))
        return [json.loads(part.numpy().tobytes()) for part in parts]

    def owns(self, index: int) -> bool:
        """Whether item `index` of a list that the ranks divide among them is this rank's; see `gather_in_order`."""
        return index % self.size == self.rank

    def gather_in_order(self, results: Sequence[T]) -> list[T]:
        """The results of all ranks, each for the items that it `owns`, in the items' order; JSON."""
        parts = self.all_gather(results)
        return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]

    def require_same(self, facts: dict[str, Any], remedy: str) -> None:
        """UserError on rank 0, with the names that differ and the remedy, if a rank has other facts by name."""
        for rank, (host, other) in enumerate(self.all_gather([platform.node(), facts])):
            if rank == 0:
                first = other
            names = sorted(name for name in {*first, *other} if first.get(name) != other.get(name))
            if names and not self.is_rank_0:
                raise FailedElsewhereError("ranks differ")
            if names:
                raise UserError(f"rank {rank} on {host}: has another {', '.join(names)} than rank 0; {remedy}")

    def all_reduce_gradients(self, parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        """Sums the gradients of all ranks, in place, and returns the sum of their losses, each a scalar.

        The parameters have one dtype; those of a rank without an example have no gradient.
        """
        if self.long_timeout_group is None:
            return loss
        sizes = [parameter.numel() for parameter in parameters]
        buffer = parameters[0].new_zeros(sum(sizes) + 1)
        *parts, total = buffer.split([*sizes, 1])
        for parameter, part in zip(parameters, parts, strict=True):
            if parameter.grad is not None:
                part.copy_(parameter.grad.flatten())
            parameter.grad = part.view_as(parameter)
        total.copy_(loss)
        with _lost_rank_errors():
            work = dist.all_reduce(buffer, async_op=True)
            if buffer.is_cuda:
                _await_gpus(work)
            work.wait(TIMEOUT)  # with a limit it raises what NCCL itself has met
        return total[0]

    def broadcast_tensors(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rank 0's `tensors`, by name, on the CPU."""
        if self.long_timeout_group is None:
            return tensors
        content = save(tensors) if self.is_rank_0 else b""
        length = self.all_gather(len(content))[0]
        buffer = _bytes_tensor(content) if self.is_rank_0 else torch.empty(length, dtype=torch.uint8)
        with _lost_rank_errors():
            dist.broadcast(buffer, 0)
        return load(buffer.numpy().tobytes())

    def check_device(self, device: torch.device) -> None:
        """Raises UserError if this rank has no GPU of its own."""
        if self.size == 1 or device.type != "cuda":
            return
        if device.index is not None:
            raise UserError(f"model.device: {device} is one GPU for {self.size} ranks; each takes its own with cuda")
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"model.device: {platform.node()} has {torch.cuda.device_count()} GPUs, and more ranks; start one rank "
                "per GPU with --nproc-per-node, or set model.device=cpu"
            )


SINGLE_RANK = Ranks()


@contextmanager
def _lost_rank_errors() -> Iterator[None]:
    """Around one exchange: whatever error the library raises, a rank is lost, unless memory ran out on this one."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):  # NCCL allocates some hundred MB in the first exchange
            raise
        raise LostRankError(
            f"another rank is gone or does not answer ({reason_of(error)}); its own message, if it could leave one, "
            "says why; run the same command again"
        ) from error


def _await_gpus(work: dist.Work, group: dist.ProcessGroup | None = None) -> None:
    """Returns when `work` is done on the GPUs of all ranks; RuntimeError, with NCCL stopped, where a rank is gone.

    NCCL waits for a rank that was killed, and nothing can end that wait once this process is in it. So the ranks ask
    each other over gloo meanwhile, which notices a closed connection.
    """
    try:
        done = torch.tensor([0])
        while not done.item():
            done[0] = work.is_completed()
            dist.all_reduce(done, dist.ReduceOp.MIN, group)
            time.sleep(0 if done.item() else POLL_S)
    except RuntimeError:
        dist.distributed_c10d._abort_process_group()  # else neither a checkpoint nor the end of the process is reached
        raise


def _bytes_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def reason_of(error: Exception) -> str:
    """The first sentence of a library's message, without its source line."""
    return re.sub(r"^\[[^]]*\] ", "", str(error).strip()).partition("\n")[0].partition(". ")[0]
