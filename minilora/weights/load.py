"""config.json and safetensors in, a model out: tensor by tensor, quantised on arrival, strict both ways.

The model is built on PyTorch's meta device, where a tensor is a shape without memory. Then one tensor at a time is read
into a buffer of its own, checked, converted and put in its place. The buffer is freed and the heap trimmed, so the peak
is the finished model plus a few copies of its largest projection: 0.74 GB for Qwen2.5-0.5B in NF4, of which Python and
PyTorch are 0.24.

Every tensor of the file must have a place in the model and every place must be filled, with two exceptions that the
format states. A tied model may carry `lm_head.weight`, which must have the embedding's shape and is not used;
`rotary_emb.inv_freq` of old files is a constant. Weights that are in 4 bits already (`bnb_checkpoint.py`) are taken as
they are.
"""

import math
from collections.abc import Callable, Iterator, Mapping
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
from minilora.weights.hf_config import read_config
from minilora.weights.safetensors_io import TensorEntry, read_checkpoint_entries, read_tensor

PROJECTION = "_proj.weight"  # how the name of a weight ends that can be in 4 bits
LARGE_BYTES = 1 << 20  # of a tensor after whose conversion the heap is worth trimming


@dataclass(frozen=True)
class LoadSettings:
    """How a checkpoint becomes a model.

    Attributes:
        compute_dtype: of activations and of all weights that are not in 4 bits.
        quantization: of projections: "nf4", "fp4" or "none".
        double_quantization: scales of the 4-bit blocks in 8 bits.
        device: where the model lives and where it is quantised: the 4-bit values may differ between devices.
    """

    compute_dtype: torch.dtype
    quantization: str = "nf4"
    double_quantization: bool = True
    device: torch.device | str = "cpu"


def load_model(
    folder: Path,
    compute_dtype: torch.dtype,
    quantization: str = "nf4",
    double_quantization: bool = True,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> Qwen2ForCausalLM:
    """The frozen base model, its projections in 4 bits unless `quantization` is "none".

    Embedding, norms, biases and head stay in the compute dtype: they are 0.3 % of the work, and rounding the
    embedding to 4 bits costs more accuracy than all projections together.

    Args:
        folder: config.json and safetensors.
        compute_dtype: see `LoadSettings`, like the next three.
        quantization: of projections.
        double_quantization: of their scales.
        device: of the model.
        on_progress: called with (tensors done, tensors in all).

    Raises:
        UserError: missing, unexpected or misshapen tensors, all of them in one message.
    """
    with torch.device("meta"):
        model = Qwen2ForCausalLM(read_config(folder))
    settings = LoadSettings(compute_dtype, quantization, double_quantization, device)
    _fill(model, open_weights(model, folder, settings), on_progress)
    return model.eval()


@dataclass(frozen=True)
class BaseWeights:
    """A checkpoint's tensors, checked against a model.

    Attributes:
        entries: the unquantised ones, by name.
        quantized: those in 4 bits, by name.
        settings: how they become the model's; `quantization` is "none" where the checkpoint is in 4 bits already.
    """

    entries: Mapping[str, TensorEntry]
    quantized: Mapping[str, QuantizedEntry]
    settings: LoadSettings

    def read(self, name: str) -> torch.Tensor:
        """A tensor as its file has it, one in 4 bits dequantised as in the model.

        Raises:
            UserError: it holds NaN or infinite values.
        """
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
    """The tensors in `folder`, checked against `model` before any of them is read.

    Raises:
        UserError: missing, unexpected or misshapen tensors, all of them in one message.
    """
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
        module_path, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_path)
        quantized = weights.in_4bit(name)
        if quantized is not None:
            _replace(model, module_path, quantized, weights)
        elif not isinstance(module, Linear4bit):  # a Linear4bit took its bias along
            setattr(module, attribute, nn.Parameter(weights.dense(name), requires_grad=False))
        if on_progress is not None:
            on_progress(done, len(names))
    trim_heap()


