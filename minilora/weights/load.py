"""config.json and safetensors in, a model out: tensor by tensor, quantised on arrival, strict both ways.

The model is built on PyTorch's meta device, where a tensor is a shape without memory. Then one tensor at a
time is read into a buffer of its own, checked, converted, put in its place, and the buffer is forgotten: the
peak is the finished model plus its largest tensor. (The C library keeps what it was given back, unless it is told
to take large buffers from the system one by one: without that the peak was seen to double.)

Every tensor of the file must have a place in the model and every place must be filled. The exceptions are
stated by the format: a tied model may carry `lm_head.weight`, which must then equal the embedding's shape and
is not used; `rotary_emb.inv_freq` of old files is a constant. What is in 4 bits already (`bnb_checkpoint.py`) is taken
as it is.
"""

import ctypes
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from minilora.errors import UserError
from minilora.qlora.model import Qwen2Config, Qwen2ForCausalLM
from minilora.qlora.nf4 import Linear4bit, QuantizedTensor, quantize
from minilora.system.files import read_json
from minilora.weights.bnb_checkpoint import QuantizedEntry, split_entries
from minilora.weights.safetensors_io import TensorEntry, read_checkpoint_entries, read_tensor

PROJECTION = "_proj.weight"  # how the name of a weight ends that can be in 4 bits
LARGEST_IN_HEAP = 32 << 20  # bytes; in training, glibc gives a larger buffer back as soon as it is freed


def read_config(folder: Path) -> Qwen2Config:
    """Architecture of the checkpoint in `folder`."""
    return Qwen2Config.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))


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
        compute_dtype: dtype of activations and of all weights that are not quantised.
        quantization: "nf4", "fp4" or "none".
        double_quantization: store the 4-bit blocks' scales in 8 bits.
        device: where the model lives.
        on_progress: called with (tensors done, tensors in all).

    Raises:
        UserError: missing, unexpected or misshapen tensors, all of them in one message.
    """
    _bound_compiled_products()
    with torch.device("meta"):
        model = Qwen2ForCausalLM(read_config(folder))
    weights = open_weights(model, folder, compute_dtype, quantization, double_quantization, device)
    with freed_memory_returned():
        _fill(model, weights, on_progress)
    return model.eval()


@dataclass(frozen=True)
class BaseWeights:
    """A checkpoint's tensors, each with its place in the model, and the form in which they get there.

    Attributes:
        entries: what the files hold in full, by name.
        quantized: what they hold in 4 bits, by name.
        compute_dtype: of all that is not in 4 bits.
        quantization: of projections in full: "nf4", "fp4" or "none".
        double_quantization: scales of the 4-bit blocks in 8 bits.
        device: where the model lives, and where it is quantised: devices may differ in the bits.
    """

    entries: Mapping[str, TensorEntry]
    quantized: Mapping[str, QuantizedEntry]
    compute_dtype: torch.dtype
    quantization: str
    double_quantization: bool
    device: torch.device | str

    def read(self, name: str) -> torch.Tensor:
        """A tensor as its file has it; of one in 4 bits, what the model computes with.

        Raises:
            UserError: it holds NaN or infinite values.
        """
        if name in self.quantized:
            return self.quantized[name].read().to(self.device).dequantize(self.compute_dtype)
        entry = self.entries[name]
        tensor = read_tensor(entry)
        if not is_finite(tensor):
            raise UserError(
                f"{entry.path}: {name} holds NaN or infinite values; download it again or choose another model"
            )
        return tensor

    def dense(self, name: str) -> torch.Tensor:
        """`read`, as the model has it."""
        return self.read(name).to(self.device, self.compute_dtype)

    def in_4bit(self, name: str) -> QuantizedTensor | None:
        """A weight as the model has it in 4 bits, None for what it has in full, as it has the head."""
        if not name.endswith(PROJECTION):
            return None
        if name in self.quantized:
            return self.quantized[name].read().to(self.device)
        if self.quantization == "none":
            return None
        # From the compute dtype, as transformers does, so that the 4-bit weights are the same.
        return quantize(self.dense(name), self.quantization, self.double_quantization)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are numbers: one pass, where `isfinite` and a sum in float32 would make a copy."""
    smallest, largest = tensor.aminmax()  # NaN if any value is
    return math.isfinite(smallest) and math.isfinite(largest)


def open_weights(
    model: Qwen2ForCausalLM,
    folder: Path,
    compute_dtype: torch.dtype,
    quantization: str,
    double_quantization: bool,
    device: torch.device | str,
) -> BaseWeights:
    """The tensors in `folder`, checked against `model` before any of them is read; arguments as for `load_model`.

    Raises:
        UserError: missing, unexpected or misshapen tensors, all of them in one message.
    """
    _refuse_other_formats(folder)
    entries, quantized = split_entries(read_checkpoint_entries(folder))
    _check_quantization(quantized, quantization, double_quantization, folder)
    _check_entries(model, entries, quantized, folder)
    if quantized:  # what such a checkpoint holds in full stays in full
        quantization = "none"
    return BaseWeights(entries, quantized, compute_dtype, quantization, double_quantization, device)


def _fill(model: Qwen2ForCausalLM, weights: BaseWeights, on_progress: Callable[[int, int], None] | None) -> None:
    """Puts every tensor in its place."""
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


def _bound_compiled_products() -> None:
    """Lets PyTorch and oneDNN remember 64 compiled matrix products each, not 1,024, unless the user says otherwise.

    Every shape of a product is compiled once and kept, 0.4 MB each; a micro-batch needs some fifty, the next one, with
    another number of rows, fifty others. Left alone they take 20 MB more with each new size, and scattered through the
    heap they keep freed activations from being used again: 0.5 GB after a dozen sizes. Compiling them again costs 1 %.
    Both read these variables when they first multiply, so this has to come before.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Makes glibc give large freed buffers back to the system at once; does nothing on other systems.

    By itself it keeps freed buffers of up to 32 MB, and small tensors that settle between them keep them from being
    returned. Afterwards that is what it does again, because training needs the same buffers in every layer, and a page
    that comes from the system costs as much as the numbers on it. One arena for all threads, so that any of them
    fills the places that another has freed.
    """
    mmap_threshold, trim_threshold, arena_max = -3, -1, -8  # malloc.h
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):  # macOS, Windows, musl
        yield
        return
    set_option(arena_max, 1)
    set_option(mmap_threshold, 1 << 20)
    try:
        yield
    finally:
        set_option(mmap_threshold, LARGEST_IN_HEAP)
        set_option(trim_threshold, 64 << 20)


def _replace(model: Qwen2ForCausalLM, path: str, quantized: QuantizedTensor, weights: BaseWeights) -> None:
    """Puts a `Linear4bit` where the meta `nn.Linear` at `path` stood, with its bias."""
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


def _check_quantization(
    quantized: dict[str, QuantizedEntry], quantization: str, double_quantization: bool, folder: Path
) -> None:
    """Raises UserError where a checkpoint that is in 4 bits already is asked for in another form."""
    kinds = {(entry.quant_type, entry.offset is not None) for entry in quantized.values()}
    if not kinds - {(quantization, double_quantization)}:
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
    """Every tensor has a place, every place a tensor of its shape; drops those that the format lets be spare."""
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
