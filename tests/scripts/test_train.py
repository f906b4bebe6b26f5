"""Whole runs through the script: they resume to the bit, refuse what would change them, and lose nothing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from minilora.errors import UserError
from minilora.runs import data_folder
from minilora.runs.metrics_log import MEASURED_KEYS
from tests.scripts.conftest import SCRIPTS, RunMain, load_script


def run_script(
    name: str, *arguments: str | Path, check: bool = True, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, SCRIPTS / name, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        cwd=cwd,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def keys(tiny_checkpoint: Callable[..., Path], processed_data: Path) -> list[str]:
    return [
        f"model.name_or_path={tiny_checkpoint()}",
        f"data.dir={processed_data}",
        "data.max_length=128",
        "lora.r=2",
        "lora.dropout=0.1",
        "train.num_train_epochs=2",
        "train.max_steps=null",
        "train.per_device_train_batch_size=4",
        "train.gradient_accumulation_steps=2",
        "train.learning_rate=5e-3",
        "train.eval_steps=4",
        "train.save_steps=3",
    ]


def final_files(output: Path) -> dict[str, bytes]:
    final = output / "checkpoints" / "final"
    return {name: (final / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")}


def log_without_measurements(output: Path) -> list[dict[str, object]]:
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{k: v for k, v in entry.items() if k not in MEASURED_KEYS} for entry in entries]


@pytest.fixture(scope="module")
def finished(keys: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    run_script("train.py", *keys, f"train.output_dir={output}")
    return output


@pytest.fixture
def undisturbed(finished: Path, tmp_path: Path) -> Path:
    """The folder of a finished run, to be changed at will."""
    return Path(shutil.copytree(finished, tmp_path / "undisturbed"))


@pytest.mark.slow
def test_a_run_that_was_killed_twice_ends_in_the_same_bytes(keys: list[str], undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    generator = random.Random(7)
    kills = 0
    while kills < 2:
        process = subprocess.Popen(
            [sys.executable, SCRIPTS / "train.py", *keys, f"train.output_dir={output}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        entries_wanted = generator.randint(2, 5) + 3 * kills
        while process.poll() is None:
            log = output / "metrics.jsonl"
            if log.is_file() and log.read_bytes().count(b"\n") >= entries_wanted:
                time.sleep(generator.random() * 0.1)
                process.send_signal(signal.SIGKILL) if os.name == "posix" else process.kill()
                break
            time.sleep(0.002)
        process.wait()
        assert process.returncode != 0, "the run ended before it was killed"
        kills += 1
    done = run_script("train.py", *keys, f"train.output_dir={output}")
    assert "resuming from" in done.stdout
    assert final_files(output) == final_files(undisturbed)
    assert log_without_measurements(output) == log_without_measurements(undisturbed)


def test_keys_that_change_no_result_may_change_in_the_middle_of_a_run(
    keys: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(undisturbed, tmp_path / "changed"))
    final = output / "checkpoints" / "final"
    removed = ["final", *sorted(path.name for path in final.parent.glob("step-*"))[1:]]
    for name in removed:  # as if it had been killed after its first checkpoint that is left
        shutil.rmtree(final.parent / name)
    harmless = [
        f"model.quantized_cache={tmp_path / 'cache'}",
        "model.cache_dequantized=true",
        "train.gradient_checkpointing=true",
        "train.offload_checkpoints=true",
    ]
    done = run_script("train.py", *keys, *harmless, f"train.output_dir={output}")
    assert "resuming from" in done.stdout
    assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == 1
    assert final_files(output) == final_files(undisturbed)
    assert log_without_measurements(output) == log_without_measurements(undisturbed)


def test_a_run_with_an_optimizer_of_bitsandbytes_resumes_to_the_bit(keys: list[str], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    outputs = [tmp_path / "whole", tmp_path / "resumed"]
    # r 64, so that some moments have the 4,096 elements from which on they are in 8 bits
    run_script("train.py", *keys, "lora.r=64", "train.optim=adamw_bnb_8bit", f"train.output_dir={outputs[0]}")
    shutil.copytree(*outputs)
    checkpoints = outputs[1] / "checkpoints"
    for name in ["final", *sorted(path.name for path in checkpoints.glob("step-*"))[1:]]:
        shutil.rmtree(checkpoints / name)
    done = run_script("train.py", *keys, "lora.r=64", "train.optim=adamw_bnb_8bit", f"train.output_dir={outputs[1]}")
    assert "resuming from" in done.stdout
    assert final_files(outputs[1]) == final_files(outputs[0])
    other = run_script("train.py", *keys, "lora.r=64", f"train.output_dir={outputs[1]}", check=False)
    assert other.returncode == 2
    assert 'train.optim: "adamw_bnb_8bit" -> "adamw_torch_fused"' in other.stderr


def test_the_final_folder_and_the_log_hold_what_is_promised(undisturbed: Path) -> None:
    final = undisturbed / "checkpoints" / "final"
    assert {path.name for path in final.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "training_args.json",
        "metrics.json",
        "calibration.json",
        "README.md",
        "manifest.json",
    }
    assert (undisturbed / "loss.png").stat().st_size > 10_000
    assert "<h1>Training report</h1>" in (undisturbed / "report.html").read_text("utf-8")
    entries = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    assert {"epoch", "train_loss", "learning_rate", "grad_norm", "tokens_per_s"} <= set(entries[0])
    assert {"eval_loss", "eval_accuracy", "eval_f1"} <= set(entries[3])
    assert "eval_loss" not in entries[0]
    assert entries[-1]["epoch"] == 2
    metrics = json.loads((final / "metrics.json").read_text("utf-8"))
    assert metrics["test_before"]["num_examples"] == metrics["test"]["num_examples"] > 0
    assert json.loads((final / "training_args.json").read_text("utf-8"))["lora"]["r"] == 2


def test_a_finished_run_is_left_alone_changed_keys_are_refused_and_restart_sets_it_aside(
    keys: list[str], undisturbed: Path
) -> None:
    again = [*keys, f"train.output_dir={undisturbed}"]
    before = final_files(undisturbed)
    assert "this run is finished" in run_script("train.py", *again).stdout

    refused = run_script("train.py", *again, "lora.r=4", "train.learning_rate=1e-3", check=False)
    assert refused.returncode == 2
    assert "lora.r: 2 -> 4" in refused.stderr
    assert "train.learning_rate: 0.005 -> 0.001" in refused.stderr
    assert "--restart" in refused.stderr
    assert "Traceback" not in refused.stderr

    run_script("train.py", *again, "--restart", "train.num_train_epochs=1")
    assert final_files(undisturbed) != before
    assert final_files(undisturbed / "previous-1") == before


def test_a_run_is_set_aside_behind_the_last_one_whatever_is_missing_before_it(
    keys: list[str], undisturbed: Path
) -> None:
    for name in ("previous-2", "previous-3", "previous-x"):
        (undisturbed / name).mkdir()
    before = final_files(undisturbed)
    run_script("train.py", *keys, f"train.output_dir={undisturbed}", "--restart", "train.max_steps=1")
    assert final_files(undisturbed / "previous-4") == before


def test_evaluation_of_the_final_adapter_agrees_with_the_training(
    keys: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    final = undisturbed / "checkpoints" / "final"
    done = run_script("evaluate.py", "--model_path", final, "--output_dir", tmp_path / "out", "--compare-base")
    results = json.loads(done.stdout.splitlines()[-1])
    trained = json.loads((final / "metrics.json").read_text("utf-8"))
    assert results["accuracy"] == trained["test"]["accuracy"]
    assert results["base"]["accuracy"] == trained["test_before"]["accuracy"]
    assert {"precision", "recall", "f1"} <= set(results) & set(results["base"])
    assert 0 <= results["mcnemar"]["p_value"] <= 1
    lines = (tmp_path / "out" / "predictions.jsonl").read_text("utf-8").splitlines()
    first = json.loads(lines[0])
    assert set(first) == {"index", "text", "label", "prediction", "probabilities"}
    assert sum(first["probabilities"].values()) == pytest.approx(1)
    right = sum(line["label"] == line["prediction"] for line in map(json.loads, lines))
    assert right / len(lines) == results["accuracy"]


def test_free_form_chat_trains_through_the_same_path(keys: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    folder.mkdir()
    for split, count in (("train", 8), ("validation", 4), ("test", 4)):
        records = [
            {"messages": [{"role": "user", "content": f"问题 {i}"}, {"role": "assistant", "content": f"回答 {i}"}]}
            for i in range(count)
        ]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{split}.jsonl").write_text(lines, "utf-8")
    output = tmp_path / "chat-run"
    for key in ("train.class_weights=balanced", "train.metric_for_best_model=eval_macro_f1"):
        refused = run_script("train.py", *keys, key, f"data.dir={folder}", f"train.output_dir={output}", check=False)
        assert refused.returncode == 2
        assert key.partition("=")[0] in refused.stderr
        assert "Traceback" not in refused.stderr
    # 40 tokens are enough for these conversations, and would not be for the instruction, which they do not have
    run_script("train.py", *keys, f"data.dir={folder}", f"train.output_dir={output}", "data.max_length=40")
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert "eval_loss" in entries[-1]
    assert "eval_accuracy" not in entries[-1]
    assert "eval_num_examples" not in entries[-1]
    final = output / "checkpoints" / "final"
    assert json.loads((final / "metrics.json").read_text("utf-8"))["test"]["num_examples"] == 4
    card = (final / "README.md").read_text("utf-8")
    assert "Test set: 4 records." in card
    assert "正面" not in card
    assert entries[-1]["train_loss"] < entries[0]["train_loss"]
    page = (output / "report.html").read_text("utf-8")
    assert "4 records, 0 cut to 40 tokens. Conversations have no labels" in page
    assert "Worst mistakes" not in page


def test_dry_run_prints_the_plan_and_writes_nothing(keys: list[str], tmp_path: Path) -> None:
    output = tmp_path / "planned"
    done = run_script("train.py", *keys, "--dry_run", f"train.output_dir={output}", "train.class_weights=balanced")
    for part in (
        "train.class_weights: 负面 1, 正面 1\n",
        "projections (nf4",
        "largest micro-batch",
        "total",
        "an epoch:",
        "<|im_start|>assistant",
    ):
        assert part in done.stdout
    assert not output.exists()


@pytest.mark.parametrize("source", ["demo", "chnsenticorp"])
def test_a_dry_run_without_data_prepares_it_elsewhere_and_leaves_nothing_behind(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, source: str
) -> None:
    folder = tmp_path / "data" / "chn_senti_corp"
    folder.mkdir(parents=True)
    for split, numbers in (("train", range(40)), ("validation", range(40, 50)), ("test", range(50, 60))):
        table = pyarrow.table({"label": [n % 2 for n in numbers], "text": [f"评论{n}" for n in numbers]})
        features = {"label": {"names": ["negative", "positive"], "_type": "ClassLabel"}}  # of this known data set
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
    before = sorted(tmp_path.rglob("*"))
    keys = (f"data.source={source}", f"model.name_or_path={tiny_checkpoint()}", "data.max_train_examples=8")
    done = run_script("train.py", "--dry_run", *keys, cwd=tmp_path)
    assert f"preparing it from {source}\n" in done.stdout
    assert "train: 8 examples" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_a_slip_in_the_data_folder_trains_on_nothing_else(
    more: list[str], tmp_path: Path, run_main: RunMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = load_script("train")
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "mine.yaml").write_text("data: {dir: data/mnie}\n", "utf-8")
    named = (
        r"data/mnie holds no train\.jsonl; .*preprocess_data\.py --input FILES --output_dir data/mnie, .*data\.source="
    )
    for arguments in (["data.dir=data/mnie"], ["--config", "mine.yaml"]):
        with pytest.raises(UserError, match=rf"^data\.dir: {named}.*; did you mean data/mine\?$"):
            run_main(script, *arguments, *more)
    with pytest.raises(UserError, match=r"^data\.dir: mine\.yaml is a file, .*preprocess_data\.py --input mine\.yaml "):
        run_main(script, "data.dir=mine.yaml", *more)
    with pytest.raises(UserError, match=r"mien\.yaml: cannot be read .*; did you mean mine\.yaml\?"):
        run_main(script, "--config", "mien.yaml", *more)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "mine", "mine.yaml"]


@pytest.mark.parametrize(
    "arguments", [[], ["data.dir=data/quickstart/"], ["data.dir=data/other", "data.source=demo"], ["data.source=demo"]]
)
def test_data_is_prepared_where_it_is_asked_for(
    arguments: list[str], tmp_path: Path, run_main: RunMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = load_script("train")
    prepared = []
    monkeypatch.setattr(data_folder, "prepare_demo", prepared.append)
    monkeypatch.setattr(script, "fit", lambda *_: None)
    run_main(script, *arguments)
    assert prepared == [Path("data/other" if "other" in str(arguments) else "data/quickstart")]


def test_splits_of_which_some_are_missing_are_never_prepared_over(tmp_path: Path) -> None:
    (tmp_path / "data" / "quickstart").mkdir(parents=True)
    train = tmp_path / "data" / "quickstart" / "train.jsonl"
    train.write_text("mine", "utf-8")
    refused = run_script("train.py", check=False, cwd=tmp_path)
    assert refused.returncode == 2
    assert "data/quickstart: has no validation.jsonl, test.jsonl; correct data.dir, or prepare" in refused.stderr
    assert train.read_text("utf-8") == "mine"


def test_help_lists_every_key() -> None:
    text = run_script("train.py", "--help").stdout
    for key in ("model.quantization", "lora.target_modules", "train.gradient_accumulation_steps", "prompt.labels"):
        assert key in text


@pytest.mark.parametrize("as_json", [True, False])
def test_inspect_batch_shows_what_is_supervised(keys: list[str], as_json: bool) -> None:
    done = run_script("inspect_batch.py", *(["--json"] if as_json else []), *keys)
    if not as_json:
        assert "[[正面<|im_end|>]]" in done.stdout or "[[负面<|im_end|>]]" in done.stdout
        return
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert set(line) == {"input_ids", "supervised", "text", "label"}
        assert len(line["input_ids"]) == len(line["supervised"])
        assert line["text"].endswith(f"{line['label']}<|im_end|>")
