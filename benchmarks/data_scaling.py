"""How the cost of preparing data grows with the number of its records.

    python benchmarks/data_scaling.py
    python benchmarks/data_scaling.py --tiny

Each size is a file of its own, made of the demo's shop reviews with a number behind each, so that none is a duplicate,
and is prepared by a process of its own. Memory should be a straight line of at most 40 bytes a record; its slope
between the two largest sizes is printed. The last line is JSON.
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


def measure(source: Path, output: Path) -> dict[str, Any]:
    """Seconds and the peak of memory of preparing a file, in this process, which imports no PyTorch."""
    started = time.perf_counter()
    report = prepare([source], output)
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status")
    peak = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text("utf-8")) if status.is_file() else []
    return {
        "records": sum(report["rows_in"].values()),
        "written": sum(report["rows_out"].values()),
        "prepare_s": seconds,
        "prepare_peak_bytes": 1024 * int(peak[0]) if peak else None,
    }


def main() -> None:
    """Measures one size as a child, or all of them."""
    if len(sys.argv) == 3 and sys.argv[1].endswith(".tsv"):
        print(json.dumps(measure(Path(sys.argv[1]), Path(sys.argv[2]))))
        return
    from compare_peft import run_child  # here, and not above: a child's memory is that of a preparation
    from meter import environment

    parser = build_parser(__doc__, "")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of records")
    parser.add_argument("--tiny", action="store_true", help=f"sizes {TINY_SIZES}, to see that this script runs")
    arguments = parser.parse_args()
    reviews = [f"{record.label}\t{record.content}" for record in read_demo_records()]
    sizes = []
    print("| records | file | preparing | records/s | peak |")
    print("|---|---|---|---|---|")
    for size in TINY_SIZES if arguments.tiny else arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "reviews.tsv"
            write_reviews(source, reviews, size)
            found = run_child("data_scaling.py", str(source), f"{folder}/out") | {"file_bytes": source.stat().st_size}
        sizes.append(found)
        peak = "-" if found["prepare_peak_bytes"] is None else f"{found['prepare_peak_bytes'] / 1e6:,.0f} MB"
        print(
            f"| {size:,} | {found['file_bytes'] / 1e6:,.1f} MB | {found['prepare_s']:.1f} s "
            f"| {size / found['prepare_s']:,.0f} | {peak} |",
            flush=True,
        )
    summary: dict[str, Any] = {"sizes": sizes, **environment()}
    if not arguments.tiny and len(sizes) > 1 and sizes[-1]["prepare_peak_bytes"] is not None:
        more_bytes, more = (sizes[-1][key] - sizes[-2][key] for key in ("prepare_peak_bytes", "records"))
        summary["prepare_bytes_per_record"] = more_bytes / more
        print(f"\nmemory: {more_bytes / more:.0f} bytes for each further record")
    print(json.dumps(summary))


def write_reviews(path: Path, reviews: list[str], count: int) -> None:
    """`count` distinct reviews with their labels."""
    with path.open("w", encoding="utf-8") as file:
        file.write("label\ttext\n")
        file.writelines(f"{review}{number}\n" for number, review in zip(range(count), itertools.cycle(reviews)))


if __name__ == "__main__":
    run_script(main)
