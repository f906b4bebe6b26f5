"""Checkpoints whose projections are in 4 bits already, in the layout of transformers and bitsandbytes.

    {layer}.weight                                (out * in / 2, 1) uint8, two codes a byte; or these bytes as a float
    {layer}.weight.absmax                         (blocks,) float32; with double quantisation their uint8 codes
    {layer}.weight.quant_map                      (16,) float32, the levels
    {layer}.weight.nested_absmax                  (blocks / 256 rounded up,) float32     with double quantisation
    {layer}.weight.nested_quant_map               (256,) float32                         with double quantisation
    {layer}.weight.quant_state.bitsandbytes__nf4  uint8: JSON with shape, block sizes and the mean of the scales

The `-bnb-4bit` repositories of the hub are of this kind. They load in a second, because nothing is left to quantise; a
4-bit copy written here (`model.quantized_cache`, `scripts/quantize.py`) is one too, and transformers opens it. A
projection that such a checkpoint holds unquantised, as its `llm_int8_skip_modules` say, stays so. A head in 4 bits,
which transformers makes where those name other modules and not the head, is dequantised once: the loss reads all of it
for every supervised position.

Source: bitsandbytes 0.50.2, QuantState.as_dict; transformers 5.23, quantizer_bnb_4bit.
"""

import contextlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from minilora.errors import UserError
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.nf4 import ABSMAX_BLOCK_SIZE, BLOCK_SIZE, LEVELS, Linear4bit, QuantizedTensor
from minilora.system.files import WRITING, StorageError, read_json, remove, storage_errors
from minilora.system.manifest import finish_folder
from minilora.weights.safetensors_io import TensorEntry, dtype_name, read_checkpoint_entries, read_tensor

STATE_NAME = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
COMPANIONS = (  # what belongs to a checkpoint beside config.json and the weights
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
STORAGE = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)  # bnb_4bit_quant_storage; FSDP needs floats
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True)
class QuantizedEntry:
    """Where a 4-bit weight is stored, and what its JSON says of it.

    Attributes:
        name: of the weight.
        quant_type: "nf4" or "fp4".
        shape: (out, in) of the dense weight.
        offset: mean of the scales; None without double quantisation.
        parts: "packed", and those of PARTS that it has.
    """

    name: str
    quant_type: str
    shape: torch.Size
    offset: float | None
    parts: Mapping[str, TensorEntry]

    def read(self) -> QuantizedTensor:
        """The weight, in memory of its own.

        Raises:
            UserError: its levels are not those of its type.
        """
        found = {part: read_tensor(entry) for part, entry in self.parts.items()}
        packed = found["packed"].view(torch.uint8).view(-1, 1)
        if not torch.equal(found["quant_map"], torch.tensor(LEVELS[self.quant_type])):
            raise UserError(
                f"{self.parts['packed'].path}: {self.name} has other levels than {self.quant_type}; "
                "use the original checkpoint"
            )
        scales = found["absmax" if self.offset is None else "nested_absmax"]
        if not torch.isfinite(scales).all():
            raise UserError(
                f"{self.parts['packed'].path}: {self.name} has scales that are NaN or infinite; download it again or "
                "choose another model"
            )
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
    """A checkpoint's unquantised tensors and its 4-bit weights, by name.

    Raises:
        UserError: a 4-bit weight is incomplete, or of a kind that `nf4.py` does not compute with.
    """
    dense, quantized = dict(entries), {}
    for state_name, state_entry in entries.items():
        match = STATE_NAME.fullmatch(state_name)
        if match is None:
            continue
        name, quant_type = match.groups()
        del dense[state_name]
        parts = {part: dense.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in dense}
        if name in dense:
            parts["packed"] = dense.pop(name)
        state = _read_state(state_name, state_entry)
        quantized[name] = _check(name, quant_type, state, parts=parts, path=state_entry.path)
    return dense, quantized


def _read_state(name: str, entry: TensorEntry) -> dict[str, Any]:
    try:
        state = json.loads(bytes(read_tensor(entry).reshape(-1).view(torch.uint8).tolist()))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{entry.path}: {name} is not JSON ({error}); download the file again") from None
    if not isinstance(state, dict):
        raise UserError(f"{entry.path}: {name} holds a {type(state).__name__}; download the file again")
    return state


