"""Provenance: what a run was made from, and whether that is the same now.

A run is a function of its configuration, its data, its base model, and the machine's arithmetic. All of them are
compared with what a checkpoint says before anything is loaded: a continuation that differs would be a third run,
neither the old nor the new. Data, base model and an adapter to begin with are known by SHA-256, not by path or name.

    state.json           of a checkpoint: all of it, and the run's state
    training_args.json   of a final adapter: the configuration
    metrics.json         beside it: SHA-256 of data and base model, machine

The number of ranks may change as long as a step has the same examples: a run may resume with 2 ranks of 4 examples each
where it had one of 8. The step is divided differently then, which changes the last bits, and the dropout masks; so is
it with another train.max_tokens_per_micro_batch.
"""

import importlib.metadata
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from minilora import __version__
from minilora.config import FREE_KEYS, KEYS, PATHS, REMOVED_KEYS, Config, same_modules
from minilora.data.hub import fetch_adapter
from minilora.data.split_files import SPLITS, read_report
from minilora.errors import UserError
from minilora.system.console import warn
from minilora.system.files import read_json, sha256
from minilora.system.manifest import MANIFEST, read_manifest
from minilora.system.schema import default_of
from minilora.weights.safetensors_io import dtype_name

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# With the number of ranks, the factors of an optimizer step's examples: only their product is fixed.
CUTS = ("per_device_train_batch_size", "gradient_accumulation_steps")
LENGTHS = ("num_train_epochs", "max_steps")
REASONS = {  # behind a key that a continuation cannot change
    **dict.fromkeys(LENGTHS, "  (free with lr_scheduler_type=constant, warmup_ratio=0)"),
    "sample": "  (which N a limit takes; a run of an earlier version has data.sample=first)",
}
ELSEWHERE = "choose another train.output_dir (of a sweep: --output_dir)"
LIMITS = ("max_train_examples", "max_validation_examples", "max_test_examples")


@dataclass(frozen=True)
class Provenance:
    """What a run is a function of."""

    config: dict[str, dict[str, Any]]  # values by section and key
    data_sha256: dict[str, str]  # of the split files, by name
    model_sha256: dict[str, str]  # of the base model's files, by name
    machine: dict[str, Any]  # device, dtype, threads, GPU, library versions, number of ranks
    adapter_sha256: dict[str, str] = field(default_factory=dict)  # of the weights that it began with, by file name

    @property
    def step_factors(self) -> dict[str, int]:
        """What the number of examples in an optimizer step is the product of."""
        defaults = Config().to_dict()
        keys = {f"train.{name}": self.config["train"].get(name, defaults["train"][name]) for name in CUTS}
        return {**keys, "processes": self.machine.get("ranks", 1)}  # checkpoints older than ranks had one

    @property
    def facts(self) -> dict[str, Any]:
        """What all ranks have in common, by name, as messages name what differs."""
        keys = {f"{section}.{name}": value for section, keys in self.config.items() for name, value in keys.items()}
        keys = {name: value for name, value in keys.items() if name not in PATHS}  # of each machine its own
        machine = {name: value for name, value in self.machine.items() if name != "threads"}
        version = {"minilora": __version__}
        return {**keys, **self.data_sha256, **self.model_sha256, **self.adapter_sha256, **machine, **version}


def current_provenance(config: Config, model_folder: Path, machine: dict[str, Any]) -> Provenance:
    """What a run would be made from now; hashes the files of data, base model and the adapter that it begins with.

    Warns of splits that are not as they were prepared: they may have been edited on purpose.
    """
    directory = Path(config.data.dir)
    data = {name: sha256(directory / name) for name in (f"{split}.jsonl" for split in SPLITS)}
    written = read_report(directory).get("sha256_out", {})
    changed = [name for name, digest in data.items() if written.get(name, digest) != digest]
    if changed:
        warn(f"note: {directory}: {', '.join(changed)}: edited or damaged since they were prepared")
    adapter = {}
    if config.model.adapter is not None:
        adapter = {ADAPTER_WEIGHTS: sha256(fetch_adapter(config.model.adapter) / ADAPTER_WEIGHTS)}
    return Provenance(config.to_dict(), data, model_digests(model_folder), machine, adapter_sha256=adapter)


