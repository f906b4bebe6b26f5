"""huggingface-hub's real client and a hub on this machine: fetched once, continued, hashed, or one message."""

import errno
import hashlib
import importlib.util
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from minilora.data import download
from minilora.data.download import PARALLEL, download_snapshot
from minilora.data.hub import MODEL_FILES, SUBFOLDERS, downloaded_files
from minilora.errors import UserError
from minilora.weights.bnb_checkpoint import COMPANIONS
from tests.local_hub import COMMIT, Fault, LocalHub

SCRIPTS = Path(__file__).parents[2] / "scripts"
CHUNK = 10 * 1024 * 1024  # huggingface-hub writes as much at a time, so that is what a break leaves
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
console.set_quiet("--quiet" in sys.argv)
if "--no-mirror" in sys.argv:
    from minilora.data import download
    download.HUB = download.constants.ENDPOINT
for name, revision in json.loads(sys.argv[1]):
    try:
        print(fetch_model(name, revision), flush=True)
    except UserError as error:
        print("error:", error, flush=True)
"""
needs_posix = pytest.mark.skipif(os.name == "nt", reason="signals and links of POSIX")

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
    """For a process whose client asks `hub`, and keeps its cache in `folder`."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {
        **plain,
        "HF_ENDPOINT": hub if isinstance(hub, str) else hub.endpoint,
        "HF_HOME": str(folder / "home"),
        "NO_PROXY": "127.0.0.1",
        "PYTHONIOENCODING": "utf-8",
        **variables,
    }


def command_of(*wanted: tuple[str, str | None] | str) -> list[str]:
    """What runs FETCH; of `wanted`, texts are its options."""
    options = [option for option in wanted if isinstance(option, str)]
    models = [model for model in wanted if not isinstance(model, str)] or [("some/thing", None)]
    return [sys.executable, "-c", FETCH, json.dumps(models), *options]


