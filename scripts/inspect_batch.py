"""Shows one micro-batch as the model sees it: every token, the supervised ones coloured."""

from minilora.system.cli import add_config_options, add_reading_options, begin_script, build_parser, run_script

if __name__ == "__main__":
    begin_script()  # before the imports that take seconds

import json
import sys
from dataclasses import replace
from pathlib import Path

from minilora.build import build_prompt, choose, iter_chosen
from minilora.config import Config, load_config
from minilora.data.examples import build_examples
from minilora.data.hub import fetch_model
from minilora.data.records import ReadOptions, Record, iter_valid_records
from minilora.data.sampler import epoch_order
from minilora.data.split_files import prepared_columns
from minilora.errors import UserError
from minilora.qlora.batch import pack
from minilora.qlora.prompt import ChatTokenizer, Example
from minilora.system.console import uses_colour
from minilora.system.files import similar_path

GREEN, RESET = "\033[1;32m", "\033[0m"
EXAMPLES = """\
examples:
  python scripts/inspect_batch.py --config scripts/configs/chnsenticorp.yaml
  python scripts/inspect_batch.py --data reviews.tsv train.per_device_train_batch_size=2
  python scripts/inspect_batch.py --json | head -1
"""


def main() -> None:
    """Reads the command line and prints the first micro-batch of training, or the first records of --data."""
    parser = build_parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--data", type=Path, help="TSV, CSV, JSON, parquet, Excel ... (default: train.jsonl of data.dir)"
    )
    add_reading_options(parser, "--data")
    parser.add_argument("--json", action="store_true", help="a JSON line for each example")
    add_config_options(parser)
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    path = arguments.data or Path(config.data.dir) / "train.jsonl"
    if arguments.data is None and not path.exists():
        raise UserError(
            f"{path}: does not exist yet; prepare it with scripts/preprocess_data.py or scripts/train.py, or give a "
            f"file with --data{similar_path(path)}"
        )
    tokenizer = ChatTokenizer(fetch_model(config.model.name_or_path, config.model.revision))
    prompt = build_prompt(config, tokenizer)
    reading = ReadOptions.given(arguments, prepared_columns(config.data.dir))
    records = first_records(path, reading, config) if arguments.data is not None else first_step(path, reading, config)
    if not records:
        raise UserError(f"{path}: holds no record; give another file with --data")
    built = build_examples(records, prompt, overlong=config.data.overlong)
    truncated = built.describe()

    for example in built.examples:
        label = None if example.label is None else prompt.labels[example.label]
        if arguments.json:
            text = tokenizer.decode(example.input_ids)
            line = {
                "input_ids": example.input_ids,
                "supervised": example.supervised,
                "text": text,
                "label": label,
            }
            print(json.dumps(line, ensure_ascii=False))
        else:
            cut = f", {example.truncated_tokens} cut" if example.truncated_tokens else ""
            print(f"--- {len(example.input_ids)} tokens, {sum(example.supervised)} supervised{cut}, label {label}")
            print(coloured(tokenizer, example))
    if arguments.json:
        print(f"{len(built.examples)} examples, {truncated}", file=sys.stderr)
    else:
        batch = pack(built.examples)
        print(
            f"--- {batch.num_examples} examples, {truncated}; {batch.num_real_tokens} tokens, "
            f"{len(batch.input_ids)} computed (the shared prefix once), {batch.num_supervised} supervised"
        )


def first_records(path: Path, reading: ReadOptions, config: Config) -> list[Record]:
    """As many as a micro-batch has. All others are read too: what is wrong with them is said."""
    size = config.train.per_device_train_batch_size
    return [record for index, record in enumerate(iter_valid_records(path, reading)) if index < size]


def first_step(path: Path, reading: ReadOptions, config: Config) -> list[Record]:
    """Those of the first micro-batch of training, in its order."""
    chosen = choose(path, reading, config, "train")
    count = sum(1 for _ in iter_chosen(path, reading, chosen))
    order = list(epoch_order(count, config.train.seed, 0)[: config.train.per_device_train_batch_size])
    again = iter_chosen(path, replace(reading, says_columns=False), chosen)
    taken = {index: record for index, (_, record) in enumerate(again) if index in order}
    return [taken[index] for index in order]


def coloured(tokenizer: ChatTokenizer, example: Example) -> str:
    """The example's text, supervised stretches green, or in [[ ]] where colours are not wanted."""
    opening, closing = (GREEN, RESET) if uses_colour() else ("[[", "]]")
    parts = []
    start = 0
    for end in range(1, len(example.input_ids) + 1):
        if end == len(example.input_ids) or example.supervised[end] != example.supervised[start]:
            text = tokenizer.decode(example.input_ids[start:end])
            parts.append(f"{opening}{text}{closing}" if example.supervised[start] else text)
            start = end
    return "".join(parts)


if __name__ == "__main__":
    run_script(main)
