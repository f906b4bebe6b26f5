"""A name becomes a folder, or one message that says what to do."""

from pathlib import Path
from typing import Any

import pytest

from minilora.data import download
from minilora.data import hub as hub_module
from minilora.data.hub import (
    MODEL_FILES,
    SMALL_FILES,
    SUBFOLDERS,
    downloaded_files,
    fetch_dataset,
    fetch_model,
    local_folder,
)
from minilora.errors import UserError


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", "utf-8")
    assert fetch_model(str(tmp_path)) == tmp_path


def test_the_packages_own_model_is_found_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "package" / "assets" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", "utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(hub_module, "__file__", str(tmp_path / "package" / "data" / "hub.py"))
    assert fetch_model("minilora/assets/tiny") == folder
    with pytest.raises(UserError, match=r"minilora/assets/huge: is neither a folder nor a hub name such as Qwen/"):
        fetch_model("minilora/assets/huge")


def test_a_folder_in_the_working_directory_comes_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some" / "model").mkdir(parents=True)
    (tmp_path / "some" / "model" / "config.json").write_text("{}", "utf-8")
    monkeypatch.chdir(tmp_path)
    assert fetch_model("some/model") == Path("some/model")


def test_only_a_folder_is_here_already(tmp_path: Path) -> None:
    assert local_folder(str(tmp_path)) == tmp_path
    assert local_folder("Qwen/Qwen2.5-7B-Instruct") is None
    assert local_folder("minilora/assets/huge") is None
    assert local_folder("minilora/assets/tiny-qwen2.5") is not None


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        fetch_model(str(tmp_path))


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "../model", "/model", "~/model", "model"])
def test_neither_folder_nor_hub_name(name: str) -> None:
    with pytest.raises(UserError, match="is neither a folder nor a hub name"):
        fetch_model(name)


def test_without_any_source_each_ones_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(kind: str, name: str, *_: Any) -> None:
        raise UserError(f"{name}: is no {kind}")

    monkeypatch.setattr(download, "download_snapshot", fail)
    with pytest.raises(UserError) as told:
        fetch_dataset(tmp_path / "out")
    assert str(told.value) == "lansinuote/ChnSentiCorp: is no dataset\nseamew/ChnSentiCorp: is no dataset"
    assert not (tmp_path / "out").exists()


def test_the_hub_is_asked_for_the_revision_and_the_files_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    (tmp_path / "hub").mkdir()
    for name in ("config.json", "model.safetensors", "train.parquet"):
        (tmp_path / "hub" / name).write_text("{}", "utf-8")
    monkeypatch.setattr(download, "download_snapshot", lambda *question: asked.append(question) or tmp_path / "hub")
    assert fetch_model("some/model", "v2") == tmp_path / "hub"
    fetch_dataset(tmp_path / "out", "some/reviews", "v3")
    assert asked == [
        ("model", "some/model", "v2", MODEL_FILES, SUBFOLDERS),
        ("dataset", "some/reviews", "v3", ["*.parquet", "*.arrow"]),
    ]
    assert fetch_model("some/model", "v2", weights=False) == tmp_path / "hub"
    assert asked[2] == ("model", "some/model", "v2", SMALL_FILES, SUBFOLDERS)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads(monkeypatch, tmp_path / "hub", "train.parquet")
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(UserError, match=r"out: cannot be written \(.+\); choose another --output"):
        fetch_dataset(tmp_path / "file" / "out", "some/reviews")


def test_parquet_comes_before_arrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads(monkeypatch, tmp_path / "hub", "train.arrow", "train.parquet", "test.arrow", "test.parquet")
    assert [path.name for path in fetch_dataset(tmp_path / "out", "some/reviews")] == ["train.parquet", "test.parquet"]


def test_the_second_source_is_tried_and_splits_get_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "snapshot" / "data"
    snapshot.mkdir(parents=True)
    for name in ("train", "valid", "test"):
        (snapshot / f"chn_senti_corp-{name}.arrow").write_text(name, "utf-8")
    asked = []

    def answer(_: str, name: str, *__: Any) -> Path:
        asked.append(name)
        if name.startswith("lansinuote"):
            raise UserError("x")
        return snapshot.parent

    monkeypatch.setattr(download, "download_snapshot", answer)
    files = fetch_dataset(tmp_path / "out")
    assert asked == ["lansinuote/ChnSentiCorp", "seamew/ChnSentiCorp"]
    assert [path.name for path in files] == ["train.arrow", "validation.arrow", "test.arrow"]
    assert files[1].read_text("utf-8") == "valid"


