"""A name on the hub in, the folder of its snapshot out: what is missing is fetched, and every file is what the hub has.

huggingface-hub does the work and brings its cache (HF_HOME), a mirror (HF_ENDPOINT), HF_HUB_OFFLINE and HF_TOKEN. Three
things are done here, because it does not do them:

Large files go on where they broke off. huggingface-hub 2.4 begins a file anew when its connection was reset or its
process was killed. Here what has come stays in the cache as `blobs/{hash}.incomplete`, and the next attempt asks for
the rest. (What huggingface.co itself serves by Xet is left to huggingface-hub, which is quicker there. A mirror's files
come by HTTP, because Xet's servers are not mirrored.)

Files are hashed. huggingface-hub looks at the size of what it downloads, and at nothing of what is in the cache
already. The cache keeps a file under its hash, SHA-256 for the large ones (LFS) and Git's SHA-1 of a blob for the
others; one that differs is downloaded once more. (Where the system has no symbolic links, as on some Windows, the cache
does not keep the hash, and only the size is looked at. A file of which a mirror gives no hash is named.)

An error becomes one message that says what to do, after what may pass by itself was tried again.
"""

import hashlib
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from glob import escape
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, errors, get_hf_file_metadata, hf_hub_url, snapshot_download, utils
from huggingface_hub.file_download import are_symlinks_supported, http_get, repo_folder_name

from minilora.errors import UserError
from minilora.system.cli import DISK_ERRORS
from minilora.system.console import is_quiet, progress, warn
from minilora.system.files import sha256_once

PARALLEL = 8  # files at a time, as many as huggingface-hub takes
NO_SUCH_RANGE = 416
PASSING = {408, NO_SUCH_RANGE, 429, 500, 502, 503, 504}  # statuses of a server that may do better in a moment
PAUSES_S = (1, 3, 6)  # before an attempt that follows on one that failed
HUB = "https://huggingface.co"
MIRROR = "set a mirror (HF_ENDPOINT=https://hf-mirror.com)"
# Of the HTTP client, httpx or requests by the version of huggingface-hub: a broken connection raises it as it is.
CLIENT_ERROR: type[BaseException] = errors.HfHubHTTPError.__mro__[1]

OTHER_JSON = (AssertionError, AttributeError, KeyError, TypeError)  # what huggingface-hub makes of one that is no hub's
SHA256, GIT_SHA1 = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")

Result = TypeVar("Result")


def download_snapshot(
    kind: str, name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str] | None = None
) -> Path:
    """Folder with the files of `name` that match, each as the hub has it.

    Args:
        kind: "model" or "dataset".
        name: owner/name.
        revision: branch, tag or commit; the main branch by default.
        allow_patterns: shell patterns of the files that are wanted.
        ignore_patterns: of those that are not wanted all the same.

    Raises:
        UserError: something did not come, or came damaged twice.
    """
    local = "give a local folder" if kind == "model" else "give local files to scripts/preprocess_data.py --input"
    patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
    try:
        snapshot = _bring(kind, name, revision, patterns)
        damaged = _damaged_files(snapshot, patterns)
        if damaged and not constants.HF_HUB_OFFLINE:
            names = [path.relative_to(snapshot).as_posix() for path, _ in damaged]
            warn(f"{snapshot}: {', '.join(names)}: not what the hub has; downloads it once more")
            _patiently(lambda: HfApi().repo_info(name, repo_type=kind, revision=revision))  # before it is thrown away
            for path, _ in damaged:
                (path.parent / path.readlink()).unlink(missing_ok=True)  # two names may have one content
            _bring(kind, name, revision, {"allow_patterns": [escape(file) for file in names]}, is_again=True)
            damaged = _damaged_files(snapshot, patterns)
    except (CLIENT_ERROR, OSError, ValueError, RuntimeError, *OTHER_JSON) as error:
        raise UserError(f"{name}: {_explanation(error, kind, name, local)}") from None
    if damaged:
        path, problem = damaged[0]
        advice = "another download did not mend it, check the disk"
        if constants.HF_HUB_OFFLINE:
            advice = "unset HF_HUB_OFFLINE to have it downloaded again"
        raise UserError(f"{path}: is not what the hub has: {problem}; {advice}, {MIRROR}, or {local}")
    return snapshot


def _bring(kind: str, name: str, revision: str | None, patterns: dict[str, Any], is_again: bool = False) -> Path:
    """Folder of the snapshot, with the files that match `patterns` downloaded if the cache lacks them."""
    is_xet_left = not constants.HF_HUB_OFFLINE and not _fetch_large_files(kind, name, revision, patterns)
    _show_bars(is_xet_left and sys.stderr.isatty() and not is_quiet())
    wanted: dict[str, Any] = {"repo_type": kind, "revision": revision, **patterns}
    wanted["force_download"] = is_again and is_xet_left  # Xet's client has a store of its own, as damaged
    return Path(_patiently(lambda: snapshot_download(name, **wanted)))


