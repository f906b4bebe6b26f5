"""Each operation in bfloat16 and float16 on a real model's activations, against float64, beside transformers and peft.

A float32 pass forward and backward over real reviews is recorded at the first, a middle and the last layer. Inputs and
upstream gradients are rounded to the dtype; float64 on the same rounded values is the judge. A figure is the norm of a
difference over the norm of the exact result, the worst of the layers. Needs what test_real.py needs and 5 GB.

    python -m pytest tests/parity/test_numerics.py -s        # a line of a Markdown table for each test
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.qwen2 import modeling_qwen2

from minilora.adapters.attach import attach, iter_lora_weights
from minilora.config import LoraConfig
from minilora.qlora import ops
from minilora.qlora.attention import attention, attention_reference, split_heads
from minilora.qlora.batch import MicroBatch, common_prefix, pack
from minilora.qlora.lora import Recompute, linear_layers
from minilora.qlora.loss import next_token_nll
from minilora.qlora.model import Qwen2ForCausalLM, RMSNorm
from minilora.qlora.nf4 import Linear4bit, quantize
from minilora.qlora.prompt import Example
from minilora.weights.load import load_model
from tests.parity.test_real import MODEL, pytestmark, real_examples  # noqa: F401

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Gradients from above are scaled to it, as by a loss scale: float16 ends at 6e-8, and gradients are smaller than that.
LARGEST_GRADIENT = 16
Function = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One operation at one layer, as functions of (*inputs, *parameters, *constants).

    Attributes:
        inputs: activations, rounded to the dtype; their gradients are compared.
        dout: the gradient that comes from above, rounded too.
        exact: the formula, by autograd; computed in float64.
        ours: minilora's.
        theirs: transformers' or peft's, by name.
        parameters: trained, so they stay float32; their gradients are compared.
        constants: frozen, rounded to the dtype.
    """

    inputs: tuple[torch.Tensor, ...]
    dout: torch.Tensor
    exact: Function
    ours: Function
    theirs: dict[str, Function]
    parameters: tuple[torch.Tensor, ...] = ()
    constants: tuple[torch.Tensor, ...] = ()

    def results(self, function: Function, dtype: torch.dtype, is_exact: bool) -> list[torch.Tensor]:
        """The output and all gradients."""
        wide = (lambda x: x.double()) if is_exact else (lambda x: x)
        inputs = [wide(x.to(dtype)).requires_grad_() for x in self.inputs]
        parameters = [wide(x.clone()).requires_grad_() for x in self.parameters]
        out = function(*inputs, *parameters, *(wide(x.to(dtype)) for x in self.constants))
        scaled = self.dout * (LARGEST_GRADIENT / self.dout.abs().max())
        dout = wide(scaled.to(dtype)).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, inputs + parameters, dout)]

    def errors(self, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
        """(error of the output, worst error of a gradient) of each side."""
        exact = self.results(self.exact, dtype, True)
        found = {}
        for name, function in {"ours": self.ours, **self.theirs}.items():
            pairs = zip(self.results(function, dtype, False), exact, strict=True)
            out, *grads = [((mine.double() - right).norm() / right.norm()).item() for mine, right in pairs]
            found[name] = (out, max(grads))
        return found


@dataclass(frozen=True)
class Activations:
    """Input and output of a module, and the gradients of the loss with respect to both."""

    x: torch.Tensor
    y: torch.Tensor
    dx: torch.Tensor
    dy: torch.Tensor


@dataclass(frozen=True)
class Recording:
    """One pass over a micro-batch: the activations of all modules of some layers by path, padding left out."""

    model: Qwen2ForCausalLM
    batch: MicroBatch
    num_tokens: int
    modules: dict[str, Activations]
    layers: tuple[int, ...]

    def at(self, path: str) -> list[tuple[Activations, Any]]:
        """Activations and module at a path within each layer."""
        found = []
        for layer in self.layers:
            name = f"layers.{layer}.{path}"
            found.append((self.modules[name], self.model.model.get_submodule(name)))
        return found


def record(model: Qwen2ForCausalLM, examples: Sequence[Example], layers: tuple[int, ...]) -> Recording:
    """Runs the model over the packed examples, the loss of their supervised tokens backward."""
    batch = pack(examples)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(name: str, module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        for x in (args[0], out):
            if not x.is_leaf:
                x.retain_grad()
        seen[name] = (args[0], out)

    def detach(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].detach().requires_grad_(), *args[1:])

    hooks = [model.model.layers[0].register_forward_pre_hook(detach)]
    for name, module in model.model.named_modules():
        in_chosen_layer = name.startswith(tuple(f"layers.{layer}." for layer in layers))
        if isinstance(module, RMSNorm) or (in_chosen_layer and isinstance(module, nn.Linear)):
            hooks.append(module.register_forward_hook(partial(keep, name)))
    names = {module: name for name, module in model.model.named_modules()}
    recomputable = RMSNorm.recomputable

    def kept(norm: RMSNorm, x: torch.Tensor) -> tuple[torch.Tensor, Recompute]:  # a layer's norms, which have no hooks
        y, again = recomputable(norm, x)
        keep(names[norm], norm, (x,), y)
        return y, again

    with mock.patch.object(RMSNorm, "recomputable", kept):
        hidden = model.model(batch.input_ids, batch.position_ids, batch.groups)
    nll, count = next_token_nll(hidden[batch.supervised_positions], batch.targets, model.head_weight)
    (nll / count).backward()
    for hook in hooks:
        hook.remove()
    n = max(int(group.keys.max()) for group in batch.groups) + 1
    modules = {
        name: Activations(*(t.detach()[:n] for t in (x, y, x.grad, y.grad) if t is not None))
        for name, (x, y) in seen.items()
    }
    return Recording(model, batch, n, modules, layers)


def supervise_all(examples: Sequence[Example]) -> list[Example]:
    """The same ids, every token behind the common prefix supervised: all positions get a gradient."""
    start = common_prefix(examples) + 1
    return [Example(e.input_ids, [i >= start for i in range(len(e.input_ids))]) for e in examples]


@pytest.fixture(scope="module", autouse=True)
def _all_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recordings(_all_threads: None) -> Iterator[dict[str, Recording]]:
    """ "packed": six reviews behind a shared prefix. "long": several in one segment, as the turns of a chat."""
    model = load_model(Path(MODEL or ""), torch.float32, "none")
    last = model.config.num_hidden_layers - 1
    layers = (0, (last + 1) // 2, last)
    examples = real_examples(14)
    ids = [token for example in examples for token in example.input_ids][:640]
    long = Example(ids, [False, *[True] * (len(ids) - 1)])
    yield {
        "packed": record(model, supervise_all(examples[:6]), layers),
        "long": record(model, [long], layers),
    }
    gc.collect()


# ---- The operations


def rms_norm_cases(recordings: dict[str, Recording]) -> list[Case]:
    """All norms of the model; prints the largest hidden state."""
    recording = recordings["packed"]
    norms = {n: m for n, m in recording.model.model.named_modules() if isinstance(m, RMSNorm)}
    largest = {name: recording.modules[name].x.abs().max().item() for name in norms}
    worst = max(largest, key=lambda name: largest[name])
    print(f"\nhidden states up to {largest[worst]:.0f}, at {worst}")
    cases = []
    for name, norm in norms.items():
        module, seen = modeling_qwen2.Qwen2RMSNorm(norm.weight.numel(), norm.eps), recording.modules[name]

        def theirs(x: torch.Tensor, weight: torch.Tensor, module: nn.Module = module) -> torch.Tensor:
            return torch.func.functional_call(module, {"weight": weight}, x)

        cases.append(
            Case(
                (seen.x,),
                seen.dy,
                exact=partial(ops.rms_norm_reference, eps=norm.eps),
                ours=partial(ops.rms_norm, eps=norm.eps),
                theirs={"transformers": theirs},
                constants=(norm.weight.detach(),),
            )
        )
    return cases


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(len(x), -1, 64)


def rotary_cases(recordings: dict[str, Recording]) -> list[Case]:
    """q and k side by side, at positions from 30,000 on."""
    recording = recordings["packed"]
    config = transformers.AutoConfig.from_pretrained(MODEL)
    embedding = modeling_qwen2.Qwen2RotaryEmbedding(config)
    positions = recording.batch.position_ids[: recording.num_tokens] + 30_000
    theta = recording.model.config.rope_theta

    def exact(x: torch.Tensor) -> torch.Tensor:
        exponent = torch.arange(0, 64, 2, dtype=torch.float64) / 64
        angle = (positions.double()[:, None] * theta**-exponent)[:, None]
        cos, sin = angle.cos(), angle.sin()
        return ops.rotary_reference(x, torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))

    def ours(x: torch.Tensor) -> torch.Tensor:
        return ops.rotary(x, *ops.rotary_table(positions, 64, theta, x.dtype))

    def theirs(x: torch.Tensor) -> torch.Tensor:
        turned = x.transpose(0, 1)[None]
        cos, sin = embedding(turned, positions[None])
        return modeling_qwen2.apply_rotary_pos_emb(turned, turned, cos, sin)[0][0].transpose(0, 1)

    pairs = zip(recording.at("self_attn.q_proj"), recording.at("self_attn.k_proj"), strict=True)
    return [
        Case(
            (torch.cat((heads(q.y), heads(k.y)), 1),),
            torch.cat((heads(q.dy), heads(k.dy)), 1),  # a turned gradient, of the right size
            exact,
            ours,
            {"transformers": theirs},
        )
        for (q, _), (k, _) in pairs
    ]


def attention_mask(batch: MicroBatch, n: int, prefix: int) -> torch.Tensor:
    """(n, n), True = masked: a token sees the prefix and its own segment up to itself."""
    segment = (batch.position_ids[:n] == prefix).cumsum(0)
    seen = (segment[:, None] == segment) | (segment == 0)
    return ~(seen & torch.ones(n, n, dtype=torch.bool).tril())


def attention_cases(recordings: dict[str, Recording], name: str) -> list[Case]:
    recording = recordings[name]
    batch, n = recording.batch, recording.num_tokens
    mask = attention_mask(batch, n, batch.groups[-1].prefix)
    config = transformers.AutoConfig.from_pretrained(MODEL)
    with torch.device("meta"):
        module = modeling_qwen2.Qwen2Attention(config, 0)
    cos, sin = ops.rotary_table(batch.position_ids[:n], 64, recording.model.config.rope_theta, torch.float32)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        groups = split_heads(batch.groups, q.shape[1], k.shape[1], num_queries=n, like=q)
        return attention(q, k, v, groups)

    def theirs(way: Callable[..., Any], *qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in qkv)
        additive = torch.zeros(1, 1, n, n, dtype=q.dtype).masked_fill_(mask, torch.finfo(q.dtype).min)
        if way is sdpa_attention_forward and name == "long":
            additive = None  # as transformers calls it where nothing but causality masks
        return way(module, q, k, v, additive, scaling=module.scaling)[0][0]

    ways = {"eager": modeling_qwen2.eager_attention_forward, "sdpa": sdpa_attention_forward}
    cases = []
    paths = [recording.at(f"self_attn.{p}_proj") for p in "qkvo"]
    for (q, _), (k, _), (v, _), (o, _) in zip(*paths, strict=True):
        turned = [ops.rotary(heads(x.y), cos, sin) for x in (q, k)]
        cases.append(
            Case(
                (*turned, heads(v.y)),
                heads(o.dx),
                exact=partial(attention_reference, mask=mask),
                ours=ours,
                theirs={key: partial(theirs, way) for key, way in ways.items()},
            )
        )
    return cases


def swiglu_cases(recordings: dict[str, Recording]) -> list[Case]:
    paths = [recordings["packed"].at(f"mlp.{p}_proj") for p in ("gate", "up", "down")]
    act = transformers.activations.ACT2FN["silu"]
    return [
        Case(
            (gate.y, up.y),
            down.dx,
            exact=ops.swiglu_reference,
            ours=ops.swiglu,
            theirs={"transformers": lambda g, u: act(g) * u},
        )
        for (gate, _), (up, _), (down, _) in zip(*paths, strict=True)
    ]


def loss_cases(recordings: dict[str, Recording], answers: bool) -> list[Case]:
    """Sum of 16 positions: within reviews, or those of the answers, 12; more would take float16 long on a CPU."""
    recording = recordings["packed"]
    batch, hidden = recording.batch, recording.modules["norm"].y
    ends = torch.tensor(
        [i + 1 == len(batch.targets) or e != batch.example_indices[i + 1] for i, e in enumerate(batch.example_indices)]
    )
    is_answer = ends | ends.roll(-1)  # the label and <|im_end|>
    chosen = (is_answer if answers else ~is_answer).nonzero().flatten()
    chosen = chosen[torch.linspace(0, len(chosen) - 1, min(16, len(chosen))).long()]
    targets = batch.targets[chosen]
    vocab_size = recording.model.config.vocab_size

    def exact(x: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x @ head.T, targets, reduction="sum")

    def theirs(x: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return ForCausalLMLoss(x @ head.T, None, vocab_size, torch.tensor(1), shift_labels=targets)

    return [
        Case(
            (hidden[batch.supervised_positions[chosen]],),
            torch.tensor(1.0),
            exact,
            ours=lambda x, head: next_token_nll(x, targets, head)[0],
            theirs={"transformers": theirs},
            constants=(recording.model.head_weight.detach(),),
        )
    ]


class Wrapped(nn.Module):
    """A linear layer that `attach` and peft find, called as the model calls it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.proj = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear_layers(x, (self.proj,))[0]  # type: ignore[list-item]


def lora_cases(recordings: dict[str, Recording], dtype: torch.dtype, use_dora: bool) -> list[Case]:
    """LoRA of rank 8 over NF4, B as large as training leaves it, on projections without and with a large bias."""
    cases = []
    for path in ("self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"):
        for seen, layer in recordings["packed"].at(path):
            weight, bias = quantize(layer.weight), layer.bias
            dense = weight.dequantize(torch.float32)
            model = Wrapped(Linear4bit(weight, None if bias is None else bias.to(dtype)))
            attach(model, LoraConfig(r=8, alpha=16, dropout=0, target_modules=["proj"], use_dora=use_dora))
            ((_, w),) = iter_lora_weights(model)
            generator = torch.Generator().manual_seed(0)
            a, b = w.lora_A.detach(), 0.01 * torch.randn(w.lora_B.shape, generator=generator)
            m = () if w.lora_magnitude_vector is None else (w.lora_magnitude_vector.detach(),)
            m = tuple(x * (1 + 0.01 * torch.randn(x.shape, generator=generator)) for x in m)
            constants = (dense,) if bias is None else (dense, bias.detach())
            cases.append(
                Case(
                    (seen.x[::4],),  # a CPU's float16 is slow
                    seen.dy[::4],
                    exact=partial(exact_lora, has_bias=bias is not None),
                    ours=partial(call, model.train(), len(m)),
                    theirs={"peft": partial(call_peft, use_dora)},
                    parameters=(a, b, *m),
                    constants=constants,
                )
            )
    return cases


def exact_lora(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *rest: torch.Tensor, has_bias: bool) -> torch.Tensor:
    """The definition; `rest`: DoRA's magnitude, if any, the dense weight, its bias, if any."""
    *m, weight = rest[:-1] if has_bias else rest
    y = x @ weight.T + 2 * (x @ a.T) @ b.T
    if m:
        y = y * (m[0] / (weight + 2 * b @ a).norm(dim=1).detach())
    return y + rest[-1] if has_bias else y


def call(model: nn.Module, magnitudes: int, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
    """Ours, over the NF4 weight; the dense one that comes along is the same."""
    names = ("lora_A", "lora_B", "lora_magnitude_vector")[: 2 + magnitudes]
    state = {f"proj.adapters.default.{name}": tensor for name, tensor in zip(names, tensors, strict=False)}
    return torch.func.functional_call(model, state, x)


def call_peft(use_dora: bool, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
    """peft's LoRA layer over a dense layer that holds the dequantised weight."""
    magnitudes = 1 if use_dora else 0
    parameters, (weight, *bias) = tensors[: 2 + magnitudes], tensors[2 + magnitudes :]
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(bias), dtype=x.dtype)
    base.weight.data.copy_(weight)
    if bias:
        base.bias.data.copy_(bias[0])
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["proj"], use_dora=use_dora)
    model = peft.get_peft_model(nn.ModuleDict({"proj": base}), config).train()  # A, B and the magnitude in float32
    layer = model.base_model.model["proj"]
    names = ("lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight")
    return torch.func.functional_call(layer, dict(zip(names, parameters, strict=False)), x)


# ---- The table

OPERATIONS: dict[str, Callable[..., list[Case]]] = {
    "RMSNorm": rms_norm_cases,
    "rotary, positions from 30,000": rotary_cases,
    "attention, short segments and a shared prefix": partial(attention_cases, name="packed"),
    "attention, one long segment": partial(attention_cases, name="long"),
    "SwiGLU": swiglu_cases,
    "loss, words of reviews": partial(loss_cases, answers=False),
    "loss, answers": partial(loss_cases, answers=True),
    "LoRA over NF4": partial(lora_cases, use_dora=False),
    "DoRA over NF4": partial(lora_cases, use_dora=True),
}


# Worst allowed error of an output or a gradient. bfloat16 keeps 8 bits, float16 11: an eighth.
BOUNDS = {"bfloat16": 0.02, "float16": 0.003}
WIDER_BOUNDS = {
    # dk of the last layer, 2.2 % and 0.29 %: dS = A (dA - rowsum(A dA)) is a small difference of rounded products.
    ("attention, short segments and a shared prefix", "bfloat16"): 0.03,
    ("attention, short segments and a shared prefix", "float16"): 0.004,
    # The difference of two logits near 25, where bfloat16's steps are 0.125; transformers rounds them too.
    ("loss, answers", "bfloat16"): 0.03,
}
# Ours may be so many times as far off as the better of theirs. PyTorch's fused attention keeps scores and weights in
# float32; ours rounds both, and k - c once more. So attention's output is compared with eager attention alone.
RATIO = 1.5


@pytest.mark.parametrize("dtype_name", HALVES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_is_as_exact_as_its_dtype_and_as_transformers(
    recordings: dict[str, Recording], operation: str, dtype_name: str
) -> None:
    dtype, build = HALVES[dtype_name], OPERATIONS[operation]
    cases = build(recordings, dtype) if "NF4" in operation else build(recordings)
    by_case = [case.errors(dtype) for case in cases]
    worst = {name: [max(found[name][i] for found in by_case) for i in (0, 1)] for name in by_case[0]}
    ours = worst.pop("ours")
    theirs = "; ".join(f"{name} {out:.2%}, {gradient:.2%}" for name, (out, gradient) in worst.items())
    print(f"\n| {operation} | {dtype_name} | {ours[0]:.2%}, {ours[1]:.2%} | {theirs} |")
    assert max(ours) < WIDER_BOUNDS.get((operation, dtype_name), BOUNDS[dtype_name])
    rounding = torch.finfo(dtype).eps / 4  # below it a ratio means nothing
    outputs = [out for name, (out, _) in worst.items() if name != "sdpa"]
    assert ours[0] <= max(RATIO * min(outputs), rounding)
    assert ours[1] <= max(RATIO * min(gradient for _, gradient in worst.values()), rounding)
