"""What the ranks of test_distributed.py do, started by torchrun: each writes its results to {folder}/{rank}.json."""

import contextlib
import io
import json
import math
import operator
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from minilora.adapters.attach import lora_parameters, parameter_groups
from minilora.adapters.optimizers import build_optimizer
from minilora.data.sampler import split_across_ranks
from minilora.errors import UserError
from minilora.evaluation.score import ScoringOptions, score
from minilora.qlora import step as step_module
from minilora.qlora.batch import pack
from minilora.qlora.lora import DropoutSeed
from minilora.qlora.prompt import Example
from minilora.qlora.step import StepSettings, TrainState, train_step
from minilora.system import distributed
from minilora.system.cli import run_script
from minilora.system.distributed import SINGLE_RANK, LostRankError, Ranks
from minilora.system.process import tuned_process
from minilora.system.signals import Interrupted
from minilora.system.torchrun import with_ranks
from tests.conftest import make_reviews
from tests.qlora.test_step import build, examples
from tests.scripts.conftest import load_script

Found = dict[str, Any]


def caught(work: Callable[[], object]) -> list[object]:
    """Type, text and signal of the exception that `work` raises."""
    try:
        work()
    except BaseException as error:
        return [type(error).__name__, str(error), getattr(error, "signum", None)]
    return []


