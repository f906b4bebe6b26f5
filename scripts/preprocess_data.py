"""Cleans data files and splits them 8:1:1, duplicates removed across all files first."""

from minilora.system.cli import begin_script, build_parser, run_script

if __name__ == "__main__":
    begin_script()  # before the imports that take seconds

from pathlib import Path
from typing import Any

from minilora.data.hub import downloaded_files
from minilora.data.prepare import SPLIT_SEED, SplitOptions, prepare
from minilora.data.readers import ENCODINGS
from minilora.data.records import ReadOptions
from minilora.errors import UserError

DOWNLOADED = Path("data/chn_senti_corp")
EXAMPLES = """\
examples:
  python scripts/preprocess_data.py                                       what download_data.py fetched
  python scripts/preprocess_data.py --input train.tsv dev.tsv --keep_splits --drop_leaks
  python scripts/preprocess_data.py --input mine.csv --text_column comment --label_column stars
"""


def main() -> None:
    """Reads the command line, prepares, prints the report."""
    parser = build_parser(__doc__, EXAMPLES)
    parser.add_argument("--input", type=Path, nargs="+", metavar="FILE", help="TSV, CSV, JSONL or parquet files")
    parser.add_argument("--output_dir", type=Path, default=Path("data/processed"), help="folder for the splits")
    parser.add_argument("--seed", type=int, default=SPLIT_SEED, help="of the split")
    parser.add_argument(
        "--keep_splits",
        action="store_true",
        help="the files are the splits; a missing dev or test is carved out of train; reports leaks",
    )
    parser.add_argument("--drop_leaks", action="store_true", help="with --keep_splits: remove leaks from train")
    parser.add_argument("--text_column", help="default: text, text_a, review, sentence or content")
    parser.add_argument("--label_column", help="default: label, labels, sentiment or target")
    parser.add_argument("--encoding", choices=ENCODINGS, default="utf-8", help="of text files; UTF-8 is written")
    arguments = parser.parse_args()
    if arguments.drop_leaks and not arguments.keep_splits:
        parser.error("--drop_leaks needs --keep_splits: without it nothing leaks")
    files = arguments.input or downloaded_files(DOWNLOADED)
    if not files:
        raise UserError(f"{DOWNLOADED}: holds no data; run scripts/download_data.py, or name files with --input")
    report = prepare(
        files,
        arguments.output_dir,
        SplitOptions(seed=arguments.seed, keep_splits=arguments.keep_splits, drop_leaks=arguments.drop_leaks),
        ReadOptions(arguments.text_column, arguments.label_column, arguments.encoding),
    )
    print_report(report, arguments.output_dir)


def print_report(report: dict[str, Any], output: Path) -> None:
    """What went in, what was dropped and why, what came out."""
    for name, count in report["rows_in"].items():
        print(f"read     {count:>7,}  {name}")
    for cause, count in report["dropped"].items():
        print(f"dropped  {count:>7,}  {cause}")
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
    for name, count in report["rows_out"].items():
        labels = ", ".join(f"{label}: {number:,}" for label, number in report["labels"][name].items())
        median = report["length_quantiles_characters"][name]["p50"]
        print(f"wrote    {count:>7,}  {output / name}.jsonl  ({labels}; median {median} characters)")


if __name__ == "__main__":
    run_script(main)
