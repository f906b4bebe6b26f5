"""A model's or a data set's name in, a local folder out.

    folder                 as it is; comes before the hub
    minilora/assets/...    the package's own model, from any working directory
    owner/name             a snapshot in the hub's cache: downloaded where files are missing, and verified

huggingface-hub downloads: its cache (HF_HOME), a mirror (HF_ENDPOINT), HF_TOKEN and HF_HUB_OFFLINE work as everywhere,
and a download that breaks is resumed. Two things are added.

Every file that is read is hashed: huggingface-hub compares only the size of what it downloads. The cache stores a file
under the hub's hash of it, SHA-256 for large files (LFS) and Git's SHA-1 of a blob for the others; a file that differs
is downloaded once more. Where the system has no symbolic links, as on some Windows, nothing is compared.

Every error becomes one message with its remedy, after a server's passing error was retried.

Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache (the cache's layout).
"""

import contextlib
import hashlib
import re
import shutil
import sys
import time
from collections.abc import Iterator
from glob import escape
from pathlib import Path
from typing import Any

from minilora.data.hub_errors import MIRROR, ClientError, cause_of, client_errors, explain, may_pass, reason_of
from minilora.data.split_files import SPLITS, split_of
from minilora.errors import UserError, capped
from minilora.system.console import is_quiet, warn
from minilora.system.files import make_folder, replacing, sha256, storage_errors, sync
from minilora.system.optional import broken
from minilora.system.signals import nothing_at_stake

# Weights, configurations, the tokenizer: what is read, and what is copied when a model is written. Pickled and other
# formats of the same weights (.bin, .gguf, original/) are as large again, and not read.
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")  # whoever passes a model on passes them on
MODEL_FILES = ["*.json", "*.safetensors", "merges.txt", "chat_template.jinja", *LICENCE_FILES]
ADAPTER_FILES = ["adapter_*", "calibration.json", "manifest.json", "metrics.json", "training_args.json"]
SMALL_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
ENDINGS = (".parquet", ".arrow")
DATA_FILES = [f"*{ending}" for ending in ENDINGS]
SUBFOLDERS = ["*/*"]
PACKAGE_ASSETS = "minilora/assets/"
CHNSENTICORP_SOURCES = ("lansinuote/ChnSentiCorp", "seamew/ChnSentiCorp")

PAUSES_S = (1, 3, 6)  # before the attempts that follow on a failed one
SHA256, GIT_SHA1 = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")


def fetch_model(name_or_path: str, revision: str | None = None, weights: bool = True) -> Path:
    """Folder with the model's files, downloaded if needed; without `weights` only the small ones.

    Raises:
        UserError: there is no such folder, or the download failed.
    """
    folder = local_folder(name_or_path)
    if folder is None:
        if hub_name(name_or_path) is None:
            raise UserError(f"{name_or_path}: is neither a folder nor a hub name such as Qwen/Qwen2.5-0.5B-Instruct")
        patterns = MODEL_FILES if weights else SMALL_FILES
        folder = download_snapshot("model", name_or_path, revision, allow_patterns=patterns, ignore_patterns=SUBFOLDERS)
        if weights and not any(folder.glob("*.safetensors")):  # a cache may hold only what another program needed
            raise UserError(
                f"{name_or_path}: no *.safetensors on the hub or in its cache ({folder}); unset HF_HUB_OFFLINE, check "
                "the network, or choose a model that has them (.bin files are not read: they can run code)"
            )
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds no config.json{_instead(folder)}")
    others = [path for path in sorted(folder.glob("*.safetensors")) if path.name != "model.safetensors"]
    others += folder.glob("pytorch_model*.bin")
    if weights and (folder / "model.safetensors").is_file() and others:
        warn(f"note: {folder}: model.safetensors is read, {others[0].name} and its like beside it are not")
    return folder


def _instead(folder: Path) -> str:
    """What a folder without a checkpoint holds, and what to do."""
    if (folder / "adapter_config.json").is_file():
        return ", but an adapter; give the base model that its adapter_config.json names"
    if any(folder.glob("*.gguf")):
        return ", but a GGUF file, which is not read; give the checkpoint in safetensors that it was made from"
    inner = those_within(folder, "*/config.json", "*/*/config.json")  # snapshots/{revision}, in the cache
    return inner or "; give the folder or name of a Hugging Face checkpoint"


def those_within(folder: Path, *patterns: str) -> str:
    """The folders within one that hold what it lacks itself, as the end of a message, final ones first; "" for none."""
    inner = [path.parent.relative_to(folder) for pattern in patterns for path in folder.glob(pattern)]
    inner.sort(key=lambda path: (path.name != "final", path))
    return f"; {capped(', '.join(path.as_posix() for path in inner))} in it do: give one of them" if inner else ""


