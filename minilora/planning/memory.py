"""The memory estimate: bytes of a training run, predicted from its configuration.

    throughout     projections in 4 bits (4.5 with their scales, 4.13 with scales of scales), all other weights in the
                   compute dtype, A and B in float32, AdamW's two moments
    at the peak,   the forward pass ends      activations of all layers, one chunk of logits
    the largest    the backward pass begins   activations of all layers, one layer's backward pass
    of             it ends                    activations of one layer, one layer's backward pass, gradients of A and B
                   validation, test           one layer's MLP or attention, of a pass that no gradient is kept of
    around it      on a CPU Python and PyTorch, and fragmentation of the heap; on a GPU CUDA's context

Activations are linear in the T packed tokens. A layer keeps what `_token_elements` lists, 27 kB a token in a
Qwen2.5-0.5B in bfloat16, and the adapter's R of each projection; everything else is recomputed. The last layer keeps
the S supervised positions only. With DoRA a layer keeps the outputs of q, k, o and down too: those of v, gate and up
are kept already. PiSSA's A and B have a frozen half beside the trainable one. With gradient checkpointing a layer keeps
only its input, and one layer at a time is recomputed; on a GPU these inputs can be offloaded to the computer's memory.
Layers below the first adapted one keep nothing.

The backward pass of a layer peaks in its MLP, or, from some hundred tokens an example on, in its attention; PyTorch's
fused attention of long examples keeps no weights. What PyTorch's allocator hands out agrees with all this within 5 %
(tests/planning/test_memory.py), except that examples of several lengths may take a fifth less. The process' own part is
measured on Linux (benchmarks/memory_estimate.py), and not yet on a GPU.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from minilora.adapters.attach import attach, iter_lora_weights, lora_parameters
from minilora.adapters.optimizers import BITSANDBYTES_OPTIMIZERS, BLOCK_8BIT, SMALLEST_8BIT, SMALLEST_PAGED
from minilora.config import Config, LoraConfig
from minilora.evaluation.score import LABEL_SHARE, MAX_TOKENS
from minilora.qlora.attention import MAX_SCORES_BYTES
from minilora.qlora.batch import FUSED_KEYS
from minilora.qlora.loss import chunk_positions
from minilora.qlora.model import Qwen2Config, Qwen2ForCausalLM
from minilora.system.process import LARGEST_IN_HEAP
from minilora.weights.bnb_checkpoint import unquantized_projections
from minilora.weights.safetensors_io import dtype_name

ALONE = ("o_proj", "down_proj")  # projections that share their input with no other
KEPT_OUTPUTS = ("v_proj", "gate_proj", "up_proj")  # what attention and SwiGLU keep for their own backward passes
# Fragmentation of the heap on a CPU: buffers differ in size from micro-batch to micro-batch and leave holes. Fitted to
# a Qwen2.5-0.5B with glibc after ten steps of up to 256 to 2,048 tokens, where it differs by 10 % of the whole from one
# run to the next: shares of the activations and of an MLP's backward pass, and this many elements of a dense weight.
HEAP_SLACK = 0.05
HEAP_SLACK_LAYERS = 3
HEAP_SLACK_WEIGHTS = 9
COMPILED_BYTES = 120_000_000  # the compiled products that `tuned_process` lets PyTorch and oneDNN keep, their libraries
COMPILER_BYTES = 80_000_000  # PyTorch's compiler, which the optimizers of bitsandbytes import
# On a GPU: the context was 426 MiB on an RTX 6000 Ada with PyTorch 2.10 (unsloth-zoo, pull request 1053), about 400 MB
# by pytorch issue 109888; cuBLAS adds 8 to 32 MiB. The allocator's fragmentation is not counted.
CONTEXT_BYTES = 500_000_000


@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted bytes by component."""

    parts: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Sum of all parts."""
        return sum(self.parts.values())

    @property
    def weight_bytes(self) -> int:
        """Only the frozen weights."""
        return sum(value for name, value in self.parts.items() if name.startswith(("projections", "embedding")))

    def __str__(self) -> str:
        lines = [f"  {name:<48}{value / 1e6:>10.1f} MB" for name, value in self.parts.items() if value]
        return "\n".join([*lines, f"  {'total':<48}{self.total_bytes / 1e6:>10.1f} MB"])


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model with its adapter."""

    config: Qwen2Config
    projections: int  # weights of the frozen linear layers
    unquantized: int  # those of them that stay unquantised in a 4-bit checkpoint
    dense: int  # embedding, head, norms and biases
    trainable: tuple[int, ...]  # of each trainable tensor
    lora_a: int  # of all A, as they are multiplied with: with PiSSA's frozen halves
    lora_b: int  # of all B, likewise
    stacked_a: int  # of those A that one input is multiplied with together
    lora_ranks: int  # R, summed over all adapted layers, likewise
    frozen_a: int  # of PiSSA's frozen halves of A
    frozen_b: int  # of its frozen halves of B
    dora_outputs: int  # outputs a token of DoRA layers that nothing else keeps
    dora_in_mlp: bool  # gate or up has DoRA
    trained_layers: int  # from the first adapted one on; those below keep nothing for a backward pass


