"""What the stages of `gpu_check.py` share: their options, the findings that they write, random models and texts.

A finding is a line of JSON in OUTPUT_DIR/gpu_check.jsonl, written the moment it is found, so that a stage that crashes
or hangs loses none:

    {"stage": "kernels", "name": "RMSNorm", "passed": true, "values": {"bfloat16": 0.0021}, "detail": {...}}

A check has `passed`, a figure has not, and what could not be measured says why under `skipped`. `values` are for the
table, `detail` for whoever looks for the cause.

The weights are random, of Qwen2.5's shapes, and drawn on the device. One channel of the key and query biases is as
large as in the real models, because that is where rounding does harm: attention scores of some hundreds.
"""

import json
import math
import random
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from minilora.adapters.attach import attach, iter_lora_weights
from minilora.build import choose_dtype
from minilora.config import Config, LoraConfig
from minilora.planning.plan import SIZES
from minilora.qlora.lora import DropoutSeed
from minilora.qlora.model import Qwen2Config, Qwen2ForCausalLM
from minilora.qlora.nf4 import Linear4bit, quantize
from minilora.qlora.prompt import Example
from minilora.weights.flash_probe import has_flash
from minilora.weights.stacked_scales import stack_scales

ROOT = Path(__file__).parents[1]
FILE = "gpu_check.jsonl"
NOT_ON_CPU = "not measured on a cpu"
EMBEDDED = ROOT / "minilora" / "assets" / "tiny-qwen2.5"

KEY_BIAS, QUERY_BIAS = 145.0, 20.0  # the largest of the key biases in layer 0 of Qwen2.5-0.5B; scores of 360 with both
PREFIX_TOKENS = 40  # of the instruction that all reviews begin with
ANSWER_TOKENS = 2
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL_VOCAB = 512
SMALL_LAYERS = 2

# ---- Options and findings


@dataclass(frozen=True)
class Options:
    """What a stage is told; small enough to be handed to its process as JSON.

    Attributes:
        stage: its name.
        device: "cuda" or "cpu".
        small: tiny sizes, to see that everything runs.
        output_dir: of the findings.
        work_dir: for files that are not kept, a gigabyte of them.
    """

    stage: str
    device: str
    small: bool
    output_dir: str
    work_dir: str

    def to_json(self) -> str:
        """For the command line of the stage's process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Options":
        """The inverse of `to_json`."""
        return cls(**json.loads(text))

    @property
    def is_gpu(self) -> bool:
        """Whether launches, waits and allocations can be measured."""
        return self.device == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """What a run computes in: bfloat16, except on a GPU that has no attention kernel for long examples in it."""
        return choose_dtype(Config(), torch.device(self.device)) if self.is_gpu else torch.bfloat16

    def sizes(self, size: str, layers: int | None = None) -> Qwen2Config:
        """Of Qwen2.5 "0.5B" or "7B", with fewer layers if asked for; tiny ones with `small`."""
        config = SIZES[size]
        if self.small:
            config = replace(config, vocab_size=SMALL_VOCAB, num_hidden_layers=SMALL_LAYERS, **SMALL)
        return replace(config, num_hidden_layers=min(layers or config.num_hidden_layers, config.num_hidden_layers))


class Findings:
    """Writer of a stage's findings."""

    def __init__(self, options: Options):
        self._path = Path(options.output_dir) / FILE
        self._stage = options.stage

    def check(self, name: str, passed: bool, detail: Any = None, **values: Any) -> None:
        """Something that must hold."""
        self._write({"name": name, "passed": bool(passed), "values": values, "detail": detail})

    def figure(self, name: str, detail: Any = None, **values: Any) -> None:
        """Something that was measured."""
        self._write({"name": name, "values": values, "detail": detail})

    def skip(self, name: str, reason: str) -> None:
        """Something that could not be measured here."""
        self._write({"name": name, "skipped": reason})

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Makes an exception within the block a failed check, so that the stage continues behind it."""
        try:
            yield
        except Exception as error:
            traceback.print_exc(file=sys.stderr)  # the stage's log
            self.check(name, False, error=f"{type(error).__name__}: {error}"[:500])

    def _write(self, row: dict[str, Any]) -> None:
        row = {"stage": self._stage, **{key: value for key, value in row.items() if value not in (None, {})}}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(row), ensure_ascii=False) + "\n")


def read_findings(folder: Path) -> list[dict[str, Any]]:
    """All findings of a run so far."""
    path = folder / FILE
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def _plain(value: Any) -> Any:
    """What JSON can hold: a NaN or an infinity becomes a word."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is right; NaN where one of them has a NaN."""
    found, exact = found.detach().double().cpu(), exact.detach().double().cpu()
    return float((found - exact).norm() / exact.norm().clamp(min=1e-30))


def largest(errors: Iterable[float]) -> float:
    """The largest, where NaN is larger than all: Python's max would lose it."""
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


# ---- Random models


