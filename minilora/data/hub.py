"""A model's or a data set's name in, a local folder out.

A local folder is taken as it is. Anything else is a name on the hub, which `download.py` knows how to ask.
"""

import shutil
from pathlib import Path

from minilora.data.prepare import SPLITS, split_of
from minilora.errors import UserError
from minilora.system.files import WRITING

# Weights, configurations, the tokenizer: what is read, and what is copied when a model is written. Pickled and other
# formats of the same weights (.bin, .gguf, original/) are as large again, and not read.
MODEL_FILES = ["*.json", "*.safetensors", "merges.txt", "chat_template.jinja"]
SMALL_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
SUBFOLDERS = ["*/*"]
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
        folder = _download("model", name_or_path, revision, MODEL_FILES if weights else SMALL_FILES, SUBFOLDERS)
        if weights and not any(folder.glob("*.safetensors")):  # a cache may hold what another program needed, no more
            raise UserError(
                f"{name_or_path}: no *.safetensors on the hub or in its cache ({folder}); unset "
                "HF_HUB_OFFLINE, check the network, or choose a model that has them (.bin files are not read: they can "
                "run code)"
            )
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds no config.json; give the folder or name of a Hugging Face checkpoint")
    return folder


def local_folder(name_or_path: str) -> Path | None:
    """The folder of a model that is here already, None for a name on the hub."""
    folder = Path(name_or_path)
    if not folder.is_dir() and name_or_path.startswith(PACKAGE_ASSETS):
        folder = Path(__file__).parents[1] / "assets" / name_or_path.removeprefix(PACKAGE_ASSETS)
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


def _download(kind: str, name: str, revision: str | None, *patterns: list[str]) -> Path:
    """`download_snapshot`, imported here: a run on local files does not wait for huggingface-hub."""
    try:
        from minilora.data.download import download_snapshot
    except ValueError as error:  # huggingface-hub reads the environment when it is imported
        raise UserError(f"{name}: huggingface-hub cannot start ({error}); correct the variables HF_...") from None
    return download_snapshot(kind, name, revision, *patterns)
