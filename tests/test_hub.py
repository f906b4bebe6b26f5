"""A name becomes a folder, or one message that says what to do."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from minilora import hub as hub_module
from minilora.errors import UserError
from minilora.hub import MODEL_FILES, downloaded_files, fetch_dataset, fetch_model, local_folder
from minilora.script import GRACE_S

COMMIT = "0" * 39 + "1"
SCRIPT = Path(__file__).parents[1] / "scripts" / "download_data.py"


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
    monkeypatch.setattr(hub_module, "__file__", str(tmp_path / "package" / "hub.py"))
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


def refused(error: type[errors.HfHubHTTPError], text: str = "x", status: int = 403) -> errors.HfHubHTTPError:
    """What huggingface-hub raises for an answer of the hub, without the HTTP client, which depends on its version."""
    return error(text, response=SimpleNamespace(headers={}, request=None, status_code=status))  # type: ignore[arg-type]


def answered(status: int) -> errors.LocalEntryNotFoundError:
    """The hub was reached, but answered with an error, and the cache is empty: how snapshot_download puts it."""
    error = errors.LocalEntryNotFoundError("x")
    error.__cause__ = refused(errors.HfHubHTTPError, f"{status} Server Error\nfor url", status)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            refused(errors.GatedRepoError),
            r"some/model: is gated; accept its terms on its page and set HF_TOKEN to your",
        ),
        (
            refused(errors.RepositoryNotFoundError),
            r"some/model: no such model on the hub, or private; check the name, set HF_TOKEN, or give a local folder",
        ),
        (
            refused(errors.RevisionNotFoundError),
            r"some/model: has no such revision; check model\.revision or --revision",
        ),
        (
            refused(errors.HfHubHTTPError, "500 Server Error\nfor url", 500),
            r"some/model: download failed \(500 Server Error\); run it again, set a mirror .*, or give a local folder",
        ),
        (
            refused(errors.HfHubHTTPError, status=401),
            r"some/model: the hub refused your token \(401\); correct HF_TOKEN or unset it",
        ),
        (answered(503), r"some/model: download failed \(503 Server Error\); run it again, set a mirror"),
        (OSError(), r"download failed \(OSError\)"),
        (OSError(28, "No space left on device"), r"download failed \(.*No space left on device\)"),
        (
            errors.LocalEntryNotFoundError("x"),
            r"set a mirror \(HF_ENDPOINT=.*\), or give a local folder",
        ),
        (errors.OfflineModeIsEnabled("x"), "unset HF_HUB_OFFLINE"),
        (ConnectionError("no route"), r"download failed \(no route\); run it again"),
        (errors.HfHubHTTPError.__mro__[1]("cut off"), r"download failed \(cut off\); run it again"),
        (errors.HFValidationError("x"), r"is no hub name, expected owner/name"),
    ],
)
def test_a_failed_download_says_what_to_do(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=message):
        fetch_model("some/model")


def test_without_any_source_each_ones_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **_: Any) -> None:
        raise refused(errors.RepositoryNotFoundError) if "lansinuote" in name else errors.OfflineModeIsEnabled("x")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError) as told:
        fetch_dataset(tmp_path / "out")
    first, second = str(told.value).splitlines()
    assert first.startswith("lansinuote/ChnSentiCorp: no such dataset on the hub, or private;")
    assert second.startswith("seamew/ChnSentiCorp: not in the cache and the hub cannot be reached;")
    assert first.endswith("or give local files to scripts/preprocess_data.py --input")
    assert not (tmp_path / "out").exists()


def test_the_hub_is_asked_for_the_revision_and_the_files_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    (tmp_path / "hub").mkdir()
    for name in ("config.json", "train.parquet"):
        (tmp_path / "hub" / name).write_text("{}", "utf-8")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.append((name, options)) or tmp_path / "hub"
    )
    assert fetch_model("some/model", "v2") == tmp_path / "hub"
    fetch_dataset(tmp_path / "out", "some/reviews", "v3")
    assert [(name, options["repo_type"], options["revision"]) for name, options in asked] == [
        ("some/model", "model", "v2"),
        ("some/reviews", "dataset", "v3"),
    ]
    assert asked[1][1]["allow_patterns"] == ["*.parquet", "*.arrow"]
    wanted = ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    offered = [*wanted, "pytorch_model.bin", "onnx/model.onnx", "model.gguf"]
    assert list(filter_repo_objects(offered, allow_patterns=asked[0][1]["allow_patterns"])) == wanted
    assert asked[0][1]["allow_patterns"] == MODEL_FILES
    assert fetch_model("some/model", "v2", weights=False) == tmp_path / "hub"
    small = [name for name in wanted if "safetensors" not in name]
    assert list(filter_repo_objects(offered, allow_patterns=asked[2][1]["allow_patterns"])) == small


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


def downloads(monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str) -> None:
    """Lets the hub answer with these files, each holding its own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, "utf-8")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))


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


