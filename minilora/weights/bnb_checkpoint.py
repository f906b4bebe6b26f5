"""Checkpoints whose projections are in 4 bits already, in the layout of transformers and bitsandbytes.

    {layer}.weight                                (out * in / 2, 1) uint8, two codes a byte; or these bytes as a float
    {layer}.weight.absmax                         (blocks,) float32; with double quantisation their uint8 codes
    {layer}.weight.quant_map                      (16,) float32, the levels
    {layer}.weight.nested_absmax                  (blocks / 256 rounded up,) float32     with double quantisation
    {layer}.weight.nested_quant_map               (256,) float32                         with double quantisation
    {layer}.weight.quant_state.bitsandbytes__nf4  uint8: JSON with shape, block sizes and the mean of the scales

The `-bnb-4bit` repositories of the hub are of this kind. They load in a second, because nothing is left to quantise; a
4-bit copy written here (`model.quantized_cache`, `scripts/quantize.py`) is one too, and transformers opens it. A
projection that such a checkpoint holds unquantised stays so. A head in 4 bits is dequantised once: the loss reads all
of it for every supervised position.

Source: bitsandbytes 0.50.2, QuantState.as_dict; transformers 5.23, quantizer_bnb_4bit.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.errors import UserError
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.nf4 import ABSMAX_BLOCK_SIZE, BLOCK_SIZE, LEVELS, Linear4bit, QuantizedTensor
from minilora.system.files import WRITING, parse_json, read_json, remove, storage_errors
from minilora.system.manifest import finish_folder
from minilora.weights.hf_config import copy_config
from minilora.weights.safetensors_io import (
    TensorEntry,
    dtype_name,
    read_checkpoint_entries,
    read_tensor,
    write_tensors,
)

STATE_NAME = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
STORAGE = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)  # bnb_4bit_quant_storage; FSDP needs floats
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True)
class QuantizedEntry:
    """Where a 4-bit weight is stored, and what its JSON says of it."""

    name: str
    quant_type: str  # "nf4" or "fp4"
    shape: torch.Size  # (out, in) of the dense weight
    offset: float | None  # mean of the scales; None without double quantisation
    parts: Mapping[str, TensorEntry]  # "packed", and those of PARTS that it has

    def read(self) -> QuantizedTensor:
        """The weight, in memory of its own. UserError for other levels than its type's, or non-finite scales."""
        found = {part: read_tensor(entry) for part, entry in self.parts.items()}
        where = f"{self.parts['packed'].path}: {self.name}"
        if not torch.equal(found["quant_map"], torch.tensor(LEVELS[self.quant_type])):
            raise UserError(f"{where} has other levels than {self.quant_type}; use the original checkpoint")
        if not torch.isfinite(found["absmax" if self.offset is None else "nested_absmax"]).all():
            raise UserError(f"{where} has scales that are NaN or infinite; download it again or choose another model")
        packed = found["packed"].view(torch.uint8).view(-1, 1)
        if self.offset is None:
            return QuantizedTensor(packed, found["absmax"], self.shape, self.quant_type)
        nested = (found["nested_absmax"], found["nested_quant_map"], torch.tensor([self.offset]))
        return QuantizedTensor(packed, found["absmax"], self.shape, self.quant_type, *nested)


def is_quantized(folder: Path) -> bool:
    """Whether the checkpoint in `folder` holds a weight in 4 bits."""
    return bool(split_entries(read_checkpoint_entries(folder))[1])


def unquantized_projections(folder: Path) -> list[str]:
    """Names of the projections' weights that a checkpoint in 4 bits holds unquantised; none of another checkpoint."""
    if not read_json(folder / "config.json").get("quantization_config"):
        return []
    dense, quantized = split_entries(read_checkpoint_entries(folder))
    return [name for name in dense if name.endswith("_proj.weight")] if quantized else []


def split_entries(entries: Mapping[str, TensorEntry]) -> tuple[dict[str, TensorEntry], dict[str, QuantizedEntry]]:
    """A checkpoint's unquantised tensors and its 4-bit weights, by name. UserError for one that `nf4.py` cannot use."""
    dense, quantized = dict(entries), {}
    for state_name, state_entry in entries.items():
        match = STATE_NAME.fullmatch(state_name)
        if match is None:
            continue
        name, quant_type = match.groups()
        del dense[state_name]
        names = {"packed": name, **{part: f"{name}.{part}" for part in PARTS}}
        parts = {part: dense.pop(names[part]) for part in names if names[part] in dense}
        try:
            quantized[name] = _quantized_entry(name, quant_type, read_tensor(state_entry), parts)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{state_entry.path}: {name} is a 4-bit weight that cannot be used: {error}; use the original "
                "checkpoint"
            ) from None
    return dense, quantized


