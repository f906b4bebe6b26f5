"""A model's or a data set's name in, a local folder out.

A local folder is taken as it is. Anything else is a name on the hub and goes through huggingface-hub, which brings
its cache, HF_ENDPOINT (a mirror), HF_HUB_OFFLINE, HF_TOKEN and HF_HOME. It is imported where it is used, so that a run
on local files neither waits for it nor needs a network.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from minilora.errors import UserError

MODEL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
]
PACKAGE_ASSETS = "minilora/assets/"
CHNSENTICORP_SOURCES = ("lansinuote/ChnSentiCorp", "seamew/ChnSentiCorp")

T = TypeVar("T")


def fetch_model(name_or_path: str, revision: str | None = None) -> Path:
    """Folder with the model's files, downloaded if it has to be.

    Args:
        name_or_path: a folder, a name below `minilora/assets/` (found from any working directory), or a hub name.
        revision: branch, tag or commit on the hub.

    Raises:
        UserError: there is no such folder, or the hub did not give it.
    """
    folder = Path(name_or_path)
    if not folder.is_dir() and name_or_path.startswith(PACKAGE_ASSETS):
        folder = Path(__file__).parent / "assets" / name_or_path.removeprefix(PACKAGE_ASSETS)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: holds no config.json; give the folder of a Hugging Face checkpoint")
        return folder
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        raise UserError(f"{name_or_path}: is neither a folder nor a hub name such as Qwen/Qwen2.5-0.5B-Instruct")
    return Path(_download("model", name_or_path, revision, allow_patterns=MODEL_FILES))


def fetch_dataset(directory: Path, repo: str | None = None, revision: str | None = None) -> list[Path]:
    """The split files of a hub data set, as `directory/train.parquet` and so on.

    Args:
        directory: where the files go; what is there already is not downloaded again.
        repo: name of the data set; by default the sources of ChnSentiCorp, one after the other.
        revision: branch, tag or commit.

    Raises:
        UserError: no source gave a training file.
    """
    if repo is None:
        present = _split_files(directory)
        if len(present) == 3:
            return present
    problems = []
    for source in [repo] if repo else CHNSENTICORP_SOURCES:
        try:
            snapshot = Path(_download("dataset", source, revision, allow_patterns=["*.parquet", "*.arrow"]))
        except UserError as error:
            problems.append(str(error))
            continue
        for path in sorted(p for p in snapshot.rglob("*") if p.suffix in (".parquet", ".arrow")):
            split = _split_of(path)
            if split is not None:
                directory.mkdir(parents=True, exist_ok=True)
                temporary = directory / f".writing-{split}{path.suffix}"
                shutil.copyfile(path, temporary)
                temporary.replace(directory / f"{split}{path.suffix}")
        present = _split_files(directory)
        if present and present[0].stem == "train":
            return present
        problems.append(f"{source}: has no train file in parquet or arrow format")
    raise UserError("\n".join(problems))


def _split_of(path: Path) -> str | None:
    name = path.stem.lower()
    for split, marks in (("train", ("train",)), ("validation", ("valid", "dev")), ("test", ("test",))):
        if any(mark in name for mark in marks):
            return split
    return None


def _split_files(directory: Path) -> list[Path]:
    candidates = [[directory / f"{split}{end}" for end in (".parquet", ".arrow")] for split in _SPLITS]
    return [path for both in candidates for path in both if path.is_file()]


_SPLITS = ("train", "validation", "test")


def _download(kind: str, name: str, revision: str | None, **options: Any) -> str:
    """`snapshot_download`, its errors as messages that say what to do."""
    from huggingface_hub import snapshot_download

    return _explain(kind, name, lambda: snapshot_download(name, repo_type=kind, revision=revision, **options))


def _explain(kind: str, name: str, download: Callable[[], T]) -> T:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    local = "give a local folder" if kind == "model" else "give local files to scripts/preprocess_data.py --input"
    try:
        return download()
    except GatedRepoError:
        raise UserError(f"{name}: is gated; accept its terms on its page and set HF_TOKEN to your token") from None
    except RevisionNotFoundError:
        raise UserError(f"{name}: has no such revision; check model.revision or --revision") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name}: no such {kind} on the hub, or private; check the name, set HF_TOKEN, or {local}"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise UserError(
            f"{name}: not in the cache and the hub cannot be reached; unset HF_HUB_OFFLINE, check the network, set a "
            f"mirror (HF_ENDPOINT=https://hf-mirror.com), or {local}"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name}: download failed ({reason}); run it again, "
            f"set a mirror (HF_ENDPOINT=https://hf-mirror.com), or {local}"
        ) from None
