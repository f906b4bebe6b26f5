"""A trained adapter's folder in, all that is needed to use it out: configuration, base model, prompt, model, reviews.

Whatever uses an adapter after training (evaluation, prediction, chat, merging) opens it here, so that each makes the
same checks: is the folder undamaged, is the base model the one it was trained on, how was its prompt rendered. A folder
of this program says all of that; for another program's adapter, and for a base model only, the defaults hold.
"""

import math
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minilora.adapters.peft_config import no_adapter, read_adapter_config
from minilora.adapters.peft_files import damage_of_adapter, load_adapter
from minilora.build import (
    DTYPES,
    build_model,
    build_prompt,
    choose,
    choose_device,
    choose_dtype,
    iter_chosen,
    read_split,
    says_indices,
)
from minilora.config import Config, config_from_dict
from minilora.data.examples import Examples, build_examples, tell_of_labels
from minilora.data.hub import PACKAGE_ASSETS, fetch_adapter, fetch_model
from minilora.data.labels import check_label_map, other_words
from minilora.data.records import ReadOptions
from minilora.data.split_files import prepared_columns
from minilora.errors import UserError, capped
from minilora.evaluation.score import ScoringOptions, score
from minilora.planning.memory import scoring_tokens
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.prompt import ChatTokenizer, ClassificationPrompt
from minilora.runs.provenance import changed_names, model_digests, read_provenance
from minilora.system.console import info, progress, warn
from minilora.system.distributed import SINGLE_RANK, Ranks
from minilora.system.files import read_json, sha256
from minilora.system.manifest import MANIFEST, read_manifest

ASKED_WITH = "asked_with"  # in the manifest of a merged model
# Beginnings of the keys that scoring reads: an adapter's shape is in its own files, and nothing is trained.
KEYS_READ = (
    "model.",
    "prompt.",
    "data.dir",
    "data.max_length",
    "data.max_test_examples",
    "data.sample",
    "train.per_device_eval_batch_size",
    "train.max_tokens_per_micro_batch",
)