def _check(
    name: str, quant_type: str, state: dict[str, Any], *, parts: dict[str, TensorEntry], path: Path
) -> QuantizedEntry:
    """The entry, if `parts` are all that `state` asks for, in the sizes that `nf4.py` computes with."""
    shape, offset = state.get("shape"), state.get("nested_offset")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        raise UserError(f"{path}: {name} has the shape {shape!r}, expected [out, in]; download the file again")
    blocks = -(-shape[0] * shape[1] // BLOCK_SIZE)
    nested = offset is not None
    storage = parts["packed"].dtype if "packed" in parts and parts["packed"].dtype in STORAGE else torch.uint8
    expected = {
        "packed": ((-(-shape[0] * shape[1] // (2 * storage.itemsize)), 1), storage),
        "absmax": ((blocks,), torch.uint8 if nested else torch.float32),
        "quant_map": ((16,), torch.float32),
    }
    if nested:
        expected["nested_absmax"] = ((-(-blocks // ABSMAX_BLOCK_SIZE),), torch.float32)
        expected["nested_quant_map"] = ((256,), torch.float32)
    sizes = {"blocksize": BLOCK_SIZE, "quant_type": quant_type} | (
        {"nested_blocksize": ABSMAX_BLOCK_SIZE} if nested else {}
    )
    problems = [
        f"{key} is {state.get(key)!r}, expected {value!r}" for key, value in sizes.items() if state.get(key) != value
    ]
    if offset is not None and not (type(offset) in (int, float) and math.isfinite(offset)):
        problems.append(f"nested_offset is {offset!r}, expected a finite number")
    for part in sorted(expected.keys() | parts.keys()):
        found = (tuple(parts[part].shape), parts[part].dtype) if part in parts else None
        if found != expected.get(part):
            problems.append(f"{part} is {found}, expected {expected.get(part)}")
    if problems:
        raise UserError(
            f"{path}: {name} is a 4-bit weight that cannot be used: {'; '.join(problems)}; use the original checkpoint"
        )
    return QuantizedEntry(
        name=name,
        quant_type=quant_type,
        shape=torch.Size(shape),
        offset=None if offset is None else float(offset),
        parts=parts,
    )


def write_quantized(model: Qwen2ForCausalLM, source: Path, target: Path, facts: Mapping[str, Any]) -> None:
    """`save_quantized` as an atomic write with a manifest: afterwards the folder is complete or as it was before.

    Args:
        model: as for `save_quantized`, like `source`.
        source: the checkpoint that it was loaded from.
        target: the folder, which is replaced.
        facts: entries of the manifest beside the checksums.

    Raises:
        StorageError: it could not be written.
    """
    temporary = target.with_name(WRITING + target.name)
    try:
        with storage_errors(temporary):
            remove(temporary)
            save_quantized(model, source, temporary)
        finish_folder(temporary, target, facts)
    except SafetensorError as error:  # what the library makes of an OSError
        raise StorageError(f"{target}: cannot be written ({error}); make room or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):
            remove(temporary)


def save_quantized(model: Qwen2ForCausalLM, source: Path, folder: Path) -> None:
    """Writes a base model in 4 bits as a checkpoint that this program and transformers open.

    Args:
        model: loaded in 4 bits, without an adapter.
        source: the checkpoint that it was loaded from; its configuration and tokenizer are copied.
        folder: made, and filled with model.safetensors and what is copied.
    """
    compute_dtype = model.head_weight.dtype
    folder.mkdir(parents=True, exist_ok=True)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Linear4bit)}
    dense = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path != "lm_head"]
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for path, layer in layers.items():
        if layer.bias is not None:
            tensors[f"{path}.bias"] = layer.bias
        tensors |= {f"{path}.{name}": tensor for name, tensor in _named_parts(layer.weight, compute_dtype)}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    weight = next(iter(layers.values())).weight
    config = read_json(source / "config.json")
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype_name(compute_dtype)
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": weight.quant_type,
        "bnb_4bit_use_double_quant": weight.offset is not None,
        "bnb_4bit_compute_dtype": dtype_name(compute_dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head", *dense] if dense else None,  # null: only the head
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8", newline="\n")
    # safetensors makes it readable by the owner only
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _named_parts(weight: QuantizedTensor, compute_dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    state = {
        "quant_type": weight.quant_type,
        "blocksize": BLOCK_SIZE,
        "dtype": dtype_name(compute_dtype),
        "shape": list(weight.shape),
    }
    yield "weight", weight.packed
    yield "weight.absmax", weight.absmax
    yield "weight.quant_map", torch.tensor(LEVELS[weight.quant_type])
    if weight.offset is not None:
        assert weight.nested_absmax is not None  # the three belong together
        assert weight.nested_code is not None
        yield "weight.nested_absmax", weight.nested_absmax
        yield (
            "weight.nested_quant_map",
            weight.nested_code.clone(),
        )  # shared by all weights, which a file cannot express
        state |= {
            "nested_blocksize": ABSMAX_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": weight.offset.item(),
        }
    content = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    yield f"weight.quant_state.bitsandbytes__{weight.quant_type}", content
