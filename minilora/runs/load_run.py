"""A trained adapter's folder in, all that is needed to use it out: configuration, base model, prompt, model, reviews.

Whatever uses an adapter after training (evaluation, prediction, chat, merging) opens it here, so that each makes the
same checks: is the folder undamaged, is the base model the one it was trained on, how was its prompt rendered. A folder
of this program says all of that; for another program's adapter, and for a base model only, the defaults hold.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minilora.adapters.peft_config import read_adapter_config
from minilora.adapters.peft_files import damage_of_adapter, load_adapter
from minilora.build import (
    DTYPES,
    Examples,
    build_examples,
    build_model,
    build_prompt,
    choose_device,
    choose_dtype,
    read_split,
)
from minilora.config import Config, config_from_dict
from minilora.data.hub import PACKAGE_ASSETS, fetch_model
from minilora.data.records import read_records
from minilora.errors import UserError
from minilora.evaluation.score import ScoringOptions, score
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.prompt import ChatTokenizer, ClassificationPrompt
from minilora.runs.provenance import model_digests, read_saved_config
from minilora.system.console import progress, warn
from minilora.system.distributed import SINGLE_RANK, Ranks
from minilora.system.files import read_json, sha256
from minilora.system.manifest import MANIFEST

# Beginnings of the keys that scoring reads: an adapter's shape is in its own files, and nothing is trained.
KEYS_READ = (
    "model.",
    "prompt.",
    "data.dir",
    "data.max_length",
    "data.max_test_examples",
    "train.per_device_eval_batch_size",
)


@dataclass(frozen=True)
class LoadedRun:
    """An adapter and what it belongs to.

    Attributes:
        path: the adapter's folder, verified; None for a base model only.
        config: of its run, or the defaults; overridden by the command line.
        model_folder: files of the base model.
        prompt: how the adapter expects a text.
    """

    path: Path | None
    config: Config
    model_folder: Path
    prompt: ClassificationPrompt

    def load(self, allow_bin: bool = False, ranks: Ranks = SINGLE_RANK) -> Qwen2ForCausalLM:
        """The base model with the adapter, if there is one, in evaluation mode, on each of `ranks`.

        Raises:
            UserError: see `load_model` and `load_adapter`.
        """
        device = choose_device(self.config)
        model = build_model(self.config, self.model_folder, device, choose_dtype(self.config, device), ranks=ranks)
        if self.path is not None:
            load_adapter(model, self.path, allow_bin, is_verified=True)
        return model.eval()

    @property
    def run_dtype(self) -> torch.dtype:
        """Compute dtype of the adapter's run, which decides the 4-bit weights and their dequantised values.

        On this machine `auto` may mean another one. Where the run is unknown, or the configuration names a dtype, it is
        `choose_dtype`'s.
        """
        machine = None if self.path is None else _run_facts(self.path).get("machine")
        name = machine.get("dtype") if isinstance(machine, dict) else None
        if self.config.model.compute_dtype == "auto" and name in DTYPES:
            return DTYPES[name]
        return choose_dtype(self.config, choose_device(self.config))

    def read_reviews(self, data: Path | None, encoding: str = "utf-8") -> tuple[Path, Examples]:
        """Labelled reviews to score the model on, and their file.

        Args:
            data: TSV, CSV, JSONL or parquet; None for the test split of the adapter's run.
            encoding: of `data`, where it is a text file.

        Raises:
            UserError: the file is missing, or holds no review or one without a label.
        """
        config, prompt = self.config, self.prompt
        if data is None:
            path = Path(config.data.dir) / "test.jsonl"
            reviews = read_split(config, prompt, "test")
            if self.path is not None:
                warn_of_another_test_set(self.path, path)
        else:
            path = data
            reviews = build_examples(read_records(path, encoding=encoding)[: config.data.max_test_examples], prompt)
        if not reviews.examples or not reviews.labelled:
            raise UserError(f"{path}: holds no labelled review or unlabelled ones; give a file with a text and a label")
        return path, reviews

    def score(
        self, model: Qwen2ForCausalLM, reviews: Examples, title: str, ranks: Ranks = SINGLE_RANK
    ) -> tuple[float, np.ndarray]:
        """Loss and (N, labels) probabilities of N labelled reviews, with a progress bar.

        Args:
            model: with the adapter, or one to compare with it.
            reviews: N of them.
            title: of the progress bar.
            ranks: that share the work; all of them get the whole result.

        Raises:
            UserError: the loss is non-finite.
        """
        size = self.config.train.per_device_eval_batch_size
        with progress(title, len(reviews.examples), "review") as bar:
            options = ScoringOptions(size, on_progress=bar.update, ranks=ranks)
            scores = score(model, reviews.examples, self.prompt, options)
        if not math.isfinite(scores.loss):
            raise UserError(
                f"{title}: the loss is {scores.loss}, expected a number; use model.compute_dtype=float32, or an "
                "earlier checkpoint of the run"
            )
        assert scores.probabilities is not None  # a prompt was given
        return scores.loss, scores.probabilities


def load_run(
    path: Path, base: str | None, overrides: list[str], other_data: bool = True, keys_read: tuple[str, ...] = KEYS_READ
) -> LoadedRun:
    """Everything except the weights, checked before they are loaded.

    Args:
        path: a final adapter, a checkpoint, or another program's adapter.
        base: base model to use in place of the adapter's own.
        overrides: `section.key=value` from the command line.
        other_data: see `read_run_config`.
        keys_read: beginnings of the keys that the caller reads; it warns of other overrides.

    Raises:
        UserError: the folder is damaged, names no base model, or was trained on another one.
    """
    config = read_run_config(path, base, other_data, overrides)
    note_unread(overrides, keys_read)
    folder = fetch_model(config.model.name_or_path, config.model.revision)
    refuse_another_base(path, folder, base is not None)
    return LoadedRun(path, config, folder, build_prompt(config, ChatTokenizer(folder)))


def load_base_run(name_or_path: str, overrides: list[str], keys_read: tuple[str, ...] = KEYS_READ) -> LoadedRun:
    """A base model without an adapter, with the default prompt.

    Args:
        name_or_path: a folder, or a name on the hub.
        overrides: `section.key=value` from the command line.
        keys_read: as for `load_run`.

    Raises:
        UserError: see `fetch_model`.
    """
    config = config_from_dict({"model": {"name_or_path": name_or_path}}, overrides, "--model_path")
    note_unread(overrides, keys_read)
    folder = fetch_model(config.model.name_or_path, config.model.revision)
    return LoadedRun(None, config, folder, build_prompt(config, ChatTokenizer(folder)))


def is_base(path: Path) -> bool:
    """Whether --model_path names a base model: a folder with a model and no adapter, or a name on the hub."""
    if path.is_dir():
        return (path / "config.json").is_file() and not (path / "adapter_config.json").is_file()
    is_hub_name = len(path.parts) == 2 and not path.is_absolute() and not path.parent.is_dir()
    return is_hub_name or path.as_posix().startswith(PACKAGE_ASSETS)


def read_run_config(model_path: Path, base: str | None, other_data: bool, overrides: list[str]) -> Config:
    """The configuration of the adapter's own run if the folder has it, else the defaults, with the adapter's base.

    Args:
        model_path: a final adapter, a checkpoint, or another program's adapter; verified where it has a manifest.
        base: base model to use in place of the adapter's own.
        other_data: the run's test split is not what is scored, so the run's limit on its size does not apply.
        overrides: `section.key=value` from the command line.
    """
    if not model_path.is_dir():
        raise UserError(f"{model_path}: is not a folder; give the one that training wrote, as checkpoints/final")
    problem = damage_of_adapter(model_path) if (model_path / MANIFEST).is_file() else None
    if problem is not None:
        raise UserError(f"{model_path}: is damaged ({problem}); take another copy of it")
    _, named = read_adapter_config(model_path)
    files = [path for name in ("training_args.json", "state.json") if (path := model_path / name).is_file()]
    content = read_saved_config(files[0]) if files else {}
    where = str(files[0] if files else model_path / "adapter_config.json")
    model, data = content.get("model", {}), content.get("data", {})
    if base:
        model = {**model, "name_or_path": base, "revision": None}
    elif model.get("name_or_path") is None:
        model = {**model, "name_or_path": named.name_or_path, "revision": named.revision}
    if model["name_or_path"] is None:
        raise UserError(f"{model_path}: adapter_config.json names no base model; give it with --base")
    if other_data:
        data = {**data, "max_test_examples": None}
    return config_from_dict({**content, "model": model, "data": data}, overrides, where)


def note_unread(overrides: list[str], keys_read: tuple[str, ...]) -> None:
    """Warns of overrides that change nothing."""
    for override in overrides:
        if not override.startswith(keys_read):
            name = override.partition("=")[0]
            warn(f"note: {name} changes nothing here: an adapter is as its files say")


def run_digests(model_path: Path, what: str) -> dict[str, str] | None:
    """SHA-256 by file name of the "data" or "model" that the adapter's run was made from; None where unknown."""
    digests = _run_facts(model_path).get(f"{what}_sha256")
    return digests if isinstance(digests, dict) else None


