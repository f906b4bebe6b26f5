"""Predicts labels of reviews and their probabilities: of one review, a file, or lines from a pipe.

Probabilities are calibrated by the temperature that training or evaluate.py --calibrate left beside the adapter.
"""

from minilora.system.cli import add_adapter_options, add_reading_options, begin_script, build_parser, run_script

if __name__ == "__main__":
    begin_script()  # before the imports that take seconds

import argparse
import codecs
import functools
import itertools
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from minilora.data.lines import encoding_named, iter_lines
from minilora.data.readers import approximate_count
from minilora.data.records import ReadOptions, Record, iter_line_records, iter_texts
from minilora.errors import UserError
from minilora.evaluation.formats import Renderer
from minilora.evaluation.predict import MAX_WAIT_S, PredictOptions, Predictor, iter_windows, with_pauses
from minilora.evaluation.score import MAX_TOKENS
from minilora.runs.calibration_file import usable_calibration
from minilora.runs.load_run import columns_of, load_run_or_base
from minilora.system.console import info, progress, warn, write_results
from minilora.system.distributed import SINGLE_RANK, Ranks
from minilora.system.files import GrowingFile, make_folder
from minilora.system.process import tuned_process
from minilora.system.signals import Interrupted, SafePoints
from minilora.system.torchrun import with_ranks

STANDARD_INPUT = Path("-")
FORMATS = {".csv": "csv", ".jsonl": "jsonl"}  # by the ending of --output
EXAMPLES = """\
examples:
  python scripts/predict.py --model_path outputs/checkpoints/final "房间很干净，早餐也不错"
  python scripts/predict.py --model_path outputs/checkpoints/final --input reviews.csv --output predictions.csv
  tail -f reviews.txt | python scripts/predict.py --model_path outputs/checkpoints/final --format jsonl
  python scripts/predict.py --model_path Qwen/Qwen2.5-0.5B-Instruct "房间很干净" model.quantization=none
  torchrun --nproc-per-node 4 scripts/predict.py --model_path outputs/checkpoints/final --input reviews.csv

Every word after -- is a review. Results are written in the order of the input, the first ones while the rest is still
computed; a line from a pipe waits a second at most for others of its batch. The index counts the input's records from
0; empty ones are skipped and counted at the end. CSV and JSONL carry the input's other columns behind the results, as
input_label and the like where a name is taken; CSV those of the first record. With --min_probability a column more,
`answered`, says whether a label is given.
"""
KEYS_READ = ("model.", "prompt.", "data.max_length")
OVERRIDE = re.compile(r"(model|lora|data|prompt|train)\.[\w-]+=.*", re.DOTALL)


def main(ranks: Ranks = SINGLE_RANK) -> None:
    """Reads the command line, predicts, writes the results as they come."""
    arguments = parse_arguments()
    path, reviews = arguments.input, arguments.reviews
    if arguments.output is not None:
        ranks.run_on_rank_0(lambda: check_output(arguments.output, path, arguments.overwrite))
    with ranks.rank_0_first():
        reading = ReadOptions.given(arguments, columns_of(arguments.model_path))
    if path == STANDARD_INPUT:
        lines = iter_lines(standard_input(), "standard input", reading.encoding)
        windows = iter_windows(with_pauses(iter_line_records(lines, "standard input")), MAX_WAIT_S)
    elif path is not None:
        windows = iter_windows(read_first(iter_texts(path, reading), path))
    else:
        windows = iter_windows(iter_line_records(reviews, "command line"))

    with ranks.rank_0_first():
        trained = load_run_or_base(arguments.model_path, arguments.base, arguments.overrides, KEYS_READ)
        calibration = usable_calibration(trained, arguments.raw)
    options = PredictOptions(
        arguments.max_batch_tokens, None if calibration is None else calibration.temperature, arguments.min_probability
    )
    total = len(reviews) if path is None else approximate_count(path)
    predictor = Predictor(trained.load(arguments.allow_bin, ranks), trained.prompt, options, ranks)
    write_all(windows, predictor, arguments, total, ranks=ranks)


def parse_arguments() -> argparse.Namespace:
    """The command line, with its defaults."""
    parser = build_parser(__doc__, EXAMPLES)
    add_adapter_options(parser, "adapter, or a base model as it is: a folder or a name on the hub")
    parser.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="TSV, CSV, JSON, parquet or Excel with a text column, .txt with a review a line, or - for such lines on "
        "standard input (the default without reviews)",
    )
    add_reading_options(parser, "--input", has_labels=False)
    add_output_options(parser)
    parser.add_argument(
        "words", nargs="*", metavar="REVIEW or section.key=value", help="reviews, and keys as in train.py"
    )
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)  # argparse loses its way there
    arguments = parser.parse_intermixed_args(words[:end])

    arguments.overrides = [word for word in arguments.words if OVERRIDE.fullmatch(word)]
    arguments.reviews = [word for word in arguments.words if not OVERRIDE.fullmatch(word)] + words[end + 1 :]
    if arguments.reviews == ["-"] and end == len(words):
        arguments.input, arguments.reviews = arguments.input or STANDARD_INPUT, []
    if arguments.reviews and arguments.input is not None:
        parser.error("give reviews or --input, not both")
    if not arguments.reviews and arguments.input is None:
        if sys.stdin.isatty():
            parser.error("give a review, a file with --input, or lines on standard input")
        arguments.input = STANDARD_INPUT
    if arguments.max_batch_tokens < 1:
        parser.error("--max_batch_tokens: expected 1 or more")
    ending = "" if arguments.output is None else arguments.output.suffix.lower()
    if arguments.format is None and arguments.output is not None and ending not in FORMATS:
        parser.error(f"--output {arguments.output}: ends in neither .csv nor .jsonl; rename it or choose a --format")
    if arguments.format is None:
        arguments.format = FORMATS.get(ending) or ("table" if sys.stdout.isatty() else "jsonl")
    return arguments


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """What becomes of the probabilities, and where it goes."""
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="written record by record (default: standard output)"
    )
    parser.add_argument(
        "--output_encoding",
        type=output_encoding,
        default="utf-8",
        metavar="NAME",
        help="of --output; utf-8-sig is what Excel takes for UTF-8 (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    parser.add_argument(
        "--format",
        choices=("table", "jsonl", "csv"),
        help="default: that of --output's ending, else a table on a terminal and JSONL elsewhere",
    )
    parser.add_argument(
        "--min_probability",
        type=probability,
        metavar="P",
        help="give no label to a review whose most probable one is below P, 0 to 1; the report's thresholds show what "
        "that costs",
    )
    parser.add_argument("--raw", action="store_true", help="the model's own probabilities, without a temperature")
    parser.add_argument(
        "--max_batch_tokens",
        type=int,
        default=MAX_TOKENS,
        metavar="N",
        help="tokens of a forward pass (default: %(default)s)",
    )


