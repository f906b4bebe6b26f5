"""Default < YAML < `section.key=value`: one frozen `Config`, every problem of it in one error.

Each key is here once, with its type, default and meaning; `--help` prints this table and a test fails for a key that
nothing reads. Values are taken by the field's type, because YAML guesses: PyYAML reads `1e-4` as text and `no` as
False. There is no interpolation, and no environment variable is read except for the home folder at which a path may
begin (`~`).
"""

import dataclasses
import difflib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from minilora.errors import UserError, capped
from minilora.system.schema import coerce, default_of, limits, takes_text, type_name
from minilora.system.strict_yaml import parse_yaml, read_yaml


def key(default: Any, meaning: str, *, is_free: bool = False, **within: float) -> Any:
    """A configuration key: default, one-line meaning for --help, and the `schema.limits` of a number.

    A free key may differ between a run and its continuation: it changes nothing of what is computed except last bits,
    or names what is compared by checksum.
    """
    metadata = {"help": meaning, "is_free": is_free, **limits(**within)}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


MAX_SEED = 2**63 - 1  # what PyTorch's generators take


@dataclass(frozen=True)
class ModelSection:
    name_or_path: str = key(
        "Qwen/Qwen2.5-0.5B-Instruct", "base model: a local folder or a name on the hub", is_free=True
    )
    revision: str | None = key(None, "branch, tag or commit on the hub", is_free=True)
    adapter: str | None = key(
        None,
        "peft adapter to begin with, a folder or a name on the hub: its next stage; lora.* is as that adapter is",
        is_free=True,
    )
    quantization: Literal["nf4", "fp4", "none"] = key("nf4", "4-bit type of the frozen weights; none is plain LoRA")
    double_quantization: bool = key(True, "store the scales of the 4-bit blocks in 8 bits")
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "type of activations; auto is bfloat16 where the hardware has it, else float16 on a GPU, else float32"
    )
    quantized_cache: str | None = key(
        None, "folder for a 4-bit copy of the base, verified by SHA-256: the next run loads in a second", is_free=True
    )
    cache_dequantized: bool = key(
        False, "keep projections dequantised beside their 4 bits: faster, for 2 bytes per parameter", is_free=True
    )
    device: str = key("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one", is_free=True)


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter is: in a YAML file, in `attach`, and with peft's names in adapter_config.json."""

    r: int = key(8, "rank of the adapter", minimum=1, maximum=65_536)
    alpha: float = key(16, "the adapter's product is scaled by alpha / r", above=0, maximum=1e6)
    dropout: float = key(0.05, "dropout on the adapter's input", minimum=0, maximum=0.99)
    target_modules: str | list[str] = key(
        "all-linear", "layers to adapt: names, all-linear, or a regular expression for the whole path"
    )
    use_rslora: bool = key(False, "scale by alpha / sqrt(r)")
    layers_to_transform: int | list[int] | None = key(None, "indices of the layers to adapt; null is all", minimum=0)
    layers_pattern: str | list[str] | None = key(None, "name of the list of layers that layers_to_transform indexes")
    rank_pattern: dict[str, int] = key(
        {}, "another rank for names or regular expressions: {q_proj: 4}", minimum=1, maximum=65_536
    )
    alpha_pattern: dict[str, float] = key({}, "another alpha for names or regular expressions", above=0, maximum=1e6)
    bias: Literal["none", "lora_only", "all"] = key("none", "also train the biases of adapted, or of all linear layers")
    use_dora: bool = key(False, "train magnitude and direction of each output's weights apart (DoRA)")
    init_lora_weights: Literal["kaiming", "gaussian", "pissa", "loftq"] = key(
        "kaiming", "first values: random, principal directions of the weights (PiSSA) or of the 4-bit error (LoftQ)"
    )


@dataclass(frozen=True)
class DataSection:
    dir: str = key("data/processed", "folder with train.jsonl, validation.jsonl and test.jsonl", is_free=True)
    source: Literal["chnsenticorp", "demo"] = key(
        "chnsenticorp",
        "prepared where data.dir is missing: the hub's ChnSentiCorp, or the reviews of [demo]",
        is_free=True,
    )
    max_length: int = key(512, "longest example in tokens; a longer review is cut", minimum=16)
    overlong: Literal["error", "drop", "cut"] = key(
        "error", "conversations whose answers alone exceed max_length: stop, leave them out, or end them there"
    )
    max_train_examples: int | None = key(None, "use N training records, as data.sample chooses them", minimum=1)
    max_validation_examples: int | None = key(None, "use N validation records, likewise", minimum=1)
    max_test_examples: int | None = key(None, "use N test records, likewise", minimum=1)
    sample: Literal["stratified", "first"] = key(
        "stratified", "which N: a seeded sample with each label's share, or the first N, as earlier versions did"
    )