@dataclass(frozen=True)
class BatchShape:
    """What memory depends on in the micro-batches of a run."""

    tokens: int  # T of the largest
    supervised_positions: int  # S of the one that has most of them
    longest: int  # tokens of the longest example that the model reads, with the prefix
    scored_tokens: int = 0  # T of the largest pass of a validation before `scoring_tokens` caps it; 0 leaves it out
    label_tokens: int = 0  # of the label words behind each example of such a pass, uncapped too
    padding: float = 1.0  # queries * keys of the largest's largest attention group, which is padded, over T * longest


@dataclass(frozen=True)
class Machine:
    """Where a run takes place."""

    device_type: str  # "cpu" or "cuda"
    compute_dtype: torch.dtype  # of activations and unquantised weights
    process_bytes: int | None = None  # before anything is loaded; None omits it, and the heap's fragmentation


def count_parameters(architecture: Qwen2Config, lora_config: LoraConfig, folder: Path | None = None) -> ParameterCounts:
    """Counts without memory for the weights; a 4-bit checkpoint in `folder` may hold some projections unquantised."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(architecture)
        attach(model, lora_config)
    unquantized = [] if folder is None else unquantized_projections(folder)
    adapted = dict(iter_lora_weights(model))
    matrices = [w.factors() for w in adapted.values()]
    with_dora = {path: len(m) for path, w in adapted.items() if (m := w.lora_magnitude_vector) is not None}
    trainable = tuple(parameter.numel() for parameter in lora_parameters(model))
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
        unquantized=sum(weights[name] for name in unquantized),
        dense=sum(parameter.numel() for parameter in model.parameters()) - projections - sum(trainable),
        trainable=trainable,
        lora_a=sum(a.numel() for a, _ in matrices),
        lora_b=sum(b.numel() for _, b in matrices),
        stacked_a=sum(w.factors()[0].numel() for path, w in adapted.items() if not path.endswith(ALONE)),
        lora_ranks=sum(len(a) for a, _ in matrices),
        frozen_a=sum(w.initial_A.numel() for w in adapted.values() if w.initial_A is not None),
        frozen_b=sum(w.initial_B.numel() for w in adapted.values() if w.initial_B is not None),
        dora_outputs=sum(size for path, size in with_dora.items() if not path.endswith(KEPT_OUTPUTS)),
        dora_in_mlp=any(path.endswith(("gate_proj", "up_proj")) for path in with_dora),
        trained_layers=model.config.num_hidden_layers - first,
    )


def moments_bytes(optim: str, sizes: Sequence[int], device_type: str) -> int:
    """Bytes of both moments for trained tensors of these sizes; not counted is what a GPU may page out."""
    bits, is_paged = BITSANDBYTES_OPTIMIZERS.get(optim, (32, False))
    if is_paged and device_type == "cuda":
        sizes = [size for size in sizes if size < SMALLEST_PAGED]
    in_8_bits = sum(size for size in sizes if bits == 8 and size >= SMALLEST_8BIT)
    return 8 * (sum(sizes) - in_8_bits) + in_8_bits * (2 * BLOCK_8BIT + 8) // BLOCK_8BIT


def scoring_tokens(config: Config) -> int:
    """Most tokens of a scoring pass: a run's validations and a later evaluation have the same passes, on any machine.

    Without a gradient a token takes some 3 F + 5 C elements at most, in training at least the 5 F + 6 C of one layer's
    activations and backward pass: with half as many again scoring fits wherever training does.
    """
    limit = config.train.token_limit
    return MAX_TOKENS if limit is None else min(MAX_TOKENS, limit * 3 // 2)


def estimate_memory(config: Config, counts: ParameterCounts, shape: BatchShape, machine: Machine) -> MemoryEstimate:
    """What training takes with micro-batches of up to that shape."""
    width = machine.compute_dtype.itemsize
    model = counts.config
    all_layers, one_layer = _activation_bytes(config, counts, shape, machine)
    dequantizes = config.model.quantization != "none" and not config.model.cache_dequantized
    dense_weight = model.intermediate_size * model.hidden_size * width if dequantizes else 0
    in_mlp = _mlp_backward(counts, shape) * width
    backward = dense_weight + max(in_mlp, _attention_backward(model, shape, width) * width)
    positions = min(shape.supervised_positions, chunk_positions(model.vocab_size, machine.device_type))
    logits = 2 * positions * model.vocab_size * 4
    gradients = (sum(counts.trainable) + counts.frozen_a) * 4  # A's is a view of one with both halves
    moments_of_a_step = (
        {"activations": all_layers, "logits": logits},
        {"activations": all_layers, "backward": backward},
        {"activations": one_layer, "backward": backward, "gradients": gradients},
        {"scoring": dense_weight + _scoring_pass(config, model, shape, width) * width},
        {"scoring": _label_logits(config, model, shape, machine)},
    )
    peak = max(moments_of_a_step, key=lambda moment: sum(moment.values()))
    in_step = {
        f"activations of {shape.tokens} tokens": peak.get("activations", 0),
        "one chunk of logits (float32)": peak.get("logits", 0),
        "one layer's backward pass": peak.get("backward", 0),
        "gradients of the adapter": peak.get("gradients", 0),
        "a scoring pass": peak.get("scoring", 0),
    }
    slack = round(HEAP_SLACK * all_layers) + HEAP_SLACK_LAYERS * in_mlp
    slack += HEAP_SLACK_WEIGHTS * width * min(dense_weight, LARGEST_IN_HEAP)
    return MemoryEstimate(
        _lasting_parts(config, counts, machine) | in_step | _process_parts(config.train.optim, machine, slack)
    )


def _lasting_parts(config: Config, counts: ParameterCounts, machine: Machine) -> dict[str, int]:
    """Weights, adapter and moments."""
    width, quantization = machine.compute_dtype.itemsize, config.model.quantization
    unquantized = counts.unquantized if quantization != "none" else 0
    in_4bit = counts.projections - unquantized
    if quantization == "none":
        bits = 8.0 * width
    else:  # with a weight's share of the scales
        bits = 4 + 8 / 64 + 32 / (64 * 256) if config.model.double_quantization else 4 + 32 / 64
    parts = {
        f"projections ({quantization}, {bits:.2f} bits)": round(in_4bit * bits / 8),
        f"embedding, head, norms, biases ({dtype_name(machine.compute_dtype)})": counts.dense * width,
        "adapter (float32)": (sum(counts.trainable) + counts.frozen_a + counts.frozen_b) * 4,
        "AdamW's moments": moments_bytes(config.train.optim, counts.trainable, machine.device_type),
    }
    if unquantized:
        parts["projections unquantised in the checkpoint"] = unquantized * width
    if quantization != "none" and config.model.cache_dequantized:
        parts["dequantised projections (cache_dequantized)"] = in_4bit * width
    return parts


def _process_parts(optim: str, machine: Machine, slack: int) -> dict[str, int]:
    """What the process takes beside tensors; `slack` is the heap's fragmentation."""
    if machine.device_type == "cuda":
        return {"CUDA's context, cuBLAS (about)": CONTEXT_BYTES}
    if machine.process_bytes is None:
        return {}
    parts = {"heap fragmentation, compiled products": slack + COMPILED_BYTES}
    if optim in BITSANDBYTES_OPTIMIZERS:
        parts["PyTorch's compiler, which bitsandbytes imports"] = COMPILER_BYTES
    return parts | {"Python and PyTorch themselves (measured)": machine.process_bytes}


