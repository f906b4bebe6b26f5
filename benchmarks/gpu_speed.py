"""The stages "environment", "shapes", "profile" and "compare" of `gpu_check.py`: figures of a machine, and its limits.

Time and memory of training steps of real shapes beside the memory estimate; what a step launches and how much of the
time the device works; the same steps by peft. Sizes with `--small` show that it runs, and mean nothing.
"""

import gc
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from compare_peft import check_losses, figures_of, run_child
from floor import flop_per_token, measure_matmul
from gpu_stage import (
    NOT_ON_CPU,
    Findings,
    Options,
    chat_example,
    random_model,
    review_examples,
    review_lengths,
    write_checkpoint,
    write_reviews,
)
from meter import Meter, environment
from torch.profiler import ProfilerActivity, profile
from workload import Workload, write_adapter

from minilora.adapters.attach import parameter_groups
from minilora.adapters.optimizers import build_optimizer
from minilora.config import Config, LoraConfig, load_config
from minilora.planning.memory import CONTEXT_BYTES, BatchShape, Machine, count_parameters, estimate_memory
from minilora.qlora.batch import MicroBatch, pack
from minilora.qlora.model import Qwen2Config
from minilora.qlora.prompt import Example
from minilora.qlora.step import StepSettings, TrainState, train_step
from minilora.system import bnb
from minilora.weights.flash_probe import has_flash
from minilora.weights.safetensors_io import dtype_name

FLOOR_TOKENS = (512, 2048, 8192)
ESTIMATE_TOLERANCE = 0.1  # of the peak that PyTorch's allocator hands out; what the README promises
WARM_UP_STEPS = 3
RATE = 1e-5
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")
SHOWN_KERNELS = 25
CONTESTANTS = (
    "minilora",
    "minilora, length-sorted",
    "minilora, checkpointing",
    "peft loop, padded, checkpointing",
    "peft loop, length-sorted, no upcasts",
)
FEW_CONTESTANTS = ("minilora", "peft loop, padded, checkpointing")
LARGE_GPU_BYTES = 70e9  # from here on peft's loop has room for 64 padded reviews

# ---- Environment


def check_environment(options: Options, findings: Findings) -> None:
    """What a figure is worth nothing without, and the floor of the products."""
    found = environment()
    findings.figure("versions", **found.pop("versions"))
    findings.figure("machine", **{key: value for key, value in found.items() if value is not None})
    functional = bnb.functional()
    has_cuda = bool(getattr(getattr(functional, "lib", None), "compiled_with_cuda", False))
    findings.figure("bitsandbytes", imported=functional is not None, cuda_library=has_cuda)
    if not options.is_gpu:
        findings.skip("device, its memory and its floor", NOT_ON_CPU)
        measure_floors(options, findings, FLOOR_TOKENS[:1])
        return
    properties = torch.cuda.get_device_properties(0)
    findings.figure(
        "device",
        gpu=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        memory_gb=properties.total_memory / 1e9,
        cuda=torch.version.cuda,
        dtype=dtype_name(options.dtype),
        flash_attention=has_flash(torch.device("cuda", 0), options.dtype, 64),
    )
    findings.check(
        "bitsandbytes counts as available only with its CUDA library",
        bnb.is_available() == has_cuda,
        available=bnb.is_available(),
        cuda_library=has_cuda,
    )
    measure_floors(options, findings, FLOOR_TOKENS)
    # After the products, for cuBLAS has memory of its own. Other programs on the device count too.
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    beside = (total - free - torch.cuda.memory_reserved()) / 1e6
    findings.figure("memory beside PyTorch's tensors", mb=beside, estimate_mb=CONTEXT_BYTES / 1e6)