def test_a_model_without_config_is_refused_after_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads(monkeypatch, tmp_path / "hub", "model.safetensors")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        fetch_model("some/model")


class Hub(BaseHTTPRequestHandler):
    """The three answers that a data set's download asks of a hub; `mode` spoils them."""

    mode = "fine"
    tokens: ClassVar[set[str | None]] = set()
    damaged: ClassVar[set[bytes]] = set()
    asked, go_on = threading.Event(), threading.Event()
    files: ClassVar = {f"data/{name}-00000-of-00001.parquet": name.encode() for name in ("train", "validation", "test")}

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "some/reviews" in path:  # huggingface-hub asks for other things too, without a token
            self.tokens.add(self.headers["Authorization"])
        errors_by_mode = {
            "refused token": (401, {}),
            "unknown": (404, {"X-Error-Code": "RepoNotFound"}),
            "no revision": (404, {"X-Error-Code": "RevisionNotFound"}),
            "gated": (403, {"X-Error-Code": "GatedRepo"}),
            "broken": (501, {}),
        }
        if Hub.mode in errors_by_mode:
            status, headers = errors_by_mode[Hub.mode]
            self.answer(status, b"{}", headers)
        elif "/resolve/" in path:
            content = self.files[path.partition(f"/resolve/{COMMIT}/")[2]]
            etag = self.digest(content)
            if Hub.mode == "hangs" and self.command != "HEAD":
                Hub.asked.set()
                Hub.go_on.wait(60)
            if Hub.mode.startswith("damages ") and self.command != "HEAD" and content in Hub.damaged:
                if Hub.mode == "damages once":
                    Hub.damaged.remove(content)
                content = bytes([content[0] ^ 1]) + content[1:]
            self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        elif "/tree/" in path:
            sizes = ((name, len(content), self.digest(content)) for name, content in self.files.items())
            entries = [{"type": "file", "path": name, "size": size, "oid": oid} for name, size, oid in sizes]
            self.answer(200, json.dumps(entries).encode(), {})
        else:
            siblings = [{"rfilename": name} for name in self.files]
            self.answer(200, json.dumps({"id": "some/reviews", "sha": COMMIT, "siblings": siblings}).encode(), {})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @staticmethod
    def digest(content: bytes) -> str:
        """Git's hash of a blob, or what LFS names a large file by."""
        if content == b"train":
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def download_environment(endpoint: str, folder: Path, **variables: str) -> dict[str, str]:
    return {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_token",
        "NO_PROXY": "127.0.0.1",
        "PYTHONIOENCODING": "utf-8",
        **variables,
    }


def download(endpoint: str, folder: Path, output: str = "out", **variables: str) -> subprocess.CompletedProcess[str]:
    environment = download_environment(endpoint, folder, **variables)
    command = [sys.executable, SCRIPT, "--output", folder / output, "--repo", "some/reviews"]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=120)


