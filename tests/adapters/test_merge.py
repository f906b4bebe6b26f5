"""The merged model is base and adapter together, in files that are whole, dense and no larger than asked.

Agreement with transformers and peft stands in tests/parity/test_merge.py.
"""

import json
import shutil
import weakref
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.adapters import merge as merge_module
from minilora.adapters.attach import attach, iter_lora_weights
from minilora.adapters.merge import (
    DEQUANTIZED,
    ORIGINAL,
    Merge,
    open_merge,
    plan_shards,
    refuse_full_disk,
    refuse_output,
    refuse_variant,
    write_merged,
)
from minilora.adapters.peft_config import BaseModel
from minilora.adapters.peft_files import load_adapter
from minilora.config import LoraConfig
from minilora.errors import UserError
from minilora.qlora.batch import pack
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.nf4 import Linear4bit
from minilora.qlora.prompt import ChatTokenizer, ClassificationPrompt
from minilora.system.files import StorageError
from minilora.system.manifest import write_folder
from minilora.weights import safetensors_io
from minilora.weights.bnb_checkpoint import write_quantized
from minilora.weights.load import LoadSettings, load_model
from tests.conftest import make_reviews, save_adapter

Checkpoint = Callable[..., Path]
# Float32: a sum of 64 to 128 products in another order, through two layers. Without the adapter logits move by more
# than 1, without its trained biases by more than 0.1.
HIDDEN_ATOL = 1e-4
PLAIN = LoraConfig(r=4, alpha=8, dropout=0.05)
ADAPTERS = {
    "plain": PLAIN,
    "two projections": replace(PLAIN, target_modules=["q_proj", "v_proj"]),
    "rslora and patterns": replace(
        PLAIN, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3.0}
    ),
    "dora": replace(PLAIN, use_dora=True),
    "all biases": replace(PLAIN, target_modules=["k_proj", "up_proj"], bias="all"),
    "pissa": replace(PLAIN, dropout=0, init_lora_weights="pissa"),
}


def write_adapter(base: Path, folder: Path, config: LoraConfig = PLAIN, size: float = 0.1) -> Path:
    """An adapter that changes every hidden state (none with `size` 0), in `folder`."""
    model = load_model(base, torch.float32, "none")
    attach(model, config)
    generator = torch.Generator().manual_seed(0)
    for _, w in iter_lora_weights(model):
        for parameter in (w.lora_B, w.lora_magnitude_vector, w.bias):
            if parameter is not None:
                parameter.data += size * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, folder, config, BaseModel("tiny"))
    return folder


@torch.no_grad()
def hidden_states(model: Qwen2ForCausalLM, tokenizer: ChatTokenizer) -> torch.Tensor:
    """(n, C) of the supervised positions of some reviews."""
    prompt = ClassificationPrompt(tokenizer, "s", "评论：", ("负面", "正面"), 256)
    texts, labels = zip(*make_reviews(6, seed=5), strict=True)
    return model(pack(prompt.examples(texts, labels)))


