"""Tokens per second of a greedy answer: minilora in 4 bits, with an adapter and dense, beside transformers and peft.

    python benchmarks/generate_speed.py --model path/to/checkpoint

Each side runs in a process of its own, in turn, on the same questions in bfloat16, and every answer has the same number
of tokens. minilora's models are set up as `scripts/chat.py` does it. The gate: transformers' dense model, as the judge
of all, finds minilora's answers as probable as those of transformers with the same weights, and no figure is shown
where it does not. The adapter is an initial one, which changes no answer. The last line is one JSON object.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compare_peft import run_child
from contestants import load_base
from meter import Meter, environment
from workload import Workload, add_workload_arguments, model_folder, write_adapter

from minilora.adapters.peft_files import load_adapter
from minilora.errors import UserError
from minilora.generation.decode import DecodeState, GenerationConfig, generate, use_gemv
from minilora.qlora.nf4 import Linear4bit
from minilora.qlora.prompt import ChatTokenizer
from minilora.system.cli import build_parser, run_script
from minilora.system.process import tuned_process
from minilora.weights.load import load_model

QUESTIONS = (
    "用三句话介绍杭州。",
    "Explain to a child why the sky is blue.",
    "写一条酒店的好评，要提到早餐和隔音。",
    "Write a Python function that merges two sorted lists.",
)
DENSE, QUANTIZED = "transformers, bfloat16", "transformers, NF4"
# Nats a token. A near tie may part two answers, which then are about as probable; those of a broken cache, or of a
# wrong weight, are less so by whole nats.
LOSS_TOLERANCE = 0.3


@tuned_process()
def answer_with_minilora(
    work: Workload, ids: list[list[int]], meter: Meter, quantization: str, adapted: bool
) -> list[list[int]]:
    """Tokens of each answer, by `decode.generate`, and their times in `meter`."""
    model = load_model(Path(work.model), work.dtype, quantization, device=work.device)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.cache_dequantized = True
    if adapted:
        load_adapter(model, Path(work.adapter))
    use_gemv(model.eval())
    config = GenerationConfig(do_sample=False, repetition_penalty=1, max_new_tokens=work.steps)
    list(generate(DecodeState(model, ids[0]), replace(config, max_new_tokens=2)))
    meter.loaded()
    answers = []
    for prompt in ids:
        clock = Clock(meter)
        answers.append([clock.tick(token) for token in generate(DecodeState(model, prompt), config)])
        clock.stop()
    return answers


def answer_with_transformers(
    work: Workload, ids: list[list[int]], meter: Meter, quantization: str, adapted: bool
) -> list[list[int]]:
    """The same by transformers' `generate`, whose streamer hands out each token; the adapter by peft."""
    import peft
    import transformers

    model = load_base(work, quantization).eval()
    if adapted:
        model = peft.PeftModel.from_pretrained(model, work.adapter).eval()
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)  # nothing ends an answer

    def answer(prompt: list[int], count: int, clock: "Clock | None" = None) -> list[int]:
        batch = torch.tensor([prompt], device=work.device)
        found = model.generate(batch, attention_mask=torch.ones_like(batch), streamer=clock, max_new_tokens=count)
        return found[0, len(prompt) :].tolist()

    answer(ids[0], 2)
    meter.loaded()
    answers = []
    for prompt in ids:
        clock = Clock(meter)
        answers.append(answer(prompt, work.steps, clock))
        clock.stop()
    return answers


class Clock:
    """Notes when an answer's tokens come; transformers takes it for a streamer."""

    def __init__(self, meter: Meter):
        """Starts."""
        self._meter = meter
        self._has_seen_prompt = False
        self._times = [time.perf_counter()]

    def tick(self, token: int) -> int:
        """A token came."""
        self._times.append(time.perf_counter())
        return token

    def put(self, value: torch.Tensor) -> None:
        """The prompt comes first, then each token."""
        if self._has_seen_prompt:
            self.tick(int(value[0]))
        self._has_seen_prompt = True

    def end(self) -> None:
        """What a streamer is told last."""

    def stop(self) -> None:
        """Leaves the answer's figures with the meter."""
        begin, first, *_, last = self._times
        row = {"first_token_s": first - begin, "tokens_per_s": (len(self._times) - 2) / (last - first)}
        self._meter.results["steps"].append(row)