@dataclass(frozen=True)
class PromptSection:
    system: str = key(  # the text that Qwen's template puts first
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        "text of the system turn; model takes the one of the model's own chat template",
    )
    instruction: str = key(
        "判断下面评论的情感，只回答“正面”或“负面”。\n评论：",
        "opens the user turn; the review follows directly",
    )
    labels: list[str] = key(["负面", "正面"], "label words; data may name a class by word or by its index in this list")
    positive_label: str | None = key(None, "class of precision, recall and F1; with two labels, the second if null")

    @property
    def positive(self) -> int | None:
        """Index of the positive class; None asks for macro averages."""
        if self.positive_label is not None:
            return self.labels.index(self.positive_label)
        return 1 if len(self.labels) == 2 else None


@dataclass(frozen=True)
class TrainSection:
    output_dir: str = key("outputs", "metrics, plot and checkpoints/ go here", is_free=True)
    learning_rate: float = key(2e-4, "peak learning rate", above=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = key("cosine", "course of the rate after warm-up")
    warmup_ratio: float = key(0.03, "share of all steps in which the rate rises from 0", minimum=0, maximum=1)
    num_train_epochs: int = key(3, "passes over the training data", minimum=1)
    max_steps: int | None = key(None, "stop after N optimizer steps, instead of num_train_epochs", minimum=1)
    per_device_train_batch_size: int = key(8, "examples in a micro-batch of each process", minimum=1)
    per_device_eval_batch_size: int = key(
        32, "examples in a forward pass of validation and test", minimum=1, is_free=True
    )
    gradient_accumulation_steps: int = key(1, "micro-batches of each process in an optimizer step", minimum=1)
    max_tokens_per_micro_batch: int | Literal["auto"] | None = key(
        None,
        "cut a step into even micro-batches of at most N tokens, instead of by examples: memory; auto is what fits a "
        "GPU, found once in a run and kept in its checkpoints, and null on a CPU",
        minimum=16,
        is_free=True,
    )
    gradient_checkpointing: bool = key(False, "recompute in backward: less memory, a third more work", is_free=True)
    offload_checkpoints: bool = key(False, "what checkpointing keeps on a GPU waits in the CPU's memory", is_free=True)
    optim: Literal["adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = key(
        "adamw_torch_fused", "AdamW of PyTorch, or of bitsandbytes: moments in 8 bits, or paged out of a full GPU"
    )
    weight_decay: float = key(0.0, "AdamW's decoupled weight decay", minimum=0)
    loraplus_lr_ratio: float = key(1.0, "learning rate of B over that of A (LoRA+)", above=0, maximum=1e4)
    adam_beta1: float = key(0.9, "AdamW's decay of the mean gradient", minimum=0, maximum=0.9999)
    adam_beta2: float = key(0.999, "AdamW's decay of the squared gradient", minimum=0, maximum=0.999999)
    adam_epsilon: float = key(1e-8, "AdamW's epsilon", minimum=0)
    class_weights: Literal["none", "balanced"] | dict[str, float] = key(
        "none",
        "weight of each class in a step's loss, sum(w nll) / sum(w); eval_loss has none; balanced is inverse to the "
        "class's number of training examples, with a mean of 1; or a table by label word: {负面: 3, 正面: 1}",
        minimum=1e-6,  # float32 holds what a loss becomes with it
        maximum=1e6,
    )
    max_grad_norm: float = key(1.0, "gradients are scaled down to this global norm; 0 turns that off", minimum=0)
    seed: int = key(42, "of data order, initial adapter and dropout", minimum=0, maximum=MAX_SEED)
    logging_steps: int = key(1, "write a line of metrics.jsonl every N steps", minimum=1, is_free=True)
    eval_steps: int = key(100, "validate every N steps, and at the end", minimum=1)
    save_steps: int = key(100, "save a checkpoint every N steps, and at the end", minimum=1, is_free=True)
    save_total_limit: int = key(2, "checkpoints to keep, the best one not counted", minimum=1, is_free=True)
    metric_for_best_model: Literal["auto", "eval_f1", "eval_macro_f1", "eval_accuracy", "eval_loss"] = key(
        "auto",
        "decides which checkpoint is best, of equal ones eval_loss; auto is eval_f1 where validation has every label, "
        "else eval_loss",
    )
    load_best_model_at_end: bool = key(True, "the final adapter is the best checkpoint's, not the last", is_free=True)
    early_stopping_patience: int | None = key(None, "stop after N validations in a row without a better one", minimum=1)
    max_skipped_steps: int = key(
        10, "stop after N steps in a row with a NaN or inf; such a step changes nothing", minimum=1, is_free=True
    )
    do_predict: bool = key(True, "score the test set before and after training", is_free=True)
    save_format: Literal["safetensors", "bin"] = key(
        "safetensors", "file of the final adapter; bin for older tools", is_free=True
    )
    save_dtype: Literal["float32", "bfloat16"] = key("float32", "type of the final adapter's tensors", is_free=True)
    portable: bool = key(
        False, "the final adapter's scale is part of B, for readers without rsLoRA and alpha_pattern", is_free=True
    )
    report_to: Literal["none", "tensorboard", "wandb"] = key(
        "none", "send the lines of metrics.jsonl to TensorBoard files or to Weights & Biases as well", is_free=True
    )

    @property
    def token_limit(self) -> int | None:
        """max_tokens_per_micro_batch as a number; None for auto too, which a run resolves (`planning/budget.py`)."""
        return None if self.max_tokens_per_micro_batch == "auto" else self.max_tokens_per_micro_batch


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    model: ModelSection = field(default_factory=ModelSection)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataSection = field(default_factory=DataSection)
    prompt: PromptSection = field(default_factory=PromptSection)
    train: TrainSection = field(default_factory=TrainSection)

    def with_token_limit(self, limit: int | None) -> "Config":
        """A copy in which train.max_tokens_per_micro_batch=auto is what a run resolved it to; a number stays."""
        if self.train.max_tokens_per_micro_batch != "auto":
            return self
        return dataclasses.replace(self, train=dataclasses.replace(self.train, max_tokens_per_micro_batch=limit))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values by section and key, as `training_args.json` holds them."""
        return dataclasses.asdict(self)


KEYS: dict[str, "dataclasses.Field[Any]"] = {
    f"{section.name}.{item.name}": item
    for section in dataclasses.fields(Config)
    for item in dataclasses.fields(section.type)  # type: ignore[arg-type]
}
FREE_KEYS = frozenset(name for name, item in KEYS.items() if item.metadata["is_free"])
# `~` is expanded here: a shell does not do it after `section.key=`, and never sees a YAML file.
PATHS = ("model.name_or_path", "model.adapter", "model.quantized_cache", "data.dir", "train.output_dir")
# Keys that users of peft look for, and why they are not here.
KEYS_OF_PEFT = {
    "lora.modules_to_save": "the base stays frozen, also head and embedding, which in small models are one matrix"
}
# Keys of earlier versions, and why they are gone. In a saved configuration they are dropped, elsewhere an error.
REMOVED_KEYS = {"train.compile_swiglu": "it compiled one operation, and gained 1 to 9 % on some CPUs only"}


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The resolved configuration.

    Args:
        path: YAML file, or None for the defaults only.
        overrides: `section.key=value` from the command line; see `_read_override`.

    Raises:
        UserError: all unknown keys, wrong types and impossible values in one message.
    """
    return config_from_dict({} if path is None else read_yaml(path), overrides, str(path))


def layer_of(name: str, path: Path | None, overrides: Sequence[str]) -> int:
    """Who names a key: 0 nobody, so that it has its default; 1 the YAML file; 2 the command line."""
    section, _, attribute = name.partition(".")
    if any(override.partition("=")[0] == name for override in overrides):
        return 2
    return int(path is not None and attribute in (read_yaml(path).get(section) or {}))


def config_from_dict(content: Any, overrides: Sequence[str], where: str) -> Config:
    """`load_config` for content that was read before, such as a run's `training_args.json`."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: holds a {type(content).__name__}, expected sections such as 'lora:' with keys")
    problems: list[str] = []
    given: dict[str, Any] = {}
    for section, keys in content.items():
        if isinstance(keys, dict):
            given |= {f"{section}.{name}": value for name, value in keys.items()}
        elif keys is not None:
            problems.append(f"{section}: got {keys!r}, expected a section with keys ({where})")
    sources = dict.fromkeys(given, where)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            problems.append(f"{override}: expected section.key=value (command line)")
            continue
        name = name.replace("-", "_")
        given[name] = _read_override(text, KEYS[name].type) if name in KEYS else text
        sources[name] = "command line"
    values: dict[str, dict[str, Any]] = {item.name: {} for item in dataclasses.fields(Config)}
    for name, value in given.items():
        section, _, attribute = name.partition(".")
        try:
            values[section][attribute] = _take(name, value)
        except ValueError as error:
            problems.append(f"{name}: {error} ({sources[name]})")
    if not problems:
        config = Config(**{item.name: item.type(**values[item.name]) for item in dataclasses.fields(Config)})  # type: ignore[operator]
        problems = [f"{name}: {text} ({sources.get(name, 'default')})" for name, text in _iter_contradictions(config)]
    if problems:
        raise UserError("\n".join(problems))
    return config


def same_modules(one: str | list[str], other: str | list[str]) -> bool:
    """Whether two values of `lora.target_modules` name the same layers, in whatever order."""
    return one == other or (isinstance(one, list) and isinstance(other, list) and set(one) == set(other))


def describe_keys() -> str:
    """The table of all keys for --help: name, default, type, meaning; `free` as in `key`."""
    lines = []
    for name, item in KEYS.items():
        kind = type_name(item.type) + (", free" if name in FREE_KEYS else "")
        lines.append(f"  {name}={json.dumps(default_of(item), ensure_ascii=False)}  ({kind})")
        lines.append(f"      {item.metadata['help']}")
    return "\n".join(lines)


def _take(name: str, value: Any) -> Any:
    """The value as the key's type. ValueError with what is wrong."""
    if name in REMOVED_KEYS:
        raise ValueError(f"was removed, because {REMOVED_KEYS[name]}; delete it")
    if name not in KEYS:
        raise ValueError(f"unknown key{_suggestion(name)}")
    try:
        taken = coerce(_number_in(value, KEYS[name].type), KEYS[name])
    except ValueError as error:
        raise ValueError(f"got {value!r}, expected {error}") from None
    return os.path.expanduser(taken) if taken and name in PATHS else taken  # noqa: PTH111  Path turns a hub name's slash


def _iter_contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """What each key allows and their combination does not: a key, and what is wrong with it."""
    labels = config.prompt.labels
    if len(labels) < 2 or len(set(labels)) < len(labels) or not all(labels):
        yield "prompt.labels", f"got {labels}, expected two or more different words"
    if config.prompt.positive_label is not None and config.prompt.positive_label not in labels:
        yield "prompt.positive_label", f"{config.prompt.positive_label!r} is not one of {labels}"
    weights = config.train.class_weights
    if isinstance(weights, dict) and set(weights) != set(labels):
        missing, unknown = ([w for w in one if w not in other] for one, other in ((labels, weights), (weights, labels)))
        found = [f"no weight for {capped(', '.join(missing))}"] if missing else []
        found += [f"one for {capped(', '.join(unknown))}, which is not in prompt.labels"] if unknown else []
        yield "train.class_weights", f"has {' and '.join(found)}; name each label word once, or use balanced or none"
    if config.model.compute_dtype == "float16" and config.model.device == "cpu":
        yield "model.compute_dtype", "float16 needs a GPU; use bfloat16 or float32 with model.device=cpu"
    if config.lora.init_lora_weights in ("pissa", "loftq") and config.model.adapter is not None:
        yield "lora.init_lora_weights", f"{config.lora.init_lora_weights} makes a new adapter, model.adapter brings one"
    if config.lora.init_lora_weights == "loftq" and config.model.quantization == "none":
        yield "lora.init_lora_weights", "loftq starts from the 4-bit error, so it needs model.quantization=nf4 or fp4"
    if config.lora.init_lora_weights == "pissa" and config.lora.dropout:
        yield "lora.dropout", "must be 0 with lora.init_lora_weights=pissa, where the adapter is a part of the weight"
    if config.train.offload_checkpoints and not config.train.gradient_checkpointing:
        yield "train.offload_checkpoints", "there is nothing to offload without train.gradient_checkpointing=true"


def _suggestion(name: str) -> str:
    if name in KEYS_OF_PEFT:
        return f"; {KEYS_OF_PEFT[name]}"
    close = [known for known in KEYS if known.partition(".")[2] == name.rpartition(".")[2]]
    if not close:  # 0.7, because a common "train." makes two names 0.67 alike
        close = difflib.get_close_matches(name, KEYS, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else "; --help lists all keys"


def _read_override(text: str, kind: Any) -> Any:
    """The value in `section.key={text}`, for a key of the type `kind`: YAML, or the text itself.

    A key that takes text takes `A # B`, `1e4` and `a: b` unchanged, because YAML would cut or convert them. There only
    quotes are YAML ("\\n" is a line break), and null and [a, b] where the key takes them.
    """
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return text
    if not takes_text(kind) or not text:
        return value
    others = tuple(get_origin(a) or a for a in get_args(kind) if a is not str)
    is_quoted = isinstance(value, str) and text.startswith(("'", '"'))
    return value if is_quoted or isinstance(value, others) else text


def _number_in(value: Any, kind: Any) -> Any:
    """A number that YAML took for text, such as 1e-4 with PyYAML, for a key of the type `kind`."""
    tables = [item for item in (kind, *get_args(kind)) if get_origin(item) is dict]
    if tables and isinstance(value, dict):
        return {name: _number_in(item, get_args(tables[0])[1]) for name, item in value.items()}
    is_numeric = {int, float} & {kind, *get_args(kind)}
    try:
        return float(value) if is_numeric and isinstance(value, str) else value
    except ValueError:
        return value
