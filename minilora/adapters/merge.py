"""An adapter and its base in, one dense checkpoint out that needs neither: to deploy, or to train further.

    original      W' = W + s B A           W from the base model's files
    dequantized   W' = Q(W) + s B A        Q(W) as in training, quantised to 4 bits and dequantised, in all projections

The adapter was trained beside Q(W), so only the second is the model whose accuracy was measured; the first is nearer to
the base, and often as good. Neither is quantised again: that would round away much of the small product. Sums are
float32, rounded once to the dtype of the files.

Memory: one shard, and a few float32 copies of one weight, for a model of any size.

The layout is Hugging Face's: one file, or shards with an index. A tied head is no tensor of its own, so it stays tied.
"""

import contextlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from minilora.adapters.attach import iter_lora_layers, merged_weight
from minilora.adapters.peft_files import load_adapter, read_adapter_tensors
from minilora.adapters.peft_keys import peft_keys, without_base_tensors
from minilora.config import LoraConfig
from minilora.errors import UserError
from minilora.qlora.lora import LoRALinear
from minilora.qlora.model import Qwen2Config, Qwen2ForCausalLM
from minilora.system.files import StorageError, json_bytes, write_file
from minilora.system.manifest import MANIFEST, read_manifest
from minilora.weights.hf_config import copy_config, read_config
from minilora.weights.load import BaseWeights, LoadSettings, is_finite, open_weights
from minilora.weights.safetensors_io import dtype_name, read_tensor, write_tensors

