"""The other side of every comparison: tiny Qwen2 checkpoints as transformers writes them, and peft over them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from minilora.adapters.attach import iter_lora_weights
from minilora.qlora.batch import MicroBatch, pack
from minilora.qlora.loss import head_logits
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.prompt import ChatTokenizer, ClassificationPrompt, Example

transformers.utils.logging.disable_progress_bar()

VOCAB_SIZE = 576  # more rows than the tiny tokenizer has ids
IGNORED = -100  # transformers' label of a position that does not count
REVIEWS = (
    ("房间干净，前台热情，早餐也不错，下次还住这里。", 1),
    ("屏幕有坏点，客服不理人。差！", 0),
    ("The staff was kind, 但是隔音太差了 😡", 0),
    ("好", 1),
    ("一口气读完，文字很美；价格120元，值得。", 1),
)


def write_reference(
    folder: Path,
    *,
    tie: bool = True,
    heads: int = 4,
    kv_heads: int = 2,
    dialect: str = "transformers-5",
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A random Qwen2 saved by transformers itself.

    Every tensor is random, also the biases and norms that transformers starts at 0 and 1: one that is never
    added would otherwise go unseen.
    """
    config = transformers.Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,  # neither implementation's default
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=tie,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.1 * noise if "norm" in name else 0.15 * noise)
    model.to(dtype).save_pretrained(folder, max_shard_size="100KB" if sharded else "1GB")
    if dialect == "classic":
        _write_classic_config(folder / "config.json")
    return folder


def _write_classic_config(path: Path) -> None:
    """The same configuration as transformers 4 wrote it."""
    content = json.loads(path.read_text("utf-8"))
    content["rope_theta"] = content.pop("rope_parameters")["rope_theta"]
    content["torch_dtype"] = content.pop("dtype")
    del content["layer_types"]
    path.write_text(json.dumps(content), "utf-8")


def load_reference(folder: Path, nf4: bool = False) -> transformers.PreTrainedModel:
    """transformers' model in float32, its projections in NF4 through its own bitsandbytes integration if asked.

    In NF4 it is left in training mode, which differs in nothing else without dropout: in evaluation mode
    bitsandbytes multiplies in bfloat16 on processors that can, whatever the compute type.
    """
    arguments: dict[str, Any] = {"dtype": torch.float32}
    if nf4:
        arguments["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **arguments).train(nf4)


def build_examples(tokenizer: ChatTokenizer, reviews: Sequence[tuple[str, int]] = REVIEWS) -> list[Example]:
    """Classification examples of several lengths that share a prefix."""
    prompt = build_prompt(tokenizer)
    return prompt.examples([text for text, _ in reviews], [label for _, label in reviews])


def build_prompt(tokenizer: ChatTokenizer) -> ClassificationPrompt:
    """The prompt of `build_examples`."""
    return ClassificationPrompt(
        tokenizer=tokenizer,
        system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        instruction="判断下面评论的情感，只回答“正面”或“负面”。\n评论：",
        labels=("负面", "正面"),
        max_length=512,
    )


@torch.no_grad()
def our_logits(model: Qwen2ForCausalLM, examples: Sequence[Example], share_prefix: bool = True) -> list[torch.Tensor]:
    """(n - 1, V) logits of each example's rows, from one packed forward pass; the last id has no row."""
    batch = pack(examples, share_prefix)
    hidden = model.model(batch.input_ids, batch.position_ids, batch.groups)
    return [head_logits(hidden[rows], model.head_weight) for rows in example_rows(batch, examples)]


def example_rows(batch: MicroBatch, examples: Sequence[Example]) -> list[list[int]]:
    """The packed rows of each example: those of the shared prefix, then its own."""
    prefix = batch.groups[-1].prefix
    rows, start = [], prefix
    for example in examples:
        end = start + len(example.input_ids) - 1 - prefix
        rows.append([*range(prefix), *range(start, end)])
        start = end
    return rows


@torch.no_grad()
def reference_logits(model: torch.nn.Module, examples: Sequence[Example]) -> list[torch.Tensor]:
    """The same from transformers or peft: each example alone, without padding or packing."""
    return [model(input_ids=torch.tensor([example.input_ids])).logits[0, :-1] for example in examples]


def reference_loss(model: torch.nn.Module, examples: Sequence[Example]) -> torch.Tensor:
    """transformers' own loss of the padded batch: the mean over the supervised tokens of all examples."""
    length = max(len(example.input_ids) for example in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        n = len(example.input_ids)
        ids[row, :n] = torch.tensor(example.input_ids)
        labels[row, :n] = torch.where(torch.tensor(example.supervised), ids[row, :n], IGNORED)
        mask[row, :n] = 1
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def randomize_adapter(model: Qwen2ForCausalLM, seed: int = 0, size: float = 0.1) -> None:
    """Gives every B random values: while B is 0, A has no gradient and neither changes any logit. Moves all else."""
    generator = torch.Generator().manual_seed(seed)
    for _, w in iter_lora_weights(model):
        w.lora_B.data.copy_(size * torch.randn(w.lora_B.shape, generator=generator))
    for _, w in iter_lora_weights(model):
        for parameter in (w.lora_magnitude_vector, w.bias):
            if parameter is not None:
                parameter.data += size * torch.randn(parameter.shape, generator=generator)


def our_tensors(model: Qwen2ForCausalLM) -> dict[str, torch.nn.Parameter]:
    """A and B by path, named as in `peft_tensors`."""
    return {
        f"{path}.{name}": getattr(layer, name)
        for path, layer in iter_lora_weights(model)
        for name in ("lora_A", "lora_B")
    }


def peft_tensors(model: peft.PeftModel) -> dict[str, torch.nn.Parameter]:
    """All trainable tensors of a peft model, by path."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def wrap_with_peft(
    base: transformers.PreTrainedModel, adapter: dict[str, torch.Tensor], **arguments: Any
) -> peft.PeftModel:
    """`base` behind a peft adapter in training mode, whose A and B are filled from `adapter`, all of them."""
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **arguments)).train()
    slots = peft_tensors(model)
    assert slots.keys() == adapter.keys()
    for name, slot in slots.items():
        slot.data.copy_(adapter[name])
    return model
