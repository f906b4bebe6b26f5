"""How the cost of preparing data, and of a training's start from it, grows with the number of its records.

    python benchmarks/data_scaling.py
    python benchmarks/data_scaling.py --tiny

Each size is a file of its own, made of the demo's shop reviews with a number behind each, so that none is a duplicate,
and is prepared by a process of its own. Two others then do what training does before it loads a model, and make each
example once, as an epoch does: the first tokenises, the second finds the tokens beside the data. Memory should be a
straight line of at most 40 bytes a record; its slopes between the two largest sizes are printed. That of a start is
without the pages of the mapped tokens, which the system takes back where it needs them. The last line is JSON.
"""

import itertools
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from minilora.data.prepare import prepare
from minilora.data.records import read_demo_records
from minilora.system.cli import build_parser, run_script

SIZES = (10_000, 100_000, 1_000_000)
TINY_SIZES = (1_000, 3_000)
TINY_MODEL = Path(__file__).parent.parent / "minilora" / "assets" / "tiny-qwen2.5"


def measure(source: Path, output: Path) -> dict[str, Any]:
    """Seconds and the peak of memory of preparing a file, in this process, which imports no PyTorch."""
    started = time.perf_counter()
    report = prepare([source], output)
    seconds = time.perf_counter() - started
    return {
        "records": sum(report["rows_in"].values()),
        "written": sum(report["rows_out"].values()),
        "prepare_s": seconds,
        "prepare_peak_bytes": status_bytes("VmHWM"),
    }


def status_bytes(name: str) -> int | None:
    """A figure of this process' memory; None where Linux does not say."""
    status = Path("/proc/self/status")
    found = re.findall(rf"{name}:\s+(\d+) kB", status.read_text("utf-8")) if status.is_file() else []
    return 1024 * int(found[0]) if found else None


def measure_start(folder: str) -> dict[str, Any]:
    """Seconds until all examples of prepared data are there, and anonymous memory after an epoch of them."""
    from minilora.build import build_prompt, read_splits  # PyTorch, which is not in the memory of a preparation
    from minilora.config import load_config
    from minilora.data.sampler import epoch_order
    from minilora.qlora.prompt import ChatTokenizer

    config = load_config(None, [f"data.dir={folder}"])
    prompt = build_prompt(config, ChatTokenizer(TINY_MODEL))
    started = time.perf_counter()
    examples = read_splits(config, prompt)["train"].examples
    order = epoch_order(len(examples), config.train.seed, 0)
    seconds = time.perf_counter() - started
    tokens = sum(len(examples[index].input_ids) for index in order)
    return {"start_s": seconds, "start_bytes": status_bytes("RssAnon"), "tokens": tokens}


def main() -> None:
    """Measures one size as a child, or all of them."""
    if len(sys.argv) == 3 and sys.argv[1].endswith(".tsv"):
        print(json.dumps(measure(Path(sys.argv[1]), Path(sys.argv[2]))))
        return
    if len(sys.argv) == 2 and Path(sys.argv[1]).is_dir():
        print(json.dumps(measure_start(sys.argv[1])))
        return
    from compare_peft import run_child  # here, and not above: a child's memory is that of a preparation
    from meter import environment

    parser = build_parser(__doc__, "")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of records")
    parser.add_argument("--tiny", action="store_true", help=f"sizes {TINY_SIZES}, to see that this script runs")
    arguments = parser.parse_args()
    reviews = [f"{record.label}\t{record.content}" for record in read_demo_records()]
    sizes = []
    print("| records | file | preparing | records/s | peak | first start | memory | second start | memory |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in TINY_SIZES if arguments.tiny else arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "reviews.tsv"
            write_reviews(source, reviews, size)
            found = run_child("data_scaling.py", str(source), f"{folder}/out") | {"file_bytes": source.stat().st_size}
            for start in ("first", "second"):
                measured = run_child("data_scaling.py", f"{folder}/out").items()
                found |= {f"{start}_{name}": value for name, value in measured}
        sizes.append(found)
        print(
            f"| {size:,} | {in_mb(found['file_bytes'])} | {found['prepare_s']:.1f} s "
            f"| {size / found['prepare_s']:,.0f} | {in_mb(found['prepare_peak_bytes'])} "
            f"| {found['first_start_s']:.1f} s | {in_mb(found['first_start_bytes'])} "
            f"| {found['second_start_s']:.1f} s | {in_mb(found['second_start_bytes'])} |",
            flush=True,
        )
    summary: dict[str, Any] = {"sizes": sizes, **environment()}
    if not arguments.tiny and len(sizes) > 1 and sizes[-1]["prepare_peak_bytes"] is not None:
        for work, key in (("prepare", "prepare_peak_bytes"), ("start", "first_start_bytes")):
            more_bytes, more = (sizes[-1][name] - sizes[-2][name] for name in (key, "records"))
            summary[f"{work}_bytes_per_record"] = more_bytes / more
            print(f"\nmemory, {work}: {more_bytes / more:.0f} bytes for each further record")
    print(json.dumps(summary))


def in_mb(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.0f} MB"


def write_reviews(path: Path, reviews: list[str], count: int) -> None:
    """`count` distinct reviews with their labels."""
    with path.open("w", encoding="utf-8") as file:
        file.write("label\ttext\n")
        file.writelines(f"{review}{number}\n" for number, review in zip(range(count), itertools.cycle(reviews)))


if __name__ == "__main__":
    run_script(main)