WAYS: dict[str, Callable[[Workload, list[list[int]], Meter], list[list[int]]]] = {
    "minilora, NF4": lambda *given: answer_with_minilora(*given, "nf4", False),
    "minilora, NF4 and an adapter": lambda *given: answer_with_minilora(*given, "nf4", True),
    "minilora, bfloat16": lambda *given: answer_with_minilora(*given, "none", False),
    QUANTIZED: lambda *given: answer_with_transformers(*given, "nf4", False),
    "peft, NF4 and an adapter": lambda *given: answer_with_transformers(*given, "nf4", True),
    DENSE: lambda *given: answer_with_transformers(*given, "none", False),
}


def questions(work: Workload, count: int) -> list[list[int]]:
    """The ids that ask the first `count` questions."""
    tokenizer = ChatTokenizer(Path(work.model))
    system = [*tokenizer.open_turn("system", "You are a helpful assistant."), *tokenizer.close_turn()]
    return [
        [
            *system,
            *tokenizer.open_turn("user", question),
            *tokenizer.close_turn(),
            *tokenizer.open_turn("assistant"),
        ]
        for question in QUESTIONS[:count]
    ]


def judge(work: Workload, ids: list[list[int]], answers: Sequence[list[list[int]]]) -> list[float]:
    """Nats a token of each way's answers, by transformers' dense model."""
    model = load_base(work, "none").eval()
    losses = []
    for given in answers:
        total = torch.zeros(())
        for prompt, answer in zip(ids, given, strict=True):
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + answer], device=work.device)).logits[0, len(prompt) - 1 : -1]
            total += torch.nn.functional.cross_entropy(logits.float().cpu(), torch.tensor(answer), reduction="sum")
        losses.append(float(total) / sum(map(len, given)))
    return losses


def main() -> None:
    """Answers as a child, or runs all ways and reports."""
    if len(sys.argv) == 4 and sys.argv[1] in WAYS:
        work = Workload.from_json(sys.argv[2])
        meter = Meter(work.device)
        answers = WAYS[sys.argv[1]](work, questions(work, int(sys.argv[3])), meter)
        meter.finish()
        print(json.dumps({**meter.results, "name": sys.argv[1], "answers": answers}))
        return
    parser = build_parser(__doc__, "")
    add_workload_arguments(parser)
    parser.add_argument("--questions", type=int, default=len(QUESTIONS), help=f"1 to {len(QUESTIONS)}")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer, 3 or more")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each way")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.questions, arguments.tokens, arguments.repeats = 2, 8, 1
    folder = model_folder(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        adapter = Path(temporary) / "adapter"
        write_adapter(folder, adapter, 8, 0.0)
        work = Workload(str(folder), "", str(adapter), 1, arguments.tokens, arguments.device, 8)
        runs = [
            run_child("generate_speed.py", name, work.to_json(), str(arguments.questions))
            for _ in range(arguments.repeats)
            for name in WAYS
        ]
    report(work, arguments.questions, runs)


def report(work: Workload, count: int, runs: list[dict[str, Any]]) -> None:
    """Checks the gate, prints the table and the line of JSON."""
    first = [next(run["answers"] for run in runs if run["name"] == name) for name in WAYS]
    losses = dict(zip(WAYS, judge(work, questions(work, count), first), strict=True))
    table: dict[str, dict[str, Any]] = {}
    for name in WAYS:
        peer = QUANTIZED if "NF4" in name else DENSE
        if not losses[name] - losses[peer] <= LOSS_TOLERANCE:
            raise UserError(
                f"{name}: its answers take {losses[name]:.2f} nats a token, those of {peer} {losses[peer]:.2f}; no "
                "figure is shown"
            )
        own = [run for run in runs if run["name"] == name]
        speeds = [statistics.median(step["tokens_per_s"] for step in run["steps"]) for run in own]
        table[name] = {
            "tokens_per_s": statistics.median(speeds),
            "spread": [min(speeds), max(speeds)],
            "first_token_s": statistics.median(step["first_token_s"] for run in own for step in run["steps"]),
            "peak_bytes": statistics.median(run["train_peak_bytes"] for run in own),
            "nats_per_token": losses[name],
        }
    print("| | tokens/s (slowest to fastest) | first token | peak | nats a token |\n|---|---|---|---|---|")
    for name, row in table.items():
        low, high = row["spread"]
        print(
            f"| {name} | {row['tokens_per_s']:.1f} ({low:.1f} to {high:.1f}) | {row['first_token_s']:.2f} s "
            f"| {row['peak_bytes'] / 1e9:.2f} GB | {row['nats_per_token']:.2f} |"
        )
    print(json.dumps({"ways": table, **environment(), "time": time.strftime("%H:%M")}))


if __name__ == "__main__":
    run_script(main)