def downloads(monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str) -> None:
    """Lets the hub answer with these files, each holding its own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, "utf-8")
    monkeypatch.setattr(download, "download_snapshot", lambda *_: folder)


def test_the_parts_of_a_split_do_not_replace_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"data/train-0000{n}-of-00002.parquet" for n in range(2)]
    downloads(monkeypatch, tmp_path / "hub", *names, "data/test-00000-of-00001.parquet")
    files = fetch_dataset(tmp_path / "out", "some/reviews")
    assert [path.name for path in files] == ["train-00000.parquet", "train-00001.parquet", "test.parquet"]
    assert [path.read_text("utf-8") for path in files[:2]] == names


def test_a_folder_may_name_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads(monkeypatch, tmp_path / "hub", "default/train/0000.parquet", "default/test/0000.parquet")
    assert [path.name for path in fetch_dataset(tmp_path / "out", "some/reviews")] == ["train.parquet", "test.parquet"]


def test_a_word_that_only_contains_a_splits_name_is_no_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads(monkeypatch, tmp_path / "hub", "train.parquet", "latest.parquet")
    assert [path.name for path in fetch_dataset(tmp_path / "out", "some/reviews")] == ["train.parquet"]


def test_several_data_sets_under_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads(monkeypatch, tmp_path / "hub", "books/train.parquet", "hotels/train.parquet")
    with pytest.raises(UserError, match=r"has several data sets \(books, hotels\)"):
        fetch_dataset(tmp_path / "out", "some/reviews")


def test_a_data_set_without_a_training_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads(monkeypatch, tmp_path / "hub", "test.parquet", "other.parquet")
    with pytest.raises(UserError, match="has no train file in parquet or arrow format"):
        fetch_dataset(tmp_path / "out", "some/reviews")


def test_a_second_data_set_is_not_mixed_into_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads(monkeypatch, tmp_path / "one", "train.parquet", "test.parquet")
    fetch_dataset(tmp_path / "out", "some/reviews")
    fetch_dataset(tmp_path / "out", "some/reviews")  # the same again is no mixture
    downloads(monkeypatch, tmp_path / "two", "train.arrow")
    with pytest.raises(UserError, match=r"holds train\.parquet, test\.parquet of another download"):
        fetch_dataset(tmp_path / "out", "other/reviews")
    assert [path.name for path in downloaded_files(tmp_path / "out")] == ["train.parquet", "test.parquet"]


def test_a_complete_set_is_kept_unless_a_revision_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("train.parquet", "validation.parquet", "test.parquet")
    downloads(monkeypatch, tmp_path / "hub", *names)
    for name in names:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("old", "utf-8")
    assert fetch_dataset(tmp_path / "out")[0].read_text("utf-8") == "old"
    assert fetch_dataset(tmp_path / "out", revision="v2")[0].read_text("utf-8") == "train.parquet"


def test_two_files_of_one_split_are_no_complete_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("train-00000.parquet", "train-00001.parquet", "validation.parquet")
    downloads(monkeypatch, tmp_path / "out", *names)
    downloads(monkeypatch, tmp_path / "hub", "data/train-0.parquet", "data/train-1.parquet", "data/dev.parquet")
    assert fetch_dataset(tmp_path / "out")[0].read_text("utf-8") == "data/train-0.parquet"


def test_a_cache_without_weights_is_named_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers leaves it where only a tokenizer was asked for."""
    downloads(monkeypatch, tmp_path / "hub", "config.json", "tokenizer.json")
    with pytest.raises(UserError, match=r"^some/model: no \*\.safetensors .*hub\); unset HF_HUB_OFFLINE, check"):
        fetch_model("some/model")
    assert fetch_model("some/model", weights=False) == tmp_path / "hub"


def test_a_model_without_config_is_refused_after_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads(monkeypatch, tmp_path / "hub", "model.safetensors")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        fetch_model("some/model")
