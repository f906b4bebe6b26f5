"""Trains with every combination of the values given, and says which is best and how sure that is.

`train.learning_rate=1e-4,3e-4 train.seed=1,2,3` are six runs, each in a folder of its own, as train.py makes them. The
same command resumes where it stopped, and trains no finished run again. Settings are compared on the validation set.
"""

from minilora.system.cli import add_config_options, begin_script, build_parser, run_script

if __name__ == "__main__":
    begin_script()  # before the imports that take seconds

import shlex
from collections.abc import Sequence
from pathlib import Path

from minilora.adapters.optimizers import check_optimizer
from minilora.build import SharedBase
from minilora.data.hub import fetch_model
from minilora.errors import UserError
from minilora.planning.memory import count_parameters
from minilora.reports.sweep import SweepReport, render_sweep
from minilora.runs.advice import NonFiniteError
from minilora.runs.data_folder import has_data, prepare_data, refuse_slip, write_folds
from minilora.runs.sweep import Variant, build_report, expand
from minilora.runs.train import fit
from minilora.system.console import info, warn
from minilora.system.distributed import SINGLE_RANK, Ranks
from minilora.system.files import json_bytes, make_folder, replace_file
from minilora.system.process import tuned_process
from minilora.system.torchrun import with_ranks
from minilora.weights.hf_config import read_config

EXAMPLES = """\
examples:
  python scripts/sweep.py train.learning_rate=1e-3,3e-3 train.seed=1,2,3        on the quickstart's model
  python scripts/sweep.py --config my.yaml --output_dir outputs/rates train.learning_rate=1e-4,2e-4,4e-4
  python scripts/sweep.py --config my.yaml --folds 5 lora.r=4,16 data.max_train_examples=500

A comma within one value stands in quotes or brackets: lora.target_modules=all-linear,'[q_proj, v_proj]'. train.py
--help lists the keys. train.do_predict is false here unless you name it: the test set is for the setting you choose.
"""


def main(ranks: Ranks = SINGLE_RANK) -> None:
    """Reads the command line, trains each run, and writes the table after each."""
    parser = build_parser(__doc__, EXAMPLES)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/sweep"), help="for the runs and the table")
    parser.add_argument(
        "--folds", type=int, metavar="K", help="cross-validation: K runs of each, on K parts of the data"
    )
    parser.add_argument("--restart", action="store_true", help="start over; set earlier runs in their folders aside")
    add_config_options(parser)
    arguments = parser.parse_intermixed_args()
    path, overrides, directory = arguments.config, arguments.overrides, arguments.output_dir
    with ranks.rank_0_first():
        variants = expand(path, overrides, directory)
        for config in {variant.config.data.dir: variant.config for variant in variants}.values():
            if not has_data(config):
                refuse_slip(config, path, [f"data.dir={config.data.dir}", *overrides])
                prepare_data(config)
        if arguments.folds is not None:
            folds = write_folds(Path(variants[0].config.data.dir), arguments.folds, directory / "folds")
            variants = expand(path, overrides, directory, folds)
        make_folder(directory, "--output_dir")
    failed = train_all(variants, directory, arguments.restart, ranks)
    if ranks.is_rank_0:
        report = build_report(variants, failed)
        print(report.to_text())
        if report.best_run is not None:
            what, script = ("on the test set", "evaluate") if report.is_labelled else ("try it", "chat")
            print(f"best: {report.best}; {what}:")
            print(f"  python scripts/{script}.py --model_path {shlex.quote(report.best_run.final)}")


def train_all(variants: Sequence[Variant], directory: Path, restart: bool, ranks: Ranks) -> dict[str, str]:
    """Trains what is not finished, one run after another, over one base model while it is the same.

    Returns why runs ended before their end, by name; UserError if all of them did.
    """
    base, failed = SharedBase(), dict[str, str]()
    models = [variant.config.model for variant in variants]
    with ranks.rank_0_first():  # of all runs: what is wrong in a later one shows before the first one trains
        named = dict.fromkeys((model.name_or_path, model.revision) for model in models)
        folders = {(name, revision): fetch_model(name, revision) for name, revision in named}
        for variant in variants:
            folder = folders[variant.config.model.name_or_path, variant.config.model.revision]
            check_optimizer(variant.config.train.optim)
            count_parameters(read_config(folder), variant.config.lora, folder)  # UserError for layers it lacks
    for number, variant in enumerate(variants, start=1):
        info(f"run {number} of {len(variants)}: {variant.name}")
        model = variant.config.model
        try:
            fit(variant.config, folders[model.name_or_path, model.revision], restart, ranks, base=base)
        except NonFiniteError as error:
            failed[variant.name] = str(error).partition("\n")[0]
            warn(f"warning: {variant.name}: {error}")
        ranks.run_on_rank_0(lambda: write_table(directory, build_report(variants, failed)))
    with ranks.rank_0_first():
        if len(failed) == len(variants):
            raise UserError(
                f"{directory}: no run is finished, all ended with non-finite losses; take a lower train.learning_rate "
                "or another model.compute_dtype"
            )
    return failed


def write_table(directory: Path, report: SweepReport) -> None:
    """sweep.json and sweep.html."""
    replace_file(directory / "sweep.json", json_bytes(report.to_json()))
    replace_file(directory / "sweep.html", render_sweep(report).encode())


if __name__ == "__main__":
    with tuned_process():
        run_script(with_ranks(main))
