"""A name becomes a folder, or one message that says what to do; with huggingface-hub's real client and a local hub."""

import errno
import hashlib
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from minilora.data import hub as hub_module
from minilora.data.hub import (
    DATA_FILES,
    MODEL_FILES,
    SMALL_FILES,
    SUBFOLDERS,
    download_snapshot,
    downloaded_files,
    fetch_dataset,
    fetch_model,
    local_folder,
)
from minilora.data.hub_errors import CERTIFICATES, PROXIES, ClientError, client_errors, socks_package
from minilora.errors import UserError
from minilora.weights.hf_config import COMPANIONS
from tests.local_hub import COMMIT, Fault, LocalHub


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


def test_only_a_folder_is_local(tmp_path: Path) -> None:
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


def test_without_any_source_each_failure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(kind: str, name: str, *_: Any, **__: Any) -> None:
        raise UserError(f"{name}: is no {kind}")

    monkeypatch.setattr(hub_module, "download_snapshot", fail)
    with pytest.raises(UserError) as refused:
        fetch_dataset(tmp_path / "out")
    assert str(refused.value) == "lansinuote/ChnSentiCorp: is no dataset\nseamew/ChnSentiCorp: is no dataset"
    assert not (tmp_path / "out").exists()


def test_the_hub_is_asked_for_the_revision_and_the_files_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def answer(kind: str, name: str, revision: str | None, **patterns: list[str]) -> Path:
        asked.append((kind, name, revision, *patterns.values()))
        return tmp_path / "hub"

    (tmp_path / "hub").mkdir()
    for name in ("config.json", "model.safetensors", "train.parquet"):
        (tmp_path / "hub" / name).write_text("{}", "utf-8")
    monkeypatch.setattr(hub_module, "download_snapshot", answer)
    assert fetch_model("some/model", "v2") == tmp_path / "hub"
    assert fetch_model("some/model", "v2", weights=False) == tmp_path / "hub"
    fetch_dataset(tmp_path / "out", "some/reviews", "v3")
    assert asked == [
        ("model", "some/model", "v2", MODEL_FILES, SUBFOLDERS),
        ("model", "some/model", "v2", SMALL_FILES, SUBFOLDERS),
        ("dataset", "some/reviews", "v3", DATA_FILES),
    ]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads(monkeypatch, tmp_path / "hub", "train.parquet")
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(UserError, match=r"out: cannot be written to \(.+\); choose another --output"):
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

    def answer(_: str, name: str, *__: Any, **___: Any) -> Path:
        asked.append(name)
        if name.startswith("lansinuote"):
            raise UserError("x")
        return snapshot.parent

    monkeypatch.setattr(hub_module, "download_snapshot", answer)
    files = fetch_dataset(tmp_path / "out")
    assert asked == ["lansinuote/ChnSentiCorp", "seamew/ChnSentiCorp"]
    assert [path.name for path in files] == ["train.arrow", "validation.arrow", "test.arrow"]
    assert files[1].read_text("utf-8") == "valid"


def downloads(monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str) -> None:
    """Lets the hub answer with these files, each holding its own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, "utf-8")
    monkeypatch.setattr(hub_module, "download_snapshot", lambda *_, **__: folder)


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


# The real client, against a hub on this machine.

SCRIPTS = Path(__file__).parents[2] / "scripts"
NOBODY = "http://127.0.0.1:9"  # the discard port: nobody listens
CHUNK = 10 * 1024 * 1024  # huggingface-hub writes this much at a time, so that is what a break leaves
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
READ = {
    "config.json": b"{}",
    "generation_config.json": b'{"a": 1}',
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "tokenizer.json": b'{"b": 1}',
    "merges.txt": b"a b",
    "chat_template.jinja": b"{{ messages }}",
    **{name: name.encode() * 1000 for name in SHARDS},
}
NOT_READ = {
    "README.md": b"# model",
    "pytorch_model.bin": b"pickle",
    "model.gguf": b"gguf",
    "original/consolidated.00.pth": b"pth",
    "original/model.safetensors": b"again",
    "onnx/config.json": b"{}",
}
# Fetches what is named in JSON, one after the other, in the client that a user has; only its pauses are shorter.
FETCH = """
import json, sys, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))
from minilora.system import console
from minilora.errors import UserError
from minilora.data.hub import fetch_model
assert "huggingface_hub" not in sys.modules, "a run on local files would wait for it"
console.set_quiet("--quiet" in sys.argv)
for name, revision in json.loads(sys.argv[1]):
    try:
        print(fetch_model(name, revision), flush=True)
    except UserError as error:
        print("error:", error, flush=True)
