"""`data.dir` of a configuration: whether it is there, else made of `data.source`; and the folds that a sweep makes."""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from minilora.config import Config, layer_of, load_config
from minilora.data.hub import fetch_dataset
from minilora.data.labels import POLARITY
from minilora.data.prepare import prepare, prepare_demo
from minilora.data.records import ReadOptions
from minilora.data.split_files import SPLITS, prepared_columns, read_report, recover_splits, write_splits
from minilora.errors import UserError
from minilora.system.console import info
from minilora.system.files import sha256, similar_path

DOWNLOADS = "chn_senti_corp"  # beside data.dir
FOLDS_SEED = 42  # the same folds in every sweep


def has_data(config: Config) -> bool:
    """Whether the splits are in `data.dir`; UserError if only some are."""
    directory = Path(config.data.dir)
    recover_splits(directory)
    missing = [f"{split}.jsonl" for split in SPLITS if not (directory / f"{split}.jsonl").is_file()]
    if 0 < len(missing) < len(SPLITS):
        raise UserError(
            f"{directory}: has no {', '.join(missing)}; correct data.dir, or prepare the data with "
            f"scripts/preprocess_data.py --input FILES --output_dir {directory}"
        )
    return not missing


def refuse_slip(config: Config, path: Path | None, overrides: Sequence[str]) -> None:
    """UserError where `data.dir` was named and what to prepare there was not: it may be misspelt.

    `path` and `overrides` are what `config` was loaded from.
    """
    is_own = Path(config.data.dir) == Path(load_config(path).data.dir)
    named = [] if is_own else overrides
    if layer_of("data.source", path, overrides) < layer_of("data.dir", path, named):
        if Path(config.data.dir).is_file():
            raise UserError(
                f"data.dir: {config.data.dir} is a file, expected a folder; make one of it with python "
                f"scripts/preprocess_data.py --input {config.data.dir} --output_dir data/mine and name that"
            )
        raise UserError(
            f"data.dir: {config.data.dir} holds no train.jsonl; prepare it with python scripts/preprocess_data.py "
            f"--input FILES --output_dir {config.data.dir}, or name what to prepare there with "
            f"data.source={config.data.source}{similar_path(Path(config.data.dir))}"
        )


def prepare_data(config: Config) -> None:
    """Makes `data.dir` from `data.source`."""
    directory = Path(config.data.dir)
    info(f"{directory} holds no data yet: preparing it from {config.data.source}")
    if config.data.source == "demo":
        prepare_demo(directory)
    else:
        prepare(fetch_dataset(directory.parent / DOWNLOADS), directory, reading=ReadOptions(map_labels=POLARITY))


def write_folds(data: Path, folds: int, directory: Path) -> list[Path]:
    """K folders with train.jsonl, validation.jsonl and test.jsonl: every record of `data` but its test set is in one
    validation set, and in the other K - 1 training sets.

    The folds have each label's share of records, and are the same whenever they are made. Those that are there stay.

    Args:
        data: a folder of prepared splits; its test set is the test set of each fold.
        folds: K, 2 or more.
        directory: gets fold-1 to fold-K.

    Raises:
        UserError: there are fewer records than folds, a line is no record, the folds that are there are of other data,
            or a folder cannot be written.
    """
    facts = {"folds": folds, "made_of": {split: sha256(data / f"{split}.jsonl") for split in SPLITS}}
    texts = [(data / f"{split}.jsonl").read_bytes() for split in SPLITS]
    lines = [line + b"\n" for text in texts[:2] for line in text.splitlines() if line.strip()]
    if not 2 <= folds <= len(lines):
        raise UserError(f"--folds: got {folds}, expected 2 to {len(lines):,}, the records to train and validate on")
    fold_of = _deal(_labels(data, texts[:2]), folds)
    targets = [directory / f"fold-{number}" for number in range(1, folds + 1)]
    for number, target in enumerate(targets):
        recover_splits(target)
        report = read_report(target)
        if report and {name: report.get(name) for name in facts} != facts:
            raise UserError(
                f"{target}: holds a fold of other data or another --folds; choose another --output_dir, or move "
                f"{directory} away"
            )
        if not report:
            held_out = {
                "train": [line for line, fold in zip(lines, fold_of, strict=True) if fold != number],
                "validation": [line for line, fold in zip(lines, fold_of, strict=True) if fold == number],
                "test": [texts[2]],
            }
            columns = prepared_columns(data)
            write_splits(held_out, target, {**facts, **({"columns": columns} if columns else {})})
    return targets


def _labels(data: Path, texts: Sequence[bytes]) -> Iterator[str | None]:
    """The label of each line of the first splits' files that is not empty, None of conversations."""
    for split, text in zip(SPLITS, texts, strict=False):
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{data}/{split}.jsonl:{number}: is not JSON ({error}); correct the line") from None
            if not isinstance(record, dict):
                raise UserError(f"{data}/{split}.jsonl:{number}: is no JSON object; correct the line")
            yield record.get("label")


def _deal(labels: Iterable[str | None], folds: int) -> list[int]:
    """The fold of each record: those of one label are shuffled and dealt in turn, where the label before ended."""
    groups: dict[str | None, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        groups[label].append(index)
    order = []
    for label, group in groups.items():
        random.Random(f"{FOLDS_SEED}-{label}").shuffle(group)
        order += group
    fold_of = [0] * len(order)
    for turn, index in enumerate(order):
        fold_of[index] = turn % folds
    return fold_of
