"""What a configuration names, as objects: device, dtype, tokenizer, prompt, examples, model.

Training, evaluation and inspection start here, so they cannot differ in how a prompt is rendered or a model is loaded.
What this module imports, except `config.py`, takes plain values and never sees the configuration.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import torch

from minilora import __version__
from minilora.adapters.attach import adapter_names, remove_adapter
from minilora.adapters.peft_config import no_adapter, read_adapter_config
from minilora.config import Config, same_modules
from minilora.data.encode import Encoder
from minilora.data.examples import Examples
from minilora.data.hub import fetch_adapter
from minilora.data.lines import count_lines
from minilora.data.records import ReadOptions, Record, iter_valid_records
from minilora.data.sampler import stratified_sample
from minilora.data.split_files import SPLITS, read_report
from minilora.data.token_store import CACHE, FileRecords, Piece, load_store
from minilora.errors import UserError, capped, shown
from minilora.qlora.model import Qwen2Config, Qwen2ForCausalLM
from minilora.qlora.nf4 import Linear4bit
from minilora.qlora.prompt import ChatTokenizer, ClassificationPrompt
from minilora.system.console import info, progress, warn
from minilora.system.distributed import SINGLE_RANK, Ranks, reason_of
from minilora.system.files import sha256
from minilora.system.memory import is_out_of_memory, peak_memory_bytes, reset_peak_memory, trim_heap
from minilora.weights.chat_template import default_system
from minilora.weights.hf_config import read_config
from minilora.weights.load import LoadSettings, load_model
from minilora.weights.quantized_cache import load_through_cache

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def take_adapter(config: Config) -> Config:
    """The configuration with the shape of the adapter that `model.adapter` names; says what that changes."""
    if config.model.adapter is None:
        return config
    folder = fetch_adapter(config.model.adapter)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"model.adapter: {folder} {no_adapter(folder)}")
    if (folder / "adapter_model.bin").is_file() and not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"model.adapter: {folder / 'adapter_model.bin'} is a pickle; convert it to safetensors")
    if folder.resolve().is_relative_to(Path(config.train.output_dir).resolve() / "checkpoints"):
        raise UserError(f"model.adapter: {folder} belongs to the run in train.output_dir; choose another one")
    found, _ = read_adapter_config(folder)
    own = config.lora
    lora = replace(found, dropout=own.dropout, init_lora_weights=own.init_lora_weights)
    if same_modules(found.target_modules, own.target_modules):
        lora = replace(lora, target_modules=own.target_modules)
    changed = [f"lora.{name}={value}" for name, value in vars(lora).items() if value != getattr(own, name)]
    if changed:
        info(f"model.adapter: as it is, {', '.join(map(capped, changed))}")
    return replace(config, lora=lora)


def choose_device(config: Config) -> torch.device:
    """The device that `model.device` names; a GPU for "auto" where there is one. UserError if it cannot be used."""
    name = config.model.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"model.device: {name!r} is not a device; expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"model.device: {name!r} is not available here; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise UserError(f"model.device: {name!r} is not available here, the last GPU is cuda:{count - 1}; use auto")
    if device.type == "cuda":
        _check_gpu(device)
    return device


def _check_gpu(device: torch.device) -> None:
    """UserError for a GPU that another program has to itself, or that this PyTorch has no kernels for.

    PyTorch for CUDA 13 has them from sm75 on: not for a V100 or a GTX 10, which it counts as available.
    """
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"model.device: {device} cannot be used ({reason_of(error)}); end the program that has it to itself, set "
            "model.device=cpu, or install a PyTorch for this GPU: this one is for "
            f"{', '.join(torch.cuda.get_arch_list())}"
        ) from None


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
    if device.type == "cuda":  # `torch.cuda.is_bf16_supported` asks the current one, which may be of another kind
        return torch.cuda.get_device_capability(device) >= (8, 0)
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
    note_positions(config, model)
    return ClassificationPrompt(
        tokenizer=tokenizer,
        system=with_model_system(config, tokenizer.folder).prompt.system,
        instruction=config.prompt.instruction,
        labels=tuple(config.prompt.labels),
        max_length=config.data.max_length,
    )


def note_positions(config: Config, model: Qwen2Config) -> None:
    """Notes that examples may be longer than those the model was made for."""
    most = model.max_position_embeddings
    if most is not None and config.data.max_length > most:
        warn(
            f"note: data.max_length: {config.data.max_length} tokens; {config.model.name_or_path} was made for {most} "
            "(max_position_embeddings), and knows nothing of positions behind them"
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


def says_indices(config: Config) -> bool:
    """Whether it is to be said which labels of `data.dir` are read as indices.

    It is not where they were said for the default's words (preprocess_data.py), or known to be these (`data.source`).
    """
    written = read_report(config.data.dir).get("sha256_out", {})
    files = [path for path in Path(config.data.dir).glob("*.jsonl") if path.stem in SPLITS]
    is_prepared = all(written.get(path.name) == sha256(path) for path in files)
    return not is_prepared or config.prompt.labels != Config().prompt.labels


def read_splits(config: Config, prompt: ClassificationPrompt, may_write: bool = True) -> dict[str, Examples]:
    """`read_split` of all splits; UserError with what is wrong in all of them."""
    splits, errors = {}, []
    for split in SPLITS:
        try:
            splits[split] = read_split(config, prompt, split, may_write=may_write)
        except UserError as error:
            errors.append(error)
    if errors:
        raise UserError("\n".join(dict.fromkeys(map(str, errors)))) from errors[0]
    return splits


def read_split(
    config: Config,
    prompt: ClassificationPrompt,
    split: str,
    reading: ReadOptions = ReadOptions(),
    *,
    is_trained: bool = False,
    may_write: bool = True,
) -> Examples:
    """The examples of one file of `data.dir`, at most `data.max_{split}_examples`; their tokens are kept beside it.

    Args:
        config: names the folder, the limit and what is done with overlong conversations.
        prompt: how records are rendered.
        split: the file's name.
        reading: how it is read.
        is_trained: an adapter answers with the prompt's words, so they cannot be others.
        may_write: otherwise nothing is kept.

    Raises:
        UserError: as `Encoder`, or the file cannot be read.
    """
    path, limit = Path(config.data.dir) / f"{split}.jsonl", getattr(config.data, f"max_{split}_examples")
    digest = sha256(path)
    facts = {
        "data": digest,
        "reading": asdict(reading),
        "limit": limit and [limit, config.data.sample],
        "overlong": config.data.overlong,
        "tokenizer": sha256(prompt.tokenizer.folder / "tokenizer.json"),
        "prompt": [prompt.system, prompt.instruction, list(prompt.labels), prompt.max_length],
        "made by": [__version__, tokenizers.__version__],
    }

    def encode(append: Callable[[Piece], None]) -> dict[str, Any]:
        with progress(f"tokenise {path.name}", min(count_lines(path), limit or sys.maxsize), "record") as bar:
            records = partial(iter_chosen, path, reading, choose(path, reading, config, split))
            encoder = Encoder(
                prompt, str(path), records, config.data.overlong, is_trained=is_trained, on_progress=bar.update
            )
            return encoder(append)

    store = load_store(path.parent / CACHE, split, facts, encode, may_write=may_write)
    records = FileRecords(path, digest, store.lines, reading)
    return Examples(records, store, prompt.max_length, config.data.overlong)


def choose(path: Path, reading: ReadOptions, config: Config, split: str) -> Sequence[int] | None:
    """Ascending indices of the records that `data.max_{split}_examples` and `data.sample` take; None for all."""
    limit = getattr(config.data, f"max_{split}_examples")
    if limit is None:
        return None
    if config.data.sample == "first":
        return range(limit)
    reading = replace(reading, says_columns=False)  # the second reading does
    return stratified_sample((record.label for record in iter_valid_records(path, reading)), limit)


def iter_chosen(path: Path, reading: ReadOptions, chosen: Sequence[int] | None) -> Iterator[tuple[int, Record]]:
    """Those records of a file, with their lines. All others are read too: what is wrong with them is said."""
    num_taken = 0
    for index, record in enumerate(iter_valid_records(path, reading)):
        if chosen is None or (num_taken < len(chosen) and chosen[num_taken] == index):
            num_taken += 1
            yield int(record.where.rpartition(":")[2]), record


class SharedBase:
    """The base model of the last run, kept for the next one that has the same: a sweep loads it once.

    `process_bytes` is what the process took before any was loaded; None where that cannot be measured.
    """

    def __init__(self) -> None:
        self.process_bytes = peak_memory_bytes(torch.device("cpu"))
        self._model: Qwen2ForCausalLM | None = None
        self._made_of: tuple[Any, ...] = ()

    def build(
        self, config: Config, folder: Path, device: torch.device, dtype: torch.dtype, ranks: Ranks
    ) -> Qwen2ForCausalLM:
        """`build_model`, or what it gave before, without an adapter; peaks of memory begin anew."""
        made_of = (replace(config.model, adapter=None), folder, device, dtype)
        model = self._model if made_of == self._made_of else None
        self._model = model  # the memory of another one is free before this one is loaded
        trim_heap()
        reset_peak_memory(device)
        if model is None:
            model = self._model = build_model(config, folder, device, dtype, ranks=ranks)
            self._made_of = made_of
        for name in adapter_names(model):
            remove_adapter(model, name)
        return model


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
