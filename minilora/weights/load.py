"""config.json and safetensors in, a model out: tensor by tensor, quantised on arrival, strict both ways.

The model is built on PyTorch's meta device, where a tensor is a shape without memory. Then one tensor at a time is read
into a buffer of its own, checked, converted and put in its place. The buffer is freed and the heap trimmed, so the peak
is the finished model plus a few copies of its largest projection: 0.74 GB for Qwen2.5-0.5B in NF4, of which Python and
PyTorch are 0.24.

The file's tensors and the model's parameters must correspond, with two exceptions. A tied model may carry
`lm_head.weight`, which must have the embedding's shape and is not used; `rotary_emb.inv_freq` of old files is a
constant. Weights that are in 4 bits already (`bnb_checkpoint.py`) are taken as they are.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from minilora.errors import UserError
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.nf4 import Linear4bit, QuantizedTensor, quantize
from minilora.system.files import read_json
from minilora.system.memory import trim_heap
from minilora.weights.bnb_checkpoint import QuantizedEntry, split_entries
from minilora.weights.flash_probe import has_flash
from minilora.weights.hf_config import read_config
from minilora.weights.safetensors_io import (
    TensorEntry,
    find_mismatches,
    read_checkpoint_entries,
    read_tensor,
    show_problems,
)
from minilora.weights.stacked_scales import stack_scales

PROJECTION = "_proj.weight"  # how the name of a weight ends that can be in 4 bits
LARGE_BYTES = 1 << 20  # of a tensor after whose conversion the heap is worth trimming


@dataclass(frozen=True)
class LoadSettings:
    """How a checkpoint becomes a model."""

    compute_dtype: torch.dtype  # of activations and of all weights that are not in 4 bits
    quantization: str = "nf4"  # of projections; or "fp4", "none"
    double_quantization: bool = True  # scales of the 4-bit blocks in 8 bits
    device: torch.device | str = "cpu"  # of the model; quantises too, and 4-bit values may differ between devices


def load_model(
    folder: Path,
    compute_dtype: torch.dtype,
    quantization: str = "nf4",
    double_quantization: bool = True,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> Qwen2ForCausalLM:
    """The frozen base model in `folder`, its projections in 4 bits; the arguments are those of `LoadSettings`.

    Embedding, norms, biases and head stay in the compute dtype: they are 0.3 % of the work, and rounding the
    embedding to 4 bits costs more accuracy than all projections together. `on_progress` is called with (tensors done,
    tensors in all).

    Raises:
        UserError: missing, unexpected or misshapen tensors, all of them in one message; NaN or infinite values.
    """
    with torch.device("meta"):
        model = Qwen2ForCausalLM(read_config(folder))
    settings = LoadSettings(compute_dtype, quantization, double_quantization, device)
    _fill(model, open_weights(model, folder, settings), on_progress)
    return model.eval()


@dataclass(frozen=True)
class BaseWeights:
    """A checkpoint's tensors by name, checked against a model."""

    entries: Mapping[str, TensorEntry]  # the unquantised ones
    quantized: Mapping[str, QuantizedEntry]  # those in 4 bits
    settings: LoadSettings  # `quantization` is "none" where the checkpoint is in 4 bits already

    def read(self, name: str) -> torch.Tensor:
        """A tensor as its file has it, one in 4 bits dequantised as in the model. UserError for NaN or inf."""
        entry = self.quantized[name].parts["packed"] if name in self.quantized else self.entries[name]
        if entry.num_bytes >= LARGE_BYTES:
            trim_heap()  # copies of the tensor before
        if name in self.quantized:
            return self.quantized[name].read().to(self.settings.device).dequantize(self.settings.compute_dtype)
        tensor = read_tensor(entry)
        if not is_finite(tensor):
            raise UserError(
                f"{entry.path}: {name} holds NaN or infinite values; download it again or choose another model"
            )
        return tensor

    def dense(self, name: str) -> torch.Tensor:
        """`read`, on the model's device in the compute dtype."""
        return self.read(name).to(self.settings.device, self.settings.compute_dtype)

    def in_4bit(self, name: str) -> QuantizedTensor | None:
        """A weight as the model has it in 4 bits, None for one that is unquantised there, as the head is."""
        if not name.endswith(PROJECTION):
            return None
        if name in self.quantized:
            trim_heap()
            return self.quantized[name].read().to(self.settings.device)
        if self.settings.quantization == "none":
            return None
        # From the compute dtype, as transformers does, so that the 4-bit weights are the same.
        return quantize(self.dense(name), self.settings.quantization, self.settings.double_quantization)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: one pass, where `isfinite` and a sum in float32 would make a copy."""
    smallest, largest = tensor.aminmax()  # NaN if any value is
    return math.isfinite(smallest) and math.isfinite(largest)


def open_weights(model: Qwen2ForCausalLM, folder: Path, settings: LoadSettings) -> BaseWeights:
    """The tensors in `folder`, of which none is read yet. UserError with all that do not correspond to `model`."""
    _refuse_other_formats(folder)
    entries, quantized = split_entries(read_checkpoint_entries(folder))
    _check_quantization(quantized, settings, folder)
    _check_entries(model, entries, quantized, folder)
    if quantized:  # projections that such a checkpoint holds unquantised stay so
        settings = replace(settings, quantization="none")
    return BaseWeights(entries, quantized, settings)


def _fill(model: Qwen2ForCausalLM, weights: BaseWeights, on_progress: Callable[[int, int], None] | None) -> None:
    names = [name for name, _ in model.named_parameters()]
    for done, name in enumerate(names, start=1):
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        quantized = weights.in_4bit(name)
        if quantized is not None:
            bias = weights.dense(f"{path}.bias") if f"{path}.bias" in weights.entries else None
            parent_path, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent_path), attribute, Linear4bit(quantized, bias))
        elif not isinstance(module, Linear4bit):  # a Linear4bit took its bias along
            setattr(module, attribute, nn.Parameter(weights.dense(name), requires_grad=False))
        if on_progress is not None:
            on_progress(done, len(names))
    for layer in model.model.layers:
        stack_scales(layer)
    head = model.head_weight
    if has_flash(head.device, head.dtype, model.config.head_dim):
        model.model.flash_attention = head.device, head.dtype
    trim_heap()


def _refuse_other_formats(folder: Path) -> None:
    """Raises UserError for weights in a compressed form that is not bitsandbytes' 4 bits."""
    content = read_json(folder / "config.json")
    found = content.get("quantization_config") or content.get("quantization")
    if not found:
        return
    method = found.get("quant_method", "MLX") if isinstance(found, dict) else found
    if method != "bitsandbytes" or not isinstance(found, dict) or found.get("load_in_8bit"):
        in_8bit = " in 8 bits" if method == "bitsandbytes" else ""
        raise UserError(
            f"{folder}: its weights are quantised by {method}{in_8bit}, only bitsandbytes in 4 bits is read; "
            "use the original checkpoint"
        )


