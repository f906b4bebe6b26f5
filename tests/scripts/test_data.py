"""The two data scripts as they are called from outside: what they print, and how they end a mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import minilora
from minilora.data.prepare import SplitOptions, prepare
from minilora.data.split_files import prepared_columns
from minilora.errors import UserError
from tests.scripts.conftest import RunMain, load_script

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = Path(minilora.__file__).parent / "assets" / "tiny-qwen2.5"


def call(script: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The finished script, with UTF-8 output and an empty hub cache, whatever this machine has."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "HF_HOME": str(cwd / "home")}
    command = [sys.executable, SCRIPTS / script, *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=cwd, env=environment)


def write_tsv(path: Path, pairs: list[tuple[str, int]]) -> Path:
    path.write_text("label\ttext_a\n" + "".join(f"{label}\t{text}\n" for text, label in pairs), "utf-8")
    return path


@pytest.fixture
def official(tmp_path: Path) -> list[Path]:
    return [
        write_tsv(tmp_path / "train.tsv", [(f"评论{number}", number % 2) for number in range(20)]),
        write_tsv(tmp_path / "dev.tsv", [("新的", 1)]),
        write_tsv(tmp_path / "test.tsv", [("别的", 0), ("评论4", 0), ("评论5", 1)]),
    ]


def test_kept_splits_print_their_leaks(official: list[Path], tmp_path: Path) -> None:
    done = call("preprocess_data.py", "--input", *official, "--keep_splits", cwd=tmp_path)
    assert done.returncode == 0
    assert "2  of 3 test records are in train (66.7%)" in done.stdout
    assert "0  of 1 validation records are in train (0.0%)" in done.stdout
    assert "--drop_leaks removes them" in done.stdout
    assert (tmp_path / "data" / "processed" / "test.jsonl").is_file()


@pytest.mark.parametrize(
    ("labels", "said"),
    [((0, 1), "labels 0, 1 are read as indices: 0 = 负面, 1 = 正面\n"), (("差", "好"), None), ((3, 4), None)],
)
def test_what_indices_mean_is_said_where_a_file_is_read(
    labels: tuple[Any, ...], said: str | None, tmp_path: Path, run_main: RunMain
) -> None:
    path = write_tsv(tmp_path / "a.tsv", [(f"评论{number}", labels[number % 2]) for number in range(20)])
    printed, _ = run_main(load_script("preprocess_data"), "--input", path, "--output_dir", tmp_path / "out")
    assert (said in printed) if said else ("read as indices" not in printed)


def test_dropped_leaks_are_counted(official: list[Path], tmp_path: Path) -> None:
    done = call("preprocess_data.py", "--input", *official, "--keep_splits", "--drop-leaks", cwd=tmp_path)
    assert "2  of train, because they leak" in done.stdout
    assert "--drop_leaks removes them" not in done.stdout


def test_a_split_that_is_carved_out_of_train_is_announced(official: list[Path], tmp_path: Path) -> None:
    done = call("preprocess_data.py", "--input", *official[:2], "--keep-splits", "--drop_leaks", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "carved         2  of train for test" in done.stdout
    assert "wrote         18  data/processed/train.jsonl" in done.stdout


def test_what_an_official_test_keeps_and_others_lose_is_printed(
    official: list[Path], tmp_path: Path, run_main: RunMain
) -> None:
    write_tsv(official[2], [("别的", 0), ("评论4", 1), ("评论5。", 1), ("评论5", 1)])
    script = load_script("preprocess_data")
    options = ("--input", *official, "--keep-splits", "--output-dir", tmp_path / "out")
    printed, _ = run_main(script, *options)
    assert "dropped        1  contradictory (1 of train)\n" in printed
    assert "kept           1  contradictory in test, which stays whole (--clean_test drops them)\n" in printed
    assert "kept           1  duplicate in test, which stays whole (--clean_test drops them)\n" in printed
    assert "wrote          4  " in printed
    printed, _ = run_main(script, *options, "--clean-test")
    assert "dropped        2  contradictory (1 of train, 1 of test)\n" in printed
    assert "stays whole" not in printed


def test_all_answers_that_are_too_long_are_in_one_message_or_dropped(tmp_path: Path, run_main: RunMain) -> None:
    turns = [{"prompt": f"问{n}", "completion": "很长的答案" * (1 + 30 * (n % 10 == 3))} for n in range(40)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, turns)), "utf-8")
    script = load_script("preprocess_data")
    options = ["--input", tmp_path / "chat.jsonl", "--output_dir", tmp_path / "out"]
    options += ["--tokenizer", TINY, "--max-length", 100]
    with pytest.raises(UserError, match=r"chat\.jsonl:4: the assistant turns exceed data\.max_length = 100") as raised:
        run_main(script, *options)
    assert "(4 such records, also chat.jsonl:14, chat.jsonl:24, chat.jsonl:34)" in str(raised.value)
    printed, _ = run_main(script, *options, "--drop-invalid")
    assert "dropped        4  invalid" in printed
    assert "wrote         28  " in printed


def test_a_fresh_split_prints_what_was_dropped_and_written(official: list[Path], tmp_path: Path) -> None:
    done = call("preprocess_data.py", "--input", *official, "--output", "out", "--seed", "7", cwd=tmp_path)
    assert "read          20" in done.stdout
    assert "dropped        2  duplicate" in done.stdout
    assert "wrote         18  out" in done.stdout
    assert "leaks" not in done.stdout
    prepare(official, tmp_path / "by_function", SplitOptions(seed=7))
    for split in ("train", "validation", "test"):
        by_script = (tmp_path / "out" / f"{split}.jsonl").read_bytes()
        assert by_script == (tmp_path / "by_function" / f"{split}.jsonl").read_bytes()


def test_columns_are_named_on_the_command_line(tmp_path: Path) -> None:
    lines = [f"{number % 2},评论{number},x,y\n" for number in range(20)]
    (tmp_path / "mine.csv").write_text("stars,comment,label,text\n" + "".join(lines), "utf-8")
    columns = ("--text-column", "comment", "--label-column", "stars")
    done = call("preprocess_data.py", "--input", "mine.csv", *columns, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "(0: 8, 1: 8; median" in done.stdout
    assert done.stderr == "mine.csv: text from 'comment', label from 'stars'; other columns: label, text\n"
    assert prepared_columns(tmp_path / "data" / "processed") == {"text": "comment", "label": "stars"}


def test_a_folder_of_save_to_disk_names_its_splits(tmp_path: Path) -> None:
    for split, numbers in (("train", range(20)), ("test", range(15, 25))):
        (tmp_path / "mine" / split).mkdir(parents=True)
        table = pyarrow.table({"label": [n % 2 for n in numbers], "text": [f"评论{n}" for n in numbers]})
        name = "data-00000-of-00001.arrow"
        path = str(tmp_path / "mine" / split / name)
        with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
        (tmp_path / "mine" / split / "state.json").write_text(f'{{"_data_files": [{{"filename": "{name}"}}]}}', "utf-8")
    (tmp_path / "mine" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}', "utf-8")
    done = call("preprocess_data.py", "--input", "mine", "--keep_splits", cwd=tmp_path)
    assert "5  of 10 test records are in train (50.0%)" in done.stdout, done.stderr


def test_downloaded_files_are_taken_without_input_in_the_order_of_training(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "chn_senti_corp"
    folder.mkdir(parents=True)
    names = ("train", "validation", "test")
    for split, texts in zip(names, (range(20), range(15, 25), range(20, 30)), strict=True):
        table = pyarrow.table({"label": [n % 2 for n in texts], "text": [f"评论{n}" for n in texts]})
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
    assert call("preprocess_data.py", cwd=tmp_path).returncode == 0
    # scripts/train.py calls prepare with the list that fetch_dataset returns
    prepare([folder / f"{split}.parquet" for split in names], tmp_path / "by_training")
    for split in names:
        by_script = (tmp_path / "data" / "processed" / f"{split}.jsonl").read_bytes()
        assert by_script == (tmp_path / "by_training" / f"{split}.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run scripts/download_data.py, or name files with --input"),
        (["--input", "nowhere.tsv"], "nowhere.tsv: cannot be read"),
        (["--input", "train.tsv", "train.tsv"], "train.tsv: given twice"),
        (["--input", "train.doc"], "train.doc: is not one of .tsv"),
        (["--input", "train.tsv", "--label-column", "stars"], "--label_column of preprocess_data.py"),
        (["--input", "dev.tsv"], "label 1: 1 distinct records to split"),
        (["--input", "train.tsv", "--seed", "x"], "argument --seed: invalid int value"),
        (["--input", "train.tsv", "--drop-leaks"], "--drop_leaks needs --keep_splits"),
        (["--input", "train.tsv", "--clean-test"], "--clean_test needs --keep_splits"),
        (["--input", "train.tsv", "--max-length", "99"], "--max_length and --tokenizer need each other"),
        (["--input", "dev.tsv", "--keep_splits"], "no file for train"),
        (["--input", "train.tsv", "--text-column", "comment"], "--text_column of preprocess_data.py"),
        (["--input", "train.tsv", "--output", "dev.tsv"], "dev.tsv: cannot be written"),
    ],
)
def test_a_users_mistake_ends_with_status_2_and_no_traceback(
    arguments: list[str], message: str, official: list[Path], tmp_path: Path
) -> None:
    done = call("preprocess_data.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_download_without_network_ends_with_status_2_and_names_both_sources(tmp_path: Path) -> None:
    done = call("download_data.py", cwd=tmp_path)  # conftest.py sets HF_HUB_OFFLINE
    assert done.returncode == 2
    assert "lansinuote/ChnSentiCorp: not in the cache" in done.stderr
    assert "seamew/ChnSentiCorp: not in the cache" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("download_data.py", "--output_dir --repo --revision"),
        ("preprocess_data.py", "--input --output_dir --seed --keep_splits --drop_leaks --text_column --label_column"),
        ("preprocess_data.py", "--clean_test --drop_rare --drop_invalid --max_length --tokenizer"),
    ],
)
def test_help_shows_options_and_examples(script: str, options: str, tmp_path: Path) -> None:
    done = call(script, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert f"python scripts/{script}" in done.stdout
    assert set(options.split()) <= set(done.stdout.replace("[", " ").replace("]", " ").split())
