"""What the tests share: a small real tokenizer, tiny random Qwen2.5 checkpoints, and a few reviews.

Nothing here touches the network, and everything is made from fixed seeds.
"""

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from minilora.adapters.peft_config import BaseModel
from minilora.adapters.peft_files import adapter_files
from minilora.config import LoraConfig
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.prompt import ChatTokenizer
from minilora.weights.hf_config import parse_config
from minilora.weights.load import load_model

# Ignored where a shell's background or `nohup` started this, and then in every child as well.
for _number, _handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if signal.getsignal(getattr(signal, _number, signal.SIGINT)) == signal.SIG_IGN:
        signal.signal(getattr(signal, _number), _handler)

torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it brings

# The pattern of Qwen2.5's tokenizer.json.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PLACES = ("这家酒店", "这个房间", "这本书", "这台电脑", "前台的服务", "早餐", "快递", "这里的环境")
GOOD = ("非常好", "好", "让人满意", "很不错，值得推荐", "干净又舒服", "好得出乎意料")
BAD = ("非常差", "差", "让人失望", "很糟糕，不推荐", "又脏又吵", "差得出乎意料")
ENDINGS = ("。", "！", "，下次再说。", "，价格是120元。")
TEMPLATE_TEXT = (
    "system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "user\n判断下面评论的情感倾向，只回答正面或负面。\n评论：",
    "评论：“好”",  # a colon and an opening quote become one token, as in Qwen2.5
    "assistant\n",
)
LABEL_WORDS = ("正面", "负面")
LONG_LABEL_WORDS = ("差评", "好评")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", action="store_true", help="tests/faults with their normal counts: minutes")
    parser.addoption("--long", action="store_true", help="tests/faults with a release's counts: an hour")


@pytest.fixture
def break_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], None]:
    """break_package("matplotlib", "raise OSError('no home folder')"): what Python runs when it is imported."""

    def replace(name: str, source: str) -> None:
        folder = tmp_path / "site-packages" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(source, "utf-8")
        monkeypatch.syspath_prepend(folder.parent)
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)

    return replace


def make_reviews(count: int, seed: int) -> list[tuple[str, int]]:
    """`count` short reviews with their label, 1 where a good word stands in them; half of each."""
    chooser = random.Random(seed)
    rows = []
    for index in range(count):
        label = index % 2
        text = chooser.choice(PLACES) + chooser.choice(GOOD if label else BAD) + chooser.choice(ENDINGS)
        rows.append((text, label))
    return rows


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose tokenizer.json is laid out as Qwen2.5's, with a vocabulary of some 500 ids.

    正面 and 负面 are one token each; 差评 and 好评 are more than one.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    corpus = [text for text, _ in make_reviews(48, seed=1)] + [*TEMPLATE_TEXT, *LABEL_WORDS] * 20
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    controls = [
        AddedToken(name, special=True, normalized=False) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    ]
    tokenizer.add_special_tokens(controls)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    assert all(len(tokenizer.encode(word).ids) == 1 for word in LABEL_WORDS)
    assert all(len(tokenizer.encode(word).ids) >= 2 for word in LONG_LABEL_WORDS)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def chat_tokenizer(tiny_tokenizer: Path) -> ChatTokenizer:
    """`tiny_tokenizer` as the package reads it."""
    return ChatTokenizer(tiny_tokenizer)


def copy_with_system(checkpoint: Path, folder: Path, system: str) -> Path:
    """A copy of a checkpoint whose chat template has a system turn by default."""
    shutil.copytree(checkpoint, folder)
    template = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{{{{ messages[0].content }}}}<|im_end|>\n"
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    return folder


def write_checkpoint(
    folder: Path,
    tokenizer_json: str,
    *,
    tie: bool = True,
    heads: int = 4,
    kv_heads: int = 2,
    hidden: int = 64,
    layers: int = 2,
    intermediate: int = 128,
    dtype: torch.dtype = torch.float32,
    sharded: bool = False,
    seed: int = 0,
) -> Path:
    """Writes a random Qwen2.5 in Hugging Face's layout (the classic dialect of config.json) into `folder`."""
    vocab_size = 576  # more rows than ids, as in Qwen2.5
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "max_window_layers": layers,
        "sliding_window": 2048,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": tie,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "tokenizer.json").write_text(tokenizer_json, "utf-8")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in Qwen2ForCausalLM(parse_config(config)).named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        tensors[name] = (1 + 0.1 * noise if "norm" in name else 0.15 * noise).to(dtype).contiguous()
    if not sharded:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        shards.setdefault(f"model-{index % 2 + 1:05d}-of-00002.safetensors", {})[name] = tensor
    for shard, part in shards.items():
        save_file(part, folder / shard, metadata={"format": "pt"})
    index_content = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: shard for shard, part in shards.items() for name in part},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_content), "utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function: `write_checkpoint`'s keyword arguments -> a folder, made once for equal arguments.

    Folders are shared between tests: copy one before you change it.
    """
    made: dict[str, Path] = {}
    tokenizer_json = (tiny_tokenizer / "tokenizer.json").read_text("utf-8")

    def make(**arguments: Any) -> Path:
        key = repr(sorted(arguments.items()))
        if key not in made:
            made[key] = write_checkpoint(tmp_path_factory.mktemp("model"), tokenizer_json, **arguments)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Callable[..., Path]) -> Callable[..., Qwen2ForCausalLM]:
    """A function that loads a tiny checkpoint: a new model at every call."""

    def load(
        quantization: str = "none",
        dtype: torch.dtype = torch.float32,
        double_quantization: bool = True,
        **arguments: Any,
    ) -> Qwen2ForCausalLM:
        return load_model(tiny_checkpoint(**arguments), dtype, quantization, double_quantization)

    return load


@pytest.fixture(scope="session")
def processed_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as scripts/preprocess_data.py writes it: 48, 12 and 12 reviews. Shared: copy before you change it."""
    folder = tmp_path_factory.mktemp("processed")
    for seed, (split, count) in enumerate((("train", 48), ("validation", 12), ("test", 12))):
        lines = [
            json.dumps({"text": t, "label": y}, ensure_ascii=False) for t, y in make_reviews(count, seed=10 + seed)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8", newline="\n")
    return folder


def save_adapter(model: Qwen2ForCausalLM, folder: Path, lora_config: LoraConfig, base: BaseModel) -> None:
    """The two files of the model's adapter in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in adapter_files(model, lora_config, base):
        (folder / name).write_bytes(content)
