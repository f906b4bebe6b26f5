"""A name becomes a folder, or one message that says what to do."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from minilora.errors import UserError
from minilora.hub import fetch_dataset, fetch_model


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", "utf-8")
    assert fetch_model(str(tmp_path)) == tmp_path


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        fetch_model(str(tmp_path))


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "model"])
def test_neither_folder_nor_hub_name(name: str) -> None:
    with pytest.raises(UserError, match="is neither a folder nor a hub name"):
        fetch_model(name)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.LocalEntryNotFoundError("x"),
            r"set a mirror \(HF_ENDPOINT=.*\), or give a local folder",
        ),
        (errors.OfflineModeIsEnabled("x"), "unset HF_HUB_OFFLINE"),
        (ConnectionError("no route"), r"download failed \(no route\); run it again"),
    ],
)
def test_a_failed_download_says_what_to_do(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=message):
        fetch_model("some/model")


def test_the_second_source_is_tried_and_splits_get_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "snapshot" / "data"
    snapshot.mkdir(parents=True)
    for name in ("train", "valid", "test"):
        (snapshot / f"chn_senti_corp-{name}.arrow").write_text(name, "utf-8")
    asked = []

    def download(name: str, **_: Any) -> str:
        asked.append(name)
        if name.startswith("lansinuote"):
            raise errors.LocalEntryNotFoundError("x")
        return str(snapshot.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    files = fetch_dataset(tmp_path / "out")
    assert asked == ["lansinuote/ChnSentiCorp", "seamew/ChnSentiCorp"]
    assert [path.name for path in files] == ["train.arrow", "validation.arrow", "test.arrow"]
    assert files[1].read_text("utf-8") == "valid"