def _quantized_entry(
    name: str, quant_type: str, state_bytes: torch.Tensor, parts: dict[str, TensorEntry]
) -> QuantizedEntry:
    """The entry; ValueError unless `parts` are all that its JSON asks for, in the sizes that `nf4.py` computes with."""
    state = parse_json(bytes(state_bytes.reshape(-1).view(torch.uint8).tolist()).decode())
    if not isinstance(state, dict):
        raise ValueError(f"its quant_state holds a {type(state).__name__}")
    shape, offset = state.get("shape"), state.get("nested_offset")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        raise ValueError(f"shape is {shape!r}, expected [out, in]")
    blocks = -(-shape[0] * shape[1] // BLOCK_SIZE)
    storage = parts["packed"].dtype if "packed" in parts and parts["packed"].dtype in STORAGE else torch.uint8
    sizes: dict[str, Any] = {"blocksize": BLOCK_SIZE, "quant_type": quant_type}
    expected = {
        "packed": ((-(-shape[0] * shape[1] // (2 * storage.itemsize)), 1), storage),
        "absmax": ((blocks,), torch.float32 if offset is None else torch.uint8),
        "quant_map": ((16,), torch.float32),
    }
    problems = []
    if offset is not None:
        sizes["nested_blocksize"] = ABSMAX_BLOCK_SIZE
        expected["nested_absmax"] = ((-(-blocks // ABSMAX_BLOCK_SIZE),), torch.float32)
        expected["nested_quant_map"] = ((256,), torch.float32)
        if type(offset) not in (int, float) or not math.isfinite(offset):
            problems.append(f"nested_offset is {offset!r}, expected a finite number")
    for key, value in sizes.items():
        if state.get(key) != value:
            problems.append(f"{key} is {state.get(key)!r}, expected {value!r}")
    for part in sorted(expected.keys() | parts.keys()):
        found = (tuple(parts[part].shape), parts[part].dtype) if part in parts else None
        if found != expected.get(part):
            problems.append(f"{part} is {found}, expected {expected.get(part)}")
    if problems:
        raise ValueError("; ".join(problems))
    return QuantizedEntry(
        name, quant_type, torch.Size(shape), offset=None if offset is None else float(offset), parts=parts
    )


def write_quantized(model: Qwen2ForCausalLM, source: Path, target: Path, facts: Mapping[str, Any]) -> None:
    """Writes a base model in 4 bits as a checkpoint that transformers opens too, atomically and with a manifest.

    Args:
        model: loaded in 4 bits, without an adapter.
        source: the checkpoint that it was loaded from; its configuration and tokenizer are copied.
        target: folder, which is replaced.
        facts: entries of the manifest.
    """
    temporary = target.with_name(WRITING + target.name)
    try:
        with storage_errors(temporary):
            remove(temporary)
            temporary.mkdir(parents=True)
        _write_files(model, source, temporary)
        finish_folder(temporary, target, facts)
    finally:
        with contextlib.suppress(OSError):
            remove(temporary)


def _write_files(model: Qwen2ForCausalLM, source: Path, folder: Path) -> None:
    compute_dtype = dtype_name(model.head_weight.dtype)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Linear4bit)}
    dense = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path != "lm_head"]
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for path, layer in layers.items():
        if layer.bias is not None:
            tensors[f"{path}.bias"] = layer.bias
        tensors |= {f"{path}.{name}": tensor for name, tensor in _named_parts(layer.weight, compute_dtype)}
    weight = next(iter(layers.values())).weight
    quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": weight.quant_type,
        "bnb_4bit_use_double_quant": weight.offset is not None,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head", *dense] if dense else None,  # null: only the head
    }
    copy_config(source, folder, compute_dtype, quantization_config)
    write_tensors({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def _named_parts(weight: QuantizedTensor, compute_dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
    state = {
        "quant_type": weight.quant_type,
        "blocksize": BLOCK_SIZE,
        "dtype": compute_dtype,
        "shape": list(weight.shape),
    }
    yield "weight", weight.packed
    yield "weight.absmax", weight.absmax
    yield "weight.quant_map", torch.tensor(LEVELS[weight.quant_type])
    if weight.offset is not None:
        assert weight.nested_absmax is not None  # the three belong together
        assert weight.nested_code is not None
        yield "weight.nested_absmax", weight.nested_absmax
        yield "weight.nested_quant_map", weight.nested_code.clone()  # all weights share it, which a file cannot express
        state |= {
            "nested_blocksize": ABSMAX_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": weight.offset.item(),
        }
    content = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    yield f"weight.quant_state.bitsandbytes__{weight.quant_type}", content
