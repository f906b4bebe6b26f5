"""Says what fits into a memory budget, and what would help where it does not: before anything is downloaded or loaded.

A model is named by its size, a folder or a name on the hub, of which only config.json is read. Examples are as long as
data.max_length allows, unless data is prepared or given with --data. Ends with a command line that fits.
"""

from minilora.system.cli import add_config_options, add_reading_options, begin_script, build_parser, run_script

if __name__ == "__main__":
    begin_script()  # before the imports that take seconds

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minilora.build import choose, iter_chosen, note_positions, take_adapter
from minilora.config import Config, load_config
from minilora.data.hub import fetch_model, local_folder
from minilora.data.records import ReadOptions
from minilora.data.split_files import prepared_columns
from minilora.errors import UserError
from minilora.planning.budget import (
    MOST,
    Setup,
    advise,
    largest_micro_batch,
    least_memory_estimate,
    read_bytes,
    shapes_of_records,
    train_command,
)
from minilora.planning.memory import BatchShape
from minilora.planning.plan import SIZES, hub_name, size_of, uniform_batch
from minilora.qlora.model import Qwen2Config
from minilora.qlora.prompt import ChatTokenizer
from minilora.system.console import info, note
from minilora.system.files import similar_path
from minilora.system.memory import peak_memory_bytes
from minilora.weights.hf_config import read_config
from minilora.weights.safetensors_io import dtype_name

EXAMPLES = """\
examples:
  python scripts/plan.py --size 7B --budget 12GB --config scripts/configs/chnsenticorp.yaml
  python scripts/plan.py --budget 24564MiB --config my.yaml lora.r=64 --length 2048
  python scripts/plan.py --size 0.5B --budget 2GB --device cpu --data reviews.tsv model.name_or_path=path/to/0.5B
  python scripts/plan.py --all --budget 24GB train.gradient_checkpointing=true
"""


def main() -> None:
    """Reads the command line, prints the plan."""
    parser = build_parser(__doc__, EXAMPLES)
    parser.add_argument("--budget", required=True, help="available memory, as 12GB (10^9 bytes each) or 24564MiB")
    parser.add_argument("--size", choices=SIZES, help="Qwen2.5 by size (default: what model.name_or_path names)")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda, unless model.device is cpu")
    parser.add_argument("--length", type=int, help="tokens of every example (default: data.max_length)")
    parser.add_argument("--data", type=Path, help="plan for the examples of this TSV, CSV, JSON, parquet ... file")
    add_reading_options(parser, "--data")
    parser.add_argument("--all", action="store_true", help="a table of all sizes")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    add_config_options(parser)
    arguments = parser.parse_intermixed_args()
    if arguments.data is not None and arguments.length is not None:
        parser.error("--length and --data both say how long the examples are; leave out one of them")
    process_bytes = peak_memory_bytes(torch.device("cpu"))  # before the tokenizer and the data, as training does
    budget_bytes = read_bytes(arguments.budget, "--budget")
    overrides = list(arguments.overrides)
    if arguments.length is not None:
        overrides.append(f"data.max_length={arguments.length}")
    config = load_config(arguments.config, overrides)
    num_records, shape_of = (0, uniform_batch) if arguments.length is not None else find_examples(config, arguments)
    if arguments.size is not None:
        overrides.append(f"model.name_or_path={hub_name(arguments.size)}")
        config = load_config(arguments.config, overrides)
    setup = Setup(
        config=take_adapter(config),
        architecture=SIZES[arguments.size] if arguments.size else read_architecture(config),
        shape_of=shape_of,
        device_type=arguments.device or ("cpu" if config.model.device == "cpu" else "cuda"),
        process_bytes=process_bytes,
        folder=None if arguments.size else local_folder(config.model.name_or_path),
    )
    note_positions(config, setup.architecture)
    shape = setup.shape
    examples = f"{num_records:,} examples" if num_records else "examples"
    print(
        f"{config.model.name_or_path} on {setup.device_type}, {dtype_name(setup.dtype)}: {examples} of up to "
        f"{shape.longest + 1:,} tokens, micro-batches of up to {shape.tokens:,} tokens\n"
    )
    if arguments.all:
        results: Any = compare_sizes(setup, budget_bytes)
        print_sizes(results, budget_bytes)
    else:
        results = advise(setup, budget_bytes, num_records or MOST)
        print_advice(setup, results)
        if results["combination"]:
            results["command"] = train_command(shown_path(arguments.config), overrides, results["combination"])
            print(f"\nthe cheapest way to fit:\n  {results['command']}")
    if arguments.json:
        print(json.dumps(results, ensure_ascii=False))


