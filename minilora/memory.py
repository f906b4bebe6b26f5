"""The memory ledger: bytes predicted from a configuration, and bytes measured.

    weights      projections in 4 bits (4.5 with their scales, 4.13 with scales of scales), all else dense
    adapter      A and B in float32, their gradients, and AdamW's two moments: 16 bytes a parameter, 10 in 8 bits
    activations  what the backward passes of `ops.py` and `lora.py` keep, per packed row
    transient    the largest weight in dense form, one chunk of logits, one layer's gradients
    heap         on a CPU, places between buffers that no other buffer fits, and the products that oneDNN has compiled

Activations are linear in the packed rows T. A layer keeps the two sums that its norms read, q, k, v and what
attention makes of them, gate and up: 4 C + 2 K D + 2 F numbers a row, 27 kB in a Qwen2.5-0.5B in bfloat16. All
else is made again from these (`lora.Again`). The last layer keeps supervised rows alone. With gradient
checkpointing a layer keeps only its input, and one layer at a time is computed again.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from minilora.attach import lora_parameters
from minilora.loss import CHUNK_ROWS
from minilora.model import Qwen2Config, Qwen2ForCausalLM
from minilora.tensorfile import dtype_name

# Steps differ in length and so do their buffers. Seen with glibc on a Qwen2.5-0.5B and micro-batches of 400 to
# 800 rows after some steps: 0.1 of the activations, and eleven times one layer's gradients, which come and go.
HEAP_SLACK = 0.1
HEAP_SLACK_LAYERS = 11
COMPILED_BYTES = 50_000_000  # the compiled products that `load.py` lets PyTorch and oneDNN keep
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Ledger:
    """Predicted bytes by component; `total_bytes` is their sum."""

    parts: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Sum of all parts."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        lines = [f"  {name:<48}{value / 1e6:>10.1f} MB" for name, value in self.parts.items()]
        return "\n".join([*lines, f"  {'total':<48}{self.total_bytes / 1e6:>10.1f} MB"])


def predict_memory(
    model: Qwen2ForCausalLM,
    rows: int,
    supervised_rows: int,
    compute_dtype: torch.dtype,
    quantization: str,
    double_quantization: bool,
    gradient_checkpointing: bool,
    cache_dequantized: bool = False,
    moment_bits: int = 32,
    process_bytes: int | None = None,
) -> Ledger:
    """The ledger of training with micro-batches of up to `rows` packed rows.

    Args:
        model: with its adapter, as it is before a weight is quantised; only shapes are read, on the meta device.
        rows: T of the largest micro-batch.
        supervised_rows: S of the micro-batch that has most of them.
        compute_dtype: of activations and dense weights.
        quantization: "nf4", "fp4" or "none".
        double_quantization: scales of the 4-bit blocks in 8 bits.
        gradient_checkpointing: as in training.
        cache_dequantized: the projections are kept in full beside their 4 bits.
        moment_bits: of each of AdamW's two moments.
        process_bytes: what the process took before anything was loaded; None where it cannot be measured.
    """
    config = model.config
    width = compute_dtype.itemsize
    adapter = sum(p.numel() for p in lora_parameters(model))
    projections = sum(
        module.weight.numel() for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)
    )
    dense = sum(p.numel() for p in model.parameters()) - projections - adapter
    bits = {"none": 8.0 * width}.get(quantization, 4 + 8 / 64 + 32 / (64 * 256) if double_quantization else 4 + 32 / 64)
    layer = _row_elements(config) * width + 8  # two root mean squares in float32
    if gradient_checkpointing:
        activations = rows * (config.num_hidden_layers * config.hidden_size * width + layer)
    else:
        activations = (rows * (config.num_hidden_layers - 1) + supervised_rows) * layer
    layer_gradients = rows * (2 * config.hidden_size + 3 * config.intermediate_size) * width
    kept_dense = projections * width if cache_dequantized and quantization != "none" else 0
    largest = config.intermediate_size * config.hidden_size * width
    parts = {
        f"projections ({quantization}, {bits:.2f} bits)": round(projections * bits / 8),
        f"embedding, head, norms, biases ({dtype_name(compute_dtype)})": dense * width,
        f"adapter, gradients, moments ({moment_bits} bits)": adapter * (8 + moment_bits // 4),
        f"activations of {rows} rows": activations,
        "one dense weight": largest if quantization != "none" and not kept_dense else 0,
        "one chunk of logits (float32)": 2 * min(supervised_rows, CHUNK_ROWS) * config.vocab_size * 4,
        "one layer's gradients": layer_gradients,
    }
    if kept_dense:
        parts["dense weights that are kept"] = kept_dense
    if process_bytes is not None and not torch.cuda.is_available():
        unused = HEAP_SLACK * activations + HEAP_SLACK_LAYERS * layer_gradients
        parts["unused places in the heap, compiled products"] = round(unused) + COMPILED_BYTES
        parts["Python and PyTorch themselves (measured)"] = process_bytes
    return Ledger(parts)


def _row_elements(config: Qwen2Config) -> int:
    """Numbers that one layer keeps for the backward pass of one row."""
    kv_size = config.num_key_value_heads * config.head_dim
    stream = 2 * config.hidden_size  # what the two norms read
    attention = 2 * config.hidden_size + 2 * kv_size  # q, k, v, and what o_proj reads
    return stream + attention + 2 * config.intermediate_size  # gate and up


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is PyTorch's or Python's way to say that memory ran out; on a CPU PyTorch has no type for it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error)
        for words in ("not enough memory", "can't allocate memory", "std::bad_alloc", "could not create a primitive")
    )


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory used so far: allocated on a GPU, resident for this process on a CPU; None where unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if STATUS.is_file():  # Linux, whose getrusage tells a child the peak of the process that started it
        fields = dict(line.split(":", 1) for line in STATUS.read_text("utf-8").splitlines() if ":" in line)
        return int(fields["VmHWM"].split()[0]) * 1024
    if sys.platform != "darwin":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
