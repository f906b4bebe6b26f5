"""What a run was made from, and whether it is the same now.

A run is a function of its configuration, its data, its base model, and the machine's way to compute. All of them are
compared with what a checkpoint says before anything is loaded: a continuation that differs would be a third run,
neither the old nor the new.

How many processes take part is not among them, as long as a step has the same examples: a run may go on with 2 ranks of
4 examples each where it had one of 8. It is cut otherwise then, which changes the last bits, and the dropout masks.
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
from minilora.system.files import read_json, sha256, sha256_once
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
    """All that a run is a function of.

    Attributes:
        config: values by section and key.
        data_sha256: of the split files, by name.
        model_sha256: of the base model's files, by name.
        ranks: processes that train together.
    """

    config: dict[str, dict[str, Any]]
    data_sha256: dict[str, str]
    model_sha256: dict[str, str]
    ranks: int

    @property
    def cut(self) -> dict[str, int]:
        """How its optimizer steps are cut; the product is the number of their examples."""
        defaults = Config().to_dict()
        keys = {f"train.{name}": self.config["train"].get(name, defaults["train"][name]) for name in CUTS}
        return {**keys, "processes": self.ranks}

    @property
    def facts(self) -> dict[str, Any]:
        """All of it by name, one level deep, as a message names what differs."""
        keys = {f"{section}.{name}": value for section, keys in self.config.items() for name, value in keys.items()}
        return {**keys, **self.data_sha256, **self.model_sha256}


def current_provenance(config: Config, model_folder: Path, ranks: int = 1) -> Provenance:
    """What a run would be made from now: the files' SHA-256 are taken, which reads all of them."""
    directory = Path(config.data.dir)
    data = {name: sha256(directory / name) for name in (f"{split}.jsonl" for split in SPLITS)}
    _note_changed_splits(directory, data)
    return Provenance(config.to_dict(), data, model_digests(model_folder), ranks)


def _note_changed_splits(directory: Path, digests: dict[str, str]) -> None:
    """Says on standard error which splits are not as they were prepared; who edits them on purpose may go on."""
    report = directory / "data_report.json"
    content = read_json(report) if report.is_file() else None
    written = content.get("sha256_out") if isinstance(content, dict) else None
    if not isinstance(written, dict):
        return
    changed = [name for name, digest in digests.items() if written.get(name, digest) != digest]
    if changed:
        warn(f"note: {directory}: {', '.join(changed)}: edited or damaged since they were prepared")


def model_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that make a base model what it is, by name."""
    names = ("config.json", "tokenizer.json")
    return {
        path.name: sha256_once(path) for path in sorted([*(folder / n for n in names), *folder.glob("*.safetensors")])
    }


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


def refuse_another_run(before: Provenance, now: Provenance, config: Config, directory: Path) -> None:
    """Raises UserError with all that would make the run in `directory`, made from `before`, another one."""
    changes = changed_keys(before.config, config)
    examples = math.prod(before.cut.values())
    if examples != math.prod(now.cut.values()):
        changes += _changed_cut(before, now)
        size, rest = divmod(examples, now.cut["processes"] * now.cut["train.gradient_accumulation_steps"])
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


def _changed_cut(before: Provenance, now: Provenance) -> list[str]:
    return [f"{name}: {old} -> {now.cut[name]}" for name, old in before.cut.items() if old != now.cut[name]]


def note_another_cut(before: Provenance, now: Provenance) -> None:
    """Says on standard error what `refuse_another_run` let pass: the same examples a step, cut otherwise."""
    changes = _changed_cut(before, now)
    if changes:
        warn(f"note: {', '.join(changes)}; the rest may differ in the last bits and has other dropout masks")


def describe_machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What else decides the bits of a run; `auto` in a configuration does not say it."""
    versions = {}
    for name in ("torch", "bitsandbytes"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    return {"device": device.type, "dtype": dtype_name(dtype), "threads": torch.get_num_threads(), **versions}


def refuse_another_machine(before: dict[str, Any], now: dict[str, Any], directory: Path) -> None:
    """Says what has changed about the machine.

    Raises:
        UserError: another kind of device or another dtype, with which a run takes another course.
    """
    changes = {
        name: f"{name}: {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value
    }
    serious = [changes[name] for name in ("device", "dtype") if name in changes]
    if serious:
        raise UserError(
            f"{directory}: its run was computed otherwise ({', '.join(serious)}); set model.device and "
            "model.compute_dtype to what it had, choose another train.output_dir, or begin anew with --restart"
        )
    if changes:
        warn(f"note: {', '.join(changes.values())}; the rest may differ in the last bits")