def fetch_adapter(name_or_path: str) -> Path:
    """The path itself, or a folder with an adapter's files from the hub; without them for a base model's name there."""
    if Path(name_or_path).is_dir() or not _is_hub_name(name_or_path):
        return Path(name_or_path)
    return download_snapshot("model", name_or_path, None, allow_patterns=ADAPTER_FILES, ignore_patterns=SUBFOLDERS)


def _is_hub_name(name_or_path: str) -> bool:
    """Whether it can only be owner/name: a path has another form, or begins with a folder that is here."""
    owner, _, name = name_or_path.partition("/")
    return bool(name) and "/" not in name and owner not in ("", ".", "..", "~") and not Path(owner).is_dir()


def hub_name(name_or_path: str) -> str | None:
    """A model's name on the hub, None for a folder or what could only be one."""
    is_path = name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~"))
    return None if is_path or local_folder(name_or_path) is not None else name_or_path


def local_folder(name_or_path: str) -> Path | None:
    """The folder of a model that is on this machine, None for a name on the hub."""
    folder = Path(name_or_path)
    if not folder.is_dir() and name_or_path.startswith(PACKAGE_ASSETS):
        folder = Path(__file__).parents[1] / "assets" / name_or_path.removeprefix(PACKAGE_ASSETS)
    return folder if folder.is_dir() else None


def fetch_dataset(directory: Path, repo: str | None = None, revision: str | None = None) -> list[Path]:
    """The split files of a hub data set, as `directory/train.parquet` and so on.

    A split that the hub keeps in several parts becomes `train-00000.parquet`, `train-00001.parquet` ...

    Args:
        directory: where the files go; without repo and revision, a complete set in it is used as it is.
        repo: by default CHNSENTICORP_SOURCES, the first that works.
        revision: branch, tag or commit.

    Raises:
        UserError: no source has a training file, or the folder holds another data set.
    """
    if repo is None and revision is None:
        present = downloaded_files(directory)
        if {split_of(path) for path in present} == set(SPLITS):
            return present
    problems = []
    for source in [repo] if repo else CHNSENTICORP_SOURCES:
        try:
            found = _choose_files(source, download_snapshot("dataset", source, revision, allow_patterns=DATA_FILES))
        except UserError as error:
            problems.append(str(error))
            continue
        foreign = [path.name for path in downloaded_files(directory) if path.name not in found]
        if foreign:  # two data sets in one folder would be taken for one
            raise UserError(
                f"{directory}: holds {capped(', '.join(foreign))} of another download; remove them or choose another "
                "--output_dir"
            )
        _copy(found, directory)
        return downloaded_files(directory)
    raise UserError("\n".join(problems))


def downloaded_files(directory: Path) -> list[Path]:
    """The files of `fetch_dataset`: train first, then validation, then test.

    One order for all callers: of duplicates the first record is kept, and the split depends on the records' order.
    """
    files = sorted(path for path in directory.glob("[!.]*") if path.suffix in ENDINGS)
    return [path for split in SPLITS for path in files if split_of(path) == split]


def _choose_files(source: str, snapshot: Path) -> dict[str, Path]:
    """Files of a data set by the names that they get in our folder; parquet before arrow."""
    parts: dict[str, list[Path]] = {}
    for ending in ENDINGS:
        for path in sorted(snapshot.rglob(f"*{ending}")):
            split = split_of(path) or split_of(path.parent)  # train-00000-of-00001.parquet, or train/0000.parquet
            if split is not None:
                parts.setdefault(split, []).append(path)
        if "train" in parts:
            break
        parts.clear()
    else:
        raise UserError(f"{source}: has no train file in parquet or arrow format; choose another --repo")
    folders = {path.parent if split_of(path) else path.parent.parent for paths in parts.values() for path in paths}
    if len(folders) > 1:
        names = ", ".join(sorted(folder.relative_to(snapshot).as_posix() for folder in folders))
        raise UserError(
            f"{source}: has several data sets ({capped(names)}); give one's files to preprocess_data.py --input"
        )
    return {
        f"{split}{f'-{number:05d}' if len(paths) > 1 else ''}{path.suffix}": path
        for split, paths in parts.items()
        for number, path in enumerate(paths)
    }


def _copy(files: dict[str, Path], directory: Path) -> None:
    make_folder(directory, "--output_dir")
    for name, path in files.items():
        with replacing(directory / name) as temporary, storage_errors(directory / name, path.stat().st_size):
            shutil.copyfile(path, temporary)
            sync(temporary)


