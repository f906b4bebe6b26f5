"""The machine's own limits for a model's shapes: how fast its matmul is, and so how fast a token could be.

Training a LoRA over frozen weights multiplies each row with every projection twice: x W^T going forward, dy W coming
back. Nothing exact can leave those out, so the time that plain `torch.mm` takes for them, on dense weights that lie
ready in the compute dtype, is the floor. Dequantising, attention, norms, activation functions and LoRA itself come on
top. `floor_share` in `compare_peft.py` is floor / measured, per computed row.

Also measured: copying memory, and dequantising NF4, which bounds how small a micro-batch may be before it weighs.

    python benchmarks/floor.py --model path/to/checkpoint
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from meter import environment
from workload import add_workload_arguments, model_folder

from minilora.qlora.model import Qwen2Config
from minilora.qlora.nf4 import quantize
from minilora.system.cli import build_parser, run_script
from minilora.weights.hf_config import read_config

TOKENS = 600  # about what 8 reviews and their prompt pack into


def projection_shapes(config: Qwen2Config) -> list[tuple[int, int]]:
    """(out, in) of the seven projections of a layer."""
    size, mlp = config.hidden_size, config.intermediate_size
    kv_size = config.num_key_value_heads * config.head_dim
    return [(size, size), (kv_size, size), (kv_size, size), (size, size), (mlp, size), (mlp, size), (size, mlp)]


def flop_per_token(config: Qwen2Config) -> int:
    """Floating-point operations of the frozen products of one row, forward and backward."""
    return 4 * config.num_hidden_layers * sum(out * inner for out, inner in projection_shapes(config))


def measure_matmul(config: Qwen2Config, tokens: int, dtype: torch.dtype, device: str) -> float:
    """Seconds that one token's frozen products take, forward and backward, in a batch of `tokens`."""
    layer_s = 0.0
    for out, inner in projection_shapes(config):
        x, dy, weight = (
            torch.randn(*size, device=device).to(dtype) for size in ((tokens, inner), (tokens, out), (out, inner))
        )
        layer_s += seconds_of(lambda x=x, w=weight: torch.mm(x, w.T), device)
        layer_s += seconds_of(lambda dy=dy, w=weight: torch.mm(dy, w), device)
    return layer_s * config.num_hidden_layers / tokens


def measure_floor(config: Qwen2Config, dtype: torch.dtype, device: str, tokens: int = TOKENS) -> dict[str, Any]:
    """The rates of this machine, as plain JSON."""
    token_s = measure_matmul(config, tokens, dtype, device)
    weight = torch.randn(config.intermediate_size, config.hidden_size, device=device).to(dtype)
    quantized = quantize(weight)
    big = torch.empty(1 << 26, dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    return {
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "flop_per_token": flop_per_token(config),
        "token_s": token_s,
        "matmul_gflop_per_s": flop_per_token(config) / token_s / 1e9,
        "floor_tokens_per_s": 1 / token_s,
        "copy_gbytes_per_s": 2 * big.nbytes / seconds_of(lambda: other.copy_(big), device) / 1e9,
        "dequantize_gbytes_per_s": weight.nbytes / seconds_of(lambda: quantized.dequantize(dtype), device) / 1e9,
    }


def seconds_of(call: Callable[[], object], device: str, repeats: int = 7) -> float:
    """Median seconds of `call`, after one that warms up; on a GPU their mean, by its own clock."""
    if device != "cpu":
        return _seconds_on_gpu(call)
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _seconds_on_gpu(call: Callable[[], object], repeats: int = 20) -> float:
    """Mean of calls that queue up behind each other: one at a time would measure how long a launch takes."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for number in range(repeats + 3):  # the first three warm up
        if number == 3:
            begin.record()
        call()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end) / repeats


def main() -> None:
    """Reads the command line and prints a table and a line of JSON."""
    parser = build_parser(__doc__, "")
    add_workload_arguments(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, TOKENS, 2048], help="tokens in a product")
    arguments = parser.parse_args()
    config = read_config(model_folder(arguments))
    results = []
    print(f"{'dtype':10}{'tokens':>6}{'GFLOP/s':>10}{'tokens/s':>9}{'copy GB/s':>11}{'NF4 GB/s':>10}")
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in arguments.tokens:
            found = measure_floor(config, dtype, arguments.device, tokens)
            results.append(found)
            print(
                f"{found['dtype']:10}{tokens:>6}{found['matmul_gflop_per_s']:>10.0f}{found['floor_tokens_per_s']:>9.0f}"
                f"{found['copy_gbytes_per_s']:>11.1f}{found['dequantize_gbytes_per_s']:>10.1f}"
            )
    print(json.dumps({"floor": results, **environment()}))


if __name__ == "__main__":
    run_script(main)
