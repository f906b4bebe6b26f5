"""Several ranks do what one process does: the same step, run and metrics; and all end alike.

The ranks are real processes on this machine, connected by gloo. tests/faults/test_ranks.py kills them.
"""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from minilora.errors import UserError
from minilora.system import torchrun
from minilora.system.distributed import SINGLE_RANK, LostRankError, Ranks, _lost_rank_errors
from minilora.system.torchrun import VARIABLES, with_ranks, without_ranks
from tests.faults.runner import Runs
from tests.runs.conftest import lasting

TESTS = Path(__file__).parents[1]
SCRIPTS = TESTS.parent / "scripts"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
RANKS = 3
Found = list[dict[str, Any]]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows cannot fork")


def run_ranks(count: int, *command: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """A command under torchrun, to its end; for one process without it.

    Each has one thread: the order of sums depends on the number of threads.
    """
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    torchrun = (*TORCHRUN, "--standalone", "--nproc-per-node", str(count))
    launch = ((sys.executable,) if count == 1 else torchrun) + tuple(map(str, command))
    return subprocess.run(launch, input=stdin, capture_output=True, encoding="utf-8", env=environment, timeout=300)


@pytest.fixture(scope="module")
def found(finished: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The results of each rank of tests/ranks.py; the lines of "turns" are in those of rank 0."""
    folder = tmp_path_factory.mktemp("ranks")
    done = run_ranks(RANKS, TESTS / "ranks.py", folder, finished[1] / "checkpoints" / "final")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    results = [json.loads((folder / f"{rank}.json").read_text("utf-8")) for rank in range(RANKS)]
    results[0]["turns"] = (folder / "turns").read_text("utf-8").split()
    results[0]["predictions"] = {
        name: (folder / name / "predictions.jsonl").read_text("utf-8") for name in ("ranks", "single")
    }
    return results


def test_a_script_of_one_process_refuses_several_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "2")
    with pytest.raises(SystemExit) as stop:
        without_ranks(lambda: pytest.fail("ran"))()
    assert stop.value.code == 0  # else torchrun would stop rank 0
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"torchrun: started 2 processes.*run python "):
        without_ranks(lambda: pytest.fail("ran"))()


@pytest.mark.parametrize("name", ["chat", "merge", "quantize"])
def test_scripts_that_write_without_ranks_refuse_them(name: str) -> None:
    assert (SCRIPTS / f"{name}.py").read_text("utf-8").endswith("    run_script(without_ranks(main))\n")


def test_a_gpu_that_is_full_in_an_exchange_is_not_a_lost_rank() -> None:
    full = RuntimeError("NCCL error in: x.cpp:1, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'")
    for error, kind in ((full, RuntimeError), (RuntimeError("Connection closed by peer"), LostRankError)):
        with pytest.raises(kind, match=str(error).partition("\n")[0]), _lost_rank_errors():
            raise error


def test_one_process_under_torchrun_is_a_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "1")
    calls: list[str] = []
    without_ranks(lambda: calls.append("ran"))()
    assert calls == ["ran"]


def test_ranks_exchange_values_and_tensors(found: Found) -> None:
    for one in found:
        told = one["exchange"]
        assert told["gather"] == [
            {"rank": rank, "text": "评" * rank, "number": 0.1, "none": None} for rank in range(RANKS)
        ]
        assert told["rank 0"] == {"by": 0}
        assert told["in order"] == [[i * i for i in range(n)] for n in (8, 2, 0)]
        assert told["tensors"]
        assert told["no tensors"]
    assert found[0]["turns"][0] == "0"
    assert sorted(found[0]["turns"]) == ["0", "1", "2"]


def test_a_detached_rank_exchanges_nothing(found: Found) -> None:
    assert [one["exchange"]["detached"] for one in found] == [[[0], "alone"], [[1], None], [[2], None]]


def test_a_rank_with_other_facts_is_named_by_rank_0_and_ends_all(found: Found) -> None:
    assert all(one["exchange"]["same"] == [] for one in found)
    first, *others = (one["exchange"]["not same"] for one in found)
    assert [kind for kind, *_ in (first, *others)] == ["UserError", *["FailedElsewhereError"] * 2]
    assert first[1].startswith("rank 2 on ")
    assert first[1].endswith(" b than rank 0; do something")


ELSEWHERE = ["FailedElsewhereError", "another rank failed", None]
TERM = ["Interrupted", "stopped by SIGTERM", 15]
NO_ROOM, BY_ZERO = ["UserError", "no room", None], ["ZeroDivisionError", "by zero", None]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("none", [[], [], []]),
        ("a mistake", [ELSEWHERE, NO_ROOM, ELSEWHERE]),
        ("a bug", [BY_ZERO, ELSEWHERE, ELSEWHERE]),
        ("two mistakes", [NO_ROOM, ELSEWHERE, ["UserError", "no rights", None]]),
        ("a signal", [TERM, TERM, TERM]),
        ("two signals", [TERM, TERM, TERM]),
        ("a mistake and a signal", [ELSEWHERE, NO_ROOM, ELSEWHERE]),
        ("rank 0 first: a mistake", [ELSEWHERE, NO_ROOM, ELSEWHERE]),
        ("rank 0 first: a bug", [BY_ZERO, ELSEWHERE, ELSEWHERE]),
        ("rank 0 first: a signal", [TERM, TERM, TERM]),
        ("on rank 0", [BY_ZERO, ELSEWHERE, ELSEWHERE]),
    ],
)
def test_what_ends_one_rank_ends_all_at_the_same_place(found: Found, case: str, expected: list[object]) -> None:
    assert [one["failures"][case] for one in found] == expected


@pytest.mark.parametrize("weighted", ["", ", weighted"])
@pytest.mark.parametrize("count", [9, 8, 4, 2])  # 9 fill the step; of 2 one rank has none
def test_ranks_take_the_step_of_one_process(found: Found, count: int, weighted: str) -> None:
    steps = [one["steps"][f"{count}{weighted}"] for one in found]
    assert sum(step["ranks"]["examples"] for step in steps) == count
    assert min(step["ranks"]["examples"] for step in steps) == count // RANKS
    for step in steps:
        assert {**step["ranks"], "examples": 0} == {**steps[0]["ranks"], "examples": 0}  # the same bits on all
        # Float32 sums of the same addends in another order; seen 3e-7.
        assert step["difference"] < 2e-6
        assert step["ranks"]["loss"] == pytest.approx(step["single"]["loss"], rel=1e-6)
        assert step["ranks"]["norm"] == pytest.approx(step["single"]["norm"], rel=1e-6)
    assert weighted == "" or steps[0]["ranks"]["loss"] != found[0]["steps"][str(count)]["ranks"]["loss"]


def test_a_rank_without_an_example_scales_its_loss_as_the_others(found: Found) -> None:
    steps = [one["steps"]["scaled"] for one in found]
    assert [step["scale"] for step in steps] == [1024.0] * RANKS
    # A power of two scales float32 exactly.
    assert all(step["weights"] == one["steps"]["2"]["ranks"]["weights"] for step, one in zip(steps, found))  # noqa: B905


@pytest.mark.parametrize(("case", "scale"), [("spoiled", None), ("spoiled, scaled", 512.0)])
def test_a_loss_of_nan_on_one_rank_changes_nothing_on_any(found: Found, case: str, scale: float | None) -> None:
    for one in found:
        step = one["steps"][case]
        assert not step["updated"]
        assert math.isnan(step["loss"])
        assert step["scale"] == scale
        assert step["weights"] == found[0]["steps"][case]["weights"] != one["steps"]["9"]["ranks"]["weights"]


def test_no_two_micro_batches_of_a_step_have_the_same_dropout_mask(found: Found) -> None:
    assert sorted(index for one in found for index in one["dropout"]) == list(range(2 * RANKS))


def test_scores_are_the_bits_of_one_process(found: Found) -> None:
    assert [one["scores"] for one in found] == [{**found[0]["scores"], "progress": 13}] * RANKS
    assert found[0]["scores"]["ranks"] == found[0]["scores"]["single"]


def test_ranks_do_not_import_the_compiler(found: Found) -> None:
    assert not any(one["compiler"] for one in found)


def test_ranks_wait_for_a_late_one_until_the_timeout(found: Found) -> None:
    assert [one["waiting"][0] for one in found] == ["LostRankError"] * RANKS
    assert any("Timed out waiting 1000ms" in one["waiting"][1] for one in found)
    for one in found:
        assert one["waiting"][1].startswith("another rank is gone or does not answer (")
        assert "\n" not in one["waiting"][1]


def test_a_sum_on_gpus_is_waited_for_until_all_have_it_or_one_is_lost(found: Found) -> None:
    for rank, one in enumerate(found):
        told = one["gpus"]
        assert told["done"] == []
        assert told["done: left"] == 3 * rank - 7  # all have asked as often as the last one, which asks 7 times
    assert [one["gpus"].get("missed", [""])[0] for one in found] == ["RuntimeError", "", "RuntimeError"]
    assert [one["gpus"]["aborted"] for one in found] == [["missed"], [], ["missed"]]


# Whole runs, in forked processes: 44 examples are seven steps of 6 and one of 2, of which a third rank gets none.


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    server = Runs()
    yield server
    server.close()


@pytest.fixture(scope="module")
def keys(tiny_checkpoint: Callable[..., Path], processed_data: Path) -> list[str]:
    return [
        f"model.name_or_path={tiny_checkpoint()}",
        "model.compute_dtype=float32",
        f"data.dir={processed_data}",
        "data.max_train_examples=44",
        "lora.r=2",
        "lora.dropout=0",
        "train.num_train_epochs=2",
        "train.learning_rate=5e-3",
        "train.per_device_eval_batch_size=5",
        "train.eval_steps=4",
        "train.save_steps=4",
        "train.save_total_limit=9",
    ]


def run_together(runs: Runs, count: int, keys: list[str], output: Path) -> list[int]:
    """A run of `count` ranks with 6 examples a step, to its end; their statuses."""
    keys = [*keys, f"train.per_device_train_batch_size={6 // count}"]
    return [runs.wait(pid) for pid in runs.start_ranks(count, keys, output)]


@pytest.fixture(scope="module")
def finished(runs: Runs, keys: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The output folders of runs of 1, 2 and 3 ranks."""
    folder = tmp_path_factory.mktemp("runs")
    for count in (1, 2, 3):
        assert run_together(runs, count, keys, folder / str(count)) == [0] * count
    return {count: folder / str(count) for count in (1, 2, 3)}


def adapter_of(output: Path) -> torch.Tensor:
    tensors = load_file(output / "checkpoints" / "final" / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def assert_equal_runs(ours: Path, theirs: Path) -> None:
    """Holds that two runs differ only by rounding, which 16 steps of Adam have made larger."""
    for entry, expected in zip(lasting(ours), lasting(theirs), strict=True):
        assert entry == pytest.approx(expected, rel=1e-4), entry["step"]
    adapter = adapter_of(theirs)
    assert (adapter_of(ours) - adapter).abs().max() < 1e-4 * adapter.abs().max()


@pytest.mark.parametrize("count", [2, 3])
def test_a_run_of_several_ranks_is_the_run_of_one(finished: dict[int, Path], count: int) -> None:
    assert_equal_runs(finished[count], finished[1])
    assert len(lasting(finished[count])) == 16


@pytest.mark.parametrize("count", [2, 3])
def test_only_rank_0_prints(finished: dict[int, Path], count: int) -> None:
    assert "16 steps" in Path(f"{finished[count]}.out").read_text("utf-8")
    for rank in range(1, count):
        assert Path(f"{finished[count]}.{rank}.out").read_text("utf-8") == ""
        assert Path(f"{finished[count]}.{rank}.err").read_text("utf-8") == ""


def test_a_run_is_finished_for_any_number_of_ranks(
    finished: dict[int, Path], runs: Runs, keys: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished[2], output)
    assert run_together(runs, 1, keys, output) == [0]
    assert run_together(runs, 3, keys, output) == [0] * 3
    assert "this run is finished" in Path(f"{output}.out").read_text("utf-8")


@pytest.mark.parametrize(("before", "now"), [(1, 2), (3, 1), (2, 3)])
def test_a_run_resumes_with_another_number_of_ranks(
    finished: dict[int, Path], runs: Runs, keys: list[str], tmp_path: Path, before: int, now: int
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished[before], output)
    for name in ("final", "step-000016", "step-000012"):
        shutil.rmtree(output / "checkpoints" / name, ignore_errors=True)
    assert run_together(runs, now, keys, output) == [0] * now
    printed, noted = (Path(f"{output}{ending}").read_text("utf-8") for ending in (".out", ".err"))
    assert f"resuming from {output / 'checkpoints' / 'step-000008'}\n" in printed
    sizes = f"train.per_device_train_batch_size: {6 // before} -> {6 // now}, processes: {before} -> {now}"
    assert f"note: {sizes}; " in noted
    assert_equal_runs(output, finished[1])
    state = json.loads((output / "checkpoints" / "step-000016" / "state.json").read_text("utf-8"))
    assert state["machine"]["ranks"] == now


@pytest.mark.parametrize("is_finished", [True, False])
def test_ranks_that_would_make_larger_steps_are_refused_by_rank_0(
    finished: dict[int, Path], runs: Runs, keys: list[str], tmp_path: Path, is_finished: bool
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished[1], output)
    if not is_finished:
        shutil.rmtree(output / "checkpoints" / "final")
    pids = runs.start_ranks(2, [*keys, "train.per_device_train_batch_size=6"], output)
    assert [runs.wait(pid) for pid in pids] == [2, 2]
    errors = Path(f"{output}.err").read_text("utf-8")
    assert errors.startswith(f"error: {output}: ")
    assert "processes: 1 -> 2" in errors
    assert "train.per_device_train_batch_size=3" in errors
    assert Path(f"{output}.1.err").read_text("utf-8") == ""


def test_a_mistake_of_all_ranks_is_printed_by_rank_0(runs: Runs, keys: list[str], tmp_path: Path) -> None:
    assert run_together(runs, 3, [*keys, "lora.rnak=3"], tmp_path / "run") == [2, 2, 2]
    assert "lora.rnak: unknown key" in (tmp_path / "run.err").read_text("utf-8")
    assert [(tmp_path / f"run.{rank}.err").read_text("utf-8") for rank in (1, 2)] == ["", ""]


def test_a_rank_with_another_base_model_ends_all(
    runs: Runs, keys: list[str], tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    """As on a machine with another copy of the base model."""
    pids = []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    for rank, model in enumerate((tiny_checkpoint(), tiny_checkpoint(seed=1))):
        environment = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": "0"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own_keys = [*keys, f"model.name_or_path={model}"]
        pids.append(runs.start(own_keys, tmp_path / "run", None, environment, tmp_path / str(rank)))
    assert [runs.wait(pid) for pid in pids] == [2, 2]
    first, second = ((tmp_path / f"{rank}.err").read_text("utf-8") for rank in (0, 1))
    assert re.search("rank 1 on .*model.safetensors.* than rank 0", first)
    assert second == ""


def test_evaluation_by_several_ranks_gives_the_results_of_one(found: Found) -> None:
    several, one = (found[0]["scripts"][f"evaluate, {name}"].splitlines() for name in ("ranks", "single"))
    results, expected = (json.loads(lines[-1]) for lines in (several, one))
    for metrics in (results, expected, results["base"], expected["base"]):
        del metrics["reviews_per_s"]
    assert results == expected
    assert len(several) == len(one)
    assert found[0]["predictions"]["ranks"] == found[0]["predictions"]["single"] != ""


def test_prediction_by_several_ranks_gives_the_lines_of_one(found: Found) -> None:
    printed = found[0]["scripts"]
    assert len(printed["file, single"].splitlines()) == 40
    assert printed["file, ranks"] == printed["file, single"]
    # If a busy machine makes the pipe pause, its windows and so its batches are others, and rounded otherwise.
    for line, expected_line in zip(
        printed["pipe, ranks"].splitlines(), printed["file, single"].splitlines(), strict=True
    ):
        result, expected = json.loads(line), json.loads(expected_line)
        assert result.pop("probabilities") == pytest.approx(expected.pop("probabilities"), rel=1e-5)
        assert result == {**expected, "probability": pytest.approx(expected["probability"], rel=1e-5)}


def test_only_rank_0_prints_results(found: Found) -> None:
    assert all(text == "" for one in found[1:] for text in one["scripts"].values())


# One process.


def test_without_torchrun_there_is_a_single_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Ranks] = []
    for environment in ({}, {"WORLD_SIZE": "2"}, dict.fromkeys(VARIABLES, "1")):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with_ranks(seen.append)()
    assert seen == [SINGLE_RANK] * 3
    assert not dist.is_initialized()


def test_a_single_rank_exchanges_nothing_and_leaves_errors_as_they_are() -> None:
    assert SINGLE_RANK.all_gather(3) == [3]
    assert SINGLE_RANK.run_on_rank_0(lambda: torch.Size([3])) == torch.Size([3])
    assert SINGLE_RANK.gather_in_order([1, 2]) == [1, 2]
    assert all(SINGLE_RANK.owns(number) for number in range(3))
    loss, tensors = torch.tensor(1.0), {"a": torch.zeros(1)}
    assert SINGLE_RANK.all_reduce_gradients([], loss) is loss
    assert SINGLE_RANK.broadcast_tensors(tensors) is tensors
    for around in (SINGLE_RANK.barrier, SINGLE_RANK.rank_0_first):
        error = ZeroDivisionError()
        with pytest.raises(ZeroDivisionError) as caught, around():
            raise error
        assert caught.value is error


def test_ranks_that_cannot_connect_are_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    values = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torchrun, "TIMEOUT", timedelta(seconds=1))
    with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}: the ranks cannot connect .+ --nnodes"):
        with_ranks(lambda _: pytest.fail("joined"))()


@pytest.mark.parametrize(("has_nccl", "expected"), [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_gpus_are_connected_by_gloo_where_pytorch_has_no_nccl(
    has_nccl: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends: list[str] = []

    def connect(backend: str, **_: Any) -> None:
        backends.append(backend)
        raise RuntimeError("far enough")

    for name, value in zip(VARIABLES, ("1", "2", "1", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torchrun, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(torchrun, "set_silent", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: has_nccl)
    monkeypatch.setattr(dist, "init_process_group", connect)
    with pytest.raises(UserError, match="far enough"):
        with_ranks(lambda _: pytest.fail("joined"))()
    assert backends == [expected]


def test_each_rank_needs_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for ranks, device in ((SINGLE_RANK, "cuda:1"), (Ranks(1, 4, 1), "cuda"), (Ranks(3, 4, 3), "cpu")):
        ranks.check_device(torch.device(device))
    with pytest.raises(UserError, match=r"model\.device: cuda:1 .* 4 ranks"):
        Ranks(1, 4, 1).check_device(torch.device("cuda:1"))
    with pytest.raises(UserError, match=r"model\.device: .* 2 GPUs.*--nproc-per-node"):
        Ranks(2, 4, 2).check_device(torch.device("cuda"))


# The real checkpoint.


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif("MINILORA_REAL_MODEL" not in os.environ, reason="needs MINILORA_REAL_MODEL")
def test_two_ranks_take_the_steps_of_one_with_a_real_checkpoint(processed_data: Path, tmp_path: Path) -> None:
    keys = [
        f"model.name_or_path={os.environ['MINILORA_REAL_MODEL']}",
        "model.compute_dtype=float32",
        f"data.dir={processed_data}",
        "data.max_validation_examples=4",
        "lora.dropout=0",
        "train.max_steps=2",
        "train.do_predict=false",
    ]
    for count in (1, 2):
        more = (f"train.per_device_train_batch_size={4 // count}", f"train.output_dir={tmp_path / str(count)}")
        done = run_ranks(count, SCRIPTS / "train.py", *keys, *more)
        assert done.returncode == 0, done.stderr
    for row, expected in zip(lasting(tmp_path / "2"), lasting(tmp_path / "1"), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)  # float32 sums of 24 layers in another order
    one, two = adapter_of(tmp_path / "1"), adapter_of(tmp_path / "2")
    # Adam's first steps divide a gradient by its own size: where that is all rounding, so is the step, which is as
    # large as any. The rest agrees as gradients do.
    assert (two - one).norm() < 1e-3 * one.norm()