def probability(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected 0 to 1")
    return value


def output_encoding(name: str) -> str:
    """Python's name of an encoding, in any spelling."""
    return "utf-8-sig" if name.lower().replace("_", "-") in ("utf-8-sig", "utf8-sig") else encoding_named(name)


def check_output(output: Path, path: Path | None, overwrite: bool) -> None:
    """Refuses an output that cannot or must not be written, before anything is computed."""
    if path is not None and output.exists() and path.exists() and output.samefile(path):
        raise UserError(f"{output}: is also the input; choose another --output")
    if output.is_dir():
        raise UserError(f"{output}: is a folder; give --output a file's name")
    if output.exists() and not overwrite:
        raise UserError(f"{output}: exists already; choose another --output, or replace it with --overwrite")
    make_folder(output.parent, "--output")


def standard_input() -> BinaryIO:
    """A reader of its own: the thread that waits in Python's would hold its lock at exit."""
    return open(0, "rb", closefd=False)


def read_first(records: Iterator[Record], path: Path) -> Iterator[Record]:
    """The same records, the first one read now: a wrong file is refused before the model is loaded."""
    first = next(records, None)
    if first is None:
        raise UserError(f"{path}: holds no record; give another file with --input")
    return itertools.chain([first], records)


def write_all(
    windows: Iterator[list[Record]],
    predictor: Predictor,
    arguments: argparse.Namespace,
    total: int | None,
    ranks: Ranks,
) -> None:
    """Predicts and writes window by window; a signal waits while one is written, so that lines are whole.

    Rank 0 reads and writes; the other ranks get each window from it.
    """
    output = None if arguments.output is None else GrowingFile(arguments.output)
    width = shutil.get_terminal_size().columns if output is None and sys.stdout.isatty() else None
    says_answered = arguments.min_probability is not None
    renderer = Renderer(arguments.format, predictor.prompt.labels, width, says_answered)
    encoder = codecs.getincrementalencoder(arguments.output_encoding)("backslashreplace")  # writes a mark once
    num_written = 0
    own: list[Record] = []

    def write(text: str) -> None:
        if output is None:
            write_results(text)
        else:
            output.append(encoder.encode(text))

    try:
        with progress("predict", total, "review") as bar, SafePoints() as safe_points:

            def read() -> list[tuple[str, str]]:
                with safe_points.anywhere():
                    own[:] = next(windows, [])
                return [(record.where, record.content) for record in own]

            is_over = False
            while not is_over:
                window = ranks.run_on_rank_0(read)
                is_over = not window
                records = own if ranks.is_rank_0 else [Record(where, content) for where, content in window]
                predictions = predictor.predict(records, bar.update, safe_points.anywhere)
                # Also after the last window: an output without results is still created.
                ranks.run_on_rank_0(functools.partial(write, renderer.render(records, predictions)))
                num_written += len(predictions)
            bar.total = bar.n
        if output is not None:
            output.sync()
            output.close()
    except Interrupted as stop:
        raise Interrupted(stop.signum, f"{stop}: {summarize(predictor, num_written, arguments.output)}") from None
    except UserError as error:
        if not ranks.is_rank_0:  # only rank 0 writes
            raise
        raise UserError(f"{error}\n  {summarize(predictor, num_written, arguments.output)}") from error
    if predictor.num_empty or predictor.num_cut or predictor.num_unanswered:
        warn(f"note: {summarize(predictor, num_written, arguments.output)}")
    elif output is not None:
        info(summarize(predictor, num_written, arguments.output))


def summarize(predictor: Predictor, num_written: int, output: Path | None) -> str:
    """Counts of written, unanswered, empty and cut records, in a line."""
    parts = [f"predictions written{'' if output is None else f' to {output}'}: {num_written:,}"]
    if predictor.num_unanswered:
        limit = f"{predictor.options.min_probability:g}"
        parts.append(f"without a label, below --min_probability {limit}: {predictor.num_unanswered:,}")
    if predictor.num_empty:
        parts.append(f"empty reviews skipped: {predictor.num_empty:,}, the first at {predictor.first_empty}")
    if predictor.num_cut:
        parts.append(f"cut to {predictor.prompt.max_length} tokens: {predictor.num_cut:,}")
    return "; ".join(parts)


if __name__ == "__main__":
    with tuned_process():
        run_script(with_ranks(main))
