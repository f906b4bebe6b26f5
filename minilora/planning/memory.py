"""The memory ledger: bytes predicted from a configuration, and bytes measured.

    always there   projections in 4 bits (4.5 with their scales, 4.13 with scales of scales), all else dense, A and B in
                   float32, AdamW's two moments
    fullest when   the forward pass ends      activations of all layers, one chunk of logits
    one of these   the backward pass begins   activations of all layers, one layer's backward pass
    is reached     it ends                    activations of one layer, one layer's backward pass, gradients of A and B
    around it      on a CPU Python and PyTorch, and what the C library cannot use again; on a GPU CUDA's context

Activations are linear in the packed rows T. A layer keeps the two sums that its norms read, q, k, v and what
attention makes of them, gate and up: 4 C + 2 K D + 2 F numbers a row, 27 kB in a Qwen2.5-0.5B in bfloat16, and the
adapter's R of each projection. All else is made again from these (`lora.Again`). The last layer keeps supervised rows
alone. With DoRA a layer keeps what q, k, o and down give too, 3 C + K D numbers: what v, gate and up give is there
already. PiSSA's A and B have a frozen half beside the trained one, and a layer keeps its B with both. With gradient
checkpointing a layer keeps only its input, and one layer at a time is computed again; on a GPU these inputs can wait in
the computer's memory.

The backward pass of a layer takes most in its MLP, 2 C + 3 F numbers a row and 2 C + 4 F with DoRA, or from some
hundred tokens an example on in its attention, whose weights are there three times. Layers below the first adapted one
keep nothing. What PyTorch's allocator hands out agrees with all this within a few percent (tests/test_memory.py). What
lies around it is measured on Linux (benchmarks/ledger.py), and on a GPU not yet.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from minilora.adapters.attach import iter_lora_weights, lora_parameters
from minilora.qlora.batch import MAX_GROUP_SCORES
from minilora.qlora.loss import CHUNK_POSITIONS
from minilora.qlora.model import Qwen2Config, Qwen2ForCausalLM
from minilora.qlora.optim import BITSANDBYTES_OPTIMIZERS, BLOCK_8BIT, SMALLEST_8BIT, SMALLEST_PAGED
from minilora.system.process import LARGEST_IN_HEAP
from minilora.weights.safetensors_io import dtype_name

KEPT_OUTPUTS = ("v_proj", "gate_proj", "up_proj")  # what attention and SwiGLU keep for their own backward passes
ATTENTION_COPIES = 3  # weights, their gradient, and that of the scores: `ops._Attention.backward`
# Around the tensors, on a CPU: buffers come and go, differ in size from micro-batch to micro-batch, and leave holes.
# Fitted to a Qwen2.5-0.5B with glibc after ten steps of up to 256 to 2,048 rows, where it differs by 10 % of the whole
# from one run to the next: shares of the activations and of what a layer's backward pass takes in its MLP, and so many
# dense weights for each byte of a number's width.
HEAP_SLACK = 0.05
HEAP_SLACK_LAYERS = 3
HEAP_SLACK_WEIGHTS = 9
COMPILED_BYTES = 120_000_000  # the compiled products that `load.py` lets PyTorch and oneDNN keep, and their libraries
COMPILER_BYTES = 80_000_000  # PyTorch's compiler, which the optimizers of bitsandbytes import
# On a GPU: the context was 426 MiB on an RTX 6000 Ada with PyTorch 2.10 (unsloth-zoo, pull request 1053), about 400 MB
# by pytorch issue 109888; cuBLAS adds 8 to 32 MiB. Nothing for what the allocator holds and cannot use again.
CONTEXT_BYTES = 500_000_000


@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted bytes by component; `total_bytes` is their sum."""

    parts: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Sum of all parts."""
        return sum(self.parts.values())

    @property
    def weight_bytes(self) -> int:
        """The frozen weights alone."""
        return sum(value for name, value in self.parts.items() if name.startswith(("projections", "embedding")))

    def __str__(self) -> str:
        lines = [f"  {name:<48}{value / 1e6:>10.1f} MB" for name, value in self.parts.items() if value]
        return "\n".join([*lines, f"  {'total':<48}{self.total_bytes / 1e6:>10.1f} MB"])


@dataclass(frozen=True)
class ParameterCounts:
    """How many numbers a model with its adapter holds: what the ledger needs to know of it.

    Attributes:
        config: the model's sizes.
        projections: weights of the frozen linear layers.
        in_full: those of them that stay in full whatever the quantisation.
        dense: embedding, head, norms and biases.
        trained: of each tensor that is trained.
        lora_a: of all A, as they are multiplied with: with PiSSA's frozen halves.
        ranks: R, summed over all adapted layers, likewise.
        frozen_a: of PiSSA's halves of A that are not trained.
        frozen_b: of its halves of B.
        dora_outputs: a row, of layers with DoRA whose outputs nothing else keeps.
        dora_in_mlp: gate or up has DoRA.
        trained_layers: decoder layers from the first adapted one on; those below keep nothing for a backward pass.
    """

    config: Qwen2Config
    projections: int
    in_full: int
    dense: int
    trained: tuple[int, ...]
    lora_a: int
    ranks: int
    frozen_a: int
    frozen_b: int
    dora_outputs: int
    dora_in_mlp: bool
    trained_layers: int


def count_parameters(model: Qwen2ForCausalLM, in_full: Collection[str] = ()) -> ParameterCounts:
    """Counts a model's numbers.

    Args:
        model: with its adapter, as it is before a weight is quantised; only shapes are read, on the meta device.
        in_full: names of projections that a 4-bit checkpoint holds in full, as the file has them.
    """
    adapted = dict(iter_lora_weights(model))
    matrices = [w.factors() for w in adapted.values()]
    with_dora = {path: len(m) for path, w in adapted.items() if (m := w.lora_magnitude_vector) is not None}
    trained = tuple(parameter.numel() for parameter in lora_parameters(model))
    weights = {
        f"{path.removesuffix('.base')}.weight": module.weight.numel()
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    }
    projections = sum(weights.values())
    first = min((int(path.split(".")[2]) for path in adapted), default=0)  # model.layers.N...
    return ParameterCounts(
        config=model.config,
        projections=projections,
        in_full=sum(weights[name] for name in in_full),
        dense=sum(parameter.numel() for parameter in model.parameters()) - projections - sum(trained),
        trained=trained,
        lora_a=sum(a.numel() for a, _ in matrices),
        ranks=sum(len(a) for a, _ in matrices),
        frozen_a=sum(w.initial_A.numel() for w in adapted.values() if w.initial_A is not None),
        frozen_b=sum(w.initial_B.numel() for w in adapted.values() if w.initial_B is not None),
        dora_outputs=sum(size for path, size in with_dora.items() if not path.endswith(KEPT_OUTPUTS)),
        dora_in_mlp=any(path.endswith(("gate_proj", "up_proj")) for path in with_dora),
        trained_layers=model.config.num_hidden_layers - first,
    )


def moments_bytes(optim: str, sizes: Sequence[int], device_type: str) -> int:
    """Bytes of both moments on the device.

    Args:
        optim: name of the optimizer.
        sizes: elements of each trained tensor.
        device_type: "cpu" or "cuda"; what a GPU may page out is not counted there.
    """
    bits, is_paged = BITSANDBYTES_OPTIMIZERS.get(optim, (32, False))
    if is_paged and device_type == "cuda":
        sizes = [size for size in sizes if size < SMALLEST_PAGED]
    in_8_bits = sum(size for size in sizes if bits == 8 and size >= SMALLEST_8BIT)
    return 8 * (sum(sizes) - in_8_bits) + in_8_bits * (2 * BLOCK_8BIT + 8) // BLOCK_8BIT


def estimate_memory(
    numbers: ParameterCounts,
    rows: int,
    supervised_positions: int,
    longest: int,
    compute_dtype: torch.dtype,
    quantization: str,
    double_quantization: bool,
    gradient_checkpointing: bool,
    moments_bytes: int,
    cache_dequantized: bool = False,
    offload_checkpoints: bool = False,
    bitsandbytes_optimizer: bool = False,
    device_type: str = "cpu",
    process_bytes: int | None = None,
) -> MemoryEstimate:
    """The ledger of training with micro-batches of up to `rows` packed rows.

    Args:
        numbers: of the model and its adapter.
        rows: T of the largest micro-batch.
        supervised_positions: S of the micro-batch that has most of them.
        longest: rows of the longest example, with the prefix.
        compute_dtype: of activations and dense weights.
        quantization: "nf4", "fp4" or "none".
        double_quantization: scales of the 4-bit blocks in 8 bits.
        gradient_checkpointing: as in training.
        moments_bytes: of the optimizer's moments (`moments_bytes`).
        cache_dequantized: the projections are kept in full beside their 4 bits.
        offload_checkpoints: on a GPU, what checkpointing keeps waits in the computer's memory.
        bitsandbytes_optimizer: the optimizer is one of bitsandbytes'.
        device_type: "cpu" or "cuda".
        process_bytes: what the process took before anything was loaded; None leaves it out, and the heap's part.
    """
    config, width = numbers.config, compute_dtype.itemsize
    is_quantized = quantization != "none"
    bits = (4 + 8 / 64 + 32 / (64 * 256) if double_quantization else 4 + 32 / 64) if is_quantized else 8.0 * width
    in_full = numbers.in_full if is_quantized else 0
    in_bits = numbers.projections - in_full
    keeps_dense = is_quantized and cache_dequantized
    parts = {
        f"projections ({quantization}, {bits:.2f} bits)": round(in_bits * bits / 8),
        f"embedding, head, norms, biases ({dtype_name(compute_dtype)})": numbers.dense * width,
        "adapter (float32)": (sum(numbers.trained) + numbers.frozen_a + numbers.frozen_b) * 4,
        "AdamW's moments": moments_bytes,
    }
    if in_full:
        parts["projections that the checkpoint holds in full"] = in_full * width
    if keeps_dense:
        parts["dense weights that are kept"] = in_bits * width

    offloads = offload_checkpoints and device_type == "cuda"
    everywhere, one_layer = _activations(numbers, rows, supervised_positions, width, gradient_checkpointing, offloads)
    dense_weight = config.intermediate_size * config.hidden_size * width if is_quantized and not keeps_dense else 0
    in_mlp = rows * (2 * config.hidden_size + (4 if numbers.dora_in_mlp else 3) * config.intermediate_size) * width
    backward = dense_weight + max(in_mlp, _attention_backward(config, rows, longest) * width)
    logits = 2 * min(supervised_positions, CHUNK_POSITIONS) * config.vocab_size * 4
    gradients = (sum(numbers.trained) + numbers.frozen_a) * 4  # A's is a view of one with both halves
    moments_of_a_step = (
        {"activations": everywhere, "logits": logits},
        {"activations": everywhere, "backward": backward},
        {"activations": one_layer, "backward": backward, "gradients": gradients},
    )
    fullest = max(moments_of_a_step, key=lambda moment: sum(moment.values()))
    parts |= {
        f"activations of {rows} rows": fullest["activations"] + longest**2,  # and the masks, a byte a pair of rows
        "one chunk of logits (float32)": fullest.get("logits", 0),
        "one layer's backward pass": fullest.get("backward", 0),
        "gradients of the adapter": fullest.get("gradients", 0),
    }
    if device_type == "cuda":
        parts["CUDA's context, cuBLAS (about)"] = CONTEXT_BYTES
    elif process_bytes is not None:
        unused = round(HEAP_SLACK * everywhere) + HEAP_SLACK_LAYERS * in_mlp
        unused += HEAP_SLACK_WEIGHTS * width * min(dense_weight, LARGEST_IN_HEAP)
        parts["unused places in the heap, compiled products"] = unused + COMPILED_BYTES
        if bitsandbytes_optimizer:
            parts["PyTorch's compiler, which bitsandbytes imports"] = COMPILER_BYTES
        parts["Python and PyTorch themselves (measured)"] = process_bytes
    return MemoryEstimate(parts)


def _activations(
    numbers: ParameterCounts,
    rows: int,
    supervised_positions: int,
    width: int,
    gradient_checkpointing: bool,
    offloads: bool,
) -> tuple[int, int]:
    """Bytes that wait for the backward pass when it begins, and when its last layer's turn has come."""
    config = numbers.config
    layers = numbers.trained_layers
    of_adapter = (numbers.ranks + numbers.dora_outputs) // layers
    row = (_row_elements(config) + of_adapter) * width + 8  # and two root mean squares in float32
    copies = numbers.lora_a * width + 2 * numbers.frozen_b * 4  # of A, and of PiSSA's B with both halves
    one_layer = rows * row + copies // layers
    if not gradient_checkpointing:
        return (rows * (layers - 1) + supervised_positions) * row + copies, one_layer
    inputs = rows * config.hidden_size * width
    return inputs * (1 if offloads else layers) + one_layer, inputs + one_layer


def _attention_backward(config: Qwen2Config, rows: int, longest: int) -> int:
    """Elements that the backward pass of a layer's attention takes, less gate and up, which are free by then."""
    scores = min(rows * longest, MAX_GROUP_SCORES) * config.num_attention_heads
    return ATTENTION_COPIES * scores - rows * (2 * config.intermediate_size - 3 * config.hidden_size)


def _row_elements(config: Qwen2Config) -> int:
    """ParameterCounts that one layer keeps for the backward pass of one row."""
    kv_size = config.num_key_value_heads * config.head_dim
    stream = 2 * config.hidden_size  # what the two norms read
    attention = 2 * config.hidden_size + 2 * kv_size  # q, k, v, and what o_proj reads
    return stream + attention + 2 * config.intermediate_size  # gate and up
