"""A model's or a data set's name in, a local folder out.

A local folder is taken as it is. Anything else is a name on the hub and goes through huggingface-hub, which brings
its cache, HF_ENDPOINT (a mirror), HF_HUB_OFFLINE, HF_TOKEN and HF_HOME. It is imported where it is used, so that a run
on local files neither waits for it nor needs a network.

huggingface-hub looks at the size of what it downloads, and at nothing of what is in the cache already. Here every file
is hashed whenever it is fetched, and compared with the hash that the hub gave it: the cache keeps a file under that
name, SHA-256 for the large ones (LFS) and Git's SHA-1 of a blob for the others. One that differs is downloaded once
more. (Where the system has no symbolic links, as on some Windows, the cache does not keep the hash, and only the size
is looked at.)
"""

import hashlib
import re
import shutil
from pathlib import Path

from minilora.console import warn
from minilora.data import SPLITS, split_of
from minilora.errors import UserError
from minilora.files import WRITING, sha256

SMALL_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
MODEL_FILES = [*SMALL_FILES, "*.safetensors", "*.safetensors.index.json"]
PACKAGE_ASSETS = "minilora/assets/"
CHNSENTICORP_SOURCES = ("lansinuote/ChnSentiCorp", "seamew/ChnSentiCorp")


def fetch_model(name_or_path: str, revision: str | None = None, weights: bool = True) -> Path:
    """Folder with the model's files, downloaded if it has to be.

    Args:
        name_or_path: a folder, a name below `minilora/assets/` (found from any working directory), or a hub name.
        revision: branch, tag or commit on the hub.
        weights: whether its weights are downloaded too.

    Raises:
        UserError: there is no such folder, or the hub did not give it.
    """
    folder = local_folder(name_or_path)
    if folder is None:
        if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
            raise UserError(f"{name_or_path}: is neither a folder nor a hub name such as Qwen/Qwen2.5-0.5B-Instruct")
        folder = _download("model", name_or_path, revision, MODEL_FILES if weights else SMALL_FILES)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds no config.json; give the folder or name of a Hugging Face checkpoint")
    return folder


def local_folder(name_or_path: str) -> Path | None:
    """The folder of a model that is here already, None for a name on the hub."""
    folder = Path(name_or_path)
    if not folder.is_dir() and name_or_path.startswith(PACKAGE_ASSETS):
        folder = Path(__file__).parent / "assets" / name_or_path.removeprefix(PACKAGE_ASSETS)
    return folder if folder.is_dir() else None


def fetch_dataset(directory: Path, repo: str | None = None, revision: str | None = None) -> list[Path]:
    """The split files of a hub data set, as `directory/train.parquet` and so on.

    A split that the hub keeps in several parts becomes `train-00000.parquet`, `train-00001.parquet` ...

    Args:
        directory: where the files go; without repo and revision, a complete set that is there already is taken.
        repo: name of the data set; by default the sources of ChnSentiCorp, one after the other.
        revision: branch, tag or commit.

    Raises:
        UserError: no source gave a training file, or the folder holds another data set.
    """
    if repo is None and revision is None:
        present = downloaded_files(directory)
        if {split_of(path) for path in present} == set(SPLITS):
            return present
    problems = []
    for source in [repo] if repo else CHNSENTICORP_SOURCES:
        try:
            found = _choose_files(source, _download("dataset", source, revision, ["*.parquet", "*.arrow"]))
        except UserError as error:
            problems.append(str(error))
            continue
        foreign = [path.name for path in downloaded_files(directory) if path.name not in found]
        if foreign:  # two data sets in one folder would be taken for one
            raise UserError(
                f"{directory}: holds {', '.join(foreign)} of another download; remove them or choose another --output"
            )
        _copy(found, directory)
        return downloaded_files(directory)
    raise UserError("\n".join(problems))


def downloaded_files(directory: Path) -> list[Path]:
    """What `fetch_dataset` left there: train first, then validation, then test.

    One order for everybody: of duplicates the first row stays, and the split is a function of the rows' order.
    """
    named = [(split_of(path), path) for path in directory.glob("*") if path.suffix in _ENDINGS and path.name[0] != "."]
    return [path for split in SPLITS for name, path in sorted(named, key=lambda pair: pair[1].name) if name == split]