def _check_quantization(quantized: Mapping[str, QuantizedEntry], settings: LoadSettings, folder: Path) -> None:
    """Raises UserError where a checkpoint that is in 4 bits already is to be loaded in another form."""
    kinds = {(entry.quant_type, entry.offset is not None) for entry in quantized.values()}
    if not kinds - {(settings.quantization, settings.double_quantization)}:
        return
    if len(kinds) > 1:
        raise UserError(f"{folder}: its weights are quantised in several ways; use the original checkpoint")
    ((name, is_double),) = kinds
    raise UserError(
        f"{folder}: is quantised already; set model.quantization={name} "
        f"model.double_quantization={str(is_double).lower()}, or use the original checkpoint"
    )


def _check_entries(
    model: Qwen2ForCausalLM,
    entries: Mapping[str, TensorEntry],
    quantized: Mapping[str, QuantizedEntry],
    folder: Path,
) -> None:
    """Raises UserError unless the tensors and the model's parameters correspond."""
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    if model.config.tie_word_embeddings and "lm_head.weight" in entries:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    problems = []
    for name, entry in quantized.items():
        if name not in expected or not (name.endswith(PROJECTION) or name == "lm_head.weight"):
            problems.append(f"{name}: is in 4 bits, which only projections and the head of an untied model can be")
        elif entry.shape != expected[name]:
            problems.append(f"{name}: file has {tuple(entry.shape)} in 4 bits, expected {tuple(expected[name])}")
    problems += find_mismatches(
        {name: shape for name, shape in expected.items() if name not in quantized},
        {name: entry for name, entry in entries.items() if not name.endswith("rotary_emb.inv_freq")},
    )
    if problems:
        raise UserError(
            f"{folder}: weights and config.json are from different models or incomplete; "
            f"download both again{show_problems(problems)}"
        )