ORIGINAL, DEQUANTIZED = "original", "dequantized"
DTYPES = {dtype_name(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
FACT = "merged_into"  # in the manifest of a folder that holds a merged model
ADAPTER_FACT = "gguf_adapter"  # in that of one with an adapter for llama.cpp


@dataclass(frozen=True)
class Merge:
    """A base model and an adapter, whose tensors are merged one by one on request."""

    base: Path  # the base model's folder
    config: Qwen2Config  # its architecture
    weights: BaseWeights  # its tensors
    lora_config: LoraConfig  # of the adapter
    layers: Mapping[str, LoRALinear]  # of the adapter, on the CPU, by path
    shapes: Mapping[str, torch.Size]  # of the merged model's tensors, by name, in the model's order

    @property
    def variants(self) -> tuple[str, ...]:
        """What the adapter can be merged into: ORIGINAL, DEQUANTIZED or both."""
        if self.weights.quantized:
            return (DEQUANTIZED,)
        return (ORIGINAL,) if self.weights.settings.quantization == "none" else (DEQUANTIZED, ORIGINAL)

    @property
    def base_dtype(self) -> torch.dtype:
        """Dtype of most of the base model's parameters; its config.json may name another."""
        dtype = self.weights.entries["model.embed_tokens.weight"].dtype
        return dtype if dtype in DTYPES.values() else torch.float32

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Size of all merged tensors in `dtype`."""
        return dtype.itemsize * sum(shape.numel() for shape in self.shapes.values())

    def tensor(self, name: str, into: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor of the merged model, on the CPU. UserError for values that `dtype` cannot represent."""
        path, _, kind = name.rpartition(".")
        quantized = self.weights.in_4bit(name) if into == DEQUANTIZED else None
        if quantized is None:
            tensor = self.weights.read(name)
        else:
            tensor = quantized.dequantize(self.weights.settings.compute_dtype).cpu()
        layer = self.layers.get(path)
        if layer is not None and kind == "weight":
            tensor = merged_weight(layer, tensor)
        elif layer is not None and layer.weights is not None and layer.weights.bias is not None:
            tensor = layer.weights.bias.detach()
        tensor = tensor.to("cpu", dtype)
        if not is_finite(tensor):
            raise UserError(
                f"{name}: merged, it has values that {dtype_name(dtype)} cannot represent; choose another --dtype, or "
                "an adapter from before its run diverged"
            )
        return tensor

    def pairs(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A (R, in) and B (out, R) by the name of their weight, for readers that scale every pair by alpha / R.

        Whatever else makes the scale (rsLoRA, alpha_pattern) is multiplied into B. UserError for an adapter that is
        more than such pairs.
        """
        found = {}
        for path, layer in self.layers.items():
            w = layer.weights
            assert w is not None  # `iter_lora_layers` gives no others
            more = "DoRA's magnitudes" if w.lora_magnitude_vector is not None else "a trained bias"
            if w.lora_magnitude_vector is not None or w.bias is not None:
                raise UserError(
                    f"--gguf_adapter: {path} has {more}, which a GGUF adapter cannot hold; write the merged model with "
                    "--gguf and without --gguf_adapter"
                )
            scale = w.scaling * w.r / self.lora_config.alpha  # 1 for plain LoRA
            found[f"{path}.weight"] = (w.lora_A.detach(), w.lora_B.detach() * scale)
        return found

    def build(
        self, into: str, dtype: torch.dtype, compute_dtype: torch.dtype, device: torch.device | str
    ) -> Qwen2ForCausalLM:
        """The model that `load_model` would make of the files in `dtype`, without the files."""
        with torch.device("meta"):
            model = Qwen2ForCausalLM(self.config)
        for name in self.shapes:
            path, _, kind = name.rpartition(".")
            tensor = self.tensor(name, into, dtype).to(device, compute_dtype)
            setattr(model.get_submodule(path), kind, nn.Parameter(tensor, requires_grad=False))
        return model.eval()


def open_merge(base: Path, adapter: Path, settings: LoadSettings, *, allow_bin: bool = False) -> Merge:
    """Two folders, checked against each other; no weight of the base is read yet.

    `settings` are those of the run that trained the adapter, which decide the 4-bit weights.
    """
    config = read_config(base)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    weights = open_weights(model, base, settings)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    _refuse_changed_base_tensors(model, adapter, weights, allow_bin)
    lora_config = load_adapter(model, adapter, allow_bin, device="cpu")
    return Merge(base, config, weights, lora_config=lora_config, layers=dict(iter_lora_layers(model)), shapes=shapes)


def _refuse_changed_base_tensors(model: Qwen2ForCausalLM, adapter: Path, weights: BaseWeights, allow_bin: bool) -> None:
    """`load_adapter` compares what an adapter repeats of the base with the model, which here has no values."""

    def base(name: str) -> torch.Tensor:
        return read_tensor(weights.entries[name]) if name in weights.entries else torch.empty(0)

    path, tensors = read_adapter_tensors(adapter, allow_bin, is_verified=True)  # `load_adapter` verifies it
    if any("lora_" not in key for key in tensors):
        without_base_tensors(path, peft_keys(path, tensors), model, base)


def refuse_variant(merge: Merge, into: str) -> None:
    """Raises UserError where `into` is not one of the variants."""
    if into in merge.variants:
        return
    if into == ORIGINAL:
        raise UserError(
            f"{merge.base}: is in 4 bits, without its original weights; merge --into {DEQUANTIZED}, or name the model "
            "that it was made from with --base"
        )
    raise UserError(
        f"--into {DEQUANTIZED}: the adapter was trained beside unquantised weights (model.quantization=none); merge "
        f"--into {ORIGINAL}"
    )


def write_merged(
    merge: Merge,
    into: str,
    dtype: torch.dtype,
    folder: Path,
    max_shard_bytes: int,
    on_progress: Callable[[int], object] | None = None,
) -> None:
    """Writes the merged model, with configuration and tokenizer, into the empty `folder`.

    `on_progress` is called with the number of tensors written. UserError: see `Merge.tensor`; StorageError for a disk.
    """
    copy_config(merge.base, folder, dtype_name(dtype))
    shards = plan_shards(merge.shapes, dtype, max_shard_bytes)
    file_of: dict[str, str] = {}
    for index, names in enumerate(shards, start=1):
        suffix = f"-{index:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"model{suffix}.safetensors"
        tensors = {}
        for name in names:
            tensors[name] = merge.tensor(name, into, dtype)
            if on_progress is not None:
                on_progress(1)
        write_tensors(tensors, folder / file)
        file_of |= dict.fromkeys(names, file)
    if len(shards) > 1:
        content = {"metadata": {"total_size": merge.num_bytes(dtype)}, "weight_map": file_of}
        write_file(folder / "model.safetensors.index.json", json_bytes(content))


def plan_shards(shapes: Mapping[str, torch.Size], dtype: torch.dtype, max_bytes: int) -> list[list[str]]:
    """Names of the tensors of each file, in order; only a single tensor makes a file larger than `max_bytes`."""
    shards: list[list[str]] = []
    filled = 0
    for name, shape in shapes.items():
        num_bytes = shape.numel() * dtype.itemsize
        if not shards or filled + num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += num_bytes
    return shards


def refuse_output(output: Path) -> None:
    """Raises UserError where `output` is anything except a new or empty folder or what an earlier merge wrote."""
    if not output.exists() and not output.is_symlink():
        return
    problem = "is not a folder"
    if output.is_dir():
        others = {path.name for path in output.iterdir()}
        with contextlib.suppress(UserError):  # no manifest, or a damaged one
            manifest = read_manifest(output)
            if {FACT, ADAPTER_FACT} & manifest["facts"].keys():
                others -= {MANIFEST, *manifest["files"]}
        if not others:
            return
        problem = f"holds {', '.join(sorted(others)[:3])}, which is no earlier merge"
    raise UserError(f"{output}: {problem}; choose another --output_dir, or move that away")


def refuse_full_disk(output: Path, num_bytes: int) -> None:
    """Raises StorageError where `num_bytes` do not fit on the disk; an earlier `output` is replaced only at the end."""
    folder = next(parent for parent in output.parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise StorageError(
            f"{output}: {num_bytes:,} bytes are to be written, {free:,} are free in {folder}; make room, or choose "
            "another --output_dir or --dtype"
        )