@dataclass(frozen=True)
class LoadedRun:
    """An adapter and what it belongs to."""

    path: Path | None  # the adapter's folder, verified; None for a base model only
    config: Config  # of its run, or the defaults; overridden by the command line
    model_folder: Path
    prompt: ClassificationPrompt

    @property
    def kind(self) -> str:
        """What it is, for tables."""
        return "base model" if self.path is None else "adapter"

    def load(self, allow_bin: bool = False, ranks: Ranks = SINGLE_RANK) -> Qwen2ForCausalLM:
        """The base model with the adapter, if there is one, in evaluation mode, on each of `ranks`."""
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
        name = None if self.path is None else read_provenance(self.path).machine.get("dtype")
        if self.config.model.compute_dtype == "auto" and name in DTYPES:
            return DTYPES[name]
        return choose_dtype(self.config, choose_device(self.config))

    @property
    def closes_turns(self) -> bool:
        """Whether training is known to have ended the model's turns with `<|im_end|>`: every run of this program."""
        return self.path is not None and bool(read_provenance(self.path).config)

    @property
    def asked_with(self) -> dict[str, Any]:
        """What a merged model's manifest keeps of a run of this program: how it was asked, for `load_run_or_base`."""
        if not self.closes_turns:
            return {}
        return {ASKED_WITH: {"prompt": asdict(self.config.prompt), "data": {"max_length": self.config.data.max_length}}}

    @property
    def labelled(self) -> bool:
        """Whether it is known to answer with label words: the run's final folder says so."""
        path = None if self.path is None else self.path / "metrics.json"
        return path is not None and path.is_file() and read_json(path).get("labelled") is True

    @property
    def columns(self) -> dict[str, str]:
        """`columns_of` the adapter's run."""
        return {} if self.path is None else columns_of(self.path)

    def read_reviews(
        self, data: Path | None, reading: ReadOptions = ReadOptions(), otherwise: str = ""
    ) -> tuple[Path, Examples]:
        """Labelled reviews to score the model on, and their file: `data`, or the test split of the adapter's run.

        `otherwise` is what a message adds to its remedies where there are none.
        """
        config, prompt, is_trained = self.config, self.prompt, self.path is not None
        check_label_map(reading.map_labels, prompt.labels)
        if data is None:
            path = Path(config.data.dir) / "test.jsonl"
            if not path.is_file():
                raise UserError(
                    f"{path}: is not there; give labelled reviews with --data, or their folder with data.dir{otherwise}"
                )
            reviews = read_split(
                config, prompt, "test", ReadOptions(map_labels=reading.map_labels), is_trained=is_trained
            )
            if self.path is not None:
                warn_of_another_test_set(self.path, path)
        else:
            path = data
            chosen = choose(path, reading, config, "test")
            records = [record for _, record in iter_chosen(path, reading, chosen)]
            empty = [record.where for record in records if not record.content.strip()]
            if empty:
                warn(f"note: {empty[0]}: one of {len(empty):,} empty texts, which are scored like others")
            reviews = build_examples(records, prompt, is_trained)
        if not reviews.labelled:
            found = f"{np.count_nonzero(reviews.labels < 0):,} of its {len(reviews.labels):,} records are conversations"
            remedy = "give labelled reviews with --data" if data is None else "give a file of labelled reviews"
            raise UserError(f"{path}: {found}, which have no label; {remedy}{otherwise}")
        if not reviews.examples:
            raise UserError(f"{path}: holds no labelled review; give a file with a text and a label")
        tell_of_labels({str(path): reviews}, prompt.labels, data is not None or says_indices(config))
        return path, reviews

    def score(
        self, model: Qwen2ForCausalLM, reviews: Examples, title: str, ranks: Ranks = SINGLE_RANK
    ) -> tuple[float, np.ndarray]:
        """Loss and (N, labels) probabilities of N labelled reviews, on all ranks; UserError for a non-finite loss.

        `model` has the adapter, or is one to compare with it; `title` is the progress bar's.
        """
        size = self.config.train.per_device_eval_batch_size
        with progress(title, len(reviews.examples), "review") as bar:
            options = ScoringOptions(size, scoring_tokens(self.config), on_progress=bar.update, ranks=ranks)
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
        path: a final adapter, a checkpoint, or another program's adapter; verified where it has a manifest.
        base: base model to use in place of the adapter's own.
        overrides: `section.key=value` from the command line.
        other_data: the run's test split is not what is scored, so the run's limit on its size does not apply.
        keys_read: beginnings of the keys that the caller reads; it warns of other overrides.
    """
    path = fetch_adapter(path.as_posix())
    if not (path / "adapter_config.json").is_file():
        raise UserError(f"{path}: {no_adapter(path)}")
    _say_what_is_not_read(path)
    problem = damage_of_adapter(path) if (path / MANIFEST).is_file() else None
    if problem is not None:
        raise UserError(f"{path}: is damaged ({problem}); take another copy of it")
    _, named = read_adapter_config(path)
    saved = read_provenance(path)
    model, data = saved.config.get("model", {}), saved.config.get("data", {})
    if base:
        model = {**model, "name_or_path": base, "revision": None}
    elif named.name_or_path is not None:  # which may have been corrected since the run
        model = {**model, "name_or_path": named.name_or_path, "revision": named.revision}
    if model.get("name_or_path") is None:
        raise UserError(f"{path}: adapter_config.json names no base model; give it with --base")
    if other_data:
        data = {name: value for name, value in data.items() if name not in ("max_test_examples", "sample")}
    try:
        run = _open({**saved.config, "model": model, "data": data}, overrides, str(path), keys_read)
    except _NoBaseError as error:
        if base is not None or any(override.startswith("model.name_or_path=") for override in overrides):
            raise
        written = () if named.name_or_path is not None else ("training_args.json", "state.json")
        name = next((name for name in written if (path / name).is_file()), "adapter_config.json")
        raise UserError(
            f"{error}\n  {path / name} names this base model; say with --base where it is on this machine"
        ) from None
    words = saved.config.get("prompt", {}).get("labels", run.config.prompt.labels)
    if words != run.config.prompt.labels:
        warn(f"warning: {path}: {other_words(run.config.prompt.labels, words)}")
    _refuse_another_base(path, saved.model_sha256, run.model_folder, base is not None)
    return replace(run, path=path)


def load_run_or_base(
    path: Path, base: str | None, overrides: list[str], keys_read: tuple[str, ...], other_data: bool = True
) -> LoadedRun:
    """`load_run`, or the base model that `path` names, without an adapter and with the default prompt.

    Where scripts/merge.py made that, with the prompt of the adapter's run.
    """
    folder = fetch_adapter(path.as_posix())
    if not _is_base(path, folder):
        return load_run(folder, base, overrides, other_data, keys_read=keys_read)
    if base is not None:
        raise UserError(f"{path}: is a base model itself; leave out --base, or give an adapter")
    asked_with = _read_asked_with(folder)
    if asked_with:
        info(f"{path}: is a merged model; prompt.* and data.max_length are those of the adapter's run")
    return _open({**asked_with, "model": {"name_or_path": path.as_posix()}}, overrides, "--model_path", keys_read)


def _read_asked_with(folder: Path) -> dict[str, Any]:
    """`LoadedRun.asked_with` of a merged model, by section; nothing of another model."""
    with suppress(UserError):  # no manifest, or another program's
        return dict(read_manifest(folder)["facts"].get(ASKED_WITH, {}))
    return {}


def _open(content: dict[str, Any], overrides: list[str], where: str, keys_read: tuple[str, ...]) -> LoadedRun:
    """The base model that a configuration names; warns of overrides that change nothing."""
    config = config_from_dict(content, overrides, where)
    for override in overrides:
        if not override.partition("=")[0].replace("-", "_").startswith(keys_read):
            warn(f"note: {override.partition('=')[0]} changes nothing here: an adapter is as its files say")
    try:
        folder = fetch_model(config.model.name_or_path, config.model.revision)
    except UserError as error:
        raise _NoBaseError(str(error)) from None
    if (folder / MANIFEST).is_file():
        model_digests(folder)  # which compares them
    return LoadedRun(None, config, folder, build_prompt(config, ChatTokenizer(folder)))


class _NoBaseError(UserError):
    """The base model is not there."""


def _is_base(path: Path, folder: Path) -> bool:
    """Whether `path`, found in `folder`, is a model and no adapter."""
    if (folder / "adapter_config.json").is_file():
        return False
    is_model = (folder / "config.json").is_file() or any(folder.glob("*.gguf"))  # which `fetch_model` refuses
    return folder != path or is_model or path.as_posix().startswith(PACKAGE_ASSETS)


def _say_what_is_not_read(folder: Path) -> None:
    """A note where a folder holds more weights than those that are read."""
    inner = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    if (folder / "adapter_model.safetensors").is_file() and (folder / "adapter_model.bin").is_file():
        inner.insert(0, "adapter_model.bin")
    if inner:
        warn(f"note: {folder}: its own adapter_model.safetensors is read, not {capped(', '.join(inner))} in it")


def columns_of(path: Path) -> dict[str, str]:
    """The columns that were named when the data of an adapter's run was prepared, by what they are ("text", "label").

    A checkpoint's are those of its data folder, if that is here. `path` may be a name on the hub.
    """
    path = fetch_adapter(path.as_posix())
    if (path / "metrics.json").is_file():
        return dict(read_json(path / "metrics.json").get("data_columns", {}))
    directory = read_provenance(path).config.get("data", {}).get("dir")
    return prepared_columns(directory) if directory else {}


def warn_of_another_test_set(model_path: Path, data: Path) -> None:
    """Warns if `data` is not the test file of the adapter's run, where the run is known."""
    digests = read_provenance(model_path).data_sha256
    if digests and digests.get(data.name) != sha256(data):
        warn(
            f"warning: {data}: is not the file of the adapter's run, its SHA-256 is another; reviews that the adapter "
            "was trained on may be in it"
        )


def _refuse_another_base(path: Path, before: dict[str, str], model_folder: Path, is_asked_for: bool) -> None:
    """UserError if a base model is not the one that the adapter was trained on; a warning if --base asked for it."""
    changed = changed_names(before, model_digests(model_folder)) if before else []
    if changed:
        problem = f"{path}: was trained on another base model than {model_folder} (SHA-256 of {', '.join(changed)})"
        if not is_asked_for:
            raise UserError(f"{problem}; name its own with --base, or this one to have it scored all the same")
        warn(f"warning: {problem}")
