"""The processes that torchrun has started in, `Ranks` out: how a script joins them, and how each of them ends."""

import os
import platform
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from minilora.errors import UserError
from minilora.system.console import set_silent
from minilora.system.distributed import LONG_TIMEOUT, SINGLE_RANK, TIMEOUT, FailedElsewhereError, Ranks, reason_of
from minilora.system.signals import Interrupted

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


def with_ranks(main: Callable[[Ranks], None]) -> Callable[[], None]:
    """A script's `main` for `run_script`: with the ranks that torchrun has started, or a single process.

    Rank 0 prints how it ends; another rank prints only what ended this rank itself.
    """

    def joined() -> None:
        if _num_started() == 1:
            main(SINGLE_RANK)
            return
        ranks = _join(int(os.environ["LOCAL_RANK"]))
        try:
            main(ranks)
        except FailedElsewhereError:
            raise SystemExit(2) from None
        except (UserError, Interrupted) as error:
            if ranks.is_rank_0:
                raise
            text = f"rank {ranks.rank} on {platform.node()}: {error}"
            if isinstance(error, UserError):
                raise UserError(text) from error
            if error.signum in ranks.agreed_signals:
                raise SystemExit(128 + error.signum) from None
            raise Interrupted(error.signum, text) from None
        dist.destroy_process_group()

    return joined


def without_ranks(main: Callable[[], None]) -> Callable[[], None]:
    """A script's `main` for `run_script` in one process: under torchrun several would write the same files."""

    def alone() -> None:
        count = _num_started()
        if count > 1 and os.environ["RANK"] != "0":
            raise SystemExit(0)  # an error here would make torchrun stop rank 0 before it prints
        if count > 1:
            raise UserError(f"torchrun: started {count} processes, this script runs in one; run python {sys.argv[0]}")
        main()

    return alone


def _num_started() -> int:
    """The number of processes that torchrun has started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in VARIABLES) else 1


def _join(local_rank: int) -> Ranks:
    """Connects this rank with the others, and selects its GPU if there is one."""
    has_gpu = local_rank < torch.cuda.device_count()
    try:
        found, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        # torchrun's store outlives its ranks: after --max-restarts, new ranks would find the addresses of dead ones.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), found)
        set_silent(rank > 0)
        if has_gpu:
            torch.cuda.set_device(local_rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpu and dist.is_nccl_available() else "gloo",  # Windows has no NCCL
            store=store,
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
        )
        long_timeout_group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"{place}: the ranks cannot connect ({reason_of(error)}); check --nnodes and --master-addr, and that every "
            "machine has started"
        ) from None
    return Ranks(rank, size, local_rank, long_timeout_group)
