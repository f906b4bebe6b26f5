"""Reviews per second of label scoring: minilora's prefill beside transformers' padded forward and `generate`.

    python benchmarks/evaluate_speed.py --model path/to/checkpoint --data dev.tsv

Each side runs in a process of its own, in turn, on the same prompts with the same NF4 weights in bfloat16. The gate:
label probabilities agree with minilora's, and no figure is shown where they do not. The last line is one JSON object.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compare_peft import run_child
from contestants import load_base
from meter import Meter, environment
from workload import Workload, add_workload_arguments, model_folder, pad

from minilora.errors import UserError
from minilora.evaluation.score import ScoringOptions, score
from minilora.qlora.prompt import Example
from minilora.system.cli import build_parser, run_script
from minilora.system.process import tuned_process
from minilora.weights.load import load_model

OURS = "minilora"
# The mean over all reviews counts: against float32 it is 0.005 to 0.007 off here, with two threads and with one, and
# 0.007 to 0.008 in transformers (Qwen2.5-0.5B, 64 reviews); a single probability is at most 0.023 off here, 0.045
# there. The two sides are 0.010 apart; 1.5 times that.
PROBABILITY_TOLERANCE = 0.015


@tuned_process()
def score_with_minilora(work: Workload, examples: list[Example], meter: Meter) -> list[float]:
    """p(second label) of each review, by `evaluation/score.py`."""
    model = load_model(Path(work.model), work.dtype, device=work.device)
    prompt = work.prompt()
    meter.loaded()
    with meter.step(sum(len(example.input_ids) for example in examples), 0):
        scores = score(model, examples, prompt, ScoringOptions(work.batch_size))
    assert scores.probabilities is not None  # a prompt was given
    return [float(row[1]) for row in scores.probabilities]


def score_with_forward(work: Workload, examples: list[Example], meter: Meter) -> list[float]:
    """The same by transformers: padded batches of the questions, longest first, logits of every position."""
    model = load_base(work, "nf4").eval()
    label_ids = [ids[0] for ids in work.prompt().label_ids]
    meter.loaded()
    found = [0.0] * len(examples)
    with meter.step(sum(len(example.input_ids) for example in examples), 0), torch.inference_mode():
        for places in _batches(examples, work.batch_size):
            batch = pad([_question(examples[place]) for place in places], work.device)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            last = batch["attention_mask"].sum(1) - 1
            chosen = logits[torch.arange(len(places)), last][:, label_ids].float().softmax(-1)
            for place, probability in zip(places, chosen[:, 1].tolist(), strict=True):
                found[place] = probability
    return found


def score_with_generate(work: Workload, examples: list[Example], meter: Meter) -> list[float]:
    """The usual way: generate the answer, greedily, and read it; probabilities are those of the first new token."""
    model = load_base(work, "nf4").eval()
    label_ids = [ids[0] for ids in work.prompt().label_ids]
    meter.loaded()
    found = [0.0] * len(examples)
    with meter.step(sum(len(example.input_ids) for example in examples), 0), torch.inference_mode():
        for places in _batches(examples, work.batch_size):
            batch = pad([_question(examples[place]) for place in places], work.device)
            padded = (batch["input_ids"], batch["attention_mask"])
            ids, mask = (_to_the_right(values, batch["attention_mask"]) for values in padded)
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=4,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            chosen = out.logits[0][:, label_ids].float().softmax(-1)
            for place, probability in zip(places, chosen[:, 1].tolist(), strict=True):
                found[place] = probability
    return found


WAYS: dict[str, Callable[[Workload, list[Example], Meter], list[float]]] = {
    OURS: score_with_minilora,
    "transformers, padded forward": score_with_forward,
    "transformers, generate": score_with_generate,
}


def _question(example: Example) -> Example:
    """The prompt without its answer."""
    ids = example.input_ids[: example.answer_start]
    return Example(ids, [False] * len(ids))


def _batches(examples: list[Example], size: int) -> list[list[int]]:
    order = sorted(range(len(examples)), key=lambda place: -len(examples[place].input_ids))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _to_the_right(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Padding moved to the left, where `generate` wants it."""
    lengths = mask.sum(1).tolist()
    return torch.stack([row.roll(len(row) - length) for row, length in zip(values, lengths, strict=True)])


def main() -> None:
    """Runs one way as a child, or all of them and reports."""
    if len(sys.argv) == 4 and sys.argv[1] in WAYS:
        work = Workload.from_json(sys.argv[2])
        meter = Meter(work.device)
        probabilities = WAYS[sys.argv[1]](work, work.examples(int(sys.argv[3])), meter)
        meter.finish()
        print(json.dumps({**meter.results, "name": sys.argv[1], "probabilities": probabilities}))
        return
    parser = build_parser(__doc__, "")
    add_workload_arguments(parser)
    parser.add_argument("--reviews", type=int, default=96, help="reviews to score")
    parser.add_argument("--batch_size", type=int, default=32, help="reviews in a forward pass")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each way")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.reviews, arguments.batch_size, arguments.repeats = 16, 8, 1
    data = str(Path(arguments.data).resolve()) if arguments.data else ""
    work = Workload(str(model_folder(arguments)), data, "", arguments.batch_size, 1, arguments.device, 8)
    runs = [
        run_child("evaluate_speed.py", name, work.to_json(), str(arguments.reviews))
        for _ in range(arguments.repeats)
        for name in WAYS
    ]
    report(runs, arguments.reviews)


def report(runs: list[dict[str, Any]], reviews: int) -> None:
    """Checks the gate, prints the table and the line of JSON."""
    reference = next(run["probabilities"] for run in runs if run["name"] == OURS)
    table: dict[str, dict[str, Any]] = {}
    for name in WAYS:
        own = [run for run in runs if run["name"] == name]
        differences = [abs(a - b) for a, b in zip(own[0]["probabilities"], reference, strict=True)]
        if not statistics.mean(differences) <= PROBABILITY_TOLERANCE:
            mean = statistics.mean(differences)
            raise UserError(f"{name}: probabilities differ from minilora's by {mean:.3f}, no figure is shown")
        speeds = [reviews / run["steps"][0]["seconds"] for run in own]
        table[name] = {
            "reviews_per_s": statistics.median(speeds),
            "spread": [min(speeds), max(speeds)],
            "peak_bytes": statistics.median(run["train_peak_bytes"] for run in own),
            "largest_probability_difference": max(differences),
        }
    print("| | reviews/s (slowest to fastest) | peak | largest difference of a probability |\n|---|---|---|---|")
    for name, row in table.items():
        low, high = row["spread"]
        print(
            f"| {name} | {row['reviews_per_s']:.2f} ({low:.2f} to {high:.2f}) | {row['peak_bytes'] / 1e9:.2f} GB "
            f"| {row['largest_probability_difference']:.3f} |"
        )
    ours = table[OURS]["reviews_per_s"]
    ratios = {f"speedup_vs_{name.split()[-1]}": ours / table[name]["reviews_per_s"] for name in list(WAYS)[1:]}
    print(json.dumps({"ways": table, **ratios, **environment(), "time": time.strftime("%H:%M")}))


if __name__ == "__main__":
    run_script(main)
