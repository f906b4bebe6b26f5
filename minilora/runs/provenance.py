"""Provenance: what a run was made from, and whether that is the same now.

A run is a function of its configuration, its data, its base model, and the machine's arithmetic. All of them are
compared with what a checkpoint says before anything is loaded: a continuation that differs would be a third run,
neither the old nor the new. Data and base model are known by SHA-256, not by path.

The number of ranks may change as long as a step has the same examples: a run may resume with 2 ranks of 4 examples each
where it had one of 8. The step is divided differently then, which changes the last bits, and the dropout masks.
"""

import importlib.metadata
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from minilora.config import CUTS, Config, changed_keys, drop_removed_keys
from minilora.data.prepare import SPLITS
from minilora.errors import UserError
from minilora.system.console import warn
from minilora.system.files import read_json, sha256
from minilora.weights.safetensors_io import dtype_name


def read_saved_config(path: Path) -> dict[str, dict[str, Any]]:
    """The configuration in training_args.json of a final adapter, or in state.json of a checkpoint.

    Raises:
        UserError: the file is missing or has other content.
    """
    content = read_json(path)
    if path.name == "state.json" and isinstance(content, dict):
        content = content.get("config")
    sections = [section.name for section in fields(Config)]
    if (
        not isinstance(content, dict)
        or sorted(content) != sorted(sections)
        or not all(isinstance(keys, dict) for keys in content.values())
    ):
        raise UserError(f"{path}: holds no run's configuration, expected {', '.join(sections)}; put the file back")
    return drop_removed_keys(content)


@dataclass(frozen=True)
class Provenance:
    """What a run is a function of.

    Attributes:
        config: values by section and key.
        data_sha256: of the split files, by name.
        model_sha256: of the base model's files, by name.
        ranks: that train together.
    """

    config: dict[str, dict[str, Any]]
    data_sha256: dict[str, str]
    model_sha256: dict[str, str]
    ranks: int

    @property
    def step_factors(self) -> dict[str, int]:
        """What the number of examples in an optimizer step is the product of."""
        defaults = Config().to_dict()
        keys = {f"train.{name}": self.config["train"].get(name, defaults["train"][name]) for name in CUTS}
        return {**keys, "processes": self.ranks}

    @property
    def facts(self) -> dict[str, Any]:
        """All of it by name, one level deep, as messages name what differs."""
        keys = {f"{section}.{name}": value for section, keys in self.config.items() for name, value in keys.items()}
        return {**keys, **self.data_sha256, **self.model_sha256}


def current_provenance(config: Config, model_folder: Path, ranks: int = 1) -> Provenance:
    """What a run would be made from now; hashes the files of data and base model."""
    directory = Path(config.data.dir)
    data = {name: sha256(directory / name) for name in (f"{split}.jsonl" for split in SPLITS)}
    _note_changed_splits(directory, data)
    return Provenance(config.to_dict(), data, model_digests(model_folder), ranks)


def _note_changed_splits(directory: Path, digests: dict[str, str]) -> None:
    """Warns of splits that are not as they were prepared; they may have been edited on purpose."""
    report = directory / "data_report.json"
    content = read_json(report) if report.is_file() else None
    written = content.get("sha256_out") if isinstance(content, dict) else None
    if not isinstance(written, dict):
        return
    changed = [name for name, digest in digests.items() if written.get(name, digest) != digest]
    if changed:
        warn(f"note: {directory}: {', '.join(changed)}: edited or damaged since they were prepared")


def model_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that define a base model, by name."""
    names = ("config.json", "tokenizer.json")
    return {path.name: sha256(path) for path in sorted([*(folder / n for n in names), *folder.glob("*.safetensors")])}


def read_provenance(folder: Path) -> Provenance:
    """What the run that wrote `folder`, a checkpoint or the final adapter, was made from.

    Raises:
        UserError: a file is missing or has other content.
    """
    names = ("training_args.json", "metrics.json") if folder.name == "final" else ("state.json", "state.json")
    config = read_saved_config(folder / names[0])
    content = read_json(folder / names[1])
    digests = ("data_sha256", "model_sha256")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in digests):
        raise UserError(f"{folder / names[1]}: holds no SHA-256 of data and model; put the file back")
    machine = content.get("machine")
    ranks = machine.get("ranks") if isinstance(machine, dict) else None
    return Provenance(config, content["data_sha256"], content["model_sha256"], 1 if ranks is None else int(ranks))


def refuse_other_run(before: Provenance, now: Provenance, config: Config, directory: Path) -> None:
    """Raises UserError with every difference that would make the run in `directory` another one."""
    changes = changed_keys(before.config, config)
    examples = math.prod(before.step_factors.values())
    if examples != math.prod(now.step_factors.values()):
        changes += _changed_factors(before, now)
        size, rest = divmod(
            examples, now.step_factors["processes"] * now.step_factors["train.gradient_accumulation_steps"]
        )
        if not rest:
            changes.append(
                f"its steps have {examples} examples; so they do with train.per_device_train_batch_size={size}"
            )
    if changes:
        raise UserError(
            f"{directory}: holds a run with another configuration; choose another train.output_dir, put the keys "
            "back, or begin anew with --restart\n  " + "\n  ".join(changes)
        )
    for what, old, new in (
        (f"data in {config.data.dir}", before.data_sha256, now.data_sha256),
        (f"base model {config.model.name_or_path}", before.model_sha256, now.model_sha256),
    ):
        changed = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        if changed:
            raise UserError(
                f"{directory}: its run was made with another {what} (SHA-256 of {', '.join(changed)}); "
                "put the files back, choose another train.output_dir, or begin anew with --restart"
            )


def _changed_factors(before: Provenance, now: Provenance) -> list[str]:
    return [
        f"{name}: {old} -> {now.step_factors[name]}"
        for name, old in before.step_factors.items()
        if old != now.step_factors[name]
    ]


def note_other_factors(before: Provenance, now: Provenance) -> None:
    """Warns of the difference that `refuse_other_run` allows: the same examples a step, divided differently."""
    changes = _changed_factors(before, now)
    if changes:
        warn(f"note: {', '.join(changes)}; the rest may differ in the last bits and has other dropout masks")


def describe_machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What else decides the bits of a run; `auto` in a configuration leaves it open."""
    versions = {}
    for name in ("torch", "bitsandbytes"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    return {"device": device.type, "dtype": dtype_name(dtype), "threads": torch.get_num_threads(), **versions}


def refuse_other_machine(before: dict[str, Any], now: dict[str, Any], directory: Path) -> None:
    """Warns of a machine that may give other last bits.

    Raises:
        UserError: another kind of device or dtype, with which the results differ by more.
    """
    changes = {
        name: f"{name}: {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value
    }
    serious = [changes[name] for name in ("device", "dtype") if name in changes]
    if serious:
        raise UserError(
            f"{directory}: its run had another device or dtype ({', '.join(serious)}); set model.device and "
            "model.compute_dtype to what it had, choose another train.output_dir, or begin anew with --restart"
        )
    if changes:
        warn(f"note: {', '.join(changes.values())}; the rest may differ in the last bits")
