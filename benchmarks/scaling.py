"""How minilora's cost grows: tokens of a micro-batch, length of its examples, rank, layers.

    python benchmarks/scaling.py --model path/to/checkpoint
    python benchmarks/scaling.py --tiny

One quantity moves, the others stay at 8 examples of 64 tokens, rank 8, all layers. A point is a process of its own that
takes `--steps` training steps on random ids after one that warms up. Flat is good: time per token is a token's work,
and what does not shrink with the micro-batch (dequantising, starting kernels) shows at its small end. Memory is a
straight line, whose slope is printed. Writes a plot into `benchmarks/results/`; the last line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from compare_peft import HERE, run_child
from meter import Meter, environment
from workload import add_workload_arguments, model_folder, write_adapter

from minilora.adapters.attach import parameter_groups
from minilora.adapters.optimizers import build_optimizer
from minilora.adapters.peft_files import load_adapter
from minilora.qlora.batch import pack
from minilora.qlora.lora import DropoutSeed
from minilora.qlora.prompt import Example
from minilora.qlora.step import StepSettings, TrainState, train_step
from minilora.system.cli import build_parser, run_script
from minilora.system.optional import MissingPackageError, import_optional
from minilora.system.process import tuned_process
from minilora.weights.load import load_model


@dataclass(frozen=True)
class Point:
    """One measurement: `examples` of `length` tokens each, nothing shared between them."""

    model: str
    device: str
    adapter: str
    examples: int = 8
    length: int = 64
    layers: int | None = None
    steps: int = 3


@tuned_process()
def measure(point: Point) -> dict[str, Any]:
    """Seconds of each step, and the peak of memory, in this process."""
    meter = Meter(point.device)
    model = load_model(Path(point.model), torch.bfloat16, device=point.device)
    load_adapter(model, Path(point.adapter))
    if point.layers is not None:
        del model.model.layers[point.layers :]
    optimizer = build_optimizer(parameter_groups(model.train()))
    generator = torch.Generator().manual_seed(0)
    size = (point.examples, point.length + 1)
    ids = torch.randint(model.config.vocab_size, size, generator=generator).tolist()
    batch = pack([Example(row, [False] * point.length + [True]) for row in ids], share_prefix=False)
    batch = batch.to(torch.device(point.device))
    meter.loaded()
    for number in range(1, point.steps + 2):
        with meter.step(0, point.examples * point.length):
            train_step(TrainState(model, optimizer, DropoutSeed()), [batch], StepSettings(number, 0.0001, 1.0))
    meter.finish()
    return meter.results


def main() -> None:
    """Measures one point as a child, or every series."""
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print(json.dumps(measure(Point(**json.loads(sys.argv[1])))))
        return
    parser = build_parser(__doc__, "")
    add_workload_arguments(parser)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a point")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder for the plot")
    arguments = parser.parse_args()
    folder = model_folder(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        series = measure_series(folder, Path(temporary), arguments)
    points = series["tokens"]
    slope = (points[-1]["peak_bytes"] - points[0]["peak_bytes"]) / (points[-1]["tokens"] - points[0]["tokens"])
    costs = [point["ms_per_token"] for point in points]
    flatness = max(costs) / min(costs) - 1
    print(f"\nmemory: {slope / 1e3:.0f} kB a token; cost per token within {flatness:.0%} over the tokens measured")
    plot(series, arguments.output)
    summary = {"bytes_per_token": slope, "cost_spread": flatness, "series": series, **environment()}
    print(json.dumps(summary))


def measure_series(folder: Path, temporary: Path, arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The four series, a table line printed as each point is done."""
    ranks = (8, 32) if arguments.tiny else (1, 8, 16, 32, 64)
    for r in ranks:
        write_adapter(folder, temporary / f"r{r}", r, b_size=0.01)
    start = Point(str(folder), arguments.device, str(temporary / "r8"), steps=arguments.steps)
    counts, lengths, layers = (
        ((1, 4), (64, 128), (1, 3))
        if arguments.tiny
        else ((1, 2, 4, 8, 16, 32), (64, 128, 256, 512, 1024, 2048, 4096), (6, 12, 24))
    )
    plan = {
        "tokens": [replace(start, examples=count) for count in counts],
        "length": [replace(start, examples=max(1, 1024 // length), length=length) for length in lengths],
        "r": [replace(start, adapter=str(temporary / f"r{r}")) for r in ranks],
        "layers": [replace(start, layers=count) for count in layers],
    }
    series: dict[str, list[dict[str, Any]]] = {}
    print("| series | tokens | length | r | layers | ms per token (fastest to slowest) | peak |")
    print("|---|---|---|---|---|---|---|")
    for name, points in plan.items():
        series[name] = []
        for point in points:
            found = run_child("scaling.py", json.dumps(asdict(point)))
            costs = [1e3 * row["seconds"] / row["computed_tokens"] for row in found["steps"][1:]]
            row = {
                "tokens": point.examples * point.length,
                "length": point.length,
                "r": int(Path(point.adapter).name[1:]),
                "layers": point.layers or "all",
                "ms_per_token": statistics.median(costs),
                "peak_bytes": found["train_peak_bytes"],
            }
            series[name].append(row)
            print(
                f"| {name} | {row['tokens']} | {row['length']} | {row['r']} | {row['layers']} "
                f"| {row['ms_per_token']:.2f} ({min(costs):.2f} to {max(costs):.2f}) "
                f"| {row['peak_bytes'] / 1e9:.2f} GB |",
                flush=True,
            )
    return series


def plot(series: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """scaling.png: cost per token above, peak memory below, a column a series."""
    try:
        pyplot: Any = import_optional("matplotlib.pyplot")
    except MissingPackageError as error:
        print(f"no scaling.png: {error}")
        return
    pyplot.switch_backend("Agg")

    figure, axes = pyplot.subplots(2, len(series), figsize=(3.5 * len(series), 6), squeeze=False)
    for column, (name, points) in enumerate(series.items()):
        places = [str(point[name]) for point in points]
        axes[0][column].plot(places, [point["ms_per_token"] for point in points], marker="o")
        axes[1][column].plot(places, [point["peak_bytes"] / 1e9 for point in points], marker="o", color="tab:orange")
        for axis in (axes[0][column], axes[1][column]):
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        axes[1][column].set_xlabel(name)
    axes[0][0].set_ylabel("ms per token")
    axes[1][0].set_ylabel("peak, GB")
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "scaling.png", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    run_script(main)
