"""What a configuration names, as objects: device, dtype, tokenizer, prompt, examples, model.

Training, evaluation and inspection start here, so they cannot differ in how a prompt is rendered or a model is loaded.
What this module imports, except `config.py`, takes plain values and never sees the configuration.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minilora.adapters.peft_config import read_adapter_config
from minilora.config import Config
from minilora.data.hub import fetch_adapter, is_hub_name
from minilora.data.labels import class_indices, index_note, missing_classes
from minilora.data.records import ReadOptions, Record, read_records
from minilora.data.sampler import stratified_sample
from minilora.errors import UserError, capped, shown
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.nf4 import Linear4bit
from minilora.qlora.prompt import ChatTokenizer, ClassificationPrompt, Example, chat_example
from minilora.system.console import info, progress, warn
from minilora.system.distributed import SINGLE_RANK, Ranks
from minilora.weights.chat_template import default_system
from minilora.weights.hf_config import read_config
from minilora.weights.load import LoadSettings, load_model
from minilora.weights.quantized_cache import load_through_cache

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Examples:
    """A data file as the model sees it: an example for each record."""

    records: list[Record]
    examples: list[Example]

    @property
    def labelled(self) -> bool:
        """All of them have a label, so accuracy and F1 are defined."""
        return all(record.messages is None for record in self.records)

    @property
    def num_truncated(self) -> int:
        """Examples whose text was truncated to data.max_length."""
        return sum(example.truncated_tokens > 0 for example in self.examples)

    @property
    def labels(self) -> list[int]:
        """Class of each example; only where all are labelled."""
        return [example.label for example in self.examples if example.label is not None]


def adapter_folder(name: str) -> Path:
    """The folder of an adapter that is named by path or as owner/name on the hub."""
    return fetch_adapter(name) if is_hub_name(name) and not Path(name).is_dir() else Path(name)


def take_adapter(config: Config) -> Config:
    """The configuration with the shape of the adapter that `model.adapter` names; says what that changes."""
    if config.model.adapter is None:
        return config
    folder = adapter_folder(config.model.adapter)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"model.adapter: {folder} holds no adapter_config.json; give a peft adapter")
    if folder.resolve().is_relative_to(Path(config.train.output_dir).resolve() / "checkpoints"):
        raise UserError(f"model.adapter: {folder} belongs to the run in train.output_dir; choose another one")
    found, _ = read_adapter_config(folder)
    own = config.lora
    lora = replace(found, dropout=own.dropout, init_lora_weights=own.init_lora_weights)
    changed = [f"lora.{name}={value}" for name, value in vars(lora).items() if value != getattr(own, name)]
    if changed:
        info(f"model.adapter: as it is, {', '.join(map(capped, changed))}")
    return replace(config, lora=lora)


def choose_device(config: Config) -> torch.device:
    """The device that `model.device` names; a GPU for "auto" where there is one. UserError if it is absent."""
    name = config.model.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"model.device: {name!r} is not a device; expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"model.device: {name!r} is not available here; use auto or cpu")
    return device


def choose_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype that `model.compute_dtype` names. UserError: float16 on a CPU.

    "auto" is bfloat16 only where the hardware multiplies it: emulated, it is slower than float32. A GPU with tensor
    cores for float16 only (T4, V100, RTX 20) takes that, with a loss scale in training: eight times as fast.
    """
    name = config.model.compute_dtype
    if name == "auto":
        if _multiplies_bfloat16(device):
            return torch.bfloat16
        has_float16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
        return torch.float16 if has_float16 else torch.float32
    if name == "float16" and device.type == "cpu":
        raise UserError("model.compute_dtype: float16 needs a GPU; use auto, bfloat16 or float32 on a CPU")
    return DTYPES[name]


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in checks)


def build_prompt(config: Config, tokenizer: ChatTokenizer) -> ClassificationPrompt:
    """The classification prompt of `prompt.*` and `data.max_length`.

    Raises:
        UserError: see `ClassificationPrompt` and `with_model_system`, or the tokenizer belongs to another model.
    """
    model = read_config(tokenizer.folder)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{tokenizer.folder}: tokenizer.json has {tokenizer.vocab_size} ids, config.json vocab_size "
            f"{model.vocab_size}; the two are from different models, download both again"
        )
    most = model.max_position_embeddings
    if most is not None and config.data.max_length > most:
        warn(
            f"note: data.max_length: {config.data.max_length} tokens; {tokenizer.folder} was made for {most} "
            "(max_position_embeddings), and knows nothing of positions behind them"
        )
    return ClassificationPrompt(
        tokenizer=tokenizer,
        system=with_model_system(config, tokenizer.folder).prompt.system,
        instruction=config.prompt.instruction,
        labels=tuple(config.prompt.labels),
        max_length=config.data.max_length,
    )