"""
needs_links = pytest.mark.skipif(os.name == "nt", reason="symbolic links")

MakeHub = Callable[..., LocalHub]


@pytest.fixture
def make_hub() -> Iterator[MakeHub]:
    """A function that starts a `LocalHub`; all end with the test."""
    hubs = []

    def make(*faults: Fault, files: dict[str, bytes] | None = None, large: Any = SHARDS, prefix: str = "") -> LocalHub:
        hubs.append(LocalHub({**READ, **NOT_READ} if files is None else files, set(large), prefix))
        hubs[-1].faults.extend(faults)
        return hubs[-1]

    yield make
    for hub in hubs:
        hub.close()


def environment_of(hub: LocalHub | str, folder: Path, **variables: str) -> dict[str, str]:
    """For a process whose client asks `hub` and keeps its cache in `folder`."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {
        **plain,
        "HF_ENDPOINT": hub if isinstance(hub, str) else hub.endpoint,
        "HF_HOME": str(folder / "home"),
        "NO_PROXY": "127.0.0.1",
        "PYTHONIOENCODING": "utf-8",
        **variables,
    }


def fetch(
    hub: LocalHub | str, folder: Path, *wanted: tuple[str, str | None] | str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`fetch_model` for each of `wanted`, `some/thing` by default, in a process; texts are options of FETCH."""
    options = [option for option in wanted if isinstance(option, str)]
    models = [model for model in wanted if not isinstance(model, str)] or [("some/thing", None)]
    command = [sys.executable, "-c", FETCH, json.dumps(models), *options]
    environment = environment_of(hub, folder, **variables)
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


def fetched(done: subprocess.CompletedProcess[str]) -> dict[str, bytes]:
    """Content of the files in the folder that a process printed, by name."""
    folder = Path(done.stdout.strip())
    assert folder.is_dir(), done.stdout + done.stderr
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def blob_of(hub: LocalHub, folder: Path, name: str) -> Path:
    """The cache's file with the content of `name`."""
    return next((folder / "home").rglob(f"blobs/{hub.digest(name)}"))


def ranges(hub: LocalHub) -> list[str | None]:
    """What the requests for large files asked for, None for the whole file."""
    return [request.range for request in hub.requests if "GET cdn" in request.line]


def test_what_is_copied_with_a_model_is_downloaded_with_it() -> None:
    for name in [*COMPANIONS, "config.json", "LICENSE", "LICENSE.md", "NOTICE.txt"]:
        assert any(fnmatch(name, pattern) for pattern in MODEL_FILES)
        assert not any(fnmatch(name, pattern) for pattern in SUBFOLDERS)


@pytest.mark.parametrize("prefix", ["", "/mirror/hf"], ids=["hub", "mirror below a path"])
def test_the_files_that_are_read_are_downloaded_once_and_no_others(
    make_hub: MakeHub, tmp_path: Path, prefix: str
) -> None:
    hub = make_hub(prefix=prefix)
    hub.token = "hf_right"
    assert fetched(fetch(hub, tmp_path, HF_TOKEN="hf_right")) == READ
    assert {request.token for request in hub.requests if " cdn " in request.line} == {None}
    assert len(hub.lines("GET cdn")) == len(SHARDS)

    hub.requests.clear()
    assert fetched(fetch(hub, tmp_path, HF_TOKEN="hf_right")) == READ
    assert not hub.lines("resolve|cdn")  # only whether the branch has moved

    hub.requests.clear()
    assert fetched(fetch(hub, tmp_path, HF_HUB_OFFLINE="1")) == READ
    assert hub.requests == []


def test_a_revision_is_asked_for_by_its_name(make_hub: MakeHub, tmp_path: Path) -> None:
    first, second = fetch(make_hub(), tmp_path, ("some/thing", COMMIT), ("some/thing", "v2")).stdout.splitlines()
    assert first.endswith(COMMIT)
    assert second.startswith("error: some/thing: has no such revision; check model.revision or --revision")


def test_a_file_whose_connection_is_closed_is_continued_where_it_was(make_hub: MakeHub, tmp_path: Path) -> None:
    content = random.Random(0).randbytes(2 * CHUNK + 1)  # nowhere the same: a piece in the wrong place shows
    files = {"config.json": b"{}", "model.safetensors": content}
    hub = make_hub(Fault("GET cdn", 1, cut=CHUNK + 1000), files=files, large=["model.safetensors"])
    assert fetched(fetch(hub, tmp_path)) == files
    assert len(ranges(hub)) == 2
    assert (ranges(hub)[1] or "").startswith("bytes=")


def test_a_file_whose_connection_is_reset_is_retried(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub(Fault("GET cdn", 1, cut=1000, is_reset=True))
    done = fetch(hub, tmp_path)
    assert "retries in" in done.stderr
    assert fetched(done) == READ


@pytest.mark.parametrize("is_reset", [False, True], ids=["closed", "reset"])
def test_an_interrupted_download_is_resumed_by_the_next_call(make_hub: MakeHub, tmp_path: Path, is_reset: bool) -> None:
    hub = make_hub()
    hub.faults.append(Fault(f"GET cdn /{hub.digest(SHARDS[1])}", cut=1000, is_reset=is_reset))
    done = fetch(hub, tmp_path)
    assert done.stdout.startswith("error: some/thing: download failed (")
    assert "; run it again" in done.stdout
    hub.faults.clear()
    hub.requests.clear()
    assert fetched(fetch(hub, tmp_path)) == READ
    assert hub.lines("GET cdn") == [f"GET cdn /{hub.digest(SHARDS[1])}"]  # what has arrived stays


@pytest.mark.parametrize("status", [500, 429])
def test_a_passing_error_of_the_hub_is_retried(make_hub: MakeHub, tmp_path: Path, status: int) -> None:
    kinds = ["/revision/", "/tree/", "HEAD hub .*/config.json", "GET hub .*resolve", "cdn"]
    hub = make_hub(*(Fault(kind, 1, status=status) for kind in kinds))
    assert fetched(fetch(hub, tmp_path)) == READ
    assert [fault.where for fault in hub.faults if fault.times and hub.lines(fault.where)] == []


def test_a_hub_that_is_down_is_no_loss_where_the_cache_has_all(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub()
    fetch(hub, tmp_path)
    hub.faults.append(Fault("hub", status=500))
    assert fetched(fetch(hub, tmp_path)) == READ
    assert fetched(fetch(NOBODY, tmp_path)) == READ


def test_what_the_hub_answers_becomes_one_message(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub()
    by_revision = {"r403": 403, "r404": 404, "r429": 429, "r500": 500, "r501": 501}
    hub.faults += [Fault(f"/revision/{name}", status=status) for name, status in by_revision.items()]
    pages = {"page": b"<html>Welcome to this airport</html>", "json": b"[]", "path": b'{"id": "a", "sha": "../../x"}'}
    hub.faults += [Fault(f"/revision/{name}", status=200, content=content) for name, content in pages.items()]
    expected = [  # model, revision, what is found, what to do
        ("some/nothing", None, "no such model", "set HF_TOKEN"),
        ("some/gated", None, r"is gated \(401\)", f"accept its terms at {hub.endpoint}/some/gated"),
        ("some/thing", "r403", r"refused access \(403", "HF_TOKEN"),
        ("some/thing", "r404", r"failed \(.*404", "HF_ENDPOINT="),
        ("some/thing", "r429", "429", "wait some minutes"),
        ("some/thing", "r500", r"failed \(.*500", "HF_ENDPOINT="),
        ("some/thing", "r501", r"failed \(.*501", "HF_ENDPOINT="),
        ("some/thing", "page", f"'{hub.endpoint}' does not answer as a hub", "correct HF_ENDPOINT"),
        ("some/thing", "json", f"'{hub.endpoint}' does not answer as a hub", "correct HF_ENDPOINT"),
    ]
    done = fetch(hub, tmp_path, *((name, revision) for name, revision, _, _ in expected), ("some/thing", "path"))
    *lines, path = done.stdout.splitlines()
    for line, (name, _, found, remedy) in zip(lines, expected, strict=True):
        assert re.match(f"error: {name}: .*{found}.*; .*{re.escape(remedy)}", line)
    assert path.startswith("error: ")  # a commit that is a path outside the cache
    assert not list(tmp_path.glob("**/x/*"))


def test_a_token_that_is_wrong_or_does_not_suffice_is_named(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub()
    hub.token = "hf_right"
    assert re.search(r"token \(401\); correct HF_TOKEN", fetch(hub, tmp_path, HF_TOKEN="hf_wrong").stdout)
    assert re.search("HF_TOKEN holds characters.*; correct it", fetch(hub, tmp_path, HF_TOKEN="令牌").stdout)
    done = fetch(hub, tmp_path, ("some/gated", None), ("some/nothing", None), HF_TOKEN="hf_right")
    gated, nothing = done.stdout.splitlines()
    assert gated.startswith("error: some/gated: is gated (403); accept its terms at ")
    assert nothing.startswith("error: some/nothing: no such model")


def test_without_a_hub_the_message_names_what_is_missing(make_hub: MakeHub, tmp_path: Path) -> None:
    offline = fetch(NOBODY, tmp_path, HF_HUB_OFFLINE="1").stdout
    assert offline.startswith(f"error: some/thing: not in the cache {tmp_path / 'home' / 'hub'}")
    assert "; unset HF_HUB_OFFLINE" in offline
    unreachable = fetch(NOBODY, tmp_path).stdout
    assert unreachable.startswith(f"error: some/thing: not in the cache, and {NOBODY} cannot be reached (")
    assert "; check the network" in unreachable
    hub = make_hub(Fault("HEAD hub .*resolve", status=200, content=b"", headers={"ETag": '"x"'}))
    found = fetch(hub, tmp_path).stdout
    assert found.startswith(f"error: some/thing: {hub.endpoint!r} does not answer as a hub does (")
    assert "; correct HF_ENDPOINT" in found


@needs_links
@pytest.mark.skipif(importlib.util.find_spec(socks_package()[0]) is not None, reason="SOCKS proxies can be used here")
def test_a_proxy_that_no_client_can_use_does_not_keep_from_a_complete_cache(make_hub: MakeHub, tmp_path: Path) -> None:
    hub, proxy = make_hub(), {"ALL_PROXY": "socks5://127.0.0.1:9", "NO_PROXY": ""}
    folder = fetch(hub, tmp_path).stdout
    offline = fetch(hub, tmp_path, **proxy, HF_HUB_OFFLINE="1")
    assert (offline.stdout, offline.stderr) == (folder, "")
    online = fetch(hub, tmp_path, **proxy)
    assert online.stdout == folder
    assert online.stderr.startswith("note: some/thing: taken from the cache, without asking the hub: ALL_PROXY=socks5")
    found = fetch(hub, tmp_path / "empty", **proxy).stdout
    assert found.startswith("error: some/thing: ALL_PROXY=socks5://127.0.0.1:9: a SOCKS proxy takes ")
    assert f"; pip install '{socks_package()[1]}[socks]', or unset ALL_PROXY" in found


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ALL_PROXY", "socks://127.0.0.1:1080", r"socks:// is not known.+; write socks5://\.\.\., or unset ALL_PROXY"),
        ("https_proxy", "htp://127.0.0.1:1080", r"htp:// is not known.+; write http://\.\.\., or unset https_proxy"),
        ("HTTPS_PROXY", "http://me:secret@proxy:80a", r"\.\.\.@proxy:80a: .*; correct it, or unset HTTPS_PROXY"),
        ("SSL_CERT_FILE", "/no/such.pem", r"there is no such file or folder; correct it, or unset SSL_CERT_FILE"),
        ("NO_PROXY", "[", r"the client cannot reach the hub \(ValueError: x\); correct or unset NO_PROXY"),
    ],
)
def test_a_variable_that_keeps_the_client_from_the_hub_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    def fail() -> None:
        raise ValueError("x")

    for known in [known for known in os.environ if known.lower() in (*PROXIES, *CERTIFICATES, "no_proxy")]:
        monkeypatch.delenv(known)
    monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.utils.get_session", fail)
    with pytest.raises(ClientError, match=message) as raised, client_errors():
        pass
    assert "secret" not in str(raised.value)


def test_a_proxy_that_is_not_reached_is_named(make_hub: MakeHub, tmp_path: Path) -> None:
    found = fetch(make_hub(), tmp_path, HTTP_PROXY=NOBODY, NO_PROXY="").stdout
    # For requests, unlike httpx, it is an error of the proxy.
    assert re.search("; (check the network and|correct or unset) HTTP_PROXY, ", found), found


@needs_links
@pytest.mark.parametrize("endpoint", ["127.0.0.1", "hf-mirror.com", "ftp://hub"])
def test_an_endpoint_that_is_none_is_named_and_a_complete_cache_is_enough(
    make_hub: MakeHub, tmp_path: Path, endpoint: str
) -> None:
    problem = f"HF_ENDPOINT is '{endpoint}', expected https://...; correct or unset it"
    found = fetch(endpoint, tmp_path)
    assert found.stdout.startswith(f"error: some/thing: {problem}, or give a local folder")
    assert "retries" not in found.stderr
    folder = fetch(make_hub(), tmp_path).stdout
    cached = fetch(endpoint, tmp_path)
    assert cached.stdout == folder
    assert cached.stderr.startswith(f"note: some/thing: taken from the cache, without asking the hub: {problem}")


def test_a_hub_package_that_fails_is_named_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "huggingface_hub").mkdir()
    (tmp_path / "huggingface_hub" / "__init__.py").write_text("raise RuntimeError('another ABI')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        UserError, match=r"some/thing: .+fails \(RuntimeError: another ABI\); pip install .+, or give a"
    ):
        fetch_model("some/thing")


def test_variables_with_which_the_client_cannot_start_are_named(tmp_path: Path) -> None:
    found = fetch(NOBODY, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="soon").stdout
    assert re.match(r"error: some/thing: huggingface-hub cannot start \(.*soon.*\); correct the variables HF_", found)


def test_a_cache_that_cannot_be_written_is_named(make_hub: MakeHub, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file", "utf-8")
    found = fetch(make_hub(), tmp_path).stdout
    assert found.startswith(f"error: some/thing: cannot be stored in {tmp_path / 'home' / 'hub'} (")
    assert "set HF_HOME" in found


@pytest.mark.parametrize("name", [SHARDS[0], "config.json"], ids=["large", "small"])
def test_a_file_that_arrives_damaged_is_downloaded_once_more(make_hub: MakeHub, tmp_path: Path, name: str) -> None:
    hub = make_hub()
    where = f"GET cdn /{hub.digest(name)}" if name in SHARDS else f"GET hub /api/resolve-cache/{name}"
    hub.faults.append(Fault(where, 1, is_damaging=True))
    done = fetch(hub, tmp_path)
    assert f"{name}: damaged; downloading once more" in done.stderr
    assert fetched(done) == READ


def test_a_file_that_arrives_damaged_twice_is_refused_with_both_hashes(make_hub: MakeHub, tmp_path: Path) -> None:
    name = "model[1].safetensors"  # no pattern, although it looks like one
    hub = make_hub(Fault("GET cdn", is_damaging=True), files={"config.json": b"{}", name: b"train"}, large=[name])
    done = fetch(hub, tmp_path)
    found, expected = (hashlib.sha256(content).hexdigest() for content in (b"urain", b"train"))
    assert f"{name}: is damaged: its hash is {found}, expected {expected}; " in done.stdout
    assert "check the network and the disk" in done.stdout
    assert len(ranges(hub)) == 2


@needs_links
def test_a_file_that_is_damaged_in_the_cache_is_downloaded_once_more(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub()
    fetch(hub, tmp_path)
    blob_of(hub, tmp_path, SHARDS[0]).write_bytes(b"M" + READ[SHARDS[0]][1:])
    found = fetch(hub, tmp_path, HF_HUB_OFFLINE="1").stdout
    assert re.search(f"{SHARDS[0]}: is damaged: .*, expected {hub.digest(SHARDS[0])}; unset HF_HUB_OFFLINE", found)
    done = fetch(hub, tmp_path)
    assert "damaged; downloading once more" in done.stderr
    assert fetched(done) == READ


@needs_links
def test_a_damaged_file_stays_where_it_is_while_the_hub_is_down(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub()
    fetch(hub, tmp_path)
    blob = blob_of(hub, tmp_path, SHARDS[0])
    blob.write_bytes(b"other")
    assert re.match(rf"error: .*{SHARDS[0]}: is damaged: .*; .*check the network", fetch(NOBODY, tmp_path).stdout)
    assert blob.read_bytes() == b"other"


@needs_links
def test_of_a_cache_that_another_program_filled_only_what_is_read_is_hashed(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub()
    program = "from huggingface_hub import snapshot_download; snapshot_download('some/thing')"
    environment = environment_of(hub, tmp_path)
    subprocess.run([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL, timeout=120, check=True)
    blob_of(hub, tmp_path, "pytorch_model.bin").write_bytes(b"damaged, and not read")
    hub.requests.clear()
    assert READ.items() <= fetched(fetch(hub, tmp_path)).items()
    assert not hub.lines("resolve|cdn")


@needs_links
@pytest.mark.parametrize("has_listing", [True, False], ids=["listing", "an older client's cache"])
def test_a_file_that_is_missing_from_the_cache_is_downloaded(
    make_hub: MakeHub, tmp_path: Path, has_listing: bool
) -> None:
    hub = make_hub()
    fetch(hub, tmp_path)
    blob_of(hub, tmp_path, SHARDS[0]).unlink()
    if not has_listing:
        for listing in (tmp_path / "home").rglob("trees/*.json"):
            listing.unlink()
    assert "unset HF_HUB_OFFLINE" in fetch(hub, tmp_path, HF_HUB_OFFLINE="1").stdout
    assert fetched(fetch(hub, tmp_path)) == READ


@needs_links
def test_a_file_of_which_a_mirror_gives_no_hash_is_named(make_hub: MakeHub, tmp_path: Path) -> None:
    headers = {"ETag": '"5f3-61a"', "X-Repo-Commit": COMMIT}
    hub = make_hub(Fault("HEAD hub .*resolve/.*/config.json", status=200, content=READ["config.json"], headers=headers))
    done = fetch(hub, tmp_path)
    assert fetched(done) == READ
    assert f"config.json: not verified, because {hub.endpoint} gave no hash" in done.stderr


@needs_links
def test_a_blob_that_is_a_link_into_a_shared_store_is_verified_by_its_own_name(
    make_hub: MakeHub, tmp_path: Path
) -> None:
    hub = make_hub()
    fetch(hub, tmp_path)
    blob = blob_of(hub, tmp_path, SHARDS[0])
    stored = tmp_path / "store" / ("0" * 64)  # a name that is a hash, and not this one's
    stored.parent.mkdir()
    blob.rename(stored)
    blob.symlink_to(stored)
    done = fetch(hub, tmp_path)
    assert "damaged" not in done.stderr
    assert fetched(done) == READ
    stored.write_bytes(b"other")
    done = fetch(hub, tmp_path)
    assert "damaged; downloading once more" in done.stderr
    assert fetched(done) == READ


@pytest.mark.skipif(not hasattr(constants, "HF_HUB_DISABLE_SYMLINKS"), reason="an older client")
def test_without_links_files_are_downloaded_all_the_same(make_hub: MakeHub, tmp_path: Path) -> None:
    done = fetch(make_hub(), tmp_path, HF_HUB_DISABLE_SYMLINKS="1")
    assert fetched(done) == READ
    assert not any(path.is_symlink() for path in Path(done.stdout.strip()).iterdir())


def test_a_log_file_gets_no_progress_bar(make_hub: MakeHub, tmp_path: Path) -> None:
    assert "%|" not in fetch(make_hub(), tmp_path, "--quiet").stderr
    assert "%|" not in fetch(make_hub(), tmp_path / "a").stderr


FILES = {f"data/{name}-00000-of-00001.parquet": name.encode() for name in ("train", "validation", "test")}


def download_data(hub: LocalHub | str, folder: Path, output: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """scripts/download_data.py."""
    command = [sys.executable, SCRIPTS / "download_data.py", "--output", folder / output, "--repo", "some/thing"]
    environment = environment_of(hub, folder, **variables)
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=120)


def test_a_data_set_is_downloaded_the_same_way(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub(files=FILES, large=list(FILES)[:1])
    done = download_data(hub, tmp_path, "out")
    assert done.returncode == 0, done.stderr
    assert [line.split()[1:] for line in done.stdout.splitlines()] == [["5", "bytes"], ["10", "bytes"], ["4", "bytes"]]
    contents = {path.name: path.read_text("utf-8") for path in downloaded_files(tmp_path / "out")}
    assert contents == {f"{name}.parquet": name for name in ("train", "validation", "test")}
    done = download_data(NOBODY, tmp_path, "again", HF_HUB_OFFLINE="1")  # from the cache
    assert done.returncode == 0, done.stderr
    assert len(downloaded_files(tmp_path / "again")) == 3


def test_a_script_whose_data_set_is_refused_ends_with_status_2(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub(files=FILES)
    hub.token = "hf_right"
    done = download_data(hub, tmp_path, "out", HF_TOKEN="hf_wrong")
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: some/thing: the hub refused your token (401); " in done.stderr
    assert not (tmp_path / "out").exists()


def refused(error: type[errors.HfHubHTTPError], text: str = "x", status: int = 403) -> errors.HfHubHTTPError:
    """What huggingface-hub raises for an answer of the hub, without the HTTP client, which depends on its version."""
    return error(text, response=SimpleNamespace(headers={}, request=None, status_code=status))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "cannot be stored in .*No space left.*; make room"),
        (OSError(), r"download failed \(OSError.*\); run it again"),
        (ConnectionError("no route"), r"download failed \(.*no route\); run it again"),
        (RuntimeError("CAS Client Error"), r"download failed \(.*CAS Client Error.*HF_HUB_DISABLE_XET=1"),
        (errors.HFValidationError("x"), "is no hub name, expected owner/name"),
        (refused(errors.HfHubHTTPError, "418 teapot\nfor url", 418), r"download failed \(418 teapot\); run it"),
        (refused(errors.HfHubHTTPError, "5" * 10_000, 418), r"download failed \(5+\.\.\.\)"),
    ],
)
def test_a_failed_download_says_what_to_do(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fail(*_: Any, **__: Any) -> None:
        asked.append(1)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=f"^some/model: .*{message}"):
        download_snapshot("model", "some/model", None, allow_patterns=["*"])
    assert len(asked) == 1  # none of these passes by itself