def merged(merge: Merge, folder: Path, into: str = ORIGINAL, **settings: Any) -> Path:
    """The folder that `write_merged` fills."""
    folder.mkdir()
    settings = {"dtype": torch.float32, "max_shard_bytes": 10**9, **settings}
    write_merged(merge, into, folder=folder, **settings)
    return folder


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_merged_model_does_what_base_and_adapter_do(
    tiny_checkpoint: Checkpoint, chat_tokenizer: ChatTokenizer, tmp_path: Path, kind: str, tie: bool
) -> None:
    base = tiny_checkpoint(tie=tie)
    adapter = write_adapter(base, tmp_path / "adapter", ADAPTERS[kind])
    folder = merged(open_merge(base, adapter, LoadSettings(torch.float32, "none")), tmp_path / "merged")
    adapted = load_model(base, torch.float32, "none")
    plain = hidden_states(adapted, chat_tokenizer)
    load_adapter(adapted, adapter)
    expected = hidden_states(adapted, chat_tokenizer)
    found = hidden_states(load_model(folder, torch.float32, "none"), chat_tokenizer)
    torch.testing.assert_close(found, expected, rtol=0, atol=HIDDEN_ATOL)
    assert (expected - plain).abs().max() > 0.1


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_the_dequantized_base_is_to_the_bit_what_training_computes_with(
    tiny_checkpoint: Checkpoint, tmp_path: Path, quantization: str, double: bool, compute_dtype: torch.dtype
) -> None:
    base = tiny_checkpoint(tie=False)
    adapter = write_adapter(base, tmp_path, size=0.0)
    merge = open_merge(base, adapter, LoadSettings(compute_dtype, quantization, double))
    model = load_model(base, compute_dtype, quantization, double)
    layers = {f"{path}.weight": m for path, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(merge.tensor(name, DEQUANTIZED, compute_dtype), layer.dense_weight(compute_dtype)), name
    others = load_file(base / "model.safetensors")
    for name in merge.shapes.keys() - layers.keys():
        assert torch.equal(merge.tensor(name, DEQUANTIZED, torch.float32), others[name]), name


def test_projections_without_an_adapter_are_dequantized_too(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint()
    adapter = write_adapter(base, tmp_path, ADAPTERS["two projections"])
    merge = open_merge(base, adapter, LoadSettings(torch.float32))
    name = "model.layers.0.mlp.down_proj.weight"
    layer = load_model(base, torch.float32).get_submodule(name.removesuffix(".weight"))
    assert isinstance(layer, Linear4bit)
    assert torch.equal(merge.tensor(name, DEQUANTIZED, torch.float32), layer.dense_weight(torch.float32))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_merged_into_the_dequantized_base_it_does_what_was_trained(
    tiny_checkpoint: Checkpoint, chat_tokenizer: ChatTokenizer, tmp_path: Path, kind: str
) -> None:
    base = tiny_checkpoint()
    adapter = write_adapter(base, tmp_path, ADAPTERS[kind])
    merge = open_merge(base, adapter, LoadSettings(torch.float32))
    trained = load_model(base, torch.float32)
    load_adapter(trained, adapter)
    expected = hidden_states(trained, chat_tokenizer)
    found = {
        into: hidden_states(merge.build(into, torch.float32, torch.float32, "cpu"), chat_tokenizer)
        for into in merge.variants
    }
    torch.testing.assert_close(found[DEQUANTIZED], expected, rtol=0, atol=HIDDEN_ATOL)
    assert (found[ORIGINAL] - expected).abs().max() > 0.1  # the 4-bit error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("into", [ORIGINAL, DEQUANTIZED])
def test_a_model_built_in_memory_is_the_one_that_the_files_make(
    tiny_checkpoint: Checkpoint, tmp_path: Path, into: str, dtype: torch.dtype
) -> None:
    base = tiny_checkpoint(tie=False)
    merge = open_merge(base, write_adapter(base, tmp_path / "adapter"), LoadSettings(torch.bfloat16))
    folder = merged(merge, tmp_path / "merged", into, dtype=dtype)
    built = merge.build(into, dtype, torch.bfloat16, "cpu")
    loaded = load_model(folder, torch.bfloat16, "none")
    assert not built.training
    expected = dict(loaded.named_parameters())
    assert {name for name, _ in built.named_parameters()} == expected.keys()
    for name, parameter in built.named_parameters():
        assert torch.equal(parameter, expected[name]), name
        assert not parameter.requires_grad


@pytest.fixture
def base_in_4bit(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    source = tiny_checkpoint()
    write_quantized(load_model(source, torch.float32), source, tmp_path / "quantized", {})
    return tmp_path / "quantized"


def test_a_base_in_4_bits_already_merges_as_the_one_that_it_was_made_from(
    tiny_checkpoint: Checkpoint, base_in_4bit: Path, tmp_path: Path
) -> None:
    source = tiny_checkpoint()
    adapter = write_adapter(source, tmp_path / "adapter")
    plain, quantized = (open_merge(base, adapter, LoadSettings(torch.float32)) for base in (source, base_in_4bit))
    assert (plain.variants, quantized.variants) == ((DEQUANTIZED, ORIGINAL), (DEQUANTIZED,))
    for name in plain.shapes:
        expected = plain.tensor(name, DEQUANTIZED, torch.float32)
        assert torch.equal(quantized.tensor(name, DEQUANTIZED, torch.float32), expected), name
    folder = merged(quantized, tmp_path / "merged", DEQUANTIZED)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text("utf-8"))
    assert load_file(folder / "model.safetensors").keys() == plain.shapes.keys()


def test_a_base_in_4_bits_has_no_original_weights(base_in_4bit: Path, tiny_checkpoint: Checkpoint) -> None:
    adapter = write_adapter(tiny_checkpoint(), base_in_4bit.parent / "adapter")
    merge = open_merge(base_in_4bit, adapter, LoadSettings(torch.float32))
    with pytest.raises(UserError) as caught:
        refuse_variant(merge, ORIGINAL)
    assert str(caught.value).startswith(f"{base_in_4bit}: ")
    assert all(remedy in str(caught.value) for remedy in ("--into dequantized", "--base"))
    refuse_variant(merge, DEQUANTIZED)


def test_what_was_trained_unquantised_has_nothing_to_dequantize(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint()
    merge = open_merge(base, write_adapter(base, tmp_path), LoadSettings(torch.float32, "none"))
    with pytest.raises(UserError, match=r"--into dequantized: .*model\.quantization=none.*--into original"):
        refuse_variant(merge, DEQUANTIZED)
    refuse_variant(merge, ORIGINAL)


def test_another_quantisation_than_the_bases_own_is_refused(base_in_4bit: Path, tiny_checkpoint: Checkpoint) -> None:
    adapter = write_adapter(tiny_checkpoint(), base_in_4bit.parent / "adapter")
    with pytest.raises(UserError, match="is quantised already; set"):
        open_merge(base_in_4bit, adapter, LoadSettings(torch.float32, "fp4"))


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_a_tied_head_stays_tied(tiny_checkpoint: Checkpoint, tmp_path: Path, tie: bool) -> None:
    base = Path(shutil.copytree(tiny_checkpoint(tie=tie), tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    spare = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()} if tie else {}  # which the format allows
    save_file({**tensors, **spare}, base / "model.safetensors")
    adapter = write_adapter(base, tmp_path / "adapter")
    folder = merged(open_merge(base, adapter, LoadSettings(torch.float32, "none")), tmp_path / "merged")
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) == (not tie)
    assert json.loads((folder / "config.json").read_text("utf-8"))["tie_word_embeddings"] is tie


def test_shards_are_no_larger_than_asked_and_the_index_names_all_of_them(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base = tiny_checkpoint(tie=False, sharded=True)
    merge = open_merge(base, write_adapter(base, tmp_path / "adapter"), LoadSettings(torch.float32, "none"))
    whole = load_file(merged(merge, tmp_path / "whole") / "model.safetensors")
    folder = merged(merge, tmp_path / "shards", max_shard_bytes=160_000)
    shards = sorted(folder.glob("*.safetensors"))
    assert [path.name for path in shards] == [f"model-{n:05d}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    found = [load_file(path) for path in shards]
    assert all(sum(tensor.nbytes for tensor in part.values()) <= 160_000 for part in found)
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in whole.values())}
    assert index["weight_map"] == {name: path.name for path, part in zip(shards, found, strict=True) for name in part}
    united = {name: tensor for part in found for name, tensor in part.items()}
    assert united.keys() == whole.keys()
    assert all(torch.equal(united[name], whole[name]) for name in whole)
    assert load_model(folder, torch.float32, "none").config == merge.config


def test_a_tensor_that_is_larger_than_a_shard_has_one_of_its_own() -> None:
    shapes = {name: torch.Size([n]) for name, n in (("a", 3), ("b", 9), ("c", 1), ("d", 3), ("e", 1))}
    assert plan_shards(shapes, torch.float32, 16) == [["a"], ["b"], ["c", "d"], ["e"]]
    assert plan_shards(shapes, torch.bfloat16, 8) == [["a"], ["b"], ["c", "d"], ["e"]]
    assert plan_shards(shapes, torch.float32, 1000) == [["a", "b", "c", "d", "e"]]


def test_no_shard_is_held_when_the_next_one_is_written(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_checkpoint()
    merge = open_merge(base, write_adapter(base, tmp_path / "adapter"), LoadSettings(torch.float32))
    earlier: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def save_and_watch(tensors: dict[str, torch.Tensor], *arguments: Any, **settings: Any) -> None:
        alive.append(sum(reference() is not None for reference in earlier))
        earlier.extend(weakref.ref(tensor) for tensor in tensors.values())
        save_file(tensors, *arguments, **settings)

    monkeypatch.setattr(safetensors_io, "save_file", save_and_watch)
    merged(merge, tmp_path / "merged", DEQUANTIZED, max_shard_bytes=100_000)
    assert len(alive) > 3
    assert set(alive) == {0}


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_config_says_the_dtype_of_the_files_in_its_own_dialect(
    tiny_checkpoint: Checkpoint, tmp_path: Path, key: str, dtype: torch.dtype
) -> None:
    base = Path(shutil.copytree(tiny_checkpoint(dtype=torch.bfloat16), tmp_path / "base"))
    before = {**json.loads((base / "config.json").read_text("utf-8")), key: "float64"}  # of what the tensors are not
    if key == "dtype":
        del before["torch_dtype"]
    (base / "config.json").write_text(json.dumps(before), "utf-8")
    merge = open_merge(base, write_adapter(base, tmp_path / "adapter"), LoadSettings(torch.float32, "none"))
    assert merge.base_dtype == torch.bfloat16
    folder = merged(merge, tmp_path / "merged", dtype=dtype)
    after = json.loads((folder / "config.json").read_text("utf-8"))
    assert after == {**before, key: str(dtype).removeprefix("torch.")}
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {dtype}


def test_what_belongs_to_the_model_comes_along(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "base"))
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja", "notes.txt"):
        (base / name).write_text(f"{{}} of {name}", "utf-8")
    merge = open_merge(base, write_adapter(base, tmp_path / "adapter"), LoadSettings(torch.float32, "none"))
    folder = merged(merge, tmp_path / "merged")
    companions = ["chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*companions, "config.json", "model.safetensors"])
    assert all((folder / name).read_bytes() == (base / name).read_bytes() for name in companions)
    assert {path.stat().st_mode for path in folder.iterdir()} == {
        (base / "notes.txt").stat().st_mode
    }  # all may read it


def test_values_that_the_dtype_cannot_hold_are_named(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint()
    merge = open_merge(base, write_adapter(base, tmp_path, size=1e6), LoadSettings(torch.float32, "none"))
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj\.weight: .*float16.*--dtype"):
        merge.build(ORIGINAL, torch.float16, torch.float32, "cpu")
    merge.build(ORIGINAL, torch.bfloat16, torch.float32, "cpu")


def test_a_damaged_base_is_not_merged(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "base"))
    adapter = write_adapter(base, tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(UserError, match=r"up_proj\.weight .*NaN"):
        merged(open_merge(base, adapter, LoadSettings(torch.float32, "none")), tmp_path / "merged")


def test_only_an_earlier_merge_is_replaced(tmp_path: Path) -> None:
    refuse_output(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    refuse_output(tmp_path / "empty")
    earlier = tmp_path / "earlier"
    write_folder(earlier, [("model.safetensors", b"x")], {merge_module.FACT: ORIGINAL})
    refuse_output(earlier)
    (earlier / "model.safetensors").unlink()  # a damaged one too
    refuse_output(earlier)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("file", "is not a folder"),
        ("link to nothing", "is not a folder"),
        ("checkpoint", "holds model.safetensors"),
        ("adapter", "holds manifest.json, model.safetensors"),
        ("merge and notes", "holds notes.txt"),
    ],
)
def test_whatever_else_is_there_stays(tmp_path: Path, content: str, problem: str) -> None:
    output = tmp_path / "output"
    if content == "file":
        output.write_text("mine", "utf-8")
    elif content == "link to nothing":
        output.symlink_to(tmp_path / "nothing")
    elif content == "checkpoint":
        output.mkdir()
        (output / "model.safetensors").write_bytes(b"x")
    else:
        facts = {"step": 3} if content == "adapter" else {merge_module.FACT: ORIGINAL}
        write_folder(output, [("model.safetensors", b"x")], facts)
        if content != "adapter":
            (output / "notes.txt").write_text("mine", "utf-8")
    with pytest.raises(UserError) as caught:
        refuse_output(output)
    assert str(caught.value).startswith(f"{output}: {problem}")
    assert "--output" in str(caught.value)


def test_a_disk_without_room_is_named_with_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(merge_module.shutil, "disk_usage", lambda path: usage(0, 0, 5_000 if path == tmp_path else 0))
    refuse_full_disk(tmp_path / "not" / "yet" / "there", 5_000)
    with pytest.raises(StorageError) as caught:
        refuse_full_disk(tmp_path / "there", 5_001)
    assert str(caught.value).startswith(f"{tmp_path / 'there'}: 5,001 bytes")
    assert all(part in str(caught.value) for part in (f"5,000 are free in {tmp_path}", "--output", "--dtype"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_size_that_is_asked_for_is_the_size_of_the_tensors(
    tiny_checkpoint: Checkpoint, tmp_path: Path, dtype: torch.dtype
) -> None:
    base = tiny_checkpoint(tie=False)
    merge = open_merge(base, write_adapter(base, tmp_path / "adapter"), LoadSettings(torch.float32, "none"))
    folder = merged(merge, tmp_path / "merged", dtype=dtype)
    tensors = load_file(folder / "model.safetensors")
    assert merge.num_bytes(dtype) == sum(tensor.nbytes for tensor in tensors.values())