def fetch(
    hub: LocalHub | str, folder: Path, *wanted: tuple[str, str | None] | str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`fetch_model` for each of `wanted`, `some/thing` by default, in a process of its own."""
    environment = environment_of(hub, folder, **variables)
    command = command_of(*wanted)
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def fetched(done: subprocess.CompletedProcess[str]) -> dict[str, bytes]:
    """Content of the files in the folder that a process printed, by name."""
    folder = Path(done.stdout.strip())
    assert folder.is_dir(), done.stdout + done.stderr
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def large_content(size: int) -> bytes:
    """Bytes that are nowhere the same, so that a piece in the wrong place shows."""
    return random.Random(0).randbytes(size)


def test_what_is_copied_with_a_model_is_fetched_with_it() -> None:
    names = [*COMPANIONS, "config.json"]
    patterns = {"allow_patterns": MODEL_FILES, "ignore_patterns": SUBFOLDERS}
    assert list(filter_repo_objects(names, **patterns)) == names


@pytest.mark.parametrize("prefix", ["", "/mirror/hf"], ids=["hub", "mirror below a path"])
def test_the_files_that_are_read_are_fetched_once_and_no_others(make_hub: MakeHub, tmp_path: Path, prefix: str) -> None:
    hub = make_hub(prefix=prefix)
    hub.token = "hf_right"
    assert fetched(fetch(hub, tmp_path, HF_TOKEN="hf_right")) == READ
    assert {request.token for request in hub.requests if " hub " in request.line and "some" in request.line} == {
        "Bearer hf_right"
    }
    assert {request.token for request in hub.requests if " cdn " in request.line} == {None}
    assert len(hub.lines("GET cdn")) == len(SHARDS)

    hub.requests.clear()
    assert fetched(fetch(hub, tmp_path, HF_TOKEN="hf_right")) == READ
    asked = set(hub.lines("some|cdn"))  # nothing but whether the branch has moved
    assert asked <= {f"GET hub /api/models/some/thing{rest}" for rest in ("", "/revision/main", f"/tree/{COMMIT}")}

    hub.requests.clear()
    assert fetched(fetch(hub, tmp_path, HF_HUB_OFFLINE="1")) == READ
    assert hub.requests == []


def test_a_revision_is_asked_for_by_its_name(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub()
    first, second = fetch(hub, tmp_path, ("some/thing", COMMIT), ("some/thing", "v2")).stdout.splitlines()
    assert first.endswith(COMMIT)
    assert second == "error: some/thing: has no such revision; check model.revision or --revision"
    assert "GET hub /api/models/some/thing/revision/v2" in hub.lines()


def test_shards_come_at_the_same_time(make_hub: MakeHub, tmp_path: Path) -> None:
    names = [f"model-{number:05d}-of-{PARALLEL:05d}.safetensors" for number in range(PARALLEL)]
    files = {"config.json": b"{}", **{name: name.encode() for name in names}}
    together = Fault("GET cdn", meets=threading.Barrier(PARALLEL))  # none is answered before all are asked for
    assert fetched(fetch(make_hub(together, files=files, large=names), tmp_path)) == files


@pytest.mark.parametrize("is_reset", [False, True], ids=["closed", "reset"])
def test_a_file_whose_connection_breaks_goes_on_where_it_was(make_hub: MakeHub, tmp_path: Path, is_reset: bool) -> None:
    files = {"config.json": b"{}", "model.safetensors": large_content(2 * CHUNK + 1)}
    hub = make_hub(Fault("GET cdn", 1, cut=CHUNK + 1000, is_reset=is_reset), files=files, large=["model.safetensors"])
    assert fetched(fetch(hub, tmp_path)) == files
    assert [request.range for request in hub.requests if " cdn " in request.line] == [None, f"bytes={CHUNK}-"]


@needs_posix
def test_a_file_whose_process_was_killed_goes_on_where_it_was(make_hub: MakeHub, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": large_content(2 * CHUNK + 1)}
    hub = make_hub(Fault("GET cdn", 1, stall=CHUNK + 1000), files=files, large=["model.safetensors"])
    process = subprocess.Popen(command_of(), env=environment_of(hub, tmp_path), stderr=subprocess.DEVNULL)
    try:
        assert hub.stalled.wait(60)
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size == CHUNK for path in tmp_path.rglob("*.incomplete")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = fetch(hub, tmp_path)
    assert fetched(done) == files
    assert [request.range for request in hub.requests if " cdn " in request.line] == [None, f"bytes={CHUNK}-"]
    assert "10.5M/21.0M" in done.stderr  # the bar begins where the file does
    assert list(tmp_path.rglob("*.incomplete")) == []


def test_a_part_that_is_too_long_is_thrown_away(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub()
    blobs = tmp_path / "home" / "hub" / "models--some--thing" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hub.digest(SHARDS[0])}.incomplete").write_bytes(READ[SHARDS[0]] + b"x")
    assert fetched(fetch(hub, tmp_path)) == READ


def test_a_hub_that_ignores_ranges_sends_the_whole_again(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub()
    blobs = tmp_path / "home" / "hub" / "models--some--thing" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hub.digest(SHARDS[0])}.incomplete").write_bytes(b"other")
    content = READ[SHARDS[0]]
    headers = {"Content-Type": "application/octet-stream"}
    hub.faults.append(Fault(f"GET cdn /{hub.digest(SHARDS[0])}", status=200, content=content, headers=headers))
    assert fetched(fetch(hub, tmp_path)) == READ


def test_a_hub_that_knows_no_such_range_is_asked_for_the_whole(make_hub: MakeHub, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"train"}
    hub = make_hub(Fault("GET cdn", 1, status=416), files=files, large=["model.safetensors"])
    blobs = tmp_path / "home" / "hub" / "models--some--thing" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hub.digest('model.safetensors')}.incomplete").write_bytes(b"tr")
    assert fetched(fetch(hub, tmp_path)) == files
    assert [request.range for request in hub.requests if " cdn " in request.line] == ["bytes=2-", None]


def test_a_hash_of_the_hub_that_is_a_path_is_refused(make_hub: MakeHub, tmp_path: Path) -> None:
    """Under its hash a file is stored."""
    outside = tmp_path / "outside"
    lfs = {"sha256": str(outside / "x"), "size": 32_000, "pointerSize": 134}
    siblings = [{"rfilename": SHARDS[0], "size": 32_000, "lfs": lfs}]
    content = json.dumps({"id": "some/thing", "sha": COMMIT, "siblings": siblings}).encode()
    hub = make_hub(Fault("/api/models/some/thing", status=200, content=content))
    done = fetch(hub, tmp_path)
    assert f"does not answer as a hub does (SHA-256 of {SHARDS[0]} is '{outside / 'x'}'); correct HF_" in done.stdout
    assert not outside.exists()


@pytest.mark.parametrize("status", [500, 429])
def test_an_error_of_the_hub_that_passes_is_waited_for(make_hub: MakeHub, tmp_path: Path, status: int) -> None:
    kinds = ["/api/models/some/thing$", "/revision/", "/tree/", "HEAD hub .*/config.json", "GET hub .*resolve", "cdn"]
    hub = make_hub(*(Fault(kind, 1, status=status) for kind in kinds))
    assert fetched(fetch(hub, tmp_path)) == READ
    assert [fault.where for fault in hub.faults if fault.times and hub.lines(fault.where)] == []


def test_a_hub_that_is_down_is_no_loss_where_the_cache_has_all(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub()
    fetch(hub, tmp_path)
    hub.faults.append(Fault("hub", status=500))
    assert fetched(fetch(hub, tmp_path)) == READ
    assert fetched(fetch("http://127.0.0.1:9", tmp_path)) == READ  # the discard port: nobody listens


def test_what_the_hub_answers_becomes_one_message(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub()
    by_revision = {"r403": 403, "r404": 404, "r429": 429, "r500": 500, "r501": 501}
    hub.faults += [Fault(f"/revision/{name}", status=status) for name, status in by_revision.items()]
    pages = {"page": b"<html>Welcome to this airport</html>", "json": b"[]", "path": b'{"id": "a", "sha": "../../x"}'}
    hub.faults += [Fault(f"/revision/{name}", status=200, content=content) for name, content in pages.items()]
    mirror = r"set a mirror \(HF_ENDPOINT=https://hf-mirror\.com\)"
    failed = rf"download failed \(.+\); run it again, {mirror}, or give a local folder"  # the client says why
    expected = [
        ("some/nothing", None, "no such model on the hub, or private; check the name, set HF_TOKEN, or give .*"),
        ("some/gated", None, rf"is gated \(401\); accept its terms at {hub.endpoint}/some/gated and set HF_TOKEN .*"),
        ("some/thing", "r403", r"the hub refused access \(403 .+\); give the token in HF_TOKEN the right to read it.*"),
        ("some/thing", "r404", failed.replace(".+", ".*404.*")),
        ("some/thing", "r429", rf"the hub has had too many requests \(429\); wait some minutes, .*, {mirror}.*"),
        ("some/thing", "r500", failed.replace(".+", ".*500.*")),
        ("some/thing", "r501", failed.replace(".+", ".*501.*")),
        (
            "some/thing",
            "page",
            rf"'{hub.endpoint}' does not answer as a hub does \(.+\); correct HF_ENDPOINT, or give .*",
        ),
        ("some/thing", "json", rf"'{hub.endpoint}' does not answer as a hub does \(it sends other JSON\); correct .*"),
        ("some/thing", "path", rf"'{hub.endpoint}' does not answer as a hub does \(commit '\.\./\.\./x'\); correct .*"),
    ]
    done = fetch(hub, tmp_path, *((name, revision) for name, revision, _ in expected))
    for line, (name, _, message) in zip(done.stdout.splitlines(), expected, strict=True):
        assert re.fullmatch(f"error: {name}: {message}", line)
    assert "Traceback" not in done.stderr


def test_a_token_that_is_wrong_or_does_not_suffice_is_said(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub()
    hub.token = "hf_right"
    done = fetch(hub, tmp_path, HF_TOKEN="hf_wrong")
    assert done.stdout == (
        "error: some/thing: the hub refused your token (401); correct HF_TOKEN, or the token that `hf auth login` has "
        "kept\n"
    )
    assert fetch(hub, tmp_path, HF_TOKEN="令牌").stdout == (
        "error: some/thing: HF_TOKEN holds characters that no token has; correct it\n"
    )
    done = fetch(hub, tmp_path, ("some/gated", None), ("some/nothing", None), HF_TOKEN="hf_right")
    gated, nothing = done.stdout.splitlines()
    assert gated.startswith("error: some/gated: is gated (403); accept its terms at ")
    assert nothing.startswith("error: some/nothing: no such model on the hub, or private; check the name")


def test_without_a_hub_it_is_said_what_is_missing(make_hub: MakeHub, tmp_path: Path) -> None:
    cache = tmp_path / "home" / "hub"
    assert fetch("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1").stdout == (
        f"error: some/thing: not in the cache {cache}, or not all of it; unset HF_HUB_OFFLINE, or give a local folder\n"
    )
    assert fetch("http://127.0.0.1:9", tmp_path).stdout.startswith(
        "error: some/thing: not in the cache, and http://127.0.0.1:9 cannot be reached ("
    )
    hub = make_hub(Fault("HEAD hub .*resolve", status=200, content=b"", headers={"ETag": '"x"'}))
    said = fetch(hub, tmp_path).stdout
    assert said.startswith(f"error: some/thing: {hub.endpoint!r} does not answer as a hub does (")
    assert said.endswith("); correct HF_ENDPOINT, or give a local folder\n")


@pytest.mark.parametrize("endpoint", ["127.0.0.1", ""])
def test_an_endpoint_that_is_none_is_said(tmp_path: Path, endpoint: str) -> None:
    said = fetch(endpoint, tmp_path).stdout
    assert said.startswith(f"error: some/thing: {endpoint!r} does not answer as a hub does (")
    assert said.endswith("); correct HF_ENDPOINT, or give a local folder\n")


def test_variables_with_which_the_client_cannot_start_are_said(tmp_path: Path) -> None:
    done = fetch("http://127.0.0.1:9", tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="soon")
    assert "error: some/thing: huggingface-hub cannot start (" in done.stdout
    assert done.stdout.endswith("); correct the variables HF_...\n")


def test_a_cache_that_cannot_be_written_is_named(make_hub: MakeHub, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file", "utf-8")
    done = fetch(make_hub(), tmp_path)
    assert done.stdout.startswith(f"error: some/thing: cannot be stored in {tmp_path / 'home' / 'hub'} (")
    assert done.stdout.endswith("); make room there, or set HF_HOME\n")


@pytest.mark.parametrize("name", [SHARDS[0], "config.json"], ids=["large", "small"])
def test_a_file_that_comes_damaged_is_downloaded_again(make_hub: MakeHub, tmp_path: Path, name: str) -> None:
    hub = make_hub()
    where = f"GET cdn /{hub.digest(name)}" if name in SHARDS else f"GET hub /api/resolve-cache/{name}"
    hub.faults.append(Fault(where, 1, is_damaging=True))
    done = fetch(hub, tmp_path)
    assert f"{name}: not what the hub has; downloads it once more" in done.stderr
    assert fetched(done) == READ


def test_a_file_that_is_downloaded_again_goes_on_where_it_broke_off(make_hub: MakeHub, tmp_path: Path) -> None:
    name = "model[1].safetensors"  # no pattern, although it looks like one
    files = {"config.json": b"{}", name: large_content(CHUNK + 1)}
    hub = make_hub(Fault("GET cdn", 1, is_damaging=True), Fault("GET cdn", 1, cut=CHUNK), files=files, large=[name])
    assert fetched(fetch(hub, tmp_path)) == files
    assert [request.range for request in hub.requests if " cdn " in request.line] == [None, None, f"bytes={CHUNK}-"]


def test_a_file_that_comes_damaged_twice_is_refused_with_both_hashes(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub(Fault("GET cdn", is_damaging=True), files={"config.json": b"{}", "model.safetensors": b"train"})
    hub.large = {"model.safetensors"}
    done = fetch(hub, tmp_path)
    found, expected = (hashlib.sha256(content).hexdigest() for content in (b"urain", b"train"))
    assert f"model.safetensors: is not what the hub has: its hash is {found}, expected {expected}; " in done.stdout
    assert "; another download did not mend it, check the disk, set a mirror" in done.stdout


@needs_posix
def test_a_file_that_was_damaged_in_the_cache_is_downloaded_again(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub()
    fetch(hub, tmp_path)
    blob = next((tmp_path / "home").rglob(f"blobs/{hub.digest(SHARDS[0])}"))
    blob.write_bytes(b"M" + READ[SHARDS[0]][1:])
    done = fetch(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert f"{SHARDS[0]}: is not what the hub has: its hash is " in done.stdout
    assert f", expected {hub.digest(SHARDS[0])}; unset HF_HUB_OFFLINE to have it" in done.stdout
    done = fetch(hub, tmp_path)
    assert "downloads it once more" in done.stderr
    assert fetched(done) == READ


@needs_posix
def test_a_damaged_file_stays_where_it_is_while_the_hub_is_down(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub()
    fetch(hub, tmp_path)
    blob = next((tmp_path / "home").rglob(f"blobs/{hub.digest(SHARDS[0])}"))
    blob.write_bytes(b"other")
    done = fetch("http://127.0.0.1:9", tmp_path)
    assert done.stdout.startswith("error: some/thing: download failed (")
    assert blob.read_bytes() == b"other"


@needs_posix
def test_of_a_cache_that_another_program_filled_only_what_is_read_is_looked_at(
    make_hub: MakeHub, tmp_path: Path
) -> None:
    hub = make_hub()
    program = "from huggingface_hub import snapshot_download; snapshot_download('some/thing')"
    environment = environment_of(hub, tmp_path)
    subprocess.run([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL, timeout=120, check=True)
    next((tmp_path / "home").rglob(f"blobs/{hub.digest('pytorch_model.bin')}")).write_bytes(b"damaged, and not read")
    hub.requests.clear()
    assert READ.items() <= fetched(fetch(hub, tmp_path)).items()
    assert not hub.lines("resolve|cdn")


@needs_posix
def test_a_file_that_is_missing_from_the_cache_is_named(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub()
    fetch(hub, tmp_path)
    next((tmp_path / "home").rglob(f"blobs/{hub.digest(SHARDS[0])}")).unlink()
    for listing in (tmp_path / "home").rglob("trees/*.json"):  # which older clients do not keep
        listing.unlink()
    done = fetch(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert f"{SHARDS[0]}: is not what the hub has: it is missing; unset HF_HUB_OFFLINE" in done.stdout
    assert fetched(fetch(hub, tmp_path)) == READ


@needs_posix
def test_a_file_of_which_a_mirror_gives_no_hash_is_named(make_hub: MakeHub, tmp_path: Path) -> None:
    headers = {"ETag": '"5f3-61a"', "X-Repo-Commit": COMMIT}
    hub = make_hub(Fault("HEAD hub .*resolve/.*/config.json", status=200, content=READ["config.json"], headers=headers))
    done = fetch(hub, tmp_path)
    assert fetched(done) == READ
    assert f"{COMMIT}: config.json: not verified, because {hub.endpoint} gave no hash for it\n" in done.stderr


@needs_posix
def test_a_blob_that_is_a_link_into_a_store_of_its_own_is_verified_by_its_own_name(
    make_hub: MakeHub, tmp_path: Path
) -> None:
    hub = make_hub()
    fetch(hub, tmp_path)
    blob = next((tmp_path / "home").rglob(f"blobs/{hub.digest(SHARDS[0])}"))
    stored = tmp_path / "store" / ("0" * 64)  # a name that is a hash, and not this one's
    stored.parent.mkdir()
    blob.rename(stored)
    blob.symlink_to(stored)
    done = fetch(hub, tmp_path)
    assert "not what the hub has" not in done.stderr
    assert fetched(done) == READ
    stored.write_bytes(b"other")
    done = fetch(hub, tmp_path)
    assert ": not what the hub has; downloads it once more" in done.stderr
    assert fetched(done) == READ


@pytest.mark.skipif(importlib.util.find_spec("hf_xet") is None, reason="needs hf-xet")
@pytest.mark.skipif(not hasattr(download.constants, "HF_HUB_DISABLE_XET"), reason="an older huggingface-hub")
def test_what_the_hub_serves_by_xet_is_left_to_its_client(make_hub: MakeHub, tmp_path: Path) -> None:
    """But not where it is a mirror, which has no Xet of its own."""
    hub = make_hub()
    hub.has_xet = True
    fetch(hub, tmp_path, "--no-mirror")
    assert hub.lines("GET hub .*/xet-read-token/")
    assert not hub.lines("GET cdn")
    hub.requests.clear()
    assert fetched(fetch(hub, tmp_path)) == READ
    assert not hub.lines("xet-read-token")


@pytest.mark.skipif(not hasattr(download.constants, "HF_HUB_DISABLE_SYMLINKS"), reason="an older huggingface-hub")
def test_without_links_files_are_fetched_all_the_same(make_hub: MakeHub, tmp_path: Path) -> None:
    done = fetch(make_hub(), tmp_path, HF_HUB_DISABLE_SYMLINKS="1")
    assert fetched(done) == READ
    assert not any(path.is_symlink() for path in Path(done.stdout.strip()).iterdir())


def test_progress_in_a_log_file_is_whole_lines_and_can_be_silenced(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub()
    lines = fetch(hub, tmp_path / "a").stderr.splitlines()
    assert [line.partition(" [")[0] for line in lines] == [f"download some/thing: {n}/64.0k" for n in ("0.00", "64.0k")]
    assert fetch(hub, tmp_path / "a").stderr == ""  # nothing to fetch
    assert fetch(hub, tmp_path / "b", "--quiet").stderr == ""
    assert fetch(hub, tmp_path / "c", HF_HUB_DISABLE_PROGRESS_BARS="1").stderr == ""


@needs_posix
def test_progress_on_a_terminal_is_a_bar(make_hub: MakeHub, tmp_path: Path) -> None:
    import fcntl
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    environment = environment_of(make_hub(), tmp_path)
    subprocess.run(command_of(), stdout=subprocess.DEVNULL, stderr=theirs, env=environment, timeout=120, check=True)
    os.close(theirs)
    shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert shown.startswith("\rdownload some/thing:   0%|")
    assert shown.endswith("\r")  # gone when it is done, and huggingface-hub shows none beside it


FILES = {f"data/{name}-00000-of-00001.parquet": name.encode() for name in ("train", "validation", "test")}


def download_data(hub: LocalHub | str, folder: Path, output: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """scripts/download_data.py."""
    command = [sys.executable, SCRIPTS / "download_data.py", "--output", folder / output, "--repo", "some/thing"]
    environment = environment_of(hub, folder, **variables)
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=120)


def test_a_data_set_comes_the_same_way(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub(files=FILES, large=list(FILES)[:1])
    done = download_data(hub, tmp_path, "out")
    assert done.returncode == 0, done.stderr
    assert [line.split()[1:] for line in done.stdout.splitlines()] == [["5", "bytes"], ["10", "bytes"], ["4", "bytes"]]
    contents = {path.name: path.read_text("utf-8") for path in downloaded_files(tmp_path / "out")}
    assert contents == {f"{name}.parquet": name for name in ("train", "validation", "test")}
    done = download_data("http://127.0.0.1:9", tmp_path, "again", HF_HUB_OFFLINE="1")  # from the cache
    assert done.returncode == 0, done.stderr
    assert len(downloaded_files(tmp_path / "again")) == 3


def test_a_script_whose_data_set_does_not_come_ends_with_status_2(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub(files=FILES)
    hub.token = "hf_right"
    done = download_data(hub, tmp_path, "out", HF_TOKEN="hf_wrong")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: some/thing: the hub refused your token (401); ")
    assert not (tmp_path / "out").exists()


@needs_posix
def test_a_signal_ends_a_download_that_hangs(make_hub: MakeHub, tmp_path: Path) -> None:
    hub = make_hub(Fault("GET cdn", stall=2), files=FILES, large=FILES)
    process = subprocess.Popen(
        [sys.executable, SCRIPTS / "download_data.py", "--output", tmp_path / "out", "--repo", "some/thing"],
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=environment_of(hub, tmp_path),
    )
    assert hub.stalled.wait(60)
    process.terminate()
    try:
        _, said = process.communicate(timeout=5)  # it does not wait for the threads that download
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


NO_NETWORK = """
import importlib, importlib.util, pathlib, socket, sys
clients = {"huggingface_hub", "hf_xet", "requests", "httpx", "httpx2", "urllib3"}
def refuse(*_, **__):
    raise AssertionError("a socket was opened")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
for path in map(pathlib.Path, sys.argv[1:]):
    if path.stem == "download":
        assert not clients & sys.modules.keys()
    if path.parent.name == "minilora":
        importlib.import_module(f"minilora.{path.stem}")
    else:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


def test_nothing_is_asked_of_a_network_when_modules_and_scripts_are_imported(tmp_path: Path) -> None:
    """And but for `download`, which comes last, none of them waits for huggingface-hub."""
    paths = [*(SCRIPTS.parent / "minilora").glob("*.py"), *SCRIPTS.glob("*.py")]
    paths.sort(key=lambda path: path.stem == "download")
    command = [sys.executable, "-c", NO_NETWORK, *paths]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment_of("http://h", tmp_path))
    assert done.returncode == 0, done.stderr


