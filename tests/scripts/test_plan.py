"""scripts/plan.py answers without a network, by name, by folder and by data; what it advises fits."""

import json
import re
import shlex
import shutil
import sys
import tracemalloc
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from minilora import build
from minilora.config import LoraConfig, load_config
from minilora.data import hub
from minilora.errors import UserError
from minilora.planning import budget
from minilora.planning.memory import BatchShape, ParameterCounts, count_parameters
from minilora.planning.plan import SIZES
from minilora.qlora.model import Qwen2Config
from minilora.system.cli import QUICKSTART
from tests.scripts.conftest import SCRIPTS, RunMain, load_script

RECIPE = SCRIPTS / "configs" / "chnsenticorp.yaml"
Plan = Callable[..., str]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("plan")


@pytest.fixture
def plan(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Plan:
    """A function: arguments of the command line -> what the script printed; in an empty folder, without a hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download_snapshot", refuse)
    monkeypatch.setattr(budget, "count_parameters", count_once)

    def call(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, arguments)])
        script.main()
        return capsys.readouterr().out

    return call


COUNTED: dict[object, ParameterCounts] = {}


def count_once(architecture: Qwen2Config, lora_config: LoraConfig, folder: Path | None) -> ParameterCounts:
    """`count_parameters`, whose answer is the same in every test."""
    key = (architecture, repr(lora_config), folder)
    if key not in COUNTED:
        COUNTED[key] = count_parameters(architecture, lora_config, folder)
    return COUNTED[key]


def refuse(*_: object, **__: object) -> Path:
    raise UserError("the hub cannot be reached")


def last_line(printed: str) -> Any:
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_planned_by_name(plan: Plan, size: str) -> None:
    printed = plan("--size", size, "--budget", "24GB")
    assert f"Qwen/Qwen2.5-{size}-Instruct on cuda, bfloat16: examples of up to 112 tokens" in printed
    for part in ("projections (nf4, 4.13 bits)", "CUDA's context", "total", "the most that fits", "what would help"):
        assert part in printed


def test_the_command_line_that_it_ends_with_fits(plan: Plan) -> None:
    printed = plan("--size", "7B", "--budget", "8GB", "lora.r=16")
    assert "7B-Instruct on cuda" in printed
    assert " over 8.00 GB" in printed
    command = shlex.split(printed.splitlines()[-1])
    assert command[:2] == ["python", "scripts/train.py"]
    keys = command[4:]
    assert "model.name_or_path=Qwen/Qwen2.5-7B-Instruct" in keys
    assert "lora.r=16" in keys
    again = plan("--config", command[3], "--budget", "8GB", "--json", *keys)
    assert last_line(again)["fits"] is True
    assert last_line(again)["combination"] == []


def test_the_command_names_the_configuration_that_was_given(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("lora: {r: 64}\n", "utf-8")
    arguments = ("--size", "7B", "--budget", "8GB", "--length", "300")
    assert "--config mine.yaml data.max_length=300 " in plan(*arguments, "--config", tmp_path / "mine.yaml")
    assert f"--config {QUICKSTART} " in plan(*arguments)


def test_where_nothing_fits_the_floor_and_what_fits_are_said(plan: Plan) -> None:
    printed = plan("--size", "72B", "--budget", "24GB")
    assert re.search(r"nothing makes it fit: .* 4[0-9.]+ GB, .*weights 4[0-9.]+ GB", printed)
    assert printed.endswith("sizes that fit: 0.5B, 1.5B, 3B, 7B, 14B, 32B\n")
    assert re.search(r"per_device_train_batch_size +none\n", printed)
    assert "sizes that fit: none" in plan("--size", "0.5B", "--budget", "100MB")


def test_json_for_machines_is_the_last_line(plan: Plan) -> None:
    found = last_line(plan("--size", "7B", "--budget", "12GB", "--json"))
    assert found["model"] == "Qwen/Qwen2.5-7B-Instruct"
    assert found["total_bytes"] == sum(found["ledger"].values()) > found["budget_bytes"] == 12 * 10**9
    assert found["command"].endswith(found["combination"][0])
    assert found["knobs"][0]["saves_bytes"] > found["knobs"][-1]["saves_bytes"] > 0


def test_a_table_of_all_sizes(plan: Plan) -> None:
    printed = plan("--all", "--budget", "24GB", "--json")
    rows = last_line(printed)
    assert [row["size"] for row in rows] == list(SIZES)
    assert [row["fits"] for row in rows] == sorted((row["fits"] for row in rows), reverse=True)
    for row in rows:
        assert re.search(rf"^ +{row['size']} +[0-9.]+ GB  {'yes' if row['fits'] else 'no'} ", printed, re.MULTILINE)
        assert row["fits"] <= bool(row["max_tokens_per_micro_batch"]) <= (row["least_bytes"] <= 24 * 10**9)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--size", "0.5B", "--device", "cpu"], "on cpu"),
        (["--size", "0.5B", "model.device=cpu"], "on cpu"),
        (["--size", "0.5B", "--device", "cuda", "model.compute_dtype=float32"], "on cuda, float32"),
        (["model.name_or_path=Qwen/Qwen2.5-Coder-3B"], "Qwen/Qwen2.5-Coder-3B on cuda"),
        (["--size", "0.5B", "--length", "100"], "examples of up to 100 tokens, micro-batches of up to 3,200 tokens"),
        (["--size", "0.5B", "data.max_length=100"], "examples of up to 100 tokens"),
    ],
)
def test_device_type_and_length_are_what_was_asked(plan: Plan, arguments: list[str], shown: str) -> None:
    printed = plan("--budget", "24GB", *arguments)
    assert shown in printed.splitlines()[0]
    assert ("Python and PyTorch themselves" in printed) == ("on cpu" in shown)
    assert ("CUDA's context" in printed) != ("on cpu" in shown)


@pytest.mark.parametrize(("length", "is_said"), [("2048", False), ("2049", True)])
def test_a_length_beyond_the_models_positions_is_said(
    plan: Plan,
    tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    length: str,
    is_said: bool,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(build, "warn", said.append)
    plan(f"model.name_or_path={tiny_checkpoint()}", "--budget", "8GB", "--length", length)
    assert any(f"data.max_length: {length} tokens" in text for text in said) == is_said


def test_a_folder_is_planned_for_its_prepared_data(
    plan: Plan, tiny_checkpoint: Callable[..., Path], processed_data: Path
) -> None:
    model = tiny_checkpoint()
    arguments = ("--budget", "24GB", "--config", RECIPE, f"model.name_or_path={model}", f"data.dir={processed_data}")
    first = plan(*arguments).splitlines()[0]
    assert first.startswith(f"{model} on cuda, bfloat16: 48 examples of up to ")
    assert "4 examples of" in plan(*arguments, "data.max_train_examples=4").splitlines()[0]
    assert f"{model} on cuda, bfloat16: examples of up to 200 tokens" in plan(*arguments, "--length", "200")


def test_columns_and_encoding_of_the_data_to_plan_for_are_named(
    script: ModuleType, run_main: RunMain, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text("text,words,stars\n,好,1\n,差,2\n", "gb18030")
    reading = ("--text-column", "words", "--label-column", "stars", "--encoding", "GBK")
    keys = (f"model.name_or_path={tiny_checkpoint()}", 'prompt.labels=["1", "2"]', f"data.dir={tmp_path / 'nowhere'}")
    out, err = run_main(script, "--budget", "12GB", "--data", tmp_path / "a.csv", *reading, *keys)
    assert "2 examples of up to" in out
    assert err == f"{tmp_path / 'a.csv'}: text from 'words', label from 'stars'; other columns: text\n"
    err = run_main(script, "--budget", "12GB", keys[0], f"data.dir={tmp_path / 'mnie'}")[1]
    assert "mnie/train.jsonl does not exist, so every example has data.max_length tokens" in err


def test_of_a_large_file_a_plan_holds_tokens_and_no_records(
    script: ModuleType, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text("label,text\n" + "".join(f"{n % 2},好{n}\n" for n in range(20_000)), "utf-8")
    config = load_config(None, [f"model.name_or_path={tiny_checkpoint()}", f"data.dir={tmp_path}"])
    arguments = Namespace(data=tmp_path / "a.csv", size=None, text_column=None, encoding="utf-8")
    tracemalloc.start()
    try:
        num_records, _ = script.find_examples(config, arguments)
        assert tracemalloc.get_traced_memory()[1] < 1_500_000  # as a list of records, five times as much
    finally:
        tracemalloc.stop()
    assert num_records == 20_000


def test_a_size_is_planned_for_data_by_the_tokenizer_of_a_local_folder(
    plan: Plan, tiny_checkpoint: Callable[..., Path], processed_data: Path
) -> None:
    arguments = ("--size", "7B", "--budget", "12GB", "--data", processed_data / "validation.jsonl")
    printed = plan(*arguments, f"model.name_or_path={tiny_checkpoint()}")
    assert printed.startswith("Qwen/Qwen2.5-7B-Instruct on cuda, bfloat16: 12 examples of up to ")


def test_the_process_is_measured_as_a_run_does_before_anything_is_read(
    plan: Plan,
    script: ModuleType,
    tiny_checkpoint: Callable[..., Path],
    processed_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = 10**9

    def growing(*of: Any) -> tuple[int, Callable[..., BatchShape]]:
        nonlocal size
        size += 10**9
        return found(*of)

    found = script.find_examples
    monkeypatch.setattr(script, "find_examples", growing)
    monkeypatch.setattr(script, "peak_memory_bytes", lambda _: size)
    keys = (f"model.name_or_path={tiny_checkpoint()}", f"data.dir={processed_data}")
    printed = plan("--budget", "24GB", "--device", "cpu", *keys)
    assert re.search(r"Python and PyTorch themselves \(measured\) +1000\.0 MB", printed)
    assert size == 2 * 10**9


def test_prepared_data_without_a_tokenizer_is_said_and_data_that_was_asked_for_is_refused(
    plan: Plan, processed_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(processed_data, tmp_path / "data" / "processed")
    arguments = ("--config", RECIPE, "--budget", "12GB")
    printed = plan(*arguments, "--size", "7B")
    assert re.search(r"train\.jsonl .*tokenizer \(model\.name_or_path: Qwen/Qwen2\.5-0\.5B", printed)
    assert "examples of up to 512 tokens" in printed
    assert "(the hub cannot be reached)" in plan(*arguments)
    with pytest.raises(UserError, match="the hub cannot be reached"):
        plan(*arguments, "--data", processed_data / "train.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "lots"], "--budget: got 'lots', expected an amount of memory"),
        (["--budget", "12GB", "lora.rnak=8"], "lora.rnak: unknown key"),
        (["--budget", "12GB", "--length", "3"], "data.max_length: got 3, expected 16 or more"),
        (["--budget", "12GB", "--config", "no.yaml"], "no.yaml: cannot be read"),
        (["--budget", "12GB", "lora.target_modules=[x_proj]"], "lora.target_modules: .*match no linear layer"),
        (["--budget", "12GB", "model.name_or_path=some/model"], "the hub cannot be reached"),
        (["--budget", "12GB", "model.name_or_path=no/such/folder"], "is neither a folder nor a hub name"),
        (["--budget", "12GB", "--device", "cpu", "model.compute_dtype=float16"], "float16 needs a GPU"),
    ],
)
def test_a_mistake_is_named(plan: Plan, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(*arguments)


def test_a_file_without_a_record_is_refused(plan: Plan, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("", "utf-8")
    with pytest.raises(UserError, match=r"empty\.jsonl: "):
        plan("--budget", "12GB", "--data", "empty.jsonl", f"model.name_or_path={tiny_checkpoint()}")


def test_a_length_beside_data_is_refused(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan("--budget", "4GB", "--length", "64", "--data", "absent.csv")
    assert "--length and --data" in capsys.readouterr().err