def check_exchange(ranks: Ranks, folder: Path) -> Found:
    """What the ranks exchange."""
    tensors = {"f": torch.tensor([0.1, math.pi]), "b": torch.tensor([[3]], dtype=torch.uint8), "s": torch.tensor(2.5)}
    own = tensors if ranks.is_rank_0 else {}
    received = ranks.broadcast_tensors(own)
    with ranks.rank_0_first(), (folder / "turns").open("a", encoding="utf-8") as file:
        file.write(f"{ranks.rank}\n")
    return {
        "gather": ranks.all_gather({"rank": ranks.rank, "text": "评" * ranks.rank, "number": 0.1, "none": None}),
        "rank 0": ranks.run_on_rank_0(lambda: {"by": ranks.rank}),
        "in order": [ranks.gather_in_order([i * i for i in range(n) if ranks.owns(i)]) for n in (8, 2, 0)],
        "tensors": all(torch.equal(tensors[name], received[name]) for name in {*tensors, *received}),
        "no tensors": ranks.broadcast_tensors({}) == {},
        "same": caught(lambda: ranks.require_same({"a": 1, "threads": [2]}, "do something")),
        "not same": caught(lambda: ranks.require_same({"a": 1, "b": ranks.rank // 2, "c": 3}, "do something")),
        "detached": [ranks.detached().all_gather(ranks.rank), ranks.detached().run_on_rank_0(lambda: "alone")],
    }


def check_failures(ranks: Ranks) -> Found:
    """What each rank raises when these ranks fail."""
    term, interrupt = Interrupted(signal.SIGTERM), Interrupted(signal.SIGINT)
    cases: dict[str, dict[int, BaseException]] = {
        "none": {},
        "a mistake": {1: UserError("no room")},
        "a bug": {0: ZeroDivisionError("by zero")},
        "two mistakes": {0: UserError("no room"), 2: UserError("no rights")},
        "a signal": {2: term},
        "two signals": {0: interrupt, 1: term},
        "a mistake and a signal": {1: UserError("no room"), 2: term},
    }

    def fail(failures: dict[int, BaseException]) -> None:
        if ranks.rank in failures:
            raise failures[ranks.rank]

    def barrier(failures: dict[int, BaseException]) -> None:
        with ranks.barrier():
            fail(failures)

    def rank_0_first(failures: dict[int, BaseException]) -> None:
        with ranks.rank_0_first():
            fail(failures)

    found = {name: caught(lambda: barrier(failures)) for name, failures in cases.items()}  # noqa: B023
    for name in ("a mistake", "a bug", "a signal"):
        found[f"rank 0 first: {name}"] = caught(lambda: rank_0_first(cases[name]))  # noqa: B023
    found["on rank 0"] = caught(lambda: ranks.run_on_rank_0(lambda: fail(cases["a bug"])))
    return found


def weigh(chosen: Sequence[Example]) -> list[float]:
    """A weight for each, from 0.5 to 6.5, whatever it is beside."""
    return [sum(example.input_ids) % 7 + 0.5 for example in chosen]


def take_step(
    ranks: Ranks,
    step_examples: list[Example],
    scaled: bool = False,
    spoiled: int | None = None,
    weighted: bool = False,
) -> tuple[Found, list[torch.Tensor]]:
    """One step of a tiny model on a share of the examples: its result, and the gradient of the update.

    `spoiled` is the rank whose loss is NaN.
    """
    model, dropout_seed = build()
    optimizer = build_optimizer(parameter_groups(model))
    gradients: list[torch.Tensor] = []
    plain_step, plain_loss = optimizer.step, step_module.next_token_nll

    def noting_step(*_: Any, **__: Any) -> None:
        gradients.extend(parameter.grad.clone() for parameter in lora_parameters(model) if parameter.grad is not None)
        plain_step()

    optimizer.step = noting_step  # type: ignore[method-assign]
    if spoiled == ranks.rank:
        step_module.next_token_nll = lambda *a: (plain_loss(*a)[0] * math.nan, 1)  # type: ignore[assignment]
    share = split_across_ranks(step_examples, ranks.size, 3)[ranks.rank] if ranks.size > 1 else step_examples
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    counts = [sum(example.supervised) for example in step_examples]
    total_weight = sum(map(operator.mul, counts, weigh(step_examples))) if weighted else sum(counts)
    try:
        result = train_step(
            TrainState(model, optimizer, dropout_seed, scaler=scaler, ranks=ranks),
            [pack(share, weights=weigh(share) if weighted else ())] if share else [],
            StepSettings(1, 0.01, 0.0, total_weight=total_weight),
        )
    finally:
        step_module.next_token_nll = plain_loss
    weights = torch.cat([parameter.detach().flatten() for parameter in lora_parameters(model)])
    scale = None if scaler is None else scaler.get_scale()
    found = {"loss": result.loss, "norm": result.grad_norm, "updated": result.updated, "scale": scale}
    return {**found, "examples": len(share), "weights": weights.tolist()}, gradients


def check_steps(ranks: Ranks) -> Found:
    """Steps of all sizes, each beside that of a single process."""
    found: Found = {}
    for count, weighted in product((9, 8, 4, 2), (False, True)):
        ours, gradients = take_step(ranks, examples(count), weighted=weighted)
        single, expected = take_step(SINGLE_RANK, examples(count), weighted=weighted)
        pairs = list(zip(gradients, expected, strict=True))
        largest = max(float(right.abs().max()) for _, right in pairs)
        difference = max(float((left - right).abs().max()) for left, right in pairs)
        name = f"{count}, weighted" if weighted else str(count)
        found[name] = {"ranks": ours, "single": single, "difference": difference / largest}
    found["scaled"] = take_step(ranks, examples(2), scaled=True)[0]
    found["spoiled"] = take_step(ranks, examples(9), spoiled=1)[0]
    found["spoiled, scaled"] = take_step(ranks, examples(9), scaled=True, spoiled=2)[0]
    return found


def check_dropout(ranks: Ranks) -> list[int]:
    """The indices that this rank's micro-batches have for their dropout masks."""
    model, _ = build()
    indices: list[int] = []

    class Noting(DropoutSeed):
        def set(self, seed: int, step: int, micro_batch: int) -> None:
            indices.append(micro_batch)

    batches = [pack(examples(2)) for _ in range(2)]
    train_step(
        TrainState(model, build_optimizer(parameter_groups(model)), Noting(), ranks=ranks),
        batches,
        StepSettings(1, 0.01, 1.0),
    )
    return indices


def check_scores(ranks: Ranks) -> Found:
    """Scores of 13 examples in batches of 2, by all ranks and by one."""
    model, _ = build()
    progress: list[int] = []
    options = ScoringOptions(2, on_progress=progress.append, ranks=ranks)
    scored = score(model, examples(13), None, options)
    single = score(model, examples(13), None, ScoringOptions(2))
    return {"ranks": scored.loss, "single": single.loss, "progress": sum(progress)}


def check_waiting(ranks: Ranks) -> list[str]:
    """What the ranks raise when one of them is too late."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=1))
    hurried = replace(ranks, long_timeout_group=group)
    try:
        hurried.run_on_rank_0(lambda: time.sleep(2))
    except LostRankError as error:
        return [type(error).__name__, str(error)]
    return []


class GpuWork:
    """A sum on GPUs that is done when it has been asked about so many times."""

    def __init__(self, times: int):
        self.left = times

    def is_completed(self) -> bool:
        self.left -= 1
        return self.left < 0


def check_gpus(ranks: Ranks) -> Found:
    """How ranks wait for a sum that is done at other times on each, and for one that a rank never begins."""
    aborted: list[str] = []
    found: Found = {"aborted": aborted}
    works = {
        "done": GpuWork(3 * ranks.rank),
        "missed": GpuWork(10**9),
    }
    for name, work in works.items():
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=1))
        distributed.dist.distributed_c10d._abort_process_group = lambda: aborted.append(name)  # noqa: B023
        if (name, ranks.rank) == ("missed", 1):
            time.sleep(2)
        else:
            found[name] = caught(lambda: distributed._await_gpus(work, group))  # type: ignore[arg-type]  # noqa: B023
        found[f"{name}: left"] = work.left
    return found


def check_scripts(ranks: Ranks, folder: Path, adapter: str) -> dict[str, str]:
    """What evaluate.py and predict.py print with all ranks, and on rank 0 as a single process."""
    reviews = "".join(f"{text}\n" for text, _ in make_reviews(40, seed=3))
    (folder / f"{ranks.rank}.txt").write_text(reviews, "utf-8")
    evaluate, predict = load_script("evaluate"), load_script("predict")
    predict.standard_input = lambda: io.BytesIO(reviews.encode())  # type: ignore[attr-defined]

    def printed(script: ModuleType, ranks: Ranks, *arguments: object) -> str:
        sys.argv = [str(script.__file__), "--model_path", adapter, *map(str, arguments)]
        with contextlib.redirect_stdout(io.StringIO()) as output:
            script.main(ranks)
        return output.getvalue()

    found = {}
    limit = ("--max_batch_tokens", 300)
    for name, which in (("ranks", ranks), ("single", SINGLE_RANK)):
        if which is ranks or ranks.is_rank_0:
            found[f"evaluate, {name}"] = printed(evaluate, which, "--compare_base", "--output_dir", folder / name)
            found[f"file, {name}"] = printed(predict, which, "--input", folder / "0.txt", *limit)
    found["pipe, ranks"] = printed(predict, ranks, "-", *limit)
    return found


def main(ranks: Ranks) -> None:
    """All checks."""
    torch.set_num_threads(1)
    folder, adapter = Path(sys.argv[1]), sys.argv[2]
    found = {
        "exchange": check_exchange(ranks, folder),
        "failures": check_failures(ranks),
        "steps": check_steps(ranks),
        "dropout": check_dropout(ranks),
        "scores": check_scores(ranks),
        "compiler": "torch._dynamo" in sys.modules,
        "scripts": check_scripts(ranks, folder, adapter),
        "waiting": check_waiting(ranks),
        "gpus": check_gpus(ranks),
    }
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    with tuned_process():
        run_script(with_ranks(main))
