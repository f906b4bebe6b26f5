"""The stage "kernels" of `gpu_check.py`: each operation on the device against float64 on the CPU.

Outputs and gradients are compared. What is right comes from a plain definition in float64 (`ops.*_reference`,
`F.cross_entropy`, a dense product) under autograd, from the very inputs that the device is given, already rounded to
its dtype. So an error is what the operation adds, and the limits can be the dtype's own. Values are as real models have
them: hidden states of 10^4, positions up to 30,000, and keys whose largest channel is 145, which is where scores that
are rounded before the softmax go wrong.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_stage import (
    KEY_BIAS,
    NOT_ON_CPU,
    QUERY_BIAS,
    Findings,
    Options,
    chat_example,
    fill_adapter,
    largest,
    random_model,
    relative_error,
    review_examples,
    review_lengths,
)
from torch.nn import functional as F

from minilora.config import LoraConfig
from minilora.qlora import ops
from minilora.qlora.attention import attention, attention_reference, split_heads
from minilora.qlora.batch import MicroBatch, common_prefix, pack
from minilora.qlora.lora import LoRALinear, linear_layers
from minilora.qlora.loss import next_token_nll
from minilora.qlora.nf4 import BLOCK_SIZE, LEVELS, QuantizedTensor, quantize
from minilora.qlora.prompt import Example
from minilora.weights.flash_probe import has_flash

# Relative error, the norm of the difference over the norm: of an output and of each gradient. bfloat16 has 8 bits, so
# one rounding is 0.17 % in the mean, and attention's gradients pass several: up to 0.9 % was seen on a CPU. float16 has
# 11 bits, an eighth of that, and float32 24, less what a sum of some thousand products loses: 1e-6 was seen.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.005}
# Levels and scales are multiplied in float32 and rounded once, by half a step.
DEQUANTIZE_LIMITS = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11 + 1e-6}
NEAREST_CODES = 0.999  # share; a weight that is nearly halfway between two levels may be rounded to the other one
HALFWAY = 1e-6  # of the block's scale: what float32 can tell apart
SCALE_LIMIT = 0.02  # of the 8-bit scales, in the norm: 256 levels, dense around 0
ANGLE_LIMIT = (
    0.005  # absolute, of a cosine: an angle of 30,000 has steps of 0.002 in float32, and its rate is rounded too
)
LONGEST_POSITION = 30_000

EPS = 1e-6
HEADS, KV_HEADS, HEAD_DIM = 14, 2, 64  # Qwen2.5-0.5B
Function = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Operation:
    """One operation and its definition.

    Attributes:
        name: in the table.
        inputs: float32 tensors on the CPU, what gradients are taken of.
        run: of inputs and constants on the device, in one dtype.
        reference: the same of float64 tensors on the CPU.
        constants: float32 tensors on the CPU that no gradient is taken of.
    """

    name: str
    inputs: Sequence[torch.Tensor]
    run: Function
    reference: Function
    constants: Sequence[torch.Tensor] = ()


def check_kernels(options: Options, findings: Findings) -> None:
    """The whole stage."""
    with findings.attempt("4 bits"):
        for quant_type in LEVELS:
            check_quantization(options, findings, quant_type)
    with findings.attempt("rotary table"):
        check_rotary_table(options, findings)
    for operation in [*elementwise_operations(), *attention_operations(options), loss_operation(options)]:
        with findings.attempt(operation.name):
            check_operation(operation, options.device, findings)
    for use_dora in (False, True):
        with findings.attempt("LoRA linear layers"):
            check_linear_layers(options, findings, use_dora)
    measure_attention(options, findings)


# ---- One operation


def check_operation(operation: Operation, device: str, findings: Findings) -> None:
    """Output and gradients in all dtypes; the largest error of each is compared with the limit."""
    detail = {_name(dtype): operation_errors(operation, dtype, device) for dtype in LIMITS}
    report_errors(operation.name, detail, LIMITS, findings)


def report_errors(
    name: str, detail: dict[str, dict[str, float]], limits: dict[torch.dtype, float], findings: Findings
) -> None:
    """A check from the errors of each dtype by what they are of: all below the limit of their dtype."""
    worst = {dtype: largest(errors.values()) for dtype, errors in detail.items()}
    passed = all(worst[_name(dtype)] < limit for dtype, limit in limits.items())
    findings.check(name, passed, detail, **worst)


def operation_errors(operation: Operation, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Relative errors of the output, y, and of the gradient of each input, d0, d1..."""
    rounded, constants = ([t.to(dtype) for t in tensors] for tensors in (operation.inputs, operation.constants))
    exact = [tensor.double().requires_grad_() for tensor in rounded]
    y_exact = operation.reference(*exact, *(tensor.double() for tensor in constants))
    dy = torch.randn(y_exact.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y_exact.backward(dy.double())
    given = [tensor.to(device, copy=True).requires_grad_() for tensor in rounded]
    y = operation.run(*given, *(tensor.to(device) for tensor in constants))
    y.backward(dy.to(y))
    errors = {"y": relative_error(y, y_exact)}
    for index, (found, right) in enumerate(zip(given, exact, strict=True)):
        assert found.grad is not None
        assert right.grad is not None
        errors[f"d{index}"] = relative_error(found.grad, right.grad)
    return errors


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- 4 bits


def check_quantization(options: Options, findings: Findings, quant_type: str) -> None:
    """The device's codes and scales beside those computed in float64, and what it makes of them."""
    nearest, scale_errors = 1.0, [0.0]
    errors: dict[str, list[float]] = {}
    for shape in ((896, 896), (96, 128), (40, 96)):  # the last with blocks that cross the ends of rows
        weight = _normal(*shape).mul_(0.02).bfloat16()
        quantized = quantize(weight.to(options.device), quant_type).to("cpu")
        found = unpack_codes(quantized)
        distances, scales = level_distances(weight, quant_type)
        excess = distances.gather(1, found[:, None])[:, 0] - distances.amin(dim=1)
        nearest = min(nearest, (excess < HALFWAY).double().mean().item())
        scale_errors.append(relative_error(quantized.scales(), scales))
        exact = torch.tensor(LEVELS[quant_type], dtype=torch.float64)[found]
        exact = exact * quantized.scales().double().repeat_interleave(BLOCK_SIZE)[: exact.numel()]
        for dtype in DEQUANTIZE_LIMITS:
            dense = quantized.to(options.device).dequantize(dtype)
            error = (dense.cpu().double().flatten() - exact).abs() / exact.abs().clamp(min=1e-12)
            errors.setdefault(_name(dtype), []).append(error.max().item())
    passed = nearest > NEAREST_CODES and largest(scale_errors) < SCALE_LIMIT
    findings.check(f"quantise, {quant_type}", passed, nearest_codes=nearest, scales=largest(scale_errors))
    by_dtype = {dtype: {"largest": largest(found)} for dtype, found in errors.items()}
    report_errors(f"dequantise, {quant_type}", by_dtype, DEQUANTIZE_LIMITS, findings)


def level_distances(weight: torch.Tensor, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """By the definition in float64: (out * in, 16) how far each level is from each weight, and each block's scale."""
    flat = weight.double().flatten()
    blocks = F.pad(flat, (0, -flat.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    scales = blocks.abs().amax(dim=1)
    levels = torch.tensor(LEVELS[quant_type], dtype=torch.float64)
    scaled = (blocks / scales[:, None]).flatten()[: flat.numel()]
    return (scaled[:, None] - levels).abs(), scales


def unpack_codes(quantized: QuantizedTensor) -> torch.Tensor:
    """(out * in,) codes, the first of a byte in its high half."""
    packed = quantized.packed.view(-1).long()
    return torch.stack((packed >> 4, packed & 15), dim=1).flatten()[: quantized.shape.numel()]


# ---- Elementwise operations


def check_rotary_table(options: Options, findings: Findings) -> None:
    """Vectors at all positions, turned by the table, against angles in float64."""
    positions = torch.arange(LONGEST_POSITION)
    x = _normal(LONGEST_POSITION, 1, HEAD_DIM)
    exponent = torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM
    angle = positions.double()[:, None, None] / 1e6**exponent
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    exact = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    tables = ops.rotary_table(positions.to(options.device), HEAD_DIM, 1e6, torch.float32)
    error = relative_error(ops.rotary(x.to(options.device), *tables), exact)
    findings.check("rotary angles, 30,000 positions", error < ANGLE_LIMIT, float32=error)


def elementwise_operations() -> list[Operation]:
    """RMSNorm on hidden states of 10^4, SwiGLU, rotary embedding at far positions."""
    tokens, size = 300, 896
    hidden = _normal(tokens, size)
    hidden[:, 7] *= 1e4  # a few channels of real hidden states are this large
    weight = 1 + 0.1 * _normal(size, seed=1)
    positions = torch.randint(LONGEST_POSITION, (tokens,), generator=torch.Generator().manual_seed(3))
    return [
        Operation(
            "RMSNorm, hidden states of 1e4",
            (hidden, weight),
            run=lambda x, w: ops.rms_norm(x, w, EPS),
            reference=lambda x, w: ops.rms_norm_reference(x, w, EPS),
        ),
        Operation(
            "SwiGLU", (3 * _normal(tokens, size), _normal(tokens, size, seed=4)), ops.swiglu, ops.swiglu_reference
        ),
        Operation(
            "rotary embedding, positions to 30,000",
            (_normal(tokens, HEADS, HEAD_DIM),),
            run=ops.rotary,
            reference=ops.rotary_reference,
            constants=ops.rotary_table(positions, HEAD_DIM, 1e6, torch.float32),
        ),
    ]


# ---- Attention


def attention_operations(options: Options) -> list[Operation]:
    """Short and long segments, and supervised positions only; each with plain and with large keys."""
    reviews = review_examples(review_lengths(8), vocab_size=500)
    behind_prefix = review_examples((860, 900, 940), vocab_size=500)
    long = [chat_example(900 if options.small else 3000, vocab_size=500)]
    operations = []
    for name, examples, heads, only_supervised in (
        ("several groups", reviews, HEADS, False),
        ("supervised positions only", reviews, HEADS, True),
        ("long segments behind a prefix", behind_prefix, 2 * KV_HEADS, False),
        ("one long segment", long, 2 * KV_HEADS, False),
        ("half of a long segment", long, 2 * KV_HEADS, True),
    ):
        for large_keys in (False, True):
            operations.append(_attention(name, examples, heads, only_supervised, large_keys=large_keys))
            if options.is_gpu and not only_supervised:  # what it does without flash attention
                in_groups = f"{name}, in groups"
                operations.append(_attention(in_groups, examples, heads, large_keys=large_keys, may_flash=False))
    return operations


def _attention(
    name: str,
    examples: Sequence[Example],
    heads: int,
    only_supervised: bool = False,
    *,
    large_keys: bool,
    may_flash: bool = True,
) -> Operation:
    batch = pack(examples)
    count = common_prefix(examples) + sum(len(e.input_ids) - 1 - common_prefix(examples) for e in examples)
    mask = dense_mask(examples, len(batch.input_ids))
    chosen = batch.supervised_positions if only_supervised else torch.arange(len(batch.input_ids))
    real = len(chosen) if only_supervised else count  # what is behind is padding, and belongs to nobody
    q = _normal(len(chosen), heads, HEAD_DIM)
    k, v = (_normal(len(mask), KV_HEADS, HEAD_DIM, seed=seed) for seed in (1, 2))
    if large_keys:
        q[..., HEAD_DIM // 2 - 1] += QUERY_BIAS
        k[..., HEAD_DIM // 2 - 1] += KEY_BIAS

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, attention_groups(batch, q, k, only_supervised, may_flash=may_flash))[:real]

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention_reference(q, k, v, mask[chosen])[:real]

    keys = f"keys of {KEY_BIAS:.0f}" if large_keys else "plain keys"
    return Operation(f"attention, {name}, {keys}", (q, k, v), run, reference)


def attention_groups(
    batch: MicroBatch, q: torch.Tensor, k: torch.Tensor, only_supervised: bool = False, *, may_flash: bool = True
) -> Any:
    """What attention is told of a micro-batch, as the model makes it once for all layers, or for the last one."""
    groups = batch.last_groups if only_supervised else batch.groups
    flash = may_flash and not only_supervised and has_flash(q.device, q.dtype, q.shape[-1])
    return split_heads(groups, q.shape[1], k.shape[1], num_queries=len(q), like=q, flash=flash)


def dense_mask(examples: Sequence[Example], tokens: int) -> torch.Tensor:
    """(T, T) bool, True = masked, from the examples themselves: causal within a segment and its prefix."""
    prefix = common_prefix(examples)
    lengths = [len(example.input_ids) - 1 - prefix for example in examples]
    lengths.append(tokens - prefix - sum(lengths))  # padding, as a segment of its own
    segment = torch.cat(
        (torch.full((prefix,), -1), torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)))
    )
    seen = (segment[:, None] == segment) | (segment == -1)
    return ~seen.tril()


def measure_attention(options: Options, findings: Findings) -> None:
    """Time and memory of attention, forward and backward: reviews in one call and in groups, chats beside PyTorch's."""
    if not options.is_gpu:
        findings.skip("attention in one call and in groups, and beside PyTorch's", NOT_ON_CPU)
        return
    batch = pack(review_examples(review_lengths(8), vocab_size=500))
    qkv = _inputs(len(batch.input_ids), options)
    ways = {"as the model computes it": has_flash(qkv[0].device, options.dtype, HEAD_DIM), "in padded groups": False}
    for name, flash in ways.items():
        name = f"attention of eight reviews, {name}"
        with findings.attempt(name):
            given = {"num_queries": len(batch.input_ids), "like": qkv[0], "flash": flash}
            ours = partial(attention, groups=split_heads(batch.groups, HEADS, KV_HEADS, **given))
            findings.figure(name, **_cost_of_attention(ours, qkv))
    for tokens in (512, 4096) if options.small else (512, 4096, 16_384):
        qkv = _inputs(tokens, options)
        groups = attention_groups(pack([chat_example(tokens, vocab_size=500)]), qkv[0], qkv[1])
        ours = partial(attention, groups=groups)
        for name, way in (("minilora's", ours), ("PyTorch's, in any order of sums", _attention_by_pytorch)):
            name = f"attention of {tokens:,} tokens, {name}"
            with findings.attempt(name):
                try:
                    findings.figure(name, **_cost_of_attention(way, qkv))
                except torch.OutOfMemoryError:  # before sm80 PyTorch's has T x T scores
                    findings.skip(name, "it takes more memory than there is")


def _inputs(tokens: int, options: Options) -> list[torch.Tensor]:
    shapes = ((tokens, HEADS, HEAD_DIM), (tokens, KV_HEADS, HEAD_DIM), (tokens, KV_HEADS, HEAD_DIM))
    return [torch.randn(s, device=options.device, dtype=options.dtype, requires_grad=True) for s in shapes]


def _attention_by_pytorch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def _cost_of_attention(way: Function, qkv: Sequence[torch.Tensor]) -> dict[str, float]:
    dy = torch.randn_like(qkv[0])
    repeats = 5
    for repeat in range(repeats + 1):
        if repeat == 1:  # the first warms up
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, started = torch.cuda.memory_allocated(), time.perf_counter()
        torch.autograd.grad(way(*qkv), qkv, dy)
    torch.cuda.synchronize()
    ms = 1e3 * (time.perf_counter() - started) / repeats
    return {"ms": ms, "peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6}


# ---- Loss and linear layers


def loss_operation(options: Options) -> Operation:
    """The mean loss of more positions than one chunk has."""
    positions, size, vocab = 100, 896, 2_000 if options.small else 20_000
    targets = torch.randint(vocab, (positions,), generator=torch.Generator().manual_seed(5))
    return Operation(
        "loss",
        (_normal(positions, size),),
        run=lambda hidden, head: next_token_nll(hidden, targets.to(hidden.device), head)[0] / positions,
        reference=lambda hidden, head: F.cross_entropy(hidden @ head.T, targets),
        constants=(_normal(vocab, size, seed=6) * 0.17,),  # logits up to 20, as a trained model's
    )


def check_linear_layers(options: Options, findings: Findings, use_dora: bool) -> None:
    """q, k and v together, as the model calls them, against the definition with dense float64 weights."""
    lora = LoraConfig(r=8, alpha=16, dropout=0, use_dora=use_dora)
    detail = {}
    for dtype in LIMITS:
        model, _ = random_model(options.sizes("0.5B", layers=1), options.device, dtype, lora)
        fill_adapter(model)
        attention = model.model.layers[0].self_attn
        detail[_name(dtype)] = linear_errors([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
    name = "DoRA" if use_dora else "LoRA"
    report_errors(f"{name} linear layers, q, k and v", detail, LIMITS, findings)


def linear_errors(layers: Sequence[LoRALinear], dtype: torch.dtype) -> dict[str, float]:
    """Relative errors of y, dx and the gradients of all trained parameters, the largest of the layers."""
    device = layers[0].base.device
    x = _normal(200, layers[0].base.in_features).to(dtype)
    given = x.to(device, copy=True).requires_grad_()
    x_exact = x.double().requires_grad_()
    errors: dict[str, list[float]] = {}
    ys = linear_layers(given, layers)
    dys = [_normal(*y.shape, seed=7).to(dtype) for y in ys]
    torch.autograd.backward(ys, [dy.to(device) for dy in dys])
    for layer, y, dy in zip(layers, ys, dys, strict=True):
        w = layer.weights
        assert w is not None
        exact = {name: p.detach().cpu().double().requires_grad_() for name, p in w.named_parameters()}
        y_exact = _linear_reference(layer, x_exact, exact)
        y_exact.backward(dy.double())
        errors.setdefault("y", []).append(relative_error(y, y_exact))
        for name, parameter in w.named_parameters():
            errors.setdefault(f"d{name}", []).append(relative_error(parameter.grad, exact[name].grad))
    errors["dx"] = [relative_error(given.grad, x_exact.grad)]
    return {name: largest(found) for name, found in errors.items()}


def _linear_reference(layer: LoRALinear, x: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    """x (W + s B A)^T + b, with DoRA its outputs times m / |W + s B A|, which is constant in the gradient."""
    assert layer.weights is not None
    weight = layer.base.weight.dequantize(torch.float32).cpu().double()
    weight = weight + layer.weights.scaling * w["lora_B"] @ w["lora_A"]
    y = x @ weight.T
    if (magnitude := w.get("lora_magnitude_vector")) is not None:
        y = y * (magnitude / weight.norm(dim=1).detach())
    return y + layer.base.bias.cpu().double()
