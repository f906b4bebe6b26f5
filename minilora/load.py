"""config.json and safetensors in, a model out: tensor by tensor, quantised on arrival, strict both ways.

The model is built on PyTorch's meta device, where a tensor is a shape without memory. Then one tensor at a
time is read into a buffer of its own, checked, converted, put in its place, and the buffer is forgotten: the
peak is the finished model plus its largest tensor. (Mapping the file, as is usual, counts every page that
was touched as used memory until the file is closed. And the C library keeps what it was given back, unless it is
told to take large buffers from the system one by one: without that the peak was seen to double.)

Every tensor of the file must have a place in the model and every place must be filled. The exceptions are
stated by the format: a tied model may carry `lm_head.weight`, which must then equal the embedding's shape and
is not used; `rotary_emb.inv_freq` of old files is a constant.

Source: https://huggingface.co/docs/safetensors, section Format. Left out: pickled checkpoints, on purpose.
"""

import ctypes
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.errors import UserError
from minilora.model import Qwen2Config, Qwen2ForCausalLM
from minilora.nf4 import Linear4bit, QuantizedTensor, quantize

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor stands: file, first byte, length in bytes, dtype and shape."""

    path: Path
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: torch.Size


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        UserError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); write or download it again") from None


def read_config(folder: Path) -> Qwen2Config:
    """Architecture of the checkpoint in `folder`."""
    return Qwen2Config.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Names and places of the tensors of one safetensors file: 8 bytes of length, JSON, then the data.

    Raises:
        UserError: the file is cut off or is not a safetensors file.
    """
    broken = f"{path}: is not a complete safetensors file"
    again = "download or copy it again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (0,)
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise UserError(f"{broken} (header of {length} bytes in a file of {size}); {again}")
            header = json.loads(file.read(length).decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{broken} (header: {error}); {again}") from None
    if not isinstance(header, dict):
        raise UserError(f"{broken} (header: holds a {type(header).__name__}); {again}")
    entries = {}
    for name, value in header.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = map(index, value["data_offsets"])
            dtype, shape = DTYPES[value["dtype"]], torch.Size(value["shape"])
            num_bytes = shape.numel() * dtype.itemsize
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: tensor {name} has an entry that cannot be read ({error}); {again}") from None
        if not 0 <= begin <= end <= size - 8 - length or end - begin != num_bytes:
            raise UserError(
                f"{path}: tensor {name} stands at bytes {begin} to {end} of {size - 8 - length}, "
                f"its shape {tuple(shape)} takes {num_bytes}; the file is cut off, {again}"
            )
        entries[name] = TensorEntry(path, 8 + length + begin, end - begin, dtype, shape)
    return entries


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """One tensor, in memory of its own.

    Raises:
        UserError: the file ends before the tensor does.
    """
    buffer = torch.empty(entry.num_bytes, dtype=torch.uint8)
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        view = memoryview(buffer.numpy().data)
        while view:
            count = file.readinto(view)
            if not count:
                raise UserError(f"{entry.path}: ends within a tensor; download or copy it again")
            view = view[count:]
    return buffer.view(entry.dtype).view(entry.shape)


def read_checkpoint_entries(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of a checkpoint folder, one file or shards with an index.

    Raises:
        UserError: no weights, a missing shard, or an index that disagrees with the shards.
    """
    index_path = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return read_header(single)
    if not index_path.is_file():
        raise UserError(
            f"{folder}: holds neither model.safetensors nor model.safetensors.index.json; "
            "give a folder with a Hugging Face checkpoint (.bin files are not read: they can run code)"
        )
    content = read_json(index_path)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index_path}: has no weight_map with a file for each tensor; download it again")
    entries: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise UserError(f"{index_path}: names {shard!r}, which is not a file of this folder; download it again")
        entries |= read_header(folder / shard)
    differing = sorted(set(entries) ^ set(weight_map))
    if differing:
        raise UserError(
            f"{index_path}: disagrees with its shards about {', '.join(differing[:5])}; "
            "the files are from different models, download them again"
        )
    return entries


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
    config = read_config(folder)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    entries = read_checkpoint_entries(folder)
    _check_entries(model, entries, folder)
    with _freed_memory_returned():
        _fill(model, entries, compute_dtype, quantization, double_quantization, device, on_progress)
    return model.eval()


def _fill(
    model: Qwen2ForCausalLM,
    entries: dict[str, TensorEntry],
    compute_dtype: torch.dtype,
    quantization: str,
    double_quantization: bool,
    device: torch.device | str,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Puts every tensor in its place."""
    names = [name for name, _ in model.named_parameters()]
    for done, name in enumerate(names, start=1):
        weight = read_tensor(entries[name]).to(device)
        module_path, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_path)
        is_projection = isinstance(module, nn.Linear) and attribute == "weight" and name != "lm_head.weight"
        if is_projection and quantization != "none":
            # Quantised from the compute dtype, as transformers does, so that the 4-bit weights are the same.
            quantized = quantize(weight.to(compute_dtype), quantization, double_quantization)
            _replace(model, module_path, quantized, entries, compute_dtype, device)
        elif not isinstance(module, Linear4bit):  # a Linear4bit took its bias along
            setattr(module, attribute, nn.Parameter(weight.to(compute_dtype), requires_grad=False))
        if on_progress is not None:
            on_progress(done, len(names))


@contextmanager
def _freed_memory_returned() -> Iterator[None]:
    """Makes glibc give large freed buffers back to the system at once; does nothing on other systems.

    By itself it keeps freed buffers of up to 32 MB, and small tensors that settle between them keep them from being
    returned. Afterwards that is what it does again, because training needs the same buffers in every layer, and a page
    that comes from the system costs as much as the numbers on it. One arena for all threads, so that backward, which
    runs in a thread of its own, fills the places that forward has freed.
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
        set_option(mmap_threshold, 32 << 20)
        set_option(trim_threshold, 64 << 20)


def _replace(
    model: Qwen2ForCausalLM,
    path: str,
    quantized: QuantizedTensor,
    entries: dict[str, TensorEntry],
    compute_dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Puts a `Linear4bit` where the meta `nn.Linear` at `path` stood, with its bias."""
    bias_entry = entries.get(f"{path}.bias")
    bias = None if bias_entry is None else read_tensor(bias_entry).to(device, compute_dtype)
    parent_path, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent_path), name, Linear4bit(quantized, bias))


def _check_entries(model: Qwen2ForCausalLM, entries: dict[str, TensorEntry], folder: Path) -> None:
    """Every tensor has a place, every place a tensor of its shape; drops those that the format lets be spare."""
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    if model.config.tie_word_embeddings and "lm_head.weight" in entries:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    problems = list(_iter_mismatches(expected, entries))
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