def test_a_mirror_named_by_hf_endpoint_serves_the_data_set(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hub, "mode", "fine")
    Hub.tokens.clear()
    done = download(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1:] for line in done.stdout.splitlines()] == [["5", "bytes"], ["10", "bytes"], ["4", "bytes"]]
    assert Hub.tokens == {"Bearer hf_token"}
    assert {path.name: path.read_text("utf-8") for path in downloaded_files(tmp_path / "out")} == {
        "train.parquet": "train",
        "validation.parquet": "validation",
        "test.parquet": "test",
    }
    monkeypatch.setattr(Hub, "mode", "broken")
    done = download(hub, tmp_path, "again", HF_HUB_OFFLINE="1")  # from the cache
    assert done.returncode == 0, done.stderr
    assert len(downloaded_files(tmp_path / "again")) == 3


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("refused token", "the hub refused your token (401); correct HF_TOKEN"),
        ("unknown", "no such dataset on the hub, or private; check the name"),
        ("no revision", "has no such revision"),
        ("gated", "is gated; accept its terms"),
        ("broken", "download failed"),  # the rest is the HTTP client's wording
    ],
)
def test_what_a_hub_answers_becomes_one_message(
    mode: str, message: str, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hub, "mode", mode)
    done = download(hub, tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_signal_ends_a_download_that_hangs(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "mode", "hangs")
    Hub.asked.clear()
    Hub.go_on.clear()
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--output", tmp_path / "out", "--repo", "some/reviews"],
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=download_environment(hub, tmp_path),
    )
    assert Hub.asked.wait(60)
    process.terminate()
    try:
        _, errors = process.communicate(timeout=GRACE_S + 5)
    finally:
        Hub.go_on.set()
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"train", b"test"], ids=["large", "small"])
def test_a_file_of_the_right_size_and_other_bytes_is_downloaded_again(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(Hub, "mode", "damages once")
    monkeypatch.setattr(Hub, "damaged", {content})
    done = download(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert ": not what the hub has, the hash differs; downloads it once more" in done.stderr
    assert sorted(path.read_bytes() for path in downloaded_files(tmp_path / "out")) == [
        b"test",
        b"train",
        b"validation",
    ]


def test_a_file_that_comes_damaged_twice_is_refused_with_both_hashes(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hub, "mode", "damages always")
    monkeypatch.setattr(Hub, "damaged", {b"train"})
    done = download(hub, tmp_path)
    assert done.returncode == 2
    assert "downloaded twice: its hash is " in done.stderr
    assert hashlib.sha256(b"urain").hexdigest() in done.stderr
    assert f"expected {hashlib.sha256(b'train').hexdigest()}" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_that_was_damaged_in_the_cache_is_downloaded_again(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hub, "mode", "fine")
    assert download(hub, tmp_path).returncode == 0
    blob = next((tmp_path / "home").rglob(f"blobs/{hashlib.sha256(b'train').hexdigest()}"))
    blob.write_bytes(b"trail")
    done = download(hub, tmp_path, "again")
    assert done.returncode == 0, done.stderr
    assert "downloads it once more" in done.stderr
    assert (tmp_path / "again" / "train.parquet").read_bytes() == b"train"


@pytest.mark.skipif(os.name == "nt", reason="the cache has no links there")
def test_a_blob_that_is_a_link_into_a_store_of_its_own_is_verified_by_its_own_name(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hub, "mode", "fine")
    assert download(hub, tmp_path).returncode == 0
    blob = next((tmp_path / "home").rglob(f"blobs/{hashlib.sha256(b'train').hexdigest()}"))
    stored = tmp_path / "store" / ("0" * 64)  # a name that is a hash, and not this one's
    stored.parent.mkdir()
    blob.rename(stored)
    blob.symlink_to(stored)
    done = download(hub, tmp_path, "linked")
    assert done.returncode == 0, done.stderr
    assert "hash differs" not in done.stderr
    assert (tmp_path / "linked" / "train.parquet").read_bytes() == b"train"
    stored.write_bytes(b"trail")
    done = download(hub, tmp_path, "again")
    assert done.returncode == 0, done.stderr
    assert ": not what the hub has, the hash differs; downloads it once more" in done.stderr
    assert (tmp_path / "again" / "train.parquet").read_bytes() == b"train"


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("http://127.0.0.1:9", "not in the cache and the hub cannot be reached"),  # the discard port: nobody listens
        ("127.0.0.1", "download failed ("),
    ],
)
def test_an_endpoint_that_is_none_becomes_one_message(endpoint: str, message: str, tmp_path: Path) -> None:
    done = download(endpoint, tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
