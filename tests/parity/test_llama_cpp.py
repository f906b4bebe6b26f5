"""llama.cpp answers as we do: with a merged GGUF file, and with the base's and the adapter's.

The real checkpoint needs MINILORA_REAL_MODEL, 4 GB of memory and 3 GB of disk. `-s` shows the answers.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from minilora.adapters.attach import attach
from minilora.adapters.init import initialize
from minilora.adapters.merge import ORIGINAL, open_merge, write_merged
from minilora.adapters.peft_config import BaseModel
from minilora.adapters.peft_files import load_adapter
from minilora.config import LoraConfig
from minilora.data.hub import local_folder
from minilora.generation.decode import DecodeState
from minilora.qlora.prompt import ChatTokenizer
from minilora.weights.gguf import write_gguf, write_gguf_adapter
from minilora.weights.hf_config import name_end_of_turn, read_config
from minilora.weights.load import LoadSettings, load_model
from tests.conftest import save_adapter
from tests.parity.reference import randomize_adapter

pytestmark = pytest.mark.parity

REAL_MODEL = os.environ.get("MINILORA_REAL_MODEL")
CONFIGS = {
    "plain": LoraConfig(r=4, alpha=12, dropout=0),
    "rslora": LoraConfig(r=4, alpha=12, dropout=0, use_rslora=True),
    "patterns": LoraConfig(
        r=4, alpha=12, dropout=0, rank_pattern={"q_proj": 2, "1.mlp.up_proj": 8}, alpha_pattern={"v_proj": 3}
    ),
    "pissa": LoraConfig(r=4, alpha=12, dropout=0, init_lora_weights="pissa", target_modules=["k_proj", "down_proj"]),
}
LEAD = 0.05  # of the best token's log-probability: nearer ones may change places in float16
QUESTIONS = ("这家酒店非常好。", "早餐很糟糕，不推荐。", "写一句话。")


Answer = Callable[[list[int]], tuple[list[int], list[float]]]


def may_answer(folder: Path) -> torch.Tensor:
    """(V,) ids that answers are made of: llama.cpp's server does not tell of a token that ends within a character."""
    tokenizer, vocabulary = ChatTokenizer(folder), json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    allowed = torch.zeros(read_config(folder).vocab_size, dtype=torch.bool)
    for token in [*vocabulary["vocab"].values(), tokenizer.im_end]:
        allowed[token] = "\ufffd" not in tokenizer.decode([token])
    return allowed


