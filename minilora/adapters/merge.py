"""An adapter and its base in, one dense checkpoint out that needs neither: what is deployed, or trained further.

    original      W' = W + s B A           W as the base model's files have it
    dequantized   W' = Q(W) + s B A        Q(W) as training saw it, in 4 bits and back, in all projections

The adapter was trained beside Q(W), so only the second is the model whose accuracy was measured; the first is nearer to
the base, and often as good. Neither is put in 4 bits again: that would round away much of the small product. Sums are
taken in float32 and rounded once, to the dtype of the files.

One tensor at a time is read, merged and put into a shard, and a shard is written and forgotten: that, and some float32
copies of one weight, is all that is held of a model of any size.

The layout is that of Hugging Face: model.safetensors, or model-00001-of-00004.safetensors and so on with an index. A
tied head is no tensor of its own, so it stays tied.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from minilora.adapters.attach import iter_lora_layers
from minilora.adapters.peft_files import load_adapter
from minilora.errors import UserError
from minilora.qlora.lora import LoRALinear, merged_weight
from minilora.qlora.model import Qwen2Config, Qwen2ForCausalLM
from minilora.system.files import StorageError, json_bytes, read_json, storage_errors, write_file
from minilora.system.manifest import MANIFEST, read_manifest
from minilora.weights.bnb_checkpoint import COMPANIONS
from minilora.weights.hf_config import read_config
from minilora.weights.load import BaseWeights, LoadSettings, is_finite, open_weights
from minilora.weights.safetensors_io import dtype_name

ORIGINAL, DEQUANTIZED = "original", "dequantized"
DTYPES = {dtype_name(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
FACT = "merged_into"  # in the manifest of a folder that holds a merged model


@dataclass(frozen=True)
class Merge:
    """A base model and an adapter, each tensor of which can be merged when it is asked for.

    Attributes:
        base: the base model's folder.
        config: its architecture.
        weights: its tensors.
        layers: of the adapter, on the CPU, by path.
        shapes: of the merged model's tensors, by name, in the model's order.
    """

    base: Path
    config: Qwen2Config
    weights: BaseWeights
    layers: Mapping[str, LoRALinear]
    shapes: Mapping[str, torch.Size]

    @property
    def variants(self) -> tuple[str, ...]:
        """What the adapter can be merged into: ORIGINAL, DEQUANTIZED or both."""
        if self.weights.quantized:
            return (DEQUANTIZED,)
        return (ORIGINAL,) if self.weights.settings.quantization == "none" else (DEQUANTIZED, ORIGINAL)

    @property
    def base_dtype(self) -> torch.dtype:
        """What most of the base model's numbers are, whatever its config.json says."""
        dtype = self.weights.entries["model.embed_tokens.weight"].dtype
        return dtype if dtype in DTYPES.values() else torch.float32

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Size of all merged tensors in `dtype`."""
        return dtype.itemsize * sum(shape.numel() for shape in self.shapes.values())

    def tensor(self, name: str, into: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor of the merged model, on the CPU.

        Args:
            name: one of `shapes`.
            into: one of `variants`.
            dtype: of the result.

        Raises:
            UserError: the base's file is damaged, or the merged values do not fit into `dtype`.
        """
        path, _, kind = name.rpartition(".")
        quantized = self.weights.in_4bit(name) if into == DEQUANTIZED else None
        if quantized is None:
            tensor = self.weights.read(name)
        else:
            tensor = quantized.dequantize(self.weights.settings.compute_dtype).cpu()
        layer = self.layers.get(path)
        if layer is not None and kind == "weight":
            tensor = merged_weight(layer, tensor)
        elif layer is not None and layer.bias is not None:
            tensor = layer.bias.detach()
        tensor = tensor.to(dtype)
        if not is_finite(tensor):
            raise UserError(
                f"{name}: merged, it has values that {dtype_name(dtype)} cannot hold; choose another --dtype, or an "
                "adapter from before its run went astray"
            )
        return tensor

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


def open_merge(
    base: Path,
    adapter: Path,
    compute_dtype: torch.dtype,
    quantization: str,
    double_quantization: bool,
    device: torch.device | str = "cpu",
    allow_bin: bool = False,
) -> Merge:
    """Base and adapter, checked against each other; no weight of the base is read yet.

    Args:
        base: folder of the base model.
        adapter: folder of the adapter.
        compute_dtype: of the run that trained it, as all that follow: they decide the 4-bit weights.
        quantization: "nf4", "fp4" or "none".
        double_quantization: scales of the 4-bit blocks in 8 bits.
        device: where it is quantised.
        allow_bin: see `load_adapter`.

    Raises:
        UserError: see `load_model` and `load_adapter`.
    """
    config = read_config(base)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    weights = open_weights(model, base, LoadSettings(compute_dtype, quantization, double_quantization, device))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    load_adapter(model, adapter, allow_bin, device="cpu")
    return Merge(base, config, weights, dict(iter_lora_layers(model)), shapes)


