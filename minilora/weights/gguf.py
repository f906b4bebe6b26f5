"""A dense Qwen2.5 checkpoint or an adapter in, one GGUF file for llama.cpp and what is built on it out.

A GGUF file is a table of metadata, then the tensors: all that llama.cpp knows of a model, with its tokenizer and chat
template. The `gguf` package, llama.cpp's own, writes the format, names the tensors and rounds to 8 bits; here is what
is specific to Qwen2: which metadata the architecture needs, and how its vocabulary is laid out.

    f32, f16, bf16    the values in that type
    q8_0              8 bits a value and a float16 scale for every 32 values of a row

Norms and biases stay in float32, as llama.cpp expects them. A tied head is left out: llama.cpp takes the embedding.

An adapter is a file of its own, which llama.cpp applies to any GGUF file of its base model (`--lora`):

    {name of the weight}.lora_a    A (R, in)
    {name of the weight}.lora_b    B (out, R)
    adapter.lora.alpha             y = W x + alpha / R B A x, with R of each tensor: it knows no other scale

The rows of q and k stay in Hugging Face's order, because llama.cpp rotates qwen2's halves as transformers does.

Source: llama.cpp's convert_hf_to_gguf.py, of whose metadata this is the part that is read for qwen2; for adapters
src/llama-adapter.cpp.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from minilora.errors import UserError
from minilora.qlora.prompt import IM_END
from minilora.system.files import storage_errors
from minilora.system.optional import MissingPackageError, import_optional
from minilora.weights.hf_config import read_config
from minilora.weights.safetensors_io import read_checkpoint_entries, read_tensor

gguf: Any = None
with contextlib.suppress(MissingPackageError):  # `check_gguf` says so
    gguf = import_optional("gguf")

KINDS = {"f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "f32": "ALL_F32", "q8_0": "MOSTLY_Q8_0"}  # llama.cpp's file types
ADAPTER_KINDS = ("f32", "f16")
CHUNK = 1 << 24  # values that are converted at a time


def check_gguf(checkpoint: Path) -> None:
    """Raises UserError for what `write_gguf` would lack, before anything is computed."""
    try:
        import_optional("gguf")
    except MissingPackageError as error:
        raise UserError(f"--gguf: {error}") from None
    if read_config(checkpoint).max_position_embeddings is None:
        raise UserError(
            f"{checkpoint / 'config.json'}: has no max_position_embeddings, llama.cpp needs the longest text in "
            "tokens; put it in, as the base model's config.json has it"
        )


def gguf_bytes(shapes: Mapping[str, torch.Size], kind: str) -> int:
    """Size of the tensors in a GGUF file of `kind`; the vocabulary adds some megabytes."""
    return sum(math.prod(gguf.quant_shape_to_byte_shape(shape, _type_of(shape, kind))) for shape in shapes.values())


def write_gguf(checkpoint: Path, path: Path, kind: str, name: str) -> None:
    """Writes `path` from a dense checkpoint's weights, configuration and tokenizer, one tensor at a time.

    `kind` is one of KINDS, `name` what llama.cpp calls the model. UserError as `check_gguf`, and for values that
    float16 cannot hold; StorageError for a full or failing disk.
    """
    check_gguf(checkpoint)
    entries = read_checkpoint_entries(checkpoint)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, read_config(checkpoint).num_hidden_layers)
    with _writer(path) as writer:
        for key, entry in entries.items():
            _announce(writer, _gguf_name(names, key), entry.shape, kind)
        _add_metadata(writer, checkpoint, kind, name)
        _write_head(writer)
        for key, entry in entries.items():
            writer.write_tensor_data(_convert(key, read_tensor(entry), _type_of(entry.shape, kind)))


def write_gguf_adapter(
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], path: Path, kind: str, alpha: float
) -> None:
    """Writes `path` from an adapter's A and B by the name of their weight in the base model.

    `kind` is one of ADAPTER_KINDS. llama.cpp multiplies B A by `alpha` over the rank of each. Errors as `write_gguf`.
    """
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 1 + max(int(key.split(".")[2]) for key in pairs))
    with _writer(path) as writer:
        for key, pair in pairs.items():
            for letter, tensor in zip("ab", pair, strict=True):
                _announce(writer, f"{_gguf_name(names, key)}.lora_{letter}", tensor.shape, kind)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(path.stem)
        writer.add_file_type(gguf.LlamaFileType[KINDS[kind]])
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        _write_head(writer)
        for key, pair in pairs.items():
            for tensor in pair:
                writer.write_tensor_data(_convert(key, tensor, _type_of(tensor.shape, kind)))


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[Any]:
    """What writes the file `path` of a qwen2 model; StorageError for a full or failing disk."""
    with storage_errors(path):
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN2])
        try:
            yield writer
        finally:
            writer.close()


def _gguf_name(names: Any, key: str) -> str:
    return str(names.get_name(key, try_suffixes=(".weight", ".bias")))


def _announce(writer: Any, name: str, shape: torch.Size, kind: str) -> None:
    """Puts a tensor into the file's table; its data follow in the same order."""
    tensor_type = _type_of(shape, kind)
    size = gguf.quant_shape_to_byte_shape(shape, tensor_type)
    writer.add_tensor_info(name, size, np.dtype(np.uint8), math.prod(size), raw_dtype=tensor_type)


