"""No review is lost without a count, none stands on both sides of a split, and the order is a pure function."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.data import clean_rows, epoch_order, find_leaks, normalized, prepare, split_rows
from minilora.errors import UserError
from minilora.rows import Row, read_rows, sha256

SCRIPT = Path(__file__).parents[1] / "scripts" / "preprocess_data.py"


def rows_of(*pairs: tuple[str, int]) -> list[Row]:
    return [Row(f"x:{number}", text, label) for number, (text, label) in enumerate(pairs, start=2)]


def write_tsv(path: Path, pairs: list[tuple[str, int]]) -> Path:
    path.write_text("label\ttext\n" + "".join(f"{label}\t{text}\n" for text, label in pairs), "utf-8")
    return path


def test_normalised_text_ignores_width_space_and_punctuation() -> None:
    assert normalized("Ａ b，好 ！_") == normalized("Ab好") == "Ab好"


def test_each_cause_is_counted() -> None:
    files = {"a": rows_of((" 好 ", 1), ("  ", 1), ("！！", 0), ("矛盾", 1)), "b": rows_of(("好！", 1), ("矛盾。", 0))}
    clean, dropped = clean_rows(files)
    assert [row.text for row in clean["a"] + clean["b"]] == ["好"]
    assert dropped == {"empty": 2, "contradictory": 2, "duplicate": 1}


@given(st.lists(st.tuples(st.text("好差a ，。", max_size=4), st.integers(0, 1)), max_size=30))
def test_rows_in_equal_rows_out_and_rows_dropped(pairs: list[tuple[str, int]]) -> None:
    files = {"a": rows_of(*pairs[::2]), "b": rows_of(*pairs[1::2])}
    clean, dropped = clean_rows(files)
    kept = [row for rows in clean.values() for row in rows]
    assert len(kept) + sum(dropped.values()) == len(pairs)
    assert len({normalized(row.content) for row in kept}) == len(kept)


def test_splits_are_8_1_1_stratified_disjoint_and_deterministic() -> None:
    rows = rows_of(*((f"评论{number}", int(number % 4 == 0)) for number in range(400)))
    splits = split_rows(rows, 42)
    assert {name: len(part) for name, part in splits.items()} == {"train": 320, "validation": 40, "test": 40}
    assert all(Counter(row.label for row in part)[1] * 4 == len(part) for part in splits.values())
    texts = [row.text for part in splits.values() for row in part]
    assert len(set(texts)) == 400
    assert split_rows(rows, 42) == splits
    assert split_rows(rows, 43) != splits


def test_a_label_too_rare_to_split_is_named() -> None:
    with pytest.raises(UserError, match=r"label 1: has 2 distinct rows, at least 3 are needed"):
        split_rows(rows_of(*((f"评论{number}", int(number < 2)) for number in range(20))), 42)


def test_an_epoch_is_a_permutation_and_a_function_of_seed_and_epoch() -> None:
    orders = [epoch_order(50, 42, epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert epoch_order(50, 42, 1) == orders[1]
    # python -c "import random; x = list(range(6)); random.Random('42-0').shuffle(x); print(x)"
    golden = subprocess.run(
        [sys.executable, "-c", "import random; x = list(range(6)); random.Random('42-0').shuffle(x); print(x)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(epoch_order(6, 42, 0)) == golden.stdout.strip()


def test_prepare_writes_splits_and_a_report_that_agrees(tmp_path: Path) -> None:
    source = write_tsv(tmp_path / "a.tsv", [(f"评论{number}", number % 2) for number in range(60)] + [("评论1", 1)])
    report = prepare([source], tmp_path / "out")
    assert report == json.loads((tmp_path / "out" / "data_report.json").read_text("utf-8"))
    assert report["rows_in"] == {str(source): 61}
    assert report["dropped"]["duplicate"] == 1
    for name, count in report["rows_out"].items():
        path = tmp_path / "out" / f"{name}.jsonl"
        assert len(read_rows(path)) == count == sum(report["labels"][name].values())
        assert report["sha256_out"][path.name] == sha256(path)
    assert report["sha256_in"][str(source)] == sha256(source)
    assert report["length_quantiles_characters"]["train"]["max"] == 4


@pytest.fixture
def official(tmp_path: Path) -> list[Path]:
    train = [(f"评论{number}", number % 2) for number in range(20)]
    return [
        write_tsv(tmp_path / "train.tsv", train),
        write_tsv(tmp_path / "dev.tsv", [("新的", 1), ("评论3！", 1)]),
        write_tsv(tmp_path / "test.tsv", [("别的", 0), ("评论4", 0), ("评论5", 1)]),
    ]


def test_kept_splits_report_what_leaks_and_drop_it_on_request(official: list[Path], tmp_path: Path) -> None:
    report = prepare(official, tmp_path / "kept", keep_splits=True)
    assert report["leaks"]["test"] == {"rows": 3, "also_in_train": 2}
    assert report["leaks"]["validation"] == {"rows": 2, "also_in_train": 1}
    assert report["rows_out"] == {"train": 20, "validation": 2, "test": 3}
    report = prepare(official, tmp_path / "dropped", keep_splits=True, drop_leaks=True)
    assert report["rows_out"] == {"train": 17, "validation": 2, "test": 3}
    parts = {name: read_rows(tmp_path / "dropped" / f"{name}.jsonl") for name in ("train", "validation", "test")}
    assert not find_leaks(parts["train"], parts["validation"] + parts["test"])


def test_kept_splits_need_all_three_files(official: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file for validation"):
        prepare([official[0], official[2]], tmp_path / "out", keep_splits=True)


def test_a_data_set_that_cleans_to_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no row is left after cleaning \(.*'empty': 1"):
        prepare([write_tsv(tmp_path / "a.tsv", [("！", 1)])], tmp_path / "out")


def test_the_script_prints_the_leaks(official: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--input", *official, "--output", tmp_path / "out", "--keep-splits"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert "2  of 3 test rows are in train (66.7%)" in done.stdout
    assert "--drop-leaks removes them" in done.stdout


def test_the_script_ends_a_users_mistake_with_status_2(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert done.returncode == 2
    assert "run scripts/download_data.py, or name files with --input" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.real
@pytest.mark.skipif("MINILORA_REAL_DATA" not in os.environ, reason="needs MINILORA_REAL_DATA")
def test_the_standard_training_file_has_the_duplicates_that_were_counted() -> None:
    rows = read_rows(Path(os.environ["MINILORA_REAL_DATA"]) / "train.tsv")
    assert len(rows) == 9600
    # cut -f 2 train.tsv | tail -n +2 | sort -u | wc -l
    assert len({row.content for row in rows}) == 8249
    assert len({normalized(row.content) for row in rows}) == 8233