def refuse_variant(merge: Merge, into: str) -> None:
    """Raises UserError where the adapter cannot be merged `into` that."""
    if into in merge.variants:
        return
    if into == ORIGINAL:
        raise UserError(
            f"{merge.base}: is in 4 bits, its original weights are not there; merge --into {DEQUANTIZED}, or name the "
            "model that it was made from with --base"
        )
    raise UserError(
        f"--into {DEQUANTIZED}: the adapter was trained beside weights in full (model.quantization=none); merge --into "
        f"{ORIGINAL}"
    )


def write_merged(
    merge: Merge,
    into: str,
    dtype: torch.dtype,
    folder: Path,
    max_shard_bytes: int,
    on_progress: Callable[[int], object] | None = None,
) -> None:
    """Writes the merged model, with configuration and tokenizer, as a checkpoint of Hugging Face's layout.

    Args:
        merge: base and adapter.
        into: one of its variants.
        dtype: of all tensors.
        folder: exists and is empty.
        max_shard_bytes: of the tensors in one file; a tensor that is larger has a file of its own.
        on_progress: called with the number of tensors written.

    Raises:
        UserError: see `Merge.tensor`.
        StorageError: the disk is full or fails.
    """
    config = read_json(merge.base / "config.json")
    config.pop("quantization_config", None)
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype_name(dtype)
    write_file(folder / "config.json", json_bytes(config))
    with storage_errors(folder):
        for name in COMPANIONS:
            if (merge.base / name).is_file():
                shutil.copyfile(merge.base / name, folder / name)
    shards = plan_shards(merge.shapes, dtype, max_shard_bytes)
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        numbered = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"model{numbered}.safetensors"
        tensors = {}
        for name in names:
            tensors[name] = merge.tensor(name, into, dtype)
            if on_progress is not None:
                on_progress(1)
        _save(tensors, folder / file)
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        content = {"metadata": {"total_size": merge.num_bytes(dtype)}, "weight_map": index}
        write_file(folder / "model.safetensors.index.json", json_bytes(content))


def plan_shards(shapes: Mapping[str, torch.Size], dtype: torch.dtype, max_bytes: int) -> list[list[str]]:
    """Names of the tensors of each file, in order, no file larger than `max_bytes` unless by a single tensor."""
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


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        with storage_errors(path, sum(tensor.nbytes for tensor in tensors.values())):
            save_file(tensors, path, metadata={"format": "pt"})
            shutil.copymode(path.with_name("config.json"), path)  # safetensors lets nobody but the owner read it
    except SafetensorError as error:  # what the library makes of an OSError
        raise StorageError(
            f"{path}: cannot be written ({error}); make room or mend the disk, and run the same command again"
        ) from None


def refuse_output(output: Path) -> None:
    """Refuses to put a merged model where something else is: only an earlier one may be replaced.

    Raises:
        UserError: `output` is a file, or a folder that holds anything but a merged model.
    """
    if not output.exists() and not output.is_symlink():
        return
    problem = _other_content(output) if output.is_dir() else "is not a folder"
    if problem is not None:
        raise UserError(f"{output}: {problem}; choose another --output, or move that away")


def _other_content(folder: Path) -> str | None:
    """What a folder holds beside a merged model, None if nothing."""
    names = {path.name for path in folder.iterdir()}
    try:
        manifest = read_manifest(folder)
    except UserError:
        return "is not empty, and not an earlier merge" if names else None
    if FACT not in manifest["facts"]:
        return "is not empty, and not an earlier merge"
    others = sorted(names - manifest["files"].keys() - {MANIFEST})
    return f"holds {', '.join(others[:3])} beside an earlier merge" if others else None


def refuse_full_disk(output: Path, num_bytes: int) -> None:
    """Raises StorageError where `num_bytes` more have no room beside `output`; what stands there stays until then."""
    place = next(parent for parent in output.parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise StorageError(
            f"{output}: {num_bytes:,} bytes are to be written, {free:,} are free in {place}; make room, or choose "
            "another --output or --dtype"
        )