def find_examples(config: Config, arguments: argparse.Namespace) -> tuple[int, Callable[[Config], BatchShape]]:
    """The number of records to plan for, of --data or else the prepared ones, and the shapes of their micro-batches.

    0 and uniform shapes where there is neither, or no tokenizer for the prepared ones.
    """
    path = arguments.data or Path(config.data.dir) / "train.jsonl"
    if arguments.data is None and not path.is_file():
        note(f"{path} does not exist, so every example has data.max_length tokens{similar_path(path)}")
        return 0, uniform_batch
    name, revision = config.model.name_or_path, config.model.revision
    folder = local_folder(name)
    try:
        if folder is None and arguments.data is None and arguments.size is not None:
            raise UserError(f"model.name_or_path: {name} is not a local folder")
        tokenizer = ChatTokenizer(folder or fetch_model(name, revision, weights=False))
    except UserError as error:
        if arguments.data is not None:
            raise
        info(f"{path} is ignored, because there is no tokenizer ({error})\n")
        return 0, uniform_batch
    reading = ReadOptions.given(arguments, prepared_columns(config.data.dir))
    chosen = choose(path, reading, config, "train")
    num_records = sum(1 for _ in iter_chosen(path, reading, chosen))
    if not num_records:
        raise UserError(f"{path}: holds no record; give another file with --data, or a --length")
    read = partial(iter_chosen, path, replace(reading, says_columns=False), chosen)
    return num_records, shapes_of_records(path, read, tokenizer)


def read_architecture(config: Config) -> Qwen2Config:
    """The model that model.name_or_path names; nothing is downloaded if its name contains the size."""
    name = config.model.name_or_path
    size = size_of(name)
    if local_folder(name) is None and size is not None:
        return SIZES[size]
    return read_config(fetch_model(name, config.model.revision, weights=False))


def compare_sizes(setup: Setup, budget_bytes: int) -> list[dict[str, Any]]:
    """A row for each size, with the same configuration."""
    rows = []
    for size in SIZES:
        sized = setup.with_size(size)
        rows.append(
            {
                "size": size,
                "total_bytes": sized.total_bytes,
                "fits": sized.total_bytes <= budget_bytes,
                "max_tokens_per_micro_batch": largest_micro_batch(sized, budget_bytes),
                "least_bytes": least_memory_estimate(sized).total_bytes,
            }
        )
    return rows


def print_sizes(rows: list[dict[str, Any]], budget_bytes: int) -> None:
    """The table of --all: the estimate, the largest micro-batch that fits, and the estimate with all options."""
    print(f"{'size':>6}{'takes':>12}  {'fits ' + in_gb(budget_bytes):<14}{'tokens':>13}{'minimum':>14}")
    for row in rows:
        fits = "yes" if row["fits"] else "no"
        most = f"{row['max_tokens_per_micro_batch']:,}" if row["max_tokens_per_micro_batch"] else "-"
        print(f"{row['size']:>6}{in_gb(row['total_bytes']):>12}  {fits:<14}{most:>13}{in_gb(row['least_bytes']):>14}")


def print_advice(setup: Setup, advice: dict[str, Any]) -> None:
    """Everything except the command."""
    budget = advice["budget_bytes"]
    print(f"{setup.estimate()}\n")
    difference = in_gb(abs(budget - advice["total_bytes"]))
    print(f"fits {in_gb(budget)}, {difference} to spare" if advice["fits"] else f"is {difference} over {in_gb(budget)}")
    print("\nthe most that fits:")
    answers = {
        "train.per_device_train_batch_size": advice["per_device_train_batch_size"],
        "train.max_tokens_per_micro_batch": advice["max_tokens_per_micro_batch"],
        "a single example, in tokens": advice["longest_example_tokens"],
    }
    for name, answer in answers.items():
        print(f"  {name:<44}{f'{answer:,}' if answer else 'none':>10}")
    if advice["knobs"]:
        print(f"\nwhat would help, each by itself:{'takes':>29}{'saves':>10}")
    for option in advice["knobs"]:
        takes, saves = in_gb(option["total_bytes"]), in_gb(option["saves_bytes"])
        print(f"  {option['keys'][-1]:<50}{takes:>9}{saves:>10}  {option['costs']}")
    if advice["combination"] is None:
        sizes = ", ".join(advice["fitting_sizes"]) or "none"
        print(
            f"\nnothing makes it fit: all of that together takes {in_gb(advice['least_bytes'])}, only its weights "
            f"{in_gb(advice['least_weight_bytes'])}; sizes that fit: {sizes}"
        )


def in_gb(count: int) -> str:
    """Bytes as text."""
    return f"{count / 1e9:.2f} GB"


def shown_path(path: Path) -> str:
    """Relative to the working directory if it is below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    run_script(main)
