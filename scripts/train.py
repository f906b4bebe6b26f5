"""Fine-tunes Qwen2.5 with QLoRA, from data to a tested adapter. The same command resumes a run that was stopped."""

from minilora.system.cli import add_config_options, begin_script, build_parser, run_script

if __name__ == "__main__":
    begin_script()  # before the imports that take seconds

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from minilora.build import take_adapter
from minilora.config import Config, describe_keys, load_config
from minilora.data.hub import fetch_model
from minilora.planning.dry_run import print_plan
from minilora.runs.data_folder import DOWNLOADS, has_data, prepare_data, refuse_slip
from minilora.runs.train import fit
from minilora.system.distributed import SINGLE_RANK, Ranks
from minilora.system.process import tuned_process
from minilora.system.torchrun import with_ranks

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
            refuse_slip(config, arguments.config, arguments.overrides)
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


if __name__ == "__main__":
    with tuned_process():
        run_script(with_ranks(main))
