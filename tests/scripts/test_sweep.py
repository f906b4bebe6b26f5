"""scripts/sweep.py: runs as train.py makes them, over one base model, resumed; a table that says what was seen."""

import json
import math
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minilora import build
from minilora.errors import UserError
from minilora.runs import train as train_module
from minilora.runs.metrics_log import MEASURED_KEYS
from minilora.system.signals import Interrupted
from tests.scripts.conftest import RunMain, load_script

SWEEP = load_script("sweep")
TRAIN = load_script("train")


@pytest.fixture
def keys(tiny_checkpoint: Callable[..., Path], processed_data: Path) -> list[str]:
    return [
        f"model.name_or_path={tiny_checkpoint()}",
        f"data.dir={processed_data}",
        "model.compute_dtype=float32",
        "lora.r=2",
        "lora.dropout=0.1",
        "train.max_steps=4",
        "train.per_device_train_batch_size=4",
        "train.eval_steps=2",
        "train.save_steps=2",
        "train.metric_for_best_model=eval_f1",
    ]


@pytest.fixture
def count_loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Gets an entry for every base model that is loaded."""
    loads: list[Any] = []
    plain = build.load_model

    def load_model(*arguments: Any, **more: Any) -> Any:
        loads.append(arguments)
        return plain(*arguments, **more)

    monkeypatch.setattr(build, "load_model", load_model)
    return loads


def contents(final: Path) -> dict[str, bytes]:
    """Of a final folder, less what names its own output folder."""
    names = ("adapter_model.safetensors", "adapter_config.json", "metrics.json")
    return {name: (final / name).read_bytes() for name in names}


def table_of(shown: str) -> str:
    return shown[shown.index("\nsetting") :]


def log(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED_KEYS} for line in lines]


def test_runs_are_those_of_train_over_one_base_model(
    keys: list[str], tmp_path: Path, run_main: RunMain, count_loads: list[Any]
) -> None:
    """Also where adapters follow each other that are of other layers and kinds."""
    varied = ["lora.target_modules=all-linear,[q_proj],[v_proj]", "lora.use_dora=false,true"]
    run_main(SWEEP, "--output_dir", tmp_path / "sweep", *keys, *varied)
    assert len(count_loads) == 1
    runs = sorted(path.parent for path in (tmp_path / "sweep").glob("*/checkpoints"))
    assert len(runs) == 6
    for number, (modules, dora) in enumerate([("[v_proj]", "false"), ("all-linear", "true")]):
        own = [*keys, f"lora.target_modules={modules}", f"lora.use_dora={dora}", "train.do_predict=false"]
        run_main(TRAIN, *own, f"train.output_dir={tmp_path / str(number)}")
        expected = contents(tmp_path / str(number) / "checkpoints" / "final")
        (same,) = [run for run in runs if contents(run / "checkpoints" / "final") == expected]
        assert log(same) == log(tmp_path / str(number))


def test_each_run_of_a_sweep_measures_its_own_peak(
    keys: list[str], tmp_path: Path, run_main: RunMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    resets: list[Any] = []
    monkeypatch.setattr(build, "reset_peak_memory", resets.append)
    run_main(SWEEP, "--output_dir", tmp_path, *keys, "train.seed=1,2")
    assert len(resets) == 2


def test_the_same_command_resumes_where_it_stopped(
    keys: list[str], tmp_path: Path, run_main: RunMain, monkeypatch: pytest.MonkeyPatch, count_loads: list[Any]
) -> None:
    command = ["--output_dir", tmp_path / "sweep", *keys, "train.seed=1,2,3"]
    plain, steps = train_module.train_step, []

    def train_step(state: Any, micro_batches: Any, settings: Any, interruptible: Any) -> Any:
        steps.append(settings.step)
        if len(steps) == 7:
            raise Interrupted(2, "stopped by Ctrl-C")
        return plain(state, micro_batches, settings, interruptible)

    monkeypatch.setattr(train_module, "train_step", train_step)
    with pytest.raises(Interrupted, match="the same command resumes"):
        run_main(SWEEP, *command)
    table = json.loads((tmp_path / "sweep" / "sweep.json").read_text("utf-8"))
    statuses = [run["status"] for run in table["settings"][0]["runs"]]
    assert [status.partition(",")[0] for status in statuses] == ["finished", "not begun", "not begun"]
    del steps[:], count_loads[:]
    steps += [0] * 8
    shown, _ = run_main(SWEEP, *command)
    assert steps[8:] == [3, 4, 1, 2, 3, 4]
    assert "3/3" in shown
    del steps[:], count_loads[:]
    again, _ = run_main(SWEEP, *command)
    assert table_of(again) == table_of(shown)
    assert steps == count_loads == []


def test_the_table_says_what_the_runs_scored_and_names_the_next_command(
    keys: list[str], tmp_path: Path, run_main: RunMain
) -> None:
    output = tmp_path / "a sweep"
    shown, _ = run_main(SWEEP, "--output_dir", output, *keys, "train.learning_rate=1e-5,1e-2", "train.seed=1,2")
    table = json.loads((output / "sweep.json").read_text("utf-8"))
    assert table["metric"] == "f1"
    for row in table["settings"]:
        for run, score in zip(row["runs"], row["scores"], strict=True):
            results = json.loads((output / run["name"] / "checkpoints/final/metrics.json").read_text("utf-8"))
            assert results["validation"] == {"eval_f1": score, "step": run["step"]}
            assert results["test"] is None
        assert row["mean"] == pytest.approx(math.fsum(row["scores"]) / 2)
    best = max(table["settings"], key=lambda row: row["mean"])
    assert table["best"] == best["setting"]
    chosen = max(best["runs"], key=lambda run: run["score"])
    assert f"evaluate.py --model_path '{output / chosen['name'] / 'checkpoints' / 'final'}'" in shown
    page = (output / "sweep.html").read_text("utf-8")
    assert all(row["setting"] in page and f"{row['mean']:.4f}" in page for row in table["settings"])


def test_a_run_whose_losses_are_non_finite_is_told_and_the_others_go_on(
    keys: list[str], tmp_path: Path, run_main: RunMain
) -> None:
    command = [*keys, "train.max_skipped_steps=2", "train.max_grad_norm=0", "train.learning_rate=1e-2,1e30"]
    shown, errors = run_main(SWEEP, "--output_dir", tmp_path, *command)
    assert "learning_rate=1e30" in errors
    assert "1/1" in shown
    assert "0/1" in shown
    table = json.loads((tmp_path / "sweep.json").read_text("utf-8"))
    assert table["settings"][1]["runs"][0]["status"] == "non-finite losses"


def test_a_restart_sets_the_runs_aside_and_trains_other_ones(
    keys: list[str], tmp_path: Path, run_main: RunMain
) -> None:
    """Of a changed configuration the refusal names --restart."""
    command = ["--output_dir", tmp_path, *keys, "train.seed=1,2"]
    run_main(SWEEP, *command)
    with pytest.raises(UserError, match="--restart"):
        run_main(SWEEP, *command, "lora.alpha=3")
    run_main(SWEEP, *command, "lora.alpha=3", "--restart")
    for seed in (1, 2):
        run = tmp_path / f"seed={seed}"
        assert (run / "previous-1" / "checkpoints" / "final").is_dir()
        assert json.loads((run / "checkpoints/final/adapter_config.json").read_text("utf-8"))["lora_alpha"] == 3


def test_a_model_that_is_not_there_is_said_before_anything_is_trained(
    keys: list[str], tmp_path: Path, run_main: RunMain, count_loads: list[Any]
) -> None:
    base = next(key for key in keys if key.startswith("model.name_or_path="))
    with pytest.raises(UserError, match="no-such-model"):
        run_main(SWEEP, "--output_dir", tmp_path / "sweep", *keys, f"{base},{tmp_path / 'no-such-model'}")
    assert count_loads == []
    assert list((tmp_path / "sweep").iterdir()) == []


@pytest.mark.parametrize(
    "choice",
    ["lora.target_modules=[q_proj],[q_prj]", "lora.layers_to_transform=[0],[9]", "lora.rank_pattern={},{x: 2}"],
)
def test_layers_that_the_model_lacks_are_said_before_anything_is_trained(
    choice: str, keys: list[str], tmp_path: Path, run_main: RunMain, count_loads: list[Any]
) -> None:
    with pytest.raises(UserError, match=choice.partition("=")[0]):
        run_main(SWEEP, "--output_dir", tmp_path / "sweep", *keys, choice)
    assert count_loads == []
    assert list((tmp_path / "sweep").iterdir()) == []


def test_conversations_are_compared_by_their_loss_and_the_next_command_takes_them(
    keys: list[str], tmp_path: Path, run_main: RunMain
) -> None:
    data = tmp_path / "chat"
    data.mkdir()
    for split in ("train", "validation", "test"):
        turns = [[("user", f"问题 {i}"), ("assistant", f"回答 {i}")] for i in range(8)]
        records = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (data / f"{split}.jsonl").write_text(lines, "utf-8")
    own = [key for key in keys if not key.startswith(("data.dir=", "train.metric_for_best_model="))]
    output = tmp_path / "it's"
    shown, _ = run_main(SWEEP, "--output_dir", output, *own, f"data.dir={data}", "train.learning_rate=1e-4,1e-2")
    (line,) = [line for line in shown.splitlines() if "--model_path" in line]
    words = shlex.split(line)
    assert words[:2] == ["python", "scripts/chat.py"]  # evaluate.py refuses conversations
    assert (Path(words[3]) / "adapter_config.json").is_file()
    page = (output / "sweep.html").read_text("utf-8")
    assert "bootstrap" not in page
    assert "no intervals" in page


def test_settings_that_are_validated_on_other_records_say_so(
    keys: list[str], tmp_path: Path, run_main: RunMain
) -> None:
    shown, _ = run_main(SWEEP, "--output_dir", tmp_path, *keys, "data.max_validation_examples=3,4")
    assert shown.count("validated on other records") == 1
    assert (tmp_path / "sweep.html").read_text("utf-8").count("validated on other records") == 1


def test_a_sweep_of_which_no_run_is_finished_is_an_error(keys: list[str], tmp_path: Path, run_main: RunMain) -> None:
    command = [*keys, "train.max_skipped_steps=2", "train.max_grad_norm=0", "train.learning_rate=1e30"]
    with pytest.raises(UserError, match="no run is finished"):
        run_main(SWEEP, "--output_dir", tmp_path, *command)
    assert "non-finite losses" in (tmp_path / "sweep.html").read_text("utf-8")


def test_folds_are_one_setting_each_and_share_its_records(keys: list[str], tmp_path: Path, run_main: RunMain) -> None:
    shown, _ = run_main(SWEEP, "--output_dir", tmp_path, "--folds", 2, *keys, "train.learning_rate=1e-4,1e-2")
    assert shown.count("2/2") == 2
    table = json.loads((tmp_path / "sweep.json").read_text("utf-8"))
    assert [len(row["scores"]) for row in table["settings"]] == [2, 2]
    assert {row["difference"] is None for row in table["settings"]} == {True, False}


def test_predictions_that_are_damaged_are_written_anew_as_the_message_says(
    keys: list[str], tmp_path: Path, run_main: RunMain
) -> None:
    command = ["--output_dir", tmp_path, *keys, "train.seed=1"]
    shown, _ = run_main(SWEEP, *command)
    (tmp_path / "run" / "validation.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="move") as caught:
        run_main(SWEEP, *command)
    assert str(tmp_path / "run" / "checkpoints" / "final") in str(caught.value)
    shutil.move(tmp_path / "run" / "checkpoints" / "final", tmp_path / "away")
    assert table_of(run_main(SWEEP, *command)[0]) == table_of(shown)
