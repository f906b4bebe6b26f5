"""Trains with every combination of the values given, and says which is best and how sure that is.

`train.learning_rate=1e-4,3e-4 train.seed=1,2,3` are six runs, each in a folder of its own, as train.py makes them. The
same command resumes where it stopped, and trains no finished run again. Settings are compared on the validation set.
"""

from minilora.system.cli import add_config_options, begin_script, build_parser, run_script

if __name__ == "__main__":
    begin_script()  # before the imports that take seconds

from collections.abc import Sequence
from pathlib import Path

from minilora.build import SharedBase
from minilora.data.hub import fetch_model
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
    failed = train_all(variants, directory, ranks)
    if ranks.is_rank_0:
        report = build_report(variants, failed)
        print(report.to_text())
        if report.best_run is not None:
            print(f"best: {report.best}; on the test set:")
            print(f"  python scripts/evaluate.py --model_path '{report.best_run.final}'")


def train_all(variants: Sequence[Variant], directory: Path, ranks: Ranks) -> dict[str, str]:
    """Trains what is not finished, one run after another, over one base model while it is the same.

    Returns why runs ended before their end, by name.
    """
    base, failed = SharedBase(), dict[str, str]()
    for number, variant in enumerate(variants, start=1):
        info(f"run {number} of {len(variants)}: {variant.name}")
        model = variant.config.model
        with ranks.rank_0_first():
            folder = fetch_model(model.name_or_path, model.revision)
        try:
            fit(variant.config, folder, ranks=ranks, base=base)
        except NonFiniteError as error:
            failed[variant.name] = str(error).partition("\n")[0]
            warn(f"warning: {variant.name}: {error}")
        ranks.run_on_rank_0(lambda: write_table(directory, build_report(variants, failed)))
    return failed


def write_table(directory: Path, report: SweepReport) -> None:
    """sweep.json and sweep.html."""
    replace_file(directory / "sweep.json", json_bytes(report.to_json()))
    replace_file(directory / "sweep.html", render_sweep(report).encode())


if __name__ == "__main__":
    with tuned_process():
        run_script(with_ranks(main))
