"""Cleaning and splitting by their definition, on lists of records: what data/prepare.py has to write, byte for byte."""

import itertools
import json
import random
import unicodedata
from collections import defaultdict
from dataclasses import replace
from typing import Any

from minilora.data.prepare import SplitOptions
from minilora.data.records import Record
from minilora.data.split_files import SPLITS

Files = dict[str, list[Record]]


def normalized(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c)[0] not in "PZC")


def clean(files: Files, across_files: bool) -> Files:
    labels = defaultdict(set)
    for record in itertools.chain.from_iterable(files.values()):
        if record.messages is None:
            labels[normalized(record.content)].add(record.label)
    kept: Files = {}
    seen = set[str]()
    for name, records in files.items():
        kept[name] = []
        seen = seen if across_files else set()
        for record in records:
            key = normalized(record.content)
            if key and len(labels[key]) < 2 and key not in seen:
                seen.add(key)
                kept[name].append(record)
    return kept


def leaks(records: list[Record], other: list[Record]) -> list[Record]:
    texts = {normalized(record.content) for record in other} - {""}
    return [record for record in records if normalized(record.content) in texts]


def split(records: list[Record], seed: int, held_out: list[str], drop_rare: bool) -> Files:
    by_label = defaultdict(list)
    for record in records:
        by_label[record.label].append(record)
    splits: Files = {name: [] for name in ("train", *held_out)}
    for label, group in sorted(by_label.items(), key=lambda item: str(item[0])):
        if len(group) < len(splits):
            assert drop_rare
            continue
        random.Random(f"{seed}-{label}").shuffle(group)
        tenth = max(1, round(len(group) / 10))
        for index, name in enumerate(held_out):
            splits[name] += group[index * tenth : (index + 1) * tenth]
        splits["train"] += group[len(held_out) * tenth :]
    for name, part in splits.items():
        random.Random(f"{seed}-{name}").shuffle(part)
    return splits


def prepared(files: Files, options: SplitOptions) -> dict[str, bytes]:
    """The split files' contents; with `keep_splits` the names of `files` are those of splits."""
    kept = clean(files, across_files=not options.keep_splits)
    if options.keep_splits:
        if "test" in files and not options.clean_test:
            kept["test"] = files["test"]
        given = [record for name, part in kept.items() if name != "train" for record in part]
        missing = [name for name in SPLITS if name not in kept]
        leaking = leaks(kept["train"], given)
        pool = [record for record in kept["train"] if record not in leaking]
        carved = split(pool, options.seed, missing, options.drop_rare) if missing else {}
        in_splits = [record for part in carved.values() for record in part]
        held_out = [record for name in missing for record in carved[name]]
        rare = [record for record in pool if missing and record not in in_splits]
        train = [record for record in kept["train"] if record not in held_out and record not in rare]
        splits = {**carved, **kept, "train": train}
    else:
        splits = split([r for part in kept.values() for r in part], options.seed, list(SPLITS[1:]), options.drop_rare)
    if options.drop_leaks:
        leaking = leaks(splits["train"], splits["validation"] + splits["test"])
        splits["train"] = [record for record in splits["train"] if record not in leaking]
    return {name: "".join(map(line, splits[name])).encode() for name in SPLITS}


def line(record: Record) -> str:
    record = record if record.text is None else replace(record, text=record.text.strip())
    content: dict[str, Any] = record.to_json()
    return json.dumps(content, ensure_ascii=False) + "\n"
