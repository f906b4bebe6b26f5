"""Several processes that train one adapter together: what each does alone, and where they meet.

torchrun starts N of them, the ranks, on one machine or on several. Each has the whole base in 4 bits, the whole adapter
and its moments. A step's examples are cut into N shares of about as many rows (`sampler.split_across_ranks`), and

    gradient = sum over the ranks of the gradient of  (losses of its share / supervised tokens of all shares)

is the one that a single process takes of the same examples, but for the order of the sum. It is all that travels: once
a step, in one buffer with the loss, 4 bytes for each number that is trained. Every rank gets the same bits back and
makes the same update, so weights are sent once, when a run begins or goes on.

Beside it there are meetings of 8 bytes. All ranks come to the same ones in the same order; that is the one rule here.
What a rank does on its own may fail, or be interrupted by a signal that only it got, so it stands within `together`,
at whose end each learns how the others fared. So all stop at the same place, in the same state, with the same status.

The first rank alone writes files and speaks. A rank that is killed closes its connections, which the others notice when
they meet next (`LostRankError`); one whose machine is gone without a word they miss after TIMEOUT. Nothing is pickled:
what is exchanged is JSON, safetensors and numbers.

Left out: a base that does not fit one GPU in 4 bits; a Qwen2.5-72B takes some 41 GB. That would be PyTorch's FSDP2,
`fully_shard` around each decoder layer with `reshard_after_forward`:

* `Linear4bit` holds its packed bytes and block scales as frozen parameters, cut by rows. A row is a whole number of
  blocks in every Qwen2.5, so a shard is quantised on arrival, without the others. FSDP2 gathers frozen parameters of
  bytes as they are (tried with gloo, equal to the bit), and sends no gradient for them.
* lora.py asks for a dense weight once in forward and once in backward, each within the layer's own gathering.
* A and B are `ignored_params`: whole on every rank and summed as now. Optimizer, checkpoints and resuming stay.
* Each forward pass becomes a meeting. So all ranks need equally many micro-batches, of training and of scoring, and one
  without an example runs one for nothing.

A step then moves all 4-bit weights to every rank twice for each micro-batch: 72 GB for a 72B, over a hundred times the
bytes of its gradient at r = 8. What fits one GPU is better off as it is.

Source: torch.distributed (gloo on CPUs, NCCL between GPUs); data parallel as in arXiv 2006.15704, section 2.
"""

import hashlib
import json
import os
import platform
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch.distributed.rendezvous import rendezvous

from minilora.errors import UserError
from minilora.system.cli import Interrupted
from minilora.system.console import set_silent

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
TIMEOUT = timedelta(minutes=30)  # how long ranks wait for each other that do the same
LONG_TIMEOUT = timedelta(days=1)  # and for what one of them does for all: a download, a 4-bit copy, a checkpoint
FAILED = 255  # beside the numbers of signals
GRACE_S = 2.0  # in which the first rank may say what the others would say too


class LostRankError(UserError):
    """Another rank was killed, lost its machine, or does not answer."""