def _activation_bytes(config: Config, counts: ParameterCounts, shape: BatchShape, machine: Machine) -> tuple[int, int]:
    """Bytes kept for the backward pass when it begins, and when it reaches its last layer."""
    width, layers = machine.compute_dtype.itemsize, counts.trained_layers
    of_adapter = (counts.lora_ranks + counts.dora_outputs) // layers
    of_model = _token_elements(counts.config) + _repeated_elements(counts.config, shape, machine)
    token = (of_model + of_adapter) * width + 8  # and two root mean squares in float32
    if width < 4:  # A and B in the compute dtype, once for a step, and A again where several are stacked
        cast, copies = (counts.lora_a + counts.lora_b) * width, counts.stacked_a * width
    else:  # only what is stacked, and PiSSA's factors with both halves
        cast, copies = 0, counts.lora_a * width + 2 * counts.frozen_b * width
    one_layer = shape.tokens * token + copies // layers + cast
    if not config.train.gradient_checkpointing:
        return (shape.tokens * (layers - 1) + shape.supervised_positions) * token + copies + cast, one_layer
    inputs = shape.tokens * counts.config.hidden_size * width
    offloads = config.train.offload_checkpoints and machine.device_type == "cuda"
    return inputs * (1 if offloads else layers) + one_layer, inputs + one_layer


