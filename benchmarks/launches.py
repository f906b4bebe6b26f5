"""Counts the operators that start a kernel, in one layer's forward and backward pass: minilora's beside peft's.

    python benchmarks/launches.py

On a fast GPU a small model waits for the processor, which needs 6 to 10 us to start a kernel, so this count decides
there and not the arithmetic. Operators are counted as PyTorch and bitsandbytes dispatch them; views and buffers without
a value start none. What a GPU with flash attention would be given is traced on a device without values
(`fake_device.py`), and needs no GPU; everything else is counted on the CPU, peft's too, where a norm's forward is nine
operators in place of one kernel. Eight reviews of 58 to 196 tokens; a layer's share is half the difference between a
model of four layers and one of two. bitsandbytes' `gemm_4bit` counts as the four operators that it is in training.
transformers and peft take part where they are installed. The last line is JSON.
"""

import gc
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from fake_device import moved_batch, on_device
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.adapters.attach import attach
from minilora.config import LoraConfig
from minilora.qlora.batch import pack
from minilora.qlora.lora import cast_once
from minilora.qlora.loss import next_token_nll
from minilora.qlora.model import Qwen2Config, Qwen2ForCausalLM
from minilora.qlora.nf4 import Linear4bit, quantize
from minilora.qlora.prompt import Example
from minilora.system.cli import build_parser, run_script
from minilora.weights.stacked_scales import stack_scales

LENGTHS = (58, 64, 71, 77, 90, 106, 136, 196)  # tokens of the reviews, of which the first 40 are the instruction
PREFIX = 40
# fmt: off
NO_KERNEL = {
    "view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "split", "split_with_sizes", "unsqueeze",
    "squeeze", "detach", "alias", "as_strided", "permute", "unbind", "reshape", "_reshape_alias", "lift_fresh", "empty",
    "new_empty", "empty_like", "empty_strided", "_local_scalar_dense", "is_same_size", "sym_size", "promote_types",
    "device",
}
# fmt: on
WEIGHTED = {"bitsandbytes.gemm_4bit.default": 4}
SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512}
HEADS: dict[str, int] = {"num_attention_heads": 4, "num_key_value_heads": 2}

Passes = tuple[Counter[str], Counter[str]]  # forward and backward


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func) if str(func).startswith("bitsandbytes") else func.overloadpacket.__name__
        if name not in NO_KERNEL:
            self.counts[name] += WEIGHTED.get(name, 1)
        return func(*args, **(kwargs or {}))


def count_passes(model: nn.Module, compute_loss: Callable[[], torch.Tensor]) -> Passes:
    """Operators by name of one forward and one backward pass, after one that is not counted."""
    for _ in range(2):
        with _Count() as forward:
            loss = compute_loss()
        with _Count() as backward:
            loss.backward()
        model.zero_grad()
    return forward.counts, backward.counts


def examples() -> list[Example]:
    """Reviews of `LENGTHS` behind one instruction, answered in two tokens; the ids do not matter."""
    ids = [[*range(PREFIX), 100 + i, *range(200, 200 + length - PREFIX)] for i, length in enumerate(LENGTHS)]
    return [Example(x, [False] * (len(x) - 2) + [True] * 2) for x in ids]


def count_minilora(layers: int, dropout: float, gradient_checkpointing: bool, is_gpu: bool = False) -> Passes:
    """NF4 with double quantisation, LoRA r 8 in all projections, bfloat16; on this CPU, or as a GPU is given it."""
    config = Qwen2Config(
        **SIZES, **HEADS, num_hidden_layers=layers, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Linear4bit(quantize(module.weight), module.bias))
    for layer in model.model.layers:
        stack_scales(layer)
    attach(model, LoraConfig(r=8, alpha=16, dropout=dropout), seed=0)
    model.train().model.gradient_checkpointing = gradient_checkpointing
    batch = pack(examples())
    with on_device(model, has_flash=True) if is_gpu else nullcontext(), cast_once(model, torch.bfloat16):
        batch = moved_batch(batch) if is_gpu else batch
        return count_passes(model, lambda: next_token_nll(model(batch), batch.targets, model.head_weight)[0])


def count_peft(layers: int, prepare: bool, gradient_checkpointing: bool) -> Passes:
    """The same of peft; `prepare` as its guide says, with norms and embedding in float32."""
    import peft
    import transformers

    config = transformers.Qwen2Config(
        **SIZES, **HEADS, num_hidden_layers=layers, tie_word_embeddings=True, max_position_embeddings=512
    )
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    load: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": "cpu", "quantization_config": quantization}
    with tempfile.TemporaryDirectory() as folder:
        transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(Path(folder), **load)
    model.config.use_cache = False
    if prepare:
        model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing, {"use_reentrant": False})
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora).train()
    longest = max(LENGTHS)
    input_ids = torch.randint(0, SIZES["vocab_size"], (len(LENGTHS), longest))
    mask = torch.tensor([[1] * length + [0] * (longest - length) for length in LENGTHS])
    labels = input_ids.masked_fill(mask == 0, -100)
    return count_passes(model, lambda: model(input_ids=input_ids, attention_mask=mask, labels=labels).loss)


def per_layer(count: Callable[[int], Passes]) -> Passes:
    """Operators by name that a layer adds."""
    (few_forward, few_backward), (forward, backward) = count(2), count(4)

    def share(more: Counter[str], few: Counter[str]) -> Counter[str]:
        return Counter({name: (more[name] - few[name]) // 2 for name in more if more[name] != few[name]})

    gc.collect()
    return share(forward, few_forward), share(backward, few_backward)


def main() -> None:
    """Prints the table, with `--verbose` by operator."""
    parser = build_parser(__doc__, "python benchmarks/launches.py --verbose")
    parser.add_argument("--verbose", action="store_true", help="each operator's count")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    ways: dict[str, Callable[[int], Passes]] = {
        "minilora": lambda layers: count_minilora(layers, 0.0, False),
        "minilora, dropout 0.05": lambda layers: count_minilora(layers, 0.05, False),
        "minilora, checkpointing": lambda layers: count_minilora(layers, 0.0, True),
        "minilora on a GPU": lambda layers: count_minilora(layers, 0.0, False, is_gpu=True),
        "minilora on a GPU, dropout 0.05": lambda layers: count_minilora(layers, 0.05, False, is_gpu=True),
        "minilora on a GPU, checkpointing": lambda layers: count_minilora(layers, 0.0, True, is_gpu=True),
    }
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError:
        print("peft is not installed: minilora only")
    else:
        ways |= {
            "peft": lambda layers: count_peft(layers, False, False),
            "peft as its guide says, checkpointing": lambda layers: count_peft(layers, True, True),
        }
    figures = {}
    print("| launches a layer | forward | backward | both |\n|---|---|---|---|")
    for name, count in ways.items():
        forward, backward = per_layer(count)
        figures[name] = {"forward": forward.total(), "backward": backward.total()}
        print(f"| {name} | {forward.total()} | {backward.total()} | {forward.total() + backward.total()} |")
        if arguments.verbose:
            print(f"    forward {dict(forward.most_common())}\n    backward {dict(backward.most_common())}")
    print(json.dumps(figures))


if __name__ == "__main__":
    run_script(main)