class FailedElsewhereError(UserError):
    """Another rank failed, and says itself why."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together; alone, every question is answered at once.

    Attributes:
        rank: 0 to size - 1; 0 is the first, which writes and speaks.
        size: how many there are.
        local_rank: its number on its own machine, which is that of its GPU.
        long_timeout_group: the group that waits for LONG_TIMEOUT, None where this process is alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    long_timeout_group: dist.ProcessGroup | None = None

    @property
    def is_rank_0(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def detached(self) -> "Ranks":
        """The same rank, which from now on asks the others nothing: they are elsewhere, or gone."""
        return replace(self, long_timeout_group=None)

    def barrier(self) -> AbstractContextManager[None]:
        """Around work of this rank alone: what ends it on one rank ends it on all, here.

        Raises:
            Interrupted: a signal came to one of them.
            FailedElsewhereError: another rank failed.
            LostRankError: another rank is gone.
        """
        return self._barrier(None)

    @contextmanager
    def rank_0_first(self) -> Iterator[None]:
        """Around work that leaves files: first the first rank, then the first of each other machine, then the rest.

        What one has made, the next finds, whether their machines share a disk or not. Raises as `together` does.
        """
        turn = 0 if self.is_rank_0 else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self._meet(None, self.long_timeout_group)
        with self._barrier(self.long_timeout_group):
            yield
        for _ in range(2 - turn):
            self._meet(None, self.long_timeout_group)

    def run_on_rank_0(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first rank, which alone does it; JSON for the others. Raises as `together` does."""
        result: Any = None
        with self._barrier(self.long_timeout_group):
            if self.is_rank_0:
                result = work()
        found = self.all_gather(result)[0]
        return result if self.is_rank_0 else found

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, in their order; anything that JSON has."""
        if self.long_timeout_group is None:
            return [value]
        content = json.dumps(value).encode()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _answered():
            dist.all_gather(lengths, torch.tensor([len(content)]))
        longest = max(int(length) for length in lengths)
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        with _answered():
            dist.all_gather(parts, _bytes_tensor(content.ljust(longest)))
        return [json.loads(part.numpy().tobytes()) for part in parts]

    def owns(self, number: int) -> bool:
        """Whether item `number` of a list that the ranks share is this one's; see `collect`."""
        return number % self.size == self.rank

    def gather_in_order(self, results: Sequence[T]) -> list[T]:
        """What all ranks made of the items that each `takes`, in the items' order; JSON."""
        parts = self.all_gather(results)
        return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]

    def require_same(self, facts: dict[str, Any], remedy: str) -> None:
        """Raises UserError on all ranks where one has other facts than the first.

        Args:
            facts: by name; the names that differ are said.
            remedy: what to do, for the message.
        """
        for rank, (host, other) in enumerate(self.all_gather([platform.node(), facts])):
            if rank == 0:
                first = other
            names = sorted(name for name in {*first, *other} if first.get(name) != other.get(name))
            if names:
                raise UserError(f"rank {rank} on {host}: has another {', '.join(names)} than rank 0; {remedy}")

    def all_reduce_gradients(self, parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        """Puts the sum of all ranks' gradients in the place of each, and returns that of their losses.

        Args:
            parameters: of one dtype; a rank that had no example has no gradient.
            loss: of this rank's share, a number.
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
        with _answered():
            dist.all_reduce(buffer)
        return total[0]

    def broadcast_tensors(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The first rank's `tensors`, which are on the CPU, by name."""
        if self.long_timeout_group is None:
            return tensors
        content = save(tensors) if self.is_rank_0 else b""
        length = self.all_gather(len(content))[0]
        buffer = _bytes_tensor(content) if self.is_rank_0 else torch.empty(length, dtype=torch.uint8)
        with _answered():
            dist.broadcast(buffer, 0)
        return load(buffer.numpy().tobytes())

    def check_device(self, device: torch.device) -> None:
        """Raises UserError where this rank has no GPU of its own."""
        if self.size == 1 or device.type != "cuda":
            return
        if device.index is not None:
            raise UserError(f"model.device: {device} is one GPU for {self.size} ranks; each takes its own with cuda")
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"model.device: there are {torch.cuda.device_count()} GPUs on {platform.node()} and more ranks; start "
                "so many with --nproc-per-node, or set model.device=cpu"
            )

    @contextmanager
    def _barrier(self, group: dist.ProcessGroup | None) -> Iterator[None]:
        """`together`, with the patience of `group`."""
        if self.long_timeout_group is None:
            yield
            return
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
        self._meet(failure, group)

    def _meet(self, failure: BaseException | None, group: dist.ProcessGroup | None) -> None:
        """Tells the others how this rank fared, and raises what is the matter with any of them."""
        if self.long_timeout_group is None:
            return
        own = 0 if failure is None else failure.signum if isinstance(failure, Interrupted) else FAILED
        code = torch.tensor([own])
        try:
            with _answered():
                dist.all_reduce(code, dist.ReduceOp.MAX, group)
        except LostRankError:
            if own != FAILED:
                raise
        if failure is not None and own == FAILED:
            raise failure
        if int(code) == FAILED:
            raise FailedElsewhereError("another rank failed")
        if int(code):
            raise Interrupted(int(code)) from failure