def llama_cpp(base: Path, model: Path, adapter: Path | None = None, most: int = 12) -> Answer:
    """A function: ids -> llama.cpp's greedy answer of at most `most` tokens, and their log-probabilities."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="pip install -e '.[llamacpp]'")
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 512, 1, 0
    params.cpuparams.n_threads = torch.get_num_threads()
    # By default keys and values are float16, and the queries within flash attention.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.verbosity = False, -1
    server = xllamacpp.Server(params)
    barred = [[token, False] for token in (~may_answer(base)).nonzero()[:, 0].tolist()]

    def answer(ids: list[int]) -> tuple[list[int], list[float]]:
        asked = {"prompt": ids, "n_predict": most, "temperature": 0, "repeat_penalty": 1.0, "n_probs": 1}
        (choice,) = server.handle_completions({**asked, "logit_bias": barred})["choices"]
        tokens = choice["logprobs"]["content"]
        return [token["id"] for token in tokens], [token["logprob"] for token in tokens]

    return answer


def ours(base: Path, adapter: Path, most: int = 12) -> Answer:
    """The same of our model, in float32, as far as each token leads by LEAD.

    The token that closes the turn ends the answer and is a part of it.
    """
    model = load_model(base, torch.float32, "none").eval()
    load_adapter(model, adapter)
    im_end, allowed = ChatTokenizer(base).im_end, may_answer(base)

    def answer(ids: list[int]) -> tuple[list[int], list[float]]:
        state, tokens, logprobs = DecodeState(model, ids), list[int](), list[float]()
        while len(tokens) < most and im_end not in tokens:
            found = state.next_logits().log_softmax(-1)
            (first, second), (token, _) = found.masked_fill(~allowed, -torch.inf).topk(2)
            if first - second < LEAD:
                break
            tokens.append(int(token))
            logprobs.append(first.item())
            state.ids.append(tokens[-1])
        return tokens, logprobs

    return answer


def prompts(folder: Path) -> list[list[int]]:
    tokenizer = ChatTokenizer(folder)
    begin = tokenizer.open_turn("system", "You are a helpful assistant.") + tokenizer.close_turn()
    end = tokenizer.close_turn() + tokenizer.open_turn("assistant")
    return [begin + tokenizer.open_turn("user", question) + end for question in QUESTIONS]


def write_adapter(base: Path, folder: Path, config: LoraConfig, size: float = 0.1) -> Path:
    model = load_model(base, torch.float32, "none")
    attach(model, config)
    if config.init_lora_weights == "pissa":
        initialize(model, base, "pissa")
    randomize_adapter(model, size=size)
    save_adapter(model, folder, config, BaseModel("tiny"))
    return folder


def write_files(base: Path, adapter: Path, folder: Path, kind: str) -> tuple[Path, Path, Path]:
    """GGUF files of the merged model, of the base and of the adapter."""
    merge = open_merge(base, adapter, LoadSettings(torch.float32, "none"))
    (folder / "merged").mkdir()
    dtype = {"f32": torch.float32, "f16": torch.float16}[kind]
    write_merged(merge, ORIGINAL, dtype, folder / "merged", max_shard_bytes=10**10)
    files = (folder / "merged.gguf", folder / "base.gguf", folder / "adapter.gguf")
    write_gguf(folder / "merged", files[0], kind, "merged")
    shutil.rmtree(folder / "merged")
    write_gguf(base, files[1], kind, "base")
    write_gguf_adapter(merge.pairs(), files[2], kind, merge.lora_config.alpha)
    return files


@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_llama_cpp_answers_as_the_adapter_does(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, config: LoraConfig, kind: str
) -> None:
    base = tiny_checkpoint()
    adapter = write_adapter(base, tmp_path / "adapter", config)
    merged, plain, lora = write_files(base, adapter, tmp_path, kind)
    expected = list(map(ours(base, adapter), prompts(base)))
    assert sum(len(tokens) for tokens, _ in expected) >= 12
    without = llama_cpp(base, plain)
    assert any(without(ids)[0][: len(e[0])] != e[0] for ids, e in zip(prompts(base), expected, strict=True))
    for answer in (llama_cpp(base, merged), llama_cpp(base, plain, lora)):
        for ids, (tokens, logprobs) in zip(prompts(base), expected, strict=True):
            found, found_logprobs = answer(ids)
            assert found[: len(tokens)] == tokens
            # Float32 sums in another order; in float16 weights and activations are rounded to 11 bits.
            assert found_logprobs[: len(tokens)] == pytest.approx(logprobs, abs={"f32": 1e-4, "f16": 0.03}[kind])


def test_a_merged_base_model_stops_in_transformers(tmp_path: Path) -> None:
    """The package's own model answers and closes its turn; with a base model's files it would talk on."""
    folder = tmp_path / "base"
    shutil.copytree(local_folder("minilora/assets/tiny-qwen2.5") or "", folder)
    for name, key, value in (
        ("config.json", "eos_token_id", 0),
        ("generation_config.json", "eos_token_id", 0),
        ("tokenizer_config.json", "eos_token", "<|endoftext|>"),
    ):
        content = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps({**content, key: value}), "utf-8")
    ids = torch.tensor([prompts(folder)[0]])

    def length() -> int:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        generated: Any = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40)
        return int(generated.shape[1] - ids.shape[1])

    assert length() == 40
    im_end = ChatTokenizer(folder).im_end
    name_end_of_turn(folder, im_end)
    assert length() < 40
    assert transformers.AutoTokenizer.from_pretrained(folder).eos_token_id == im_end


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not REAL_MODEL, reason="MINILORA_REAL_MODEL is not set")
@pytest.mark.parametrize("kind", ["f16", "f32"])
def test_llama_cpp_answers_as_a_real_model_does(tmp_path: Path, kind: str) -> None:
    base = Path(REAL_MODEL or "")
    config = LoraConfig(r=8, alpha=16, dropout=0, use_rslora=True, alpha_pattern={"v_proj": 4})
    adapter = write_adapter(base, tmp_path / "adapter", config, size=0.003)  # with more it talks nonsense
    expected = list(map(ours(base, adapter, most=24), prompts(base)))
    merged, plain, lora = write_files(base, adapter, tmp_path, kind)
    without = llama_cpp(base, plain, most=24)
    assert any(without(ids)[0][: len(e[0])] != e[0] for ids, e in zip(prompts(base), expected, strict=True))
    del without
    for name, files in (("merged", (merged,)), ("adapter", (plain, lora))):
        answer = llama_cpp(base, *files, most=24)
        for ids, (tokens, logprobs) in zip(prompts(base), expected, strict=True):
            found, found_logprobs = answer(ids)
            worst = max(abs(a - b) for a, b in zip(found_logprobs, logprobs, strict=False))
            print(
                f"\n{kind} {name}: {ChatTokenizer(base).decode(found)!r}, {len(tokens)} tokens compared, their "
                f"log-probabilities within {worst:.1e}"
            )
            assert found[: len(tokens)] == tokens
            assert worst < 0.01  # at most 2.1e-3 in f16 and 5.7e-4 in f32 (Qwen2.5-Coder-0.5B-Instruct)
