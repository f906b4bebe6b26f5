"""What other programs make of an adapter is read with a note where it is the same, and named where it is not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.adapters.attach import attach, lora_parameters
from minilora.adapters.merge import open_merge
from minilora.adapters.peft_config import BaseModel
from minilora.adapters.peft_files import load_adapter
from minilora.config import LoraConfig
from minilora.errors import UserError
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.weights.load import LoadSettings
from tests.conftest import save_adapter

LoadModel = Callable[..., Qwen2ForCausalLM]
Rename = Callable[[str], str]
OURS = "base_model.model."
EMBEDDING = f"{OURS}model.embed_tokens.weight"


def in_memory(key: str) -> str:
    """As a state_dict has it: with the adapter's name."""
    if "magnitude" in key:
        return f"{key}.default.weight"
    return key.replace(".weight", ".default.weight") if ".lora_" in key else key


SPELLINGS: dict[str, Rename] = {
    "adapter's name": in_memory,
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled layers": lambda key: key.replace("self_attn.", "_orig_mod.self_attn.").replace("mlp.", "_orig_mod.mlp."),
    "data parallel": lambda key: f"module.{in_memory(key)}",
    "prefix twice": lambda key: OURS + key,
    "no prefix": lambda key: key.removeprefix(OURS),
    "without the head's model": lambda key: key.removeprefix(f"{OURS}model."),
    "one of its own": lambda key: f"policy.{key}",
}


@pytest.fixture
def trained(tiny_model: LoadModel) -> Qwen2ForCausalLM:
    model = tiny_model()
    attach(model, LoraConfig(r=4, use_dora=True))
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.uniform_(-0.1, 0.1)
    return model


@pytest.fixture
def folder(trained: Qwen2ForCausalLM, tmp_path: Path) -> Path:
    save_adapter(trained, tmp_path, LoraConfig(r=4, use_dora=True), BaseModel("tiny"))
    return tmp_path


def rewrite(folder: Path, rename: Rename = str, **more: torch.Tensor) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {rename(key): value for key, value in load_file(path).items()}
    save_file({**tensors, **{rename(key): value for key, value in more.items()}}, path)


def is_equal(a: Qwen2ForCausalLM, b: Qwen2ForCausalLM) -> bool:
    return all(torch.equal(x, y) for x, y in zip(lora_parameters(a), lora_parameters(b), strict=True))


@pytest.mark.parametrize("rename", SPELLINGS.values(), ids=SPELLINGS)
def test_a_uniform_spelling_of_the_keys_is_read_with_a_note(
    rename: Rename, folder: Path, trained: Qwen2ForCausalLM, tiny_model: LoadModel, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    rewrite(folder, rename, **{EMBEDDING: model.model.embed_tokens.weight.detach().clone()})
    load_adapter(model, folder)
    assert is_equal(model, trained)
    keys, tensors = capsys.readouterr().err.splitlines()
    key = f"{OURS}model.layers.0.mlp.down_proj.lora_A.weight"
    assert rename(EMBEDDING) != EMBEDDING or rename(key) in keys
    assert "its keys are not peft's" in keys
    assert tensors.endswith("model.embed_tokens.weight: equal to the base model's, left out")


def test_peft_s_own_keys_are_read_without_a_note(
    folder: Path, tiny_model: LoadModel, capsys: pytest.CaptureFixture[str]
) -> None:
    load_adapter(tiny_model(), folder)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key if "layers.0" in key else key.removeprefix(OURS),
        lambda key: key.replace("model.layers", "model.language_model.layers"),
    ],
    ids=["two spellings", "a part of another model"],
)
def test_keys_of_two_spellings_or_of_another_architecture_are_refused(
    rename: Rename, folder: Path, tiny_model: LoadModel
) -> None:
    rewrite(folder, rename)
    with pytest.raises(UserError, match="unknown to the model"):
        load_adapter(tiny_model(), folder)


def test_two_adapters_in_a_file_are_refused(folder: Path, tiny_model: LoadModel) -> None:
    key = f"{OURS}model.layers.0.mlp.down_proj.lora_A"
    rewrite(folder, **{f"{key}.other.weight": torch.zeros(4, 4)})
    with pytest.raises(UserError, match="holds several adapters, expected one"):
        load_adapter(tiny_model(), folder)


@pytest.mark.parametrize("key", [EMBEDDING, f"{OURS}model.norm.weight", f"{OURS}lm_head.weight"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_equals_the_base_is_left_out_and_what_differs_is_refused(
    key: str, tied: bool, tiny_checkpoint: Callable[..., Path], tiny_model: LoadModel, tmp_path: Path
) -> None:
    base = tiny_checkpoint(tie=tied)
    model = tiny_model(tie=tied)
    attach(model, LoraConfig(r=4))
    save_adapter(model, tmp_path, LoraConfig(r=4), BaseModel("tiny"))
    own = (
        {**dict(model.named_parameters()), "lm_head.weight": model.head_weight}[key.removeprefix(OURS)].detach().clone()
    )
    settings = LoadSettings(torch.float32)
    rewrite(tmp_path, **{key: own})
    load_adapter(tiny_model(tie=tied), tmp_path)
    open_merge(base, tmp_path, settings)
    for other in (own + 0.1, torch.cat([own, own[:1]])):
        rewrite(tmp_path, **{key: other})
        for load in (
            lambda: load_adapter(tiny_model(tie=tied), tmp_path),
            lambda: open_merge(base, tmp_path, settings),
        ):
            with pytest.raises(UserError, match=rf"{key} .+ is not as in the base model.+; check --base, or merge"):
                load()


def test_tensors_that_zero_3_left_empty_are_named(folder: Path, tiny_model: LoadModel) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({key: torch.zeros(0) for key in load_file(path)}, path)
    with pytest.raises(UserError, match=r"has the shape \[0\] .+DeepSpeed ZeRO-3 .+zero_to_fp32\.py"):
        load_adapter(tiny_model(), folder)


@pytest.mark.parametrize("is_named", [True, False])
def test_an_adapter_of_mlx_is_named(tmp_path: Path, tiny_model: LoadModel, is_named: bool) -> None:
    content = '{"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}}' if is_named else "{}"
    (tmp_path / "adapter_config.json").write_text(content, "utf-8")
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.zeros(4, 2)}, tmp_path / "adapters.safetensors")
    with pytest.raises(UserError, match=r"is an adapter of MLX, .+ mlx_lm fuse"):
        load_adapter(tiny_model(), tmp_path)
