"""A sweep's combinations, their folders, and its folds."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from minilora.errors import UserError
from minilora.runs.data_folder import write_folds
from minilora.runs.sweep import LONGEST_NAME, expand, split_values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4,3e-4", ["1e-4", "3e-4"]),
        ("1e-4", ["1e-4"]),
        ("", [""]),
        ("all-linear,[q_proj, v_proj]", ["all-linear", "[q_proj, v_proj]"]),
        ("{q_proj: 4, v_proj: 8},{}", ["{q_proj: 4, v_proj: 8}", "{}"]),
        ("'a, b',\"c, d\"", ["'a, b'", '"c, d"']),
        ("don't,won't", ["don't", "won't"]),
        ("(q|k),x{1,2}", ["(q|k)", "x{1,2}"]),
        ("负面，正面", ["负面，正面"]),
    ],
)
def test_commas_divide_values(text: str, values: list[str]) -> None:
    assert split_values(text) == values


def test_every_combination_has_a_folder_and_its_setting() -> None:
    variants = expand(None, ["lora.r=4,8", "train.seed=1,2", "data.max_length=64"], Path("out"))
    assert [variant.name for variant in variants] == ["r=4,seed=1", "r=4,seed=2", "r=8,seed=1", "r=8,seed=2"]
    assert [variant.setting for variant in variants] == ["r=4", "r=4", "r=8", "r=8"]
    assert [(v.config.lora.r, v.config.train.seed) for v in variants] == [(4, 1), (4, 2), (8, 1), (8, 2)]
    assert {v.config.data.max_length for v in variants} == {64}
    assert variants[3].directory == Path("out/r=8,seed=2")


def test_the_test_set_is_left_alone_unless_it_is_asked_for() -> None:
    assert not expand(None, [], Path("out"))[0].config.train.do_predict
    assert expand(None, ["train.do_predict=true"], Path("out"))[0].config.train.do_predict


def test_names_that_no_file_system_takes_become_others_that_differ() -> None:
    names = [v.name for v in expand(None, ["model.name_or_path=a/b,a:b"], Path("out"))]
    assert len({*names, "name_or_path=a-b"}) == 3
    assert not any(set(name) & set('/\\:*?"<>|') for name in names)
    for long in ("x" * 300, "你是客服" * 75):
        variants = expand(None, [f"prompt.system={long}a,{long}b"], Path("out"))
        assert len({v.name for v in variants}) == 2
        assert all(len(v.name.encode()) <= LONGEST_NAME + 9 for v in variants)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.learning_rate=1e-4,1e-4"], "'1e-4' twice"),
        (["train.learning_rate=1e-4,"], "'' between commas"),
        (["train.output_dir=here"], "--output_dir"),
        (["lora.rr=1,2"], "lora.rr: unknown key"),
        (["lora.r=0,x", "train.seed=-1"], "lora.r: got 0"),
        (["lora.r"], "expected section.key=value"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        expand(None, overrides, Path("out"))
    assert said in str(caught.value)


def test_all_problems_of_all_combinations_are_one_message() -> None:
    with pytest.raises(UserError) as caught:
        expand(None, ["lora.r=0,x", "train.seed=-1"], Path("out"))
    assert len(str(caught.value).splitlines()) == 3


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]


def test_each_record_is_validated_on_once_and_never_trained_on_there(processed_data: Path, tmp_path: Path) -> None:
    folds = write_folds(processed_data, 4, tmp_path)
    everything = texts(processed_data / "train.jsonl") + texts(processed_data / "validation.jsonl")
    assert Counter(text for fold in folds for text in texts(fold / "validation.jsonl")) == Counter(everything)
    for fold in folds:
        held_out = texts(fold / "validation.jsonl")
        assert Counter(texts(fold / "train.jsonl") + held_out) == Counter(everything)
        assert abs(len(held_out) - len(everything) / 4) < 1
        assert (fold / "test.jsonl").read_bytes() == (processed_data / "test.jsonl").read_bytes()


def test_folds_have_each_labels_share(processed_data: Path, tmp_path: Path) -> None:
    shares = []
    for fold in write_folds(processed_data, 3, tmp_path):
        labels = [json.loads(line)["label"] for line in (fold / "validation.jsonl").read_text("utf-8").splitlines()]
        shares.append(Counter(labels))
    for label in shares[0]:
        counts = [share[label] for share in shares]
        assert max(counts) - min(counts) <= 1


def test_a_last_line_without_its_end_is_not_joined_to_the_next(processed_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation", "test"):
        (data / f"{split}.jsonl").write_bytes((processed_data / f"{split}.jsonl").read_bytes().rstrip(b"\n"))
    folds = write_folds(data, 2, tmp_path / "folds")
    expected = texts(data / "train.jsonl") + texts(data / "validation.jsonl")
    assert Counter(text for fold in folds for text in texts(fold / "validation.jsonl")) == Counter(expected)


def test_folds_that_are_there_stay_and_those_of_other_data_are_refused(processed_data: Path, tmp_path: Path) -> None:
    first, _ = write_folds(processed_data, 2, tmp_path)
    before = (first / "train.jsonl").stat().st_mtime_ns
    write_folds(processed_data, 2, tmp_path)
    assert (first / "train.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="--output_dir"):
        write_folds(processed_data, 3, tmp_path)


@pytest.mark.parametrize(("line", "word"), [('{"label": "书", "text": "x"', "JSON"), ("[1]", "object")])
def test_a_line_that_is_no_record_is_named(processed_data: Path, tmp_path: Path, line: str, word: str) -> None:
    data = tmp_path / "data"
    shutil.copytree(processed_data, data)
    with (data / "validation.jsonl").open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    count = len((data / "validation.jsonl").read_bytes().splitlines())
    with pytest.raises(UserError, match=rf"validation\.jsonl:{count}: is .*{word}"):
        write_folds(data, 2, tmp_path / "folds")


@pytest.mark.parametrize(
    "overrides", [["train.seed=1,2", "train.seed=3"], ["lora.r=4", "lora.use-dora=true,false", "lora.use_dora=true"]]
)
def test_a_key_with_several_values_that_is_given_again_is_refused(overrides: list[str]) -> None:
    """The last value would win, and runs of one seed stand under the names of two."""
    with pytest.raises(UserError, match="at once"):
        expand(None, overrides, Path("out"))


def test_several_values_override_one_that_is_given_before() -> None:
    assert [v.config.train.seed for v in expand(None, ["train.seed=3", "train.seed=1,2"], Path("out"))] == [1, 2]


@pytest.mark.parametrize("folds", [0, 1, 10_000])
def test_a_number_of_folds_that_makes_no_sense_is_refused(processed_data: Path, tmp_path: Path, folds: int) -> None:
    with pytest.raises(UserError, match=f"--folds: got {folds}"):
        write_folds(processed_data, folds, tmp_path)