class RandomWeights:
    """Draws the weights of a model by their names in a checkpoint, from one generator on the device."""

    def __init__(self, config: Qwen2Config, device: str, dtype: torch.dtype, large_keys: bool = True):
        self._config, self._device, self._dtype, self._large_keys = config, device, dtype, large_keys
        self._generator = torch.Generator(device).manual_seed(0)

    def draw(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """The tensor `name`: N(0, 0.02) matrices, norms around 1, N(0, 1) biases and in them the large channel."""
        value = torch.empty(tuple(shape), device=self._device, dtype=self._dtype).normal_(generator=self._generator)
        if len(shape) == 2:
            return value.mul_(0.02)
        if name.endswith("norm.weight"):
            return 1 + 0.1 * value
        if not self._large_keys:
            return value
        slowest = self._config.head_dim // 2 - 1  # its pair turns slowest, so the bias survives rotary embedding
        if "k_proj" in name:
            value[slowest] = KEY_BIAS  # of the first key/value head
        if "q_proj" in name:
            value[slowest :: self._config.head_dim] = QUERY_BIAS
        return value


def random_model(
    config: Qwen2Config, device: str, dtype: torch.dtype, lora: LoraConfig, quantization: str = "nf4"
) -> tuple[Qwen2ForCausalLM, DropoutSeed]:
    """A model in training mode with an adapter, whose B is zero, and its dropout seed."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    weights = RandomWeights(config, device, dtype)
    for path, module in list(model.named_modules()):
        drawn = {
            name: weights.draw(f"{path}.{name}", parameter.shape)
            for name, parameter in module.named_parameters(recurse=False)
        }
        if isinstance(module, nn.Linear) and path != "lm_head" and quantization != "none":
            parent, _, leaf = path.rpartition(".")
            quantized = Linear4bit(quantize(drawn["weight"], quantization), drawn.get("bias"))
            setattr(model.get_submodule(parent), leaf, quantized)
            continue
        for name, value in drawn.items():
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    for layer in model.model.layers:
        stack_scales(layer)
    if has_flash(model.head_weight.device, dtype, config.head_dim):
        model.model.flash_attention = model.head_weight.device, dtype
    dropout_seed = attach(model, lora)
    dropout_seed.set(0, 1, 0)
    return model.train(), dropout_seed


def fill_adapter(model: nn.Module) -> None:
    """Gives every B random values, the same on every device, so that A has a gradient too."""
    generator = torch.Generator().manual_seed(1)
    for _, w in iter_lora_weights(model):
        w.lora_B.data.copy_(torch.empty(w.lora_B.shape).normal_(0, 0.02, generator=generator))


def write_checkpoint(config: Qwen2Config, folder: Path, device: str) -> None:
    """A checkpoint of random bfloat16 weights and the embedded model's tokenizer, as transformers reads it too.

    Without the large channel: in float32 too, two right attentions over it differ by more than `gate.py` allows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((EMBEDDED / name).read_bytes())
    content = json.loads((EMBEDDED / "config.json").read_text("utf-8"))
    config = replace(config, vocab_size=max(config.vocab_size, content["vocab_size"]))
    content |= {"max_position_embeddings": 32_768, **{k: v for k, v in asdict(config).items() if v is not None}}
    (folder / "config.json").write_text(json.dumps(content), "utf-8")
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Qwen2ForCausalLM(config).named_parameters()}
    weights = RandomWeights(config, device, torch.bfloat16, large_keys=False)
    tensors = {name: weights.draw(name, shape).cpu() for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ---- Random texts


def review_lengths(count: int, seed: int = 1) -> list[int]:
    """Tokens of reviews, about as ChnSentiCorp's are: a median of 60, a few of some hundreds."""
    chooser = random.Random(seed)
    return [min(470, max(4, round(math.exp(chooser.gauss(4.1, 0.75))))) for _ in range(count)]


def review_examples(lengths: Sequence[int], vocab_size: int) -> list[Example]:
    """Reviews of random ids behind the same prefix, each with two supervised tokens."""
    chooser = random.Random(0)
    prefix = [chooser.randrange(vocab_size) for _ in range(PREFIX_TOKENS)]
    examples = []
    for length in lengths:
        ids = prefix + [chooser.randrange(vocab_size) for _ in range(length + ANSWER_TOKENS)]
        examples.append(Example(ids, [False] * (len(ids) - ANSWER_TOKENS) + [True] * ANSWER_TOKENS))
    return examples


def chat_example(tokens: int, vocab_size: int) -> Example:
    """One conversation that the model reads `tokens` tokens of, the second half of it supervised."""
    chooser = random.Random(0)
    ids = [chooser.randrange(vocab_size) for _ in range(tokens + 1)]
    return Example(ids, [False] * (len(ids) - tokens // 2) + [True] * (tokens // 2))


WORDS = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多"
GOOD, BAD = ("好", "满意", "干净", "推荐"), ("差", "失望", "脏", "吵")


def random_reviews(count: int) -> list[tuple[str, int]]:
    """Texts of random characters and one word that gives the label, (text, label)."""
    chooser = random.Random(3)

    def text(label: int) -> str:
        characters = chooser.choices(WORDS, k=review_lengths(1, seed=chooser.getrandbits(32))[0])
        characters[chooser.randrange(len(characters))] = chooser.choice(GOOD if label else BAD)
        return "".join(characters)

    return [(text(index % 2), index % 2) for index in range(count)]


def write_reviews(path: Path, count: int) -> None:
    """`random_reviews` as JSON lines, or as ChnSentiCorp's tab-separated file."""
    reviews = random_reviews(count)
    if path.suffix == ".jsonl":
        lines = [json.dumps({"text": text, "label": label}) for text, label in reviews]
    else:
        lines = ["label\ttext_a", *(f"{label}\t{text}" for text, label in reviews)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", "utf-8")