def _show_bars(is_shown: bool) -> None:
    """Chooses whether huggingface-hub shows its own bars, unless HF_HUB_DISABLE_PROGRESS_BARS has chosen."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        (utils.enable_progress_bars if is_shown else utils.disable_progress_bars)()


def _fetch_large_files(kind: str, name: str, revision: str | None, patterns: dict[str, Any]) -> bool:
    """Brings the large files that are missing into the cache, several at a time, each from where it broke off.

    False where they are left to huggingface-hub, because the hub serves them by Xet.
    """
    try:
        info: Any = _patiently(lambda: HfApi().repo_info(name, repo_type=kind, revision=revision, files_metadata=True))
    except (CLIENT_ERROR, OSError):
        return True  # `snapshot_download` asks again, and knows whether the cache will do
    if not GIT_SHA1.fullmatch(info.sha):  # it becomes a path, as the files' hashes do
        raise ValueError(f"commit {info.sha!r}")
    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    folder = repo_folder_name(repo_id=name, repo_type=kind)
    missing = []
    for file in utils.filter_repo_objects(info.siblings or [], key=lambda file: file.rfilename, **patterns):
        if file.lfs and not SHA256.fullmatch(file.lfs.sha256):
            raise ValueError(f"SHA-256 of {file.rfilename} is {file.lfs.sha256!r}")
        if file.lfs and not (blob := cache / folder / "blobs" / file.lfs.sha256).exists():
            url = hf_hub_url(name, file.rfilename, repo_type=kind, revision=info.sha)
            missing.append(_LargeFile(url, blob, cache / ".locks" / folder / f"{blob.name}.lock", file.lfs.size))
    if not missing or not are_symlinks_supported(cache):
        return True
    if _is_served_by_xet(missing[0].url):
        return False
    total, initial = sum(file.size for file in missing), sum(file.count_fetched() for file in missing)
    is_hidden = bool(constants.HF_HUB_DISABLE_PROGRESS_BARS)
    with progress(f"download {name}", total, "B", initial, is_hidden=is_hidden) as bar:
        _fetch_in_parallel(missing, bar)
    return True


def _is_served_by_xet(url: str) -> bool:
    """Whether huggingface-hub would ask Xet's servers for the file at `url`."""
    is_off = find_spec("hf_xet") is None or getattr(constants, "HF_HUB_DISABLE_XET", True)
    if is_off or constants.ENDPOINT != HUB:
        return False
    return _patiently(lambda: get_hf_file_metadata(url)).xet_file_data is not None