def _token_elements(model: Qwen2Config) -> int:
    """Elements that one layer keeps for the backward pass of one token: 4 C + 2 K D + 2 F."""
    norms = 2 * model.hidden_size  # what the two of them read
    attention = 2 * model.hidden_size + 2 * model.num_key_value_heads * model.head_dim  # q, k, v, what o_proj reads
    return norms + attention + 2 * model.intermediate_size  # gate and up


def _mlp_backward(counts: ParameterCounts, shape: BatchShape) -> int:
    """Elements that the backward pass of a layer's MLP takes."""
    model = counts.config
    return shape.tokens * (2 * model.hidden_size + (4 if counts.dora_in_mlp else 3) * model.intermediate_size)


def _scored_tokens(config: Config, shape: BatchShape) -> tuple[int, int]:
    """T of the largest scoring pass, and how many of its tokens are label words behind each example."""
    limit = scoring_tokens(config)
    of_words = min(shape.label_tokens, limit // LABEL_SHARE)
    return min(shape.scored_tokens, max(limit, shape.longest + of_words)), of_words


def _scoring_pass(config: Config, model: Qwen2Config, shape: BatchShape, width: int) -> int:
    """Elements of a layer in a scoring pass: gate, up and what SwiGLU makes of them, or attention with its scores."""
    tokens, of_words = _scored_tokens(config, shape)
    of_text = 0 if shape.longest >= FUSED_KEYS else shape.longest**2  # fused attention has no scores
    length = shape.longest + of_words
    scores = max(of_text, of_words * length) * tokens // length * model.num_attention_heads
    scores = min(scores, MAX_SCORES_BYTES // width)
    in_mlp, in_attention = 3 * model.intermediate_size + 5 * model.hidden_size, 6 * model.hidden_size
    return max(tokens * in_mlp, tokens * in_attention + 2 * scores)


def _label_logits(config: Config, model: Qwen2Config, shape: BatchShape, machine: Machine) -> int:
    """Bytes of float32 logits behind the tokens of label words, a piece of the vocabulary's, and of their softmax."""
    tokens, of_words = _scored_tokens(config, shape)
    positions = tokens * of_words // (shape.longest + of_words)
    return 8 * positions * min(model.vocab_size, chunk_positions(positions + model.hidden_size, machine.device_type))


# ---- Attention: all that the estimate says of it, except what `_token_elements` keeps

ATTENTION_COPIES = 3  # attention weights, their gradient, and that of the scores


def _repeated_elements(model: Qwen2Config, shape: BatchShape, machine: Machine) -> int:
    """Elements a token and layer by which a GPU's fused attention keeps keys and values once for each query head.

    Only flash attention takes them as they are: in bfloat16 from sm80 on, and PyTorch for Windows is compiled without
    it (pytorch issue 108175). In float16 the GPU is taken for one before sm80, where "auto" is that.
    """
    takes_groups = machine.compute_dtype == torch.bfloat16 and sys.platform != "win32"
    if machine.device_type != "cuda" or shape.longest < FUSED_KEYS or takes_groups:
        return 0
    return 2 * (model.num_attention_heads - model.num_key_value_heads) * model.head_dim


def _attention_backward(model: Qwen2Config, shape: BatchShape, width: int) -> int:
    """Elements that the backward pass of a layer's attention takes, less gate and up, which are freed by then."""
    is_fused = shape.longest >= FUSED_KEYS  # then only shorter examples that are packed with it have scores
    tokens, keys = (shape.tokens - shape.longest, FUSED_KEYS) if is_fused else (shape.tokens, shape.longest)
    scores = round(tokens * keys * (1 if is_fused else shape.padding))
    scores = min(scores * model.num_attention_heads, MAX_SCORES_BYTES // width)
    return ATTENTION_COPIES * scores - shape.tokens * (2 * model.intermediate_size - 3 * model.hidden_size)