def _write_head(writer: Any) -> None:
    """All that stands before the tensors' data."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _add_metadata(writer: Any, checkpoint: Path, kind: str, name: str) -> None:
    """What llama.cpp reads of a qwen2 model beside its tensors."""
    config = read_config(checkpoint)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
    writer.add_file_type(gguf.LlamaFileType[KINDS[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    tokens, types = zip(*_iter_tokens(checkpoint, config.vocab_size), strict=True)
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre("qwen2")  # its pre-tokenizer's pattern
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(checkpoint, load_merges=True, n_vocab=config.vocab_size)
    special.add_special_token["bos"] = False  # Qwen's tokenizer puts no token before a text
    if IM_END in tokens:  # the end of a turn, which is not the end token of a base model
        special.special_token_ids["eot"] = tokens.index(IM_END)
    special.add_to_gguf(writer, quiet=True)  # merges, ids of eos, eot, bos and pad, chat template


def _iter_tokens(checkpoint: Path, vocab_size: int) -> Iterator[tuple[str, int]]:
    """Text and type of every id, in order; an id of the embedding without a token is an unused one."""
    kinds = gguf.TokenType
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    by_id = {token_id: text for text, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}
    added = tokenizer.get_added_tokens_decoder()
    for token_id in range(vocab_size):
        text = by_id.get(token_id)
        if text is None:
            yield f"[PAD{token_id}]", kinds.UNUSED
        elif token_id not in added:
            yield text, kinds.NORMAL
        else:  # Qwen's file marks <|fim_prefix|> and others as not special; no text may be encoded as them
            is_control = added[token_id].special or (text.startswith("<|") and text.endswith("|>"))
            yield text, kinds.CONTROL if is_control else kinds.USER_DEFINED


def _type_of(shape: torch.Size, kind: str) -> Any:
    """The type that a tensor is written in: float32 with one axis, float16 where blocks do not divide a row."""
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    chosen = gguf.GGMLQuantizationType[kind.upper()]
    return chosen if shape[-1] % gguf.GGML_QUANT_SIZES[chosen][0] == 0 else gguf.GGMLQuantizationType.F16


def _convert(key: str, tensor: torch.Tensor, tensor_type: Any) -> np.ndarray:
    """The tensor in `tensor_type`: (rows, bytes of a row) uint8."""
    matrix = tensor.view(-1, tensor.shape[-1])
    data = np.empty(gguf.quant_shape_to_byte_shape(matrix.shape, tensor_type), np.uint8)
    step = max(1, CHUNK // matrix.shape[1])
    for start in range(0, len(matrix), step):
        piece = matrix[start : start + step].float()
        if tensor_type == gguf.GGMLQuantizationType.F16 and piece.abs().max() > torch.finfo(torch.float16).max:
            raise UserError(
                f"{key}: has values that float16 cannot hold; write --gguf bf16 or f32, or --gguf_adapter f32"
            )
        data[start : start + step] = gguf.quantize(piece.numpy(), tensor_type).view(np.uint8)
    return data