def _run_facts(model_path: Path) -> dict[str, Any]:
    """What a final adapter or a checkpoint says of its run; empty where unknown."""
    known = [path for name in ("metrics.json", "state.json") if (path := model_path / name).is_file()]
    content = read_json(known[0]) if known else None
    return content if isinstance(content, dict) else {}


def warn_of_another_test_set(model_path: Path, data: Path) -> None:
    """Warns if `data` is not the test file of the adapter's run, where the run is known."""
    digests = run_digests(model_path, "data")
    if digests is not None and digests.get(data.name) != sha256(data):
        warn(
            f"warning: {data}: is not the file of the adapter's run, its SHA-256 is another; reviews that the adapter "
            "was trained on may be in it"
        )


def refuse_another_base(model_path: Path, model_folder: Path, is_asked_for: bool) -> None:
    """Warns if a base model is not the one that the adapter was trained on, where its run is known.

    Raises:
        UserError: it is another one, and was not given with --base.
    """
    before = run_digests(model_path, "model")
    now = model_digests(model_folder) if before is not None else {}
    changed = sorted(name for name in {*(before or {}), *now} if (before or {}).get(name) != now.get(name))
    if not changed:
        return
    problem = f"{model_path}: was trained on another base model than {model_folder} (SHA-256 of {', '.join(changed)})"
    if not is_asked_for:
        raise UserError(f"{problem}; name its own with --base, or this one to have it scored all the same")
    warn(f"warning: {problem}")
