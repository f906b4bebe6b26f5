"""Compares the memory estimate with the measured peak of some training steps, configuration by configuration.

    python benchmarks/memory_estimate.py --model path/to/checkpoint
    python benchmarks/memory_estimate.py --tiny

Each case is a process of its own that takes `--steps` steps on random ids, in micro-batches of eight examples whose
lengths differ, the first one the largest. On a CPU the peak is the resident memory of the process; on a GPU it is what
PyTorch has allocated, compared with the estimate without CUDA's context. The last line is JSON.
"""

import json
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from compare_peft import run_child
from meter import environment
from workload import add_workload_arguments, model_folder

from minilora.adapters.attach import attach, parameter_groups
from minilora.adapters.optimizers import build_optimizer
from minilora.build import build_model, choose_device, choose_dtype
from minilora.config import Config, load_config
from minilora.planning.memory import CONTEXT_BYTES, BatchShape, Machine, count_parameters, estimate_memory
from minilora.qlora.batch import pack
from minilora.qlora.prompt import Example
from minilora.qlora.step import StepSettings, TrainState, train_step
from minilora.system.cli import build_parser, run_script
from minilora.system.memory import peak_memory_bytes, trim_heap
from minilora.system.process import tuned_process
from minilora.weights.hf_config import read_config

CHECKPOINTING = "train.gradient_checkpointing=true"
CASES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (256, ()),
    (512, ()),
    (1024, ()),
    (2048, ()),
    (256, (CHECKPOINTING,)),
    (512, (CHECKPOINTING,)),
    (1024, (CHECKPOINTING,)),
    (2048, (CHECKPOINTING,)),
    (512, ("lora.r=64",)),
    (512, ("lora.r=64", "train.optim=adamw_bnb_8bit")),
    (512, ("lora.use_dora=true",)),
    (512, ("lora.use_dora=true", CHECKPOINTING)),
    (512, ("model.quantization=none",)),
    (2048, ("model.quantization=none", CHECKPOINTING)),
    (512, ("model.cache_dequantized=true",)),
    (512, ("model.double_quantization=false", "lora.dropout=0.05")),
    (512, ("model.compute_dtype=float32",)),
)


@dataclass(frozen=True)
class Case:
    """One measurement: micro-batches of up to `tokens` tokens under a configuration."""

    model: str
    device: str
    tokens: int
    keys: tuple[str, ...]
    steps: int

    def config(self) -> Config:
        """The configuration, in bfloat16 and without dropout unless its keys say otherwise."""
        fixed = [f"model.name_or_path={self.model}", f"model.device={self.device}", "model.compute_dtype=bfloat16"]
        return load_config(None, [*fixed, "lora.dropout=0", *self.keys])


@tuned_process()
def measure(case: Case) -> dict[str, Any]:
    """Bytes predicted and measured, in this process."""
    config = case.config()
    device = choose_device(config)
    dtype = choose_dtype(config, device)
    process_bytes = peak_memory_bytes(torch.device("cpu"))
    model = build_model(config, Path(case.model), device, dtype)
    model.model.gradient_checkpointing = config.train.gradient_checkpointing
    model.model.offload_checkpoints = config.train.offload_checkpoints
    dropout_seed = attach(model, config.lora)
    trim_heap()  # as `open_run`
    optimizer = build_optimizer(parameter_groups(model.train()), optim=config.train.optim)
    generator = random.Random(0)
    shape = BatchShape(0, 0, 0)
    for step in range(1, case.steps + 1):
        tokens = case.tokens if step == 1 else generator.randint(case.tokens * 6 // 10, case.tokens)
        examples = random_examples(tokens, generator)
        batch = pack(examples).to(device)
        shape = BatchShape(
            tokens=max(shape.tokens, len(batch.input_ids)),
            supervised_positions=max(shape.supervised_positions, batch.num_supervised),
            longest=max(shape.longest, *(len(example.input_ids) - 1 for example in examples)),
        )
        train_step(TrainState(model, optimizer, dropout_seed), [batch], StepSettings(step, 0.0001, 1.0))
    counts = count_parameters(read_config(Path(case.model)), config.lora)
    estimate = estimate_memory(config, counts, shape, Machine(device.type, dtype, process_bytes))
    predicted = estimate.total_bytes - (CONTEXT_BYTES if device.type == "cuda" else 0)
    return {"predicted": predicted, "measured": peak_memory_bytes(device), "parts": estimate.parts}


def random_examples(tokens: int, generator: random.Random, count: int = 8) -> list[Example]:
    """Examples of random ids, `tokens` tokens in total, each with two supervised ones."""
    weights = [generator.uniform(0.3, 1) for _ in range(count)]
    lengths = [max(3, int(tokens * weight / sum(weights))) for weight in weights]
    return [
        Example([generator.randrange(500) for _ in range(length + 1)], [False] * (length - 1) + [True, True])
        for length in lengths
    ]


def main() -> None:
    """Measures one case as a child, or all of them."""
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
        return
    parser = build_parser(__doc__, "")
    add_workload_arguments(parser)
    parser.add_argument("--steps", type=int, default=10, help="training steps of a case")
    arguments = parser.parse_args()
    folder = model_folder(arguments)
    results = []
    print("| tokens | configuration | predicted | measured | off by |\n|---|---|---|---|---|")
    for tokens, keys in CASES:
        case = Case(model=str(folder), device=arguments.device, tokens=tokens, keys=keys, steps=arguments.steps)
        found = run_child("memory_estimate.py", json.dumps(asdict(case)))
        off = found["predicted"] / found["measured"] - 1
        results.append({"tokens": tokens, "keys": keys, "off": off, **found})
        predicted, measured = (f"{found[name] / 1e9:.2f} GB" for name in ("predicted", "measured"))
        print(f"| {tokens} | {' '.join(keys) or 'default'} | {predicted} | {measured} | {off:+.1%} |", flush=True)
    worst = max(abs(result["off"]) for result in results)
    print(f"\nlargest error: {worst:.1%}")
    print(json.dumps({"worst": worst, "cases": results, **environment()}))


if __name__ == "__main__":
    run_script(main)