def download_snapshot(kind: str, name: str, revision: str | None, **patterns: Any) -> Path:
    """Folder with the files of a "model" or "dataset" that match, each verified against the hub's hash.

    `patterns` are allow_patterns and ignore_patterns of `snapshot_download`. UserError: a file was not downloaded, or
    is damaged after a second download.
    """
    try:
        from huggingface_hub import constants  # here: a run on local files does not wait for huggingface-hub
    except ValueError as error:  # it reads the environment when it is imported
        raise UserError(f"{name}: huggingface-hub cannot start ({error}); correct the variables HF_...") from None
    except Exception as error:
        raise UserError(f"{name}: {broken('huggingface_hub', error)}, or give a local folder") from None
    local = "give a local folder" if kind == "model" else "give local files to scripts/preprocess_data.py --input"
    try:
        snapshot = _download(name, repo_type=kind, revision=revision, **patterns)
        damaged = _damaged_files(snapshot, **patterns)
        if damaged and not constants.HF_HUB_OFFLINE:
            warn(f"{snapshot}: {', '.join(damaged)}: damaged; downloading once more")
            again = [escape(file) for file in damaged]
            _download(name, repo_type=kind, revision=revision, allow_patterns=again, force_download=True)
            damaged = _damaged_files(snapshot, **patterns)
    except UserError:  # a file of the cache that may not be read
        raise
    except Exception as error:  # any: which client's and which parser's errors come depends on the library's version
        raise UserError(f"{name}: {explain(error, kind, name, local)}") from error
    for file, problem in damaged.items():
        advice = f"another download did not replace it: check the network and the disk, {MIRROR}"
        if constants.HF_HUB_OFFLINE:
            advice = "unset HF_HUB_OFFLINE to download it again"
        raise UserError(f"{snapshot / file}: is damaged: {problem}; {advice}, or {local}")
    return snapshot


def _download(name: str, **wanted: Any) -> Path:
    """`snapshot_download` of what is missing, retried after PAUSES_S where an error may pass.

    Where HF_HUB_OFFLINE is set, or the client fails before it reaches the hub, the cache is enough if it has all.
    """
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return Path(snapshot_download(name, local_files_only=True, **wanted))
    pauses = iter(PAUSES_S)
    while True:
        try:
            with _progress_bars(), nothing_at_stake(), client_errors():  # files in transfer are temporary
                return Path(snapshot_download(name, **wanted))
        except ClientError as error:
            if "force_download" not in wanted:
                with contextlib.suppress(Exception):  # it is not in the cache
                    folder = Path(snapshot_download(name, local_files_only=True, **wanted))
                    warn(f"note: {name}: taken from the cache, without asking the hub: {error}")
                    return folder
            raise
        except Exception as error:
            pause_s = next(pauses, None)
            if pause_s is None or not may_pass(error):
                raise
            warn(f"{name}: {reason_of(cause_of(error))}; retries in {pause_s} s")
        time.sleep(pause_s)


@contextlib.contextmanager
def _progress_bars() -> Iterator[None]:
    """Hides huggingface-hub's bars with --quiet and in log files, unless HF_HUB_DISABLE_PROGRESS_BARS decides."""
    from huggingface_hub import constants, utils

    is_shown = sys.stderr.isatty() and not is_quiet()
    if is_shown or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _damaged_files(snapshot: Path, **patterns: Any) -> dict[str, str]:
    """The snapshot's files that match and differ from the hub's hash, each with what is wrong."""
    from huggingface_hub import constants, utils

    damaged: dict[str, str] = {}
    unverified = []
    links = sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_symlink())
    for name in utils.filter_repo_objects(links, **patterns):
        path = snapshot / name
        # One hop, not all: a blob may in turn be a link into a store that all repositories share (hf-xet).
        expected = path.readlink().name
        if not path.exists():
            damaged[name] = "it is missing"
        elif not SHA256.fullmatch(expected) and not GIT_SHA1.fullmatch(expected):
            unverified.append(name)
        elif (found := sha256(path) if SHA256.fullmatch(expected) else _git_sha1(path)) != expected:
            damaged[name] = f"its hash is {found}, expected {expected}"
    if unverified:
        warn(f"{snapshot}: {', '.join(unverified)}: not verified, because {constants.ENDPOINT} gave no hash for it")
    return damaged


def _git_sha1(path: Path) -> str:
    """Git's hash of a file: SHA-1 of "blob", its length, a zero byte, and its content."""
    content = path.read_bytes()  # small: the hub keeps files of more than 10 MB in LFS
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