def with_model_system(config: Config, folder: Path) -> Config:
    """The configuration with the text that `prompt.system: model` stands for; UserError where there is none."""
    if config.prompt.system != "model":
        return config
    system = default_system(folder)
    if system is None:
        raise UserError(
            f"prompt.system: model, but {folder} has no chat template with a system turn of its own; give the text"
        )
    return replace(config, prompt=replace(config.prompt, system=system))


def note_other_system(prompt: ClassificationPrompt, remedy: str = "prompt.system=model takes that") -> None:
    """Notes that the prompt's system turn is not the one of the model's own chat template, which other programs use."""
    own = default_system(prompt.tokenizer.folder)
    if own not in (None, prompt.system):
        warn(
            f"note: prompt.system is {shown(prompt.system)}; where a conversation has no system turn, the model's own "
            f"chat template puts {shown(own)}; {remedy}"
        )


def read_split(
    config: Config,
    prompt: ClassificationPrompt,
    split: str,
    reading: ReadOptions = ReadOptions(),
    is_trained: bool = False,
) -> Examples:
    """The examples of one file of `data.dir`, at most `data.max_{split}_examples`."""
    path = Path(config.data.dir) / f"{split}.jsonl"
    return build_examples(limited(read_records(path, reading), config, split), prompt, is_trained)


def limited(records: Sequence[Record], config: Config, split: str) -> Sequence[Record]:
    """At most `data.max_{split}_examples` of the records, in their order, chosen as `data.sample` says."""
    limit = getattr(config.data, f"max_{split}_examples")
    if limit is None or config.data.sample == "first":
        return records[:limit]
    return [records[index] for index in stratified_sample([record.label for record in records], limit)]


def build_examples(records: Sequence[Record], prompt: ClassificationPrompt, is_trained: bool = False) -> Examples:
    """One example per record: a labelled text, or a conversation, whose default system turn is the prompt's.

    Raises:
        UserError: a label that is neither a label word nor its index, or a conversation without a supervised token.
    """
    texts = [record for record in records if record.messages is None]
    found = [(record.where, record.label) for record in texts if record.label is not None]
    labels = class_indices(found, prompt.labels, is_trained)
    labelled = iter(prompt.examples([record.content for record in texts], labels))
    examples = []
    for record in records:
        if record.messages is None:
            examples.append(next(labelled))
            continue
        examples.append(
            chat_example(
                prompt.tokenizer,
                record.messages,
                max_length=prompt.max_length,
                where=record.where,
                default_system=prompt.system,
            )
        )
    return Examples(list(records), examples)


def lacking_classes(files: Mapping[str, Examples], words: Sequence[str]) -> list[str]:
    """A sentence for each labelled file that has no example of some class, with its name."""
    texts = {name: missing_classes(file.labels, words) for name, file in files.items() if file.labelled}
    return [f"{name}: {text}" for name, text in texts.items() if text is not None]


def tell_of_labels(files: Mapping[str, Examples], words: Sequence[str]) -> None:
    """Says which labels of some files were read as indices, and warns of `lacking_classes`."""
    note = index_note({record.label for file in files.values() for record in file.records}, words)
    if note is not None:
        info(note)
    for text in lacking_classes(files, words):
        warn(f"warning: {text}")


def build_model(
    config: Config, folder: Path, device: torch.device, dtype: torch.dtype, ranks: Ranks = SINGLE_RANK
) -> Qwen2ForCausalLM:
    """The frozen base model, with a progress bar for its tensors; each rank has its own. Errors: see `load_model`."""
    ranks.check_device(device)
    if device.index is not None:
        torch.cuda.set_device(device)  # bitsandbytes waits for the current GPU, whichever its tensors are on
    makes_copy = config.model.quantized_cache is not None
    with ranks.rank_0_first() if makes_copy else ranks.barrier(), progress("load model", None, "tensor") as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        settings = LoadSettings(dtype, config.model.quantization, config.model.double_quantization, device)
        if config.model.quantized_cache is None:
            model = load_model(folder, **vars(settings), on_progress=on_progress)
        else:
            model = load_through_cache(folder, Path(config.model.quantized_cache), settings, on_progress)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.cache_dequantized = config.model.cache_dequantized
    return model
