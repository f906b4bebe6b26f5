"""Cleans data files and splits them 8:1:1, duplicates removed across all files first."""

from minilora.system.cli import add_reading_options, begin_script, build_parser, run_script

if __name__ == "__main__":
    begin_script()  # before the imports that take seconds

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from minilora.config import Config
from minilora.data.hub import downloaded_files, fetch_model
from minilora.data.labels import POLARITY, alike_note, as_label, index_note
from minilora.data.prepare import SPLIT_SEED, SplitOptions, prepare
from minilora.data.readers import data_files, split_folders
from minilora.data.records import ReadOptions, Record
from minilora.errors import UserError
from minilora.qlora.prompt import ChatTokenizer, chat_example
from minilora.system.console import info, warn

DOWNLOADED = Path("data/chn_senti_corp")
EXAMPLES = """\
examples:
  python scripts/preprocess_data.py                                       what download_data.py fetched
  python scripts/preprocess_data.py --input train.tsv dev.tsv --keep_splits --drop_leaks
  python scripts/preprocess_data.py --input mine.csv --text_column comment --label_column stars --drop_rare
  python scripts/preprocess_data.py --input chats.jsonl --tokenizer Qwen/Qwen2.5-0.5B-Instruct --max_length 512
  python scripts/preprocess_data.py --input mine.csv --map_labels negative=负面,positive=正面
"""


def main() -> None:
    """Reads the command line, prepares, prints the report."""
    parser = build_parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="TSV, CSV, JSON, parquet, Excel files; save_to_disk folders",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("data/processed"), help="folder for the splits")
    parser.add_argument("--seed", type=int, default=SPLIT_SEED, help="of the split")
    parser.add_argument(
        "--keep_splits",
        action="store_true",
        help="the files are the splits; a missing dev or test is carved out of train; reports leaks. A test file "
        "stays whole: of a text with one label in train and another in test, train's record is dropped",
    )
    parser.add_argument("--drop_leaks", action="store_true", help="with --keep_splits: remove leaks from train")
    parser.add_argument(
        "--clean_test",
        action="store_true",
        help="with --keep_splits: drop empty, contradictory and duplicate records of the test file too",
    )
    parser.add_argument("--drop_rare", action="store_true", help="drop labels with fewer records than there are splits")
    parser.add_argument(
        "--drop_invalid",
        action="store_true",
        help="drop records that cannot be used: no label, too many or too few fields, answers empty or too long",
    )
    parser.add_argument("--max_length", type=int, help="most tokens of a conversation, as data.max_length of training")
    parser.add_argument("--tokenizer", metavar="MODEL", help="folder or hub name of the model that counts them")
    add_reading_options(parser, "--input")
    arguments = parser.parse_args()
    if arguments.drop_leaks and not arguments.keep_splits:
        parser.error("--drop_leaks needs --keep_splits: without it nothing leaks")
    if arguments.clean_test and not arguments.keep_splits:
        parser.error("--clean_test needs --keep_splits: without it no file is the test")
    if (arguments.max_length is None) != (arguments.tokenizer is None):
        parser.error("--max_length and --tokenizer need each other: tokens are those of a model")
    folders = [folder for path in arguments.input or [] for folder in split_folders(path)]
    files = [file for folder in folders for file in data_files(folder)] or downloaded_files(DOWNLOADED)
    if not files:
        raise UserError(f"{DOWNLOADED}: holds no data; run scripts/download_data.py, or name files with --input")
    reading = ReadOptions.given(arguments, {})
    if not arguments.input and not reading.map_labels:
        reading = replace(reading, map_labels=POLARITY)
    names = ("seed", "keep_splits", "drop_leaks", "clean_test", "drop_rare", "drop_invalid")
    report = prepare(
        files,
        arguments.output_dir,
        SplitOptions(**{name: getattr(arguments, name) for name in names}),
        reading,
        check=length_check(arguments.tokenizer, arguments.max_length) if arguments.tokenizer else bool,
    )
    print_report(report, arguments.output_dir)


def length_check(model: str, max_length: int) -> Callable[[Record], object]:
    """Raises UserError for a conversation whose answers do not fit; what else is too long, training cuts."""
    tokenizer = ChatTokenizer(fetch_model(model, weights=False))

    def check(record: Record) -> None:
        if record.messages is not None:
            chat_example(tokenizer, record.messages, max_length=max_length, where=record.where, default_system="")

    return check


def print_report(report: dict[str, Any], output: Path) -> None:
    """What went in, what was dropped and why, what came out."""
    for name, count in report["rows_in"].items():
        print(f"read     {count:>7,}  {name}")
    for key, count in report.get("not_read", {}).items():
        print(f"not read {count:>7,}  key {key}")
    for cause, count in report["dropped"].items():
        by_split = {name: counts.get(cause, 0) for name, counts in report["dropped_by_split"].items()}
        of_which = ", ".join(f"{number:,} of {name}" for name, number in by_split.items() if number)
        print(f"dropped  {count:>7,}  {cause}{f' ({of_which})' if of_which else ''}")
    for line in report.get("invalid", []):
        print(f"          invalid  {line}")
    for cause, count in report["kept_in_test"].items():
        if count:
            print(f"kept     {count:>7,}  {cause} in test, which stays whole (--clean_test drops them)")
    for name, count in report["carved_from_train"].items():
        share = f"a tenth of each label, seed {report['seed']}"
        print(f"carved   {count:>7,}  of train for {name}, which has no file ({share})")
    leaks_as_given = report["leaks"].get("as_given", {})
    for name, leak in leaks_as_given.items():
        share = leak["also_in_train"] / leak["rows"]
        print(f"leaks    {leak['also_in_train']:>7,}  of {leak['rows']:,} {name} records are in train ({share:.1%})")
    if report["leaks"]["dropped_from_train"]:
        print(f"dropped  {report['leaks']['dropped_from_train']:>7,}  of train, because they leak")
    elif any(leak["also_in_train"] for leak in leaks_as_given.values()):
        print("                  --drop_leaks removes them from train")
    labels, words = {label for counts in report["labels"].values() for label in counts}, Config().prompt.labels
    indices = index_note({*map(as_label, labels)} & {*range(len(words))}, words)
    if indices is not None:  # for other words, training says it
        info(indices)
    alike = alike_note(labels)
    if alike:
        warn(f"warning: {alike}")
    for name, count in report["rows_out"].items():
        labels = ", ".join(f"{label}: {number:,}" for label, number in report["labels"][name].items())
        median = report["length_quantiles_characters"][name]["p50"]
        print(f"wrote    {count:>7,}  {output / name}.jsonl  ({labels}; median {median} characters)")


if __name__ == "__main__":
    run_script(main)