def measure_floors(options: Options, findings: Findings, token_counts: Sequence[int]) -> None:
    """How fast a step could be that is nothing but its frozen products."""
    for size in ("0.5B", "7B"):
        config = options.sizes(size)
        for tokens in token_counts:
            name = f"floor of {size}{', tiny' if options.small else ''}, {tokens} tokens"
            with findings.attempt(name):
                token_s = measure_matmul(config, tokens, options.dtype, options.device)
                tflop_per_s = flop_per_token(config) / token_s / 1e12
                findings.figure(name, ms=1e3 * tokens * token_s, tokens_per_s=1 / token_s, tflop_per_s=tflop_per_s)


# ---- Shapes


@dataclass(frozen=True)
class Case:
    """Training steps of one shape.

    Attributes:
        name: in the table.
        size: of the model.
        reviews: in a step, or 0 for one chat.
        tokens: of the chat.
        keys: of the configuration.
        steps: that are timed.
    """

    name: str
    size: str
    reviews: int = 0
    tokens: int = 0
    keys: tuple[str, ...] = ()
    steps: int = 4

    def examples(self, step: int, small: bool, vocab_size: int) -> list[Example]:
        """Of one step; reviews of other lengths in each, the longest of them in the first."""
        if not self.reviews:
            return [chat_example(self.tokens // 32 if small else self.tokens, vocab_size)]
        count = max(2, self.reviews // 8) if small else self.reviews
        steps = WARM_UP_STEPS + self.steps
        lengths = review_lengths(count * steps)
        groups = [lengths[start : start + count] for start in range(0, len(lengths), count)]
        groups.sort(key=sum, reverse=True)
        return review_examples(groups[step - 1], vocab_size)


CHECKPOINTING = "train.gradient_checkpointing=true"
OFFLOADING = "train.offload_checkpoints=true"
CASES = (
    Case("0.5B, 8 reviews", "0.5B", reviews=8, steps=15),
    Case("0.5B, 8 reviews, dropout", "0.5B", reviews=8, keys=("lora.dropout=0.05",), steps=15),
    Case("0.5B, 64 reviews", "0.5B", reviews=64, steps=6),
    Case("0.5B, one chat of 4,096", "0.5B", tokens=4096),
    Case("0.5B, one chat of 32,768, checkpointing", "0.5B", tokens=32_768, keys=(CHECKPOINTING,), steps=1),
    Case("7B, 8 reviews", "7B", reviews=8, steps=5),
    Case("7B, one chat of 4,096, checkpointing", "7B", tokens=4096, keys=(CHECKPOINTING,), steps=2),
    Case("7B, one chat of 4,096, offloaded", "7B", tokens=4096, keys=(CHECKPOINTING, OFFLOADING), steps=2),
)


def measure_shapes(options: Options, findings: Findings) -> None:
    """All cases in turn; where a GPU has too little memory by the estimate, a line says so."""
    for case in CASES:
        if options.small:
            case = replace(case, name=f"{case.name}, tiny")
        with findings.attempt(case.name):
            measure_case(case, options, findings)
        _free_cache(options)


def _free_cache(options: Options) -> None:
    gc.collect()
    if options.is_gpu:
        torch.cuda.empty_cache()


def measure_case(case: Case, options: Options, findings: Findings) -> None:
    """Time and memory of a case beside the estimate."""
    config = load_config(None, ["lora.dropout=0", *case.keys])
    sizes = options.sizes(case.size)
    steps = 1 if options.small else case.steps
    warm_up = 1 if options.small or case.tokens > 8192 else WARM_UP_STEPS
    examples = [case.examples(step, options.small, sizes.vocab_size) for step in range(1, warm_up + steps + 1)]
    estimate = _estimate_bytes(config, sizes, [pack(step) for step in examples], options)
    if options.is_gpu and estimate > (room := torch.cuda.get_device_properties(0).total_memory):
        findings.skip(case.name, f"it takes {estimate / 1e9:.1f} GB by the estimate, and there are {room / 1e9:.1f}")
        return
    model, seed = random_model(sizes, options.device, options.dtype, config.lora)
    model.model.gradient_checkpointing = config.train.gradient_checkpointing
    model.model.offload_checkpoints = config.train.offload_checkpoints
    state = TrainState(model, build_optimizer(parameter_groups(model)), seed)
    _free_cache(options)  # of what the weights were drawn in
    meter = Meter(options.device)
    for number, group in enumerate(examples, start=1):
        if number == warm_up + 1:
            meter.results["steps"].clear()
            meter.loaded()  # peaks count from here
        with meter.step(sum(len(example.input_ids) for example in group), 0) as row:
            batch = pack(group).to(torch.device(options.device))
            row["computed_tokens"] = len(batch.input_ids)
            row["loss"] = train_step(state, [batch], StepSettings(number, RATE)).loss
    meter.finish()
    findings.figure(case.name, **_speed(meter.results["steps"]))
    if not options.is_gpu or options.small:  # of a tiny model, cuBLAS' own workspace is the larger part
        findings.skip(f"{case.name}: memory", "not measured with tiny sizes" if options.is_gpu else NOT_ON_CPU)
        return
    allocated, reserved = meter.results["train_peak_bytes"], torch.cuda.max_memory_reserved()
    values = {"allocated_gb": allocated / 1e9, "reserved_gb": reserved / 1e9, "estimate_gb": estimate / 1e9}
    off = estimate / allocated - 1
    findings.check(f"{case.name}: memory", abs(off) <= ESTIMATE_TOLERANCE, **values, off=f"{off:+.1%}")


def _speed(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    seconds = sum(step["seconds"] for step in steps)
    real, computed = (sum(step[name] for step in steps) for name in ("real_tokens", "computed_tokens"))
    return {
        "ms_per_step": 1e3 * seconds / len(steps),
        "real_tokens_per_s": real / seconds,
        "computed_tokens_per_s": computed / seconds,
        "loss": steps[-1]["loss"],
    }


def _estimate_bytes(config: Config, sizes: Qwen2Config, batches: Sequence[MicroBatch], options: Options) -> int:
    """What PyTorch hands out for a run of these micro-batches, by the memory estimate: without CUDA's context."""
    shape = BatchShape(
        tokens=max(len(batch.input_ids) for batch in batches),
        supervised_positions=max(batch.num_supervised for batch in batches),
        longest=max(int(batch.position_ids.max()) + 1 for batch in batches),
    )
    machine = Machine(options.device, options.dtype, process_bytes=None)
    estimate = estimate_memory(config, count_parameters(sizes, config.lora), shape, machine)
    return estimate.total_bytes - (CONTEXT_BYTES if options.is_gpu else 0)


# ---- Profile


def profile_steps(options: Options, findings: Findings) -> None:
    """A step of short reviews and one of a long chat, each with a few layers of its size."""
    for name, size, layers in (("0.5B, 8 reviews", "0.5B", None), ("7B, one chat of 4,096", "7B", 4)):
        case = next(case for case in CASES if case.name.startswith(name))
        sizes = options.sizes(size, layers)
        with findings.attempt(name):
            batch = pack(case.examples(1, options.small, sizes.vocab_size))
            name = f"{name}, {sizes.num_hidden_layers}{' tiny' if options.small else ''} layers"
            profile_step(name, sizes, batch, options=options, findings=findings)


def profile_step(name: str, sizes: Qwen2Config, batch: MicroBatch, *, options: Options, findings: Findings) -> None:
    """Launches and the share of time in which the device works; on a CPU only its operators, by time."""
    model, seed = random_model(sizes, options.device, options.dtype, LoraConfig(dropout=0))
    state = TrainState(model, build_optimizer(parameter_groups(model)), seed)
    numbers = iter(range(1, 100))
    meter = Meter(options.device)

    def take_step() -> None:
        with meter.step(0, 0):
            train_step(state, [batch.to(torch.device(options.device))], StepSettings(next(numbers), RATE))

    for _ in range(2 * WARM_UP_STEPS):
        take_step()
    step_s = sum(row["seconds"] for row in meter.results["steps"][WARM_UP_STEPS:]) / WARM_UP_STEPS
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if options.is_gpu else [])]
    with profile(activities=activities) as profiler:
        take_step()
    events = profiler.key_averages()
    log = Path(options.output_dir) / f"profile-{name.partition(',')[0]}.txt"
    log.write_text(events.table(sort_by="self_cpu_time_total", row_limit=60), "utf-8")
    operators = sorted(events, key=lambda event: -event.self_cpu_time_total)[:SHOWN_KERNELS]
    if not options.is_gpu:
        slowest = [(event.key, event.count, event.self_cpu_time_total / 1e3) for event in operators]
        findings.figure(f"profile of {name}", slowest, ms_per_step=1e3 * step_s, most_time=slowest[0][0])
        findings.skip(f"launches and busy share of {name}", NOT_ON_CPU)
        return
    kernels = [event for event in events if str(event.device_type).endswith("CUDA")]
    if not kernels:
        findings.skip(f"profile of {name}", "the profiler recorded no kernels: CUPTI is missing or not permitted")
        return
    launches = sum(event.count for event in events if event.key in LAUNCHES)
    busy_s = sum(event.self_device_time_total for event in kernels) / 1e6
    kernels.sort(key=lambda event: -event.self_device_time_total)
    slowest = [(event.key[:120], event.count, event.self_device_time_total / 1e3) for event in kernels[:SHOWN_KERNELS]]
    findings.figure(
        f"profile of {name}",
        slowest,
        ms_per_step=1e3 * step_s,
        launches=launches,
        launches_per_layer=launches / sizes.num_hidden_layers,
        busy_share=busy_s / step_s,
        largest_kernel=slowest[0][0][:40],
    )


# ---- Compare


def compare_with_peft(options: Options, findings: Findings) -> None:
    """`gate.py` and `contestants.py` on a random checkpoint and random reviews: first the same, then how fast."""
    missing = [name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        findings.skip("comparison with peft", f"not installed: {', '.join(missing)}")
        return
    batch_size, steps, names = (2, 2, FEW_CONTESTANTS) if options.small else (8, 10, CONTESTANTS)
    if options.is_gpu and torch.cuda.get_device_properties(0).total_memory > LARGE_GPU_BYTES and not options.small:
        batch_size = 64
    work = Path(options.work_dir)
    checkpoint, data, start, trained = (work / name for name in ("checkpoint", "train.tsv", "start", "trained"))
    write_checkpoint(options.sizes("0.5B"), checkpoint, options.device)
    write_reviews(data, max(batch_size * (steps + 1), 16))
    write_adapter(checkpoint, start, r=8, b_size=0.0)
    write_adapter(checkpoint, trained, r=8, b_size=0.01)
    _free_cache(options)
    how = {"batch_size": batch_size, "steps": steps, "device": options.device, "r": 8}
    workload = Workload(str(checkpoint), str(data), str(start), **how)
    name = "float32 loss and gradients as peft's"
    with findings.attempt(name):
        gate = run_child("gate.py", replace(workload, adapter=str(trained)).to_json())
        error = gate["largest_gradient_relative_error"]
        findings.check(name, gate["passed"], gate, gradients=gate["gradients"], largest_error=error)
    runs = []
    for name in names:
        with findings.attempt(f"{name}, batch {batch_size}"):
            runs.append({**run_child("contestants.py", name, workload.to_json()), "repeat": 0})
            figures = figures_of(runs[-1:])
            findings.figure(
                f"{name}, batch {batch_size}",
                real_tokens_per_s=figures["tokens_per_s"],
                peak_gb=figures["train_peak_bytes"] / 1e9,
                load_s=figures["load_s"],
            )
    name = "bfloat16 losses as minilora's"
    with findings.attempt(name):
        findings.check(name, True, largest_difference=max(check_losses(runs).values()))  # raises beyond its tolerance
