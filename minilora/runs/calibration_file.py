"""calibration.json beside an adapter: its temperature, and what that was fitted for.

A temperature belongs to one function from a review to probabilities. Where the adapter's weights, the base model, its
quantisation or the prompt are others now, it is not used, and a note says so. The files that it was fitted on are known
by SHA-256, so that figures of the same data are called what they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minilora.adapters.peft_files import CALIBRATION, weights_file
from minilora.errors import UserError
from minilora.evaluation.calibration import TemperatureFit
from minilora.qlora.prompt import ClassificationPrompt
from minilora.runs.load_run import LoadedRun
from minilora.runs.provenance import model_digests
from minilora.system.console import note, warn
from minilora.system.files import json_bytes, read_json, sha256
from minilora.system.manifest import MANIFEST, verify_folder
from minilora.system.schema import limits, read_fields

FIT_ONE = "evaluate.py --calibrate FILE fits one"


@dataclass(frozen=True)
class Calibration:
    """Content of calibration.json."""

    temperature: float = field(metadata=limits(above=0))
    num_examples: int
    log_loss_before: float  # nats, of the examples that it was fitted on
    log_loss_after: float
    data_sha256: dict[str, str]  # of their files, by name
    weights_sha256: str  # of the adapter's tensors
    model_sha256: dict[str, str]  # of the base model's files, by name
    labels: tuple[str, ...]  # of the prompt, as the next two
    instruction: str
    system: str
    temperature_interval_95: tuple[float, ...] | None = None
    note: str | None = None  # why it says little
    quantization: str | None = None  # of the base model; not in files of the first versions

    @classmethod
    def of(
        cls,
        fit: TemperatureFit,
        prompt: ClassificationPrompt,
        *,
        quantization: str,
        weights: str,
        model: Mapping[str, str],
        data: Mapping[str, str],
    ) -> "Calibration":
        """A fit, model.quantization, and the SHA-256 of adapter, base model and labelled files."""
        return cls(
            fit.temperature,
            fit.num_examples,
            fit.log_loss_before,
            fit.log_loss_after,
            data_sha256=dict(data),
            weights_sha256=weights,
            model_sha256=dict(model),
            labels=tuple(prompt.labels),
            instruction=prompt.instruction,
            system=prompt.system,
            temperature_interval_95=fit.interval_95,
            note=fit.note,
            quantization=quantization,
        )

    def to_bytes(self) -> bytes:
        return json_bytes(asdict(self))

    def changes(self, folder: Path, run: LoadedRun) -> list[str]:
        """What it was fitted for that is different now, in words; `folder` has the run's adapter."""
        prompt, quantization = run.prompt, run.config.model.quantization
        pairs = {
            "other weights of the adapter": (self.weights_sha256, sha256(weights_file(folder))),
            "another base model": (self.model_sha256, model_digests(run.model_folder)),
            f"model.quantization={self.quantization}": (self.quantization or quantization, quantization),
            "another prompt": (
                (self.labels, self.instruction, self.system),
                (tuple(prompt.labels), prompt.instruction, prompt.system),
            ),
        }
        return [name for name, (before, now) in pairs.items() if before != now]

    def is_fitted_on(self, files: Sequence[Path]) -> bool:
        """Whether one of the data files is one that it was fitted on."""
        return any(sha256(path) in self.data_sha256.values() for path in files)

    def describe(self) -> str:
        """The temperature, how well it is known and what it did where it was fitted, in a sentence or two."""
        interval = " to ".join(f"{end:.3g}" for end in self.temperature_interval_95 or ())
        return (
            f"Temperature {self.temperature:.4g}{f' (95 % interval {interval})' if interval else ''}, fitted on "
            f"{self.num_examples:,} examples of {', '.join(self.data_sha256)}, where log loss goes from "
            f"{self.log_loss_before:.4f} to {self.log_loss_after:.4f}.{f' Note: {self.note}.' if self.note else ''}"
        )


def read_calibration(folder: Path) -> Calibration | None:
    """The calibration of an adapter's folder, None where there is none; UserError where it is damaged."""
    path = folder / CALIBRATION
    if not path.is_file():
        return None
    advice = f"do without it by --raw, or replace it: {FIT_ONE}"
    problem = verify_folder(folder, [CALIBRATION]) if (folder / MANIFEST).is_file() else None
    if problem is not None:
        raise UserError(f"{path}: is not as it was written ({problem}); {advice}")
    content = read_json(path, advice)
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object; {advice}")
    return read_fields(Calibration, content, str(path), advice)


def usable_calibration(run: LoadedRun, raw: bool) -> Calibration | None:
    """`read_calibration` where it fits the adapter and how it is asked; a line says which probabilities there will be.

    `raw` leaves the file alone.
    """
    folder = run.path
    found = None if folder is None or raw else read_calibration(folder)
    changes = [] if found is None or folder is None else found.changes(folder, run)
    if changes:
        warn(
            f"note: probabilities are not calibrated: {folder}/{CALIBRATION} was fitted for {' and '.join(changes)}; "
            f"{FIT_ONE}"
        )
        return None
    if found is not None:
        note(
            f"probabilities: calibrated, temperature {found.temperature:.4g} fitted on {found.num_examples:,} examples "
            f"({CALIBRATION}; --raw leaves it out)"
        )
    elif raw or folder is None:
        note(f"probabilities: not calibrated ({'--raw' if raw else 'a base model'})")
    else:
        note(f"probabilities: not calibrated (no {CALIBRATION}; {FIT_ONE})")
    return found