def model_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that define a base model, by name.

    UserError for weights that are not as scripts/merge.py or quantize.py wrote them; a note on other files.
    """
    paths = [folder / "config.json", folder / "tokenizer.json", *folder.glob("*.safetensors")]
    digests = {path.name: sha256(path) for path in sorted(paths)}
    if not (folder / MANIFEST).is_file():
        return digests
    try:
        written = read_manifest(folder)["files"]
    except UserError:
        warn(f"note: {folder / MANIFEST}: is damaged or another program's, so the base model cannot be verified")
        return digests
    changed = [name for name in digests if name in written and written[name]["sha256"] != digests[name]]
    damaged = [name for name in changed if name.endswith(".safetensors")]
    if damaged:
        raise UserError(
            f"{folder}: {', '.join(damaged)}: damaged since they were written (by SHA-256 of {MANIFEST}); copy or make "
            f"the folder again, or remove its {MANIFEST} if you changed them on purpose"
        )
    if changed:
        warn(f"note: {folder}: {', '.join(changed)}: edited or damaged since they were written")
    return digests


def describe_machine(device: torch.device, dtype: torch.dtype, ranks: int) -> dict[str, Any]:
    """What else decides the bits of a run; `auto` in a configuration leaves it open."""
    versions = {}
    for name in ("torch", "bitsandbytes"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    kind = {"device": device.type, "dtype": dtype_name(dtype), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        kind |= {"gpu": f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}", "cuda": torch.version.cuda}
    return {**kind, **versions, "ranks": ranks}


def read_provenance(folder: Path) -> Provenance:
    """What the run that wrote a final adapter or a checkpoint was made from; empty where the folder does not say."""
    found: dict[str, Any] = {}
    for name in ("state.json", "metrics.json", "training_args.json"):
        path = folder / name
        if path.is_file():
            content = read_json(path)
            content = {"config": content} if name == "training_args.json" else content
            if not _is_provenance(content):
                raise UserError(f"{path}: does not say what a run was made from; put the file back")
            found |= content
    saved = {item.name: found.get(item.name, {}) for item in fields(Provenance)}
    return Provenance(**{**saved, "config": of_earlier_version(saved["config"])})


def _is_provenance(content: Any) -> bool:
    """Whether what a file has of a Provenance has its types."""
    if not isinstance(content, dict) or not all(isinstance(content.get(f.name, {}), dict) for f in fields(Provenance)):
        return False
    config = content.get("config", Config().to_dict())
    sections = sorted(section.name for section in fields(Config))
    return sorted(config) == sections and all(isinstance(keys, dict) for keys in config.values())


def of_earlier_version(content: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """A saved configuration as this version says it: without keys that are gone since, and with `data.sample`.

    A version that had no such key took the first N.
    """
    kept = {
        section: {name: value for name, value in keys.items() if f"{section}.{name}" not in REMOVED_KEYS}
        for section, keys in content.items()
    }
    data = kept.get("data", {})
    if "sample" not in data and any(data.get(name) for name in LIMITS):
        kept["data"] = {**data, "sample": "first"}
    return kept


def changed_keys(before: Mapping[str, Any], config: Config) -> list[str]:
    """`section.key: before -> now` of every key that would change the course of a run that has begun.

    The run's length is no such key where the learning rate does not depend on it, nor is one of CUTS, nor a compute
    dtype of auto, which is compared as what it became.
    """
    before = of_earlier_version(before)
    is_constant = config.train.lr_scheduler_type == "constant" and config.train.warmup_ratio == 0
    lines = []
    for name, item in KEYS.items():
        section, _, attribute = name.partition(".")
        old = before.get(section, {}).get(attribute, default_of(item))  # an older version had no such key
        now = getattr(getattr(config, section), attribute)
        is_free = name in FREE_KEYS or attribute in CUTS or (is_constant and attribute in LENGTHS)
        is_free = is_free or (attribute == "compute_dtype" and "auto" in (old, now))
        is_same = same_modules(old, now) if attribute == "target_modules" else old == now
        if not is_same and not is_free:
            shown = (json.dumps(value, ensure_ascii=False) for value in (old, now))
            lines.append(f"{name}: {' -> '.join(shown)}{REASONS.get(attribute, '')}")
    return lines


def changed_names(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The names whose value, such as a checksum, is another one or is in one of them only."""
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


def refuse_other_run(before: Provenance, now: Provenance, config: Config, directory: Path) -> None:
    """Raises UserError with every difference that would make the run in `directory` another one."""
    changes = changed_keys(before.config, config)
    examples = math.prod(before.step_factors.values())
    if examples != math.prod(now.step_factors.values()):
        changes += _changed_factors(before, now)
        others = now.step_factors["processes"] * now.step_factors["train.gradient_accumulation_steps"]
        if examples % others == 0:
            size = f"train.per_device_train_batch_size={examples // others}"
            changes.append(f"its steps have {examples} examples; so they do with {size}")
    if changes:
        raise UserError(
            f"{directory}: holds a run with another configuration; {ELSEWHERE}, put the keys back, or begin anew with "
            "--restart\n  " + "\n  ".join(changes)
        )
    for what, changed in (
        (f"data in {config.data.dir}", changed_names(before.data_sha256, now.data_sha256)),
        (f"base model {config.model.name_or_path}", changed_names(before.model_sha256, now.model_sha256)),
        (f"model.adapter ({config.model.adapter})", changed_names(before.adapter_sha256, now.adapter_sha256)),
    ):
        if changed:
            raise UserError(
                f"{directory}: its run was made with another {what} (SHA-256 of {', '.join(changed)}); "
                f"put the files back, {ELSEWHERE}, or begin anew with --restart"
            )


def refuse_other_machine(before: Provenance, now: Provenance, directory: Path) -> None:
    """UserError for another kind of device or dtype; a warning of what may change only the last bits of the rest."""
    changes = {
        name: f"{name}: {before.machine.get(name)} -> {value}"
        for name, value in now.machine.items()
        if name != "ranks" and before.machine.get(name) != value
    }
    serious = [changes[name] for name in ("device", "dtype") if name in changes]
    if serious:
        raise UserError(
            f"{directory}: its run had another device or dtype ({', '.join(serious)}); set model.device and "
            f"model.compute_dtype to what it had, {ELSEWHERE}, or begin anew with --restart"
        )
    divided = [*_changed_factors(before, now), *_changed_key(before, now, "max_tokens_per_micro_batch")]
    others = [*_changed_key(before, now, "per_device_eval_batch_size"), *changes.values()]
    if divided or others:
        masks = " and has other dropout masks" if divided else ""
        warn(f"note: {', '.join([*divided, *others])}; the rest may differ in the last bits{masks}")


def _changed_factors(before: Provenance, now: Provenance) -> list[str]:
    pairs = zip(before.step_factors.items(), now.step_factors.values(), strict=True)
    return [f"{name}: {old} -> {new}" for (name, old), new in pairs if old != new]


def _changed_key(before: Provenance, now: Provenance, name: str) -> list[str]:
    """`train.{name}: before -> now` where that differs."""
    old, new = (run.config["train"].get(name, getattr(Config().train, name)) for run in (before, now))
    return [f"train.{name}: {old} -> {new}"] if old != new else []