_ENDINGS = (".parquet", ".arrow")


def _choose_files(source: str, snapshot: Path) -> dict[str, Path]:
    """Files of a data set by the names that they get here, parquet before arrow."""
    parts: dict[str, list[Path]] = {}
    for ending in _ENDINGS:
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
        raise UserError(f"{source}: has several data sets ({names}); give one's files to preprocess_data.py --input")
    return {
        f"{split}{f'-{number:05d}' if len(paths) > 1 else ''}{path.suffix}": path
        for split, paths in parts.items()
        for number, path in enumerate(paths)
    }


def _copy(files: dict[str, Path], directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, path in files.items():
            shutil.copyfile(path, directory / f"{WRITING}{name}")
            (directory / f"{WRITING}{name}").replace(directory / name)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror}); choose another --output") from None


def _download(kind: str, name: str, revision: str | None, allow_patterns: list[str]) -> Path:
    """`snapshot_download`, its errors as messages that say what to do."""
    from huggingface_hub import errors, snapshot_download

    local = "give a local folder" if kind == "model" else "give local files to scripts/preprocess_data.py --input"
    mirror = f"set a mirror (HF_ENDPOINT=https://hf-mirror.com), or {local}"
    # httpx's or requests', by the version of huggingface-hub: a broken connection raises it as it is.
    client_error: type[BaseException] = errors.HfHubHTTPError.__mro__[1]

    try:
        snapshot = Path(snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=allow_patterns))
        damaged = _damaged_files(snapshot)
        if damaged:
            names = [path.relative_to(snapshot).as_posix() for path, _, _ in damaged]
            warn(f"{snapshot}: {', '.join(names)}: not what the hub has, the hash differs; downloads it once more")
            snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=names, force_download=True)
            damaged = _damaged_files(snapshot)
        if damaged:
            path, found, expected = damaged[0]
            raise UserError(
                f"{path}: is not what the hub has, downloaded twice: its hash is {found}, expected {expected}; check "
                f"the disk and the connection, {mirror}"
            )
        return snapshot
    except errors.HFValidationError:
        raise UserError(f"{name}: is no hub name, expected owner/name; check the name, or {local}") from None
    except errors.GatedRepoError:
        raise UserError(f"{name}: is gated; accept its terms on its page and set HF_TOKEN to your token") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name}: has no such revision; check model.revision or --revision") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{name}: no such {kind} on the hub, or private; check the name, set HF_TOKEN, or {local}"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):  # reached, but it answered with an error
            raise UserError(f"{name}: download failed ({_reason(error.__cause__)}); run it again, {mirror}") from None
        raise UserError(
            f"{name}: not in the cache and the hub cannot be reached; unset HF_HUB_OFFLINE, check the network, {mirror}"
        ) from None
    except (client_error, OSError) as error:
        if getattr(getattr(error, "response", None), "status_code", None) == 401:
            raise UserError(f"{name}: the hub refused your token (401); correct HF_TOKEN or unset it") from None
        raise UserError(f"{name}: download failed ({_reason(error)}); run it again, {mirror}") from None


def _damaged_files(snapshot: Path) -> list[tuple[Path, str, str]]:
    """Files of a downloaded snapshot that are not what the hub has: path, hash found, hash expected."""
    damaged = []
    for path in sorted(snapshot.rglob("*")):
        # One hop, not all: a blob may in turn be a link into a store that all repositories share (hf-xet).
        expected = path.readlink().name if path.is_symlink() and path.is_file() else ""
        if re.fullmatch(r"[0-9a-f]{64}", expected):
            found = sha256(path)
        elif re.fullmatch(r"[0-9a-f]{40}", expected):
            found = _git_sha1(path)
        else:
            continue
        if found != expected:
            damaged.append((path, found, expected))
    return damaged


def _git_sha1(path: Path) -> str:
    """The hash under which Git keeps a file: SHA-1 of "blob", its length, a zero byte, and its content."""
    content = path.read_bytes()  # small: the hub keeps files of more than 10 MB in LFS
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