@dataclass(frozen=True)
class _LargeFile:
    """A file that the hub keeps in LFS, and its place in huggingface-hub's cache.

    Attributes:
        url: on the hub, which redirects to the content.
        blob: where the file will be, under its hash.
        lock: what huggingface-hub locks while it writes there.
        size: in bytes.
    """

    url: str
    blob: Path
    lock: Path
    size: int

    @property
    def part(self) -> Path:
        """What has come so far."""
        return self.blob.with_name(self.blob.name + ".incomplete")

    def count_fetched(self) -> int:
        """Bytes that have come so far."""
        return self.part.stat().st_size if self.part.exists() else 0

    def fetch(self, bar: Any) -> None:
        """Asks for the rest, again and again while something comes, and puts the whole in place."""
        for folder in (self.blob.parent, self.lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with utils.WeakFileLock(self.lock):
            if self.blob.exists():  # another process has brought it
                return
            _patiently(lambda: self._ask_for_rest(bar), self.count_fetched)
            self.part.replace(self.blob)

    def _ask_for_rest(self, bar: Any) -> None:
        if self.count_fetched() > self.size:
            self._throw_away(bar)
        headers = utils.build_hf_headers()  # the HTTP client drops the token where a redirect leaves the hub
        try:
            with self.part.open("ab") as file:  # what came before an error stays
                start = file.tell()
                http_get(self.url, file, resume_size=start, headers=headers, expected_size=self.size, _tqdm_bar=bar)
        except CLIENT_ERROR as error:
            if _status_of(error) == NO_SUCH_RANGE:  # nor will there be one the next time
                self._throw_away(bar)
            raise

    def _throw_away(self, bar: Any) -> None:
        bar.update(-self.count_fetched())
        self.part.unlink()


def _fetch_in_parallel(files: list[_LargeFile], bar: Any) -> None:
    """Fetches all, PARALLEL at a time, in threads that a program does not wait for when it is stopped."""
    outcomes: SimpleQueue[BaseException | None] = SimpleQueue()
    places = threading.Semaphore(PARALLEL)

    def fetch(file: _LargeFile) -> None:
        with places:
            try:
                file.fetch(bar)
                outcomes.put(None)
            except BaseException as error:
                outcomes.put(error)

    for file in files:
        threading.Thread(target=fetch, args=(file,), daemon=True).start()
    for _ in files:
        error = outcomes.get()
        if error is not None:
            raise error


def _patiently(request: Callable[[], Result], count_done: Callable[[], int] | None = None) -> Result:
    """What `request` returns, after a pause or several where the server's answer may pass.

    Args:
        request: called again after PAUSES_S.
        count_done: how far it has come, where a broken connection is no reason to give up: when that has grown, the
            pauses begin anew.
    """
    pauses, most = iter(PAUSES_S), -1
    while True:
        try:
            return request()
        except (CLIENT_ERROR, OSError) as error:
            if count_done is not None and count_done() > most:
                pauses, most = iter(PAUSES_S), count_done()
            status = _status_of(error)
            is_broken = status is None and count_done is not None and not _is_of_disk(error)
            pause_s = next(pauses, None)
            if pause_s is None or not (status in PASSING or is_broken):
                raise
            warn(f"{_reason(_cause_of(error))}: tries again in {pause_s} s")
        time.sleep(pause_s)


def _cause_of(error: BaseException) -> BaseException:
    """What `snapshot_download` met before it looked into the cache in vain and raised `error`."""
    if isinstance(error, errors.LocalEntryNotFoundError | ValueError) and error.__cause__ is not None:
        return error.__cause__
    return error


def _status_of(error: BaseException) -> int | None:
    """Status that the hub answered with, None for an error of another kind."""
    status = getattr(getattr(_cause_of(error), "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_of_disk(error: BaseException) -> bool:
    number = getattr(error, "errno", None)
    return number in DISK_ERRORS or isinstance(error, NotADirectoryError | FileExistsError)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _explanation(error: BaseException, kind: str, name: str, local: str) -> str:
    """What went wrong and what to do, as the rest of a message."""
    cause, status, endpoint = _cause_of(error), _status_of(error), constants.ENDPOINT
    reason = "it sends other JSON" if isinstance(cause, OTHER_JSON) else _reason(cause)
    if isinstance(error, errors.HFValidationError):
        return f"is no hub name, expected owner/name; check the name, or {local}"
    if isinstance(cause, errors.GatedRepoError):
        page = f"{endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
        return f"is gated ({status}); accept its terms at {page} and set HF_TOKEN to a token of that account"
    if isinstance(cause, errors.RevisionNotFoundError):
        return "has no such revision; check model.revision or --revision"
    if isinstance(cause, errors.RepositoryNotFoundError):
        return f"no such {kind} on the hub, or private; check the name, set HF_TOKEN, or {local}"
    if status == 401:
        return "the hub refused your token (401); correct HF_TOKEN, or the token that `hf auth login` has kept"
    if status == 403:
        return f"the hub refused access ({reason}); give the token in HF_TOKEN the right to read it, or {local}"
    if status == 429:
        return f"the hub has had too many requests (429); wait some minutes, set HF_TOKEN, {MIRROR}, or {local}"
    if _is_of_disk(error):
        return f"cannot be stored in {constants.HF_HUB_CACHE} ({error}); make room there, or set HF_HOME"
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return f"not in the cache {constants.HF_HUB_CACHE}, or not all of it; unset HF_HUB_OFFLINE, or {local}"
    if isinstance(cause, UnicodeEncodeError):  # of a header: the address has been understood
        return "HF_TOKEN holds characters that no token has; correct it"
    if isinstance(cause, (errors.FileMetadataError, ValueError, *OTHER_JSON)) or not endpoint.startswith("http"):
        return f"{endpoint!r} does not answer as a hub does ({reason}); correct HF_ENDPOINT, or {local}"
    if isinstance(error, errors.LocalEntryNotFoundError) and status is None:
        return f"not in the cache, and {endpoint} cannot be reached ({reason}); check the network, {MIRROR}, or {local}"
    if isinstance(error, RuntimeError):
        return f"download by Xet failed ({reason}); run it again, set HF_HUB_DISABLE_XET=1, {MIRROR}, or {local}"
    return f"download failed ({reason}); run it again, {MIRROR}, or {local}"


def _damaged_files(snapshot: Path, patterns: dict[str, Any]) -> list[tuple[Path, str]]:
    """Those of a snapshot's files that match `patterns` and are not what the hub has, each with what is wrong."""
    names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_symlink()]
    damaged, unverified = [], []
    for name in sorted(utils.filter_repo_objects(names, **patterns)):
        path = snapshot / name
        # One hop, not all: a blob may in turn be a link into a store that all repositories share (hf-xet).
        expected = path.readlink().name
        if not path.exists():
            damaged.append((path, "it is missing"))
        elif not SHA256.fullmatch(expected) and not GIT_SHA1.fullmatch(expected):
            unverified.append(name)
        elif (found := sha256_once(path) if SHA256.fullmatch(expected) else _git_sha1(path)) != expected:
            damaged.append((path, f"its hash is {found}, expected {expected}"))
    if unverified:
        warn(f"{snapshot}: {', '.join(unverified)}: not verified, because {constants.ENDPOINT} gave no hash for it")
    return damaged


def _git_sha1(path: Path) -> str:
    """The hash under which Git keeps a file: SHA-1 of "blob", its length, a zero byte, and its content."""
    content = path.read_bytes()  # small: the hub keeps files of more than 10 MB in LFS
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