def _replace(model: Qwen2ForCausalLM, path: str, quantized: QuantizedTensor, weights: BaseWeights) -> None:
    """Replaces the meta `nn.Linear` at `path` by a `Linear4bit` with its bias."""
    bias = weights.dense(f"{path}.bias") if f"{path}.bias" in weights.entries else None
    parent_path, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent_path), name, Linear4bit(quantized, bias))


def _refuse_other_formats(folder: Path) -> None:
    """Raises UserError for weights in a compressed form that is not bitsandbytes' 4 bits."""
    found = read_json(folder / "config.json").get("quantization_config")
    if not found:
        return
    method = found.get("quant_method") if isinstance(found, dict) else found
    if method != "bitsandbytes" or not isinstance(found, dict) or found.get("load_in_8bit"):
        what = f"{method} in 8 bits" if method == "bitsandbytes" else repr(method)
        raise UserError(
            f"{folder}: its weights are quantised by {what}, only bitsandbytes in 4 bits is read; "
            "use the original checkpoint"
        )


def _check_quantization(quantized: dict[str, QuantizedEntry], settings: LoadSettings, folder: Path) -> None:
    """Raises UserError where a checkpoint that is in 4 bits already is to be loaded in another form."""
    kinds = {(entry.quant_type, entry.offset is not None) for entry in quantized.values()}
    if not kinds - {(settings.quantization, settings.double_quantization)}:
        return
    held, *others = sorted(kinds)
    if others:
        found = ", ".join(f"{kind}{' double' if double else ''}" for kind, double in sorted(kinds))
        raise UserError(f"{folder}: its weights are quantised in several ways ({found}); use the original checkpoint")
    raise UserError(
        f"{folder}: is quantised already, as {held[0]} {'with' if held[1] else 'without'} double quantisation; set "
        f"model.quantization={held[0]} model.double_quantization={str(held[1]).lower()}, or use the original checkpoint"
    )


def _check_entries(
    model: Qwen2ForCausalLM, entries: dict[str, TensorEntry], quantized: dict[str, QuantizedEntry], folder: Path
) -> None:
    """Raises UserError unless every tensor has a place and every place a tensor of its shape."""
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    if model.config.tie_word_embeddings and "lm_head.weight" in entries:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    can_be_quantized = {name for name in expected if name.endswith(PROJECTION) or name == "lm_head.weight"}
    problems = [
        f"{name}: file has {tuple(entry.shape)} in 4 bits, config.json asks {tuple(expected[name])}"
        if name in can_be_quantized
        else f"{name}: is in 4 bits, which only projections and the head of an untied model can be"
        for name, entry in quantized.items()
        if entry.shape != expected.get(name) or name not in can_be_quantized
    ]
    expected = {name: shape for name, shape in expected.items() if name not in quantized}
    problems += _iter_mismatches(expected, entries)
    if problems:
        shown = "\n  ".join(problems[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(
            f"{folder}: weights and config.json are from different models or incomplete; "
            f"download both again\n  {shown}{more}"
        )


def _iter_mismatches(expected: dict[str, torch.Size], entries: dict[str, TensorEntry]) -> Iterator[str]:
    for name in sorted(set(expected) - set(entries)):
        yield f"{name}: missing from the file, config.json asks {tuple(expected[name])}"
    for name in sorted(set(entries) - set(expected)):
        if not name.endswith("rotary_emb.inv_freq"):
            yield f"{name}: in the file, unknown to a Qwen2.5 model of this config.json"
    for name in sorted(set(expected) & set(entries)):
        if entries[name].shape != expected[name]:
            yield f"{name}: file has {tuple(entries[name].shape)}, config.json asks {tuple(expected[name])}"
        elif not entries[name].dtype.is_floating_point:
            yield f"{name}: file has {entries[name].dtype}, expected a floating-point type"
