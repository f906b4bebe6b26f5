"""Fine-tunes Qwen2.5 with QLoRA, from data to a tested adapter. The same command resumes a run that was stopped."""

from minilora.system.cli import add_config_options, begin_script, build_parser, run_script

if __name__ == "__main__":
    begin_script()  # before the imports that take seconds

import shutil
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from minilora.build import take_adapter
from minilora.config import Config, describe_keys, layer_of, load_config
from minilora.data.hub import fetch_dataset, fetch_model
from minilora.data.labels import POLARITY
from minilora.data.prepare import prepare, prepare_demo
from minilora.data.records import ReadOptions
from minilora.data.split_files import SPLITS, recover_splits
from minilora.errors import UserError
from minilora.planning.dry_run import print_plan
from minilora.runs.train import fit
from minilora.system.console import info
from minilora.system.distributed import SINGLE_RANK, Ranks
from minilora.system.files import similar_path
from minilora.system.process import tuned_process
from minilora.system.torchrun import with_ranks

DOWNLOADS = "chn_senti_corp"  # beside data.dir
EXAMPLES = """\
examples:
  python scripts/train.py                                    the quickstart: two minutes, no download
  python scripts/train.py --config scripts/configs/chnsenticorp.yaml
  python scripts/train.py --config my.yaml lora.r=16 train.learning_rate=1e-4
  python scripts/train.py --config my.yaml --dry_run         memory, tokens and a prompt, then stop
  torchrun --nproc-per-node 4 scripts/train.py --config my.yaml      four GPUs share each step

keys, each `section.key=default  (type)`; a free one may differ when a run is resumed:
"""


def main(ranks: Ranks = SINGLE_RANK) -> None:
    """Reads the command line, prepares what is missing, trains."""
    parser = build_parser(__doc__, EXAMPLES + describe_keys())
    parser.add_argument("--dry_run", action="store_true", help="print memory estimate, tokens and a prompt, then stop")
    parser.add_argument("--restart", action="store_true", help="start over; set the earlier run in its folder aside")
    add_config_options(parser)
    arguments = parser.parse_intermixed_args()
    with ranks.rank_0_first():
        config = load_config(arguments.config, arguments.overrides)
        if not has_data(config):
            refuse_slip(config, arguments)
    if arguments.dry_run:
        if ranks.is_rank_0:
            show_plan(take_adapter(config), ranks.size)
        return
    with ranks.rank_0_first():
        if not has_data(config):
            prepare_data(config)
        model_folder = fetch_model(config.model.name_or_path, config.model.revision)
    fit(config, model_folder, arguments.restart, ranks)


def show_plan(config: Config, ranks: int) -> None:
    """Prints the plan and leaves no files: missing data is prepared in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        if not has_data(config):
            downloads = Path(config.data.dir).parent / DOWNLOADS
            if downloads.is_dir():
                shutil.copytree(downloads, Path(folder) / DOWNLOADS)
            config = replace(config, data=replace(config.data, dir=str(Path(folder) / "processed")))
            prepare_data(config)
        print_plan(config, fetch_model(config.model.name_or_path, config.model.revision), ranks)


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


def refuse_slip(config: Config, arguments: Namespace) -> None:
    """UserError where `data.dir` was named and what to prepare there was not: it may be misspelt."""
    path, overrides = arguments.config, arguments.overrides
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


if __name__ == "__main__":
    with tuned_process():
        run_script(with_ranks(main))