def refused(error: type[errors.HfHubHTTPError], text: str = "x", status: int = 403) -> errors.HfHubHTTPError:
    """What huggingface-hub raises for an answer of the hub, without the HTTP client, which depends on its version."""
    return error(text, response=SimpleNamespace(headers={}, request=None, status_code=status))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"cannot be stored in .* \(.*No space left on device\); make",
        ),
        (
            OSError(),
            r"download failed \(OSError\); run it again, set a mirror \(HF_ENDPOINT=.*\), or give a local fold",
        ),
        (ConnectionError("no route"), r"download failed \(no route\); run it again"),
        (errors.HfHubHTTPError.__mro__[1]("cut off"), r"download failed \(cut off\); run it again"),
        (
            RuntimeError("CAS Client Error"),
            r"download by Xet failed \(CAS Client Error\); run it again, set HF_HUB_DIS",
        ),
        (errors.HFValidationError("x"), r"is no hub name, expected owner/name; check the name"),
        (refused(errors.HfHubHTTPError, "418 teapot\nfor url", 418), r"download failed \(418 teapot\); run it"),
    ],
)
def test_a_failed_download_says_what_to_do(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(download, "snapshot_download", fail)
    with pytest.raises(UserError, match=f"^some/model: {message}"):
        download_snapshot("model", "some/model", None, ["*"])


@pytest.mark.parametrize("grows", [True, False], ids=["it goes on", "nothing comes"])
def test_a_broken_connection_is_given_up_only_when_nothing_comes_any_more(
    grows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    attempts = 0
    monkeypatch.setattr(time, "sleep", pauses.append)

    def request() -> str:
        nonlocal attempts
        attempts += 1
        if attempts == 20:
            return "whole"
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    if grows:
        assert download._patiently(request, lambda: attempts) == "whole"
        assert pauses == [1] * 19
    else:
        with pytest.raises(ConnectionResetError):
            download._patiently(request, lambda: 7)
        assert pauses == [1, 3, 6]


def test_a_full_disk_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def request() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(OSError, match="No space left"):
        download._patiently(request, lambda: 0)