SINGLE_RANK = Ranks()


def with_ranks(main: Callable[[Ranks], None]) -> Callable[[], None]:
    """A script's `main` for `run_script`: with the ranks that torchrun has started, or alone, where nothing is joined.

    What all ranks would print is printed once.
    """

    def joined() -> None:
        if _num_started() == 1:
            main(SINGLE_RANK)
            return
        store, ranks = _join(int(os.environ["LOCAL_RANK"]))
        try:
            main(ranks)
        except (UserError, Interrupted) as error:
            signum = error.signum if isinstance(error, Interrupted) else None
            if _is_said(store, ranks, error):
                raise SystemExit(2 if signum is None else 128 + signum) from None
            if ranks.is_rank_0:
                raise
            text = f"rank {ranks.rank} on {platform.node()}: {error}"
            raise (UserError(text) if signum is None else Interrupted(signum, text)) from error
        dist.destroy_process_group()

    return joined


def without_ranks(main: Callable[[], None]) -> Callable[[], None]:
    """A script's `main` for `run_script` that is the work of one process: refused, once, where torchrun starts several,
    which would all write the same files."""

    def alone() -> None:
        count = _num_started()
        if count > 1 and os.environ["RANK"] != "0":
            raise SystemExit(0)  # so that torchrun lets the first one say why
        if count > 1:
            raise UserError(f"torchrun: started {count} processes, this is the work of one; run python {sys.argv[0]}")
        main()

    return alone


def _num_started() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in VARIABLES) else 1


def _join(local_rank: int) -> tuple[dist.Store, Ranks]:
    """Connects this process with the others, and takes its GPU, if there is one for it."""
    has_gpu = local_rank < torch.cuda.device_count()
    try:
        found, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        # torchrun's store outlives its ranks: with --max-restarts, those of the next attempt would find the dead ones.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), found)
        set_silent(rank > 0)
        if has_gpu:
            torch.cuda.set_device(local_rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpu else "gloo",
            store=dist.PrefixStore("ranks", store),
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
        )
        long_timeout_group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"{place}: the ranks cannot be joined ({_reason(error)}); check --nnodes and --master-addr, and that every "
            "machine was started"
        ) from None
    return store, Ranks(rank, size, local_rank, long_timeout_group)


def _is_said(store: dist.Store, ranks: Ranks, error: BaseException) -> bool:
    """Whether this rank need not say how it ends: the first does, or the one that failed.

    The first rank stays until the others have heard it, because the store may go with it.
    """
    key = "ended" if isinstance(error, LostRankError) else hashlib.sha256(str(error).encode()).hexdigest()
    said = [isinstance(error, FailedElsewhereError)]
    over = threading.Event()

    def ask() -> None:
        with suppress(RuntimeError):  # the store has gone all the same
            if ranks.is_rank_0:
                store.set(key, "")
                store.set("ended", "")
                while not over.is_set() and store.add("heard", 0) < ranks.size - 1:
                    over.wait(0.02)
            else:
                while not over.is_set() and not said[0]:
                    said[0] = store.check([key])
                    over.wait(0.02)
                store.add("heard", 1)

    asking = threading.Thread(target=ask, daemon=True)  # a store behind a broken cable does not answer for long
    asking.start()
    for _ in range(2):  # one that still asks when Python ends would abort the process, in the library's C++ code
        with suppress(Interrupted):  # torchrun ends this rank too
            asking.join(GRACE_S)
        over.set()
    return said[0]


@contextmanager
def _answered() -> Iterator[None]:
    """Around one exchange: whatever the library says when it fails, a rank is lost."""
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(
            f"another rank is gone or does not answer ({_reason(error)}); its own message, if it could leave one, says "
            "why; run the same command again"
        ) from error


def _bytes_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _reason(error: Exception) -> str:
    """The first sentence of a library's message, without the line of its source that says it."""
    return re.sub(r"^\[[^]]*\] ", "", str(error).strip()).partition("\n")[0].partition(". ")[0]
