"""validation.safetensors beside a run's log: what its final adapter says of each validation record, for comparisons."""

import hashlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from minilora.data.examples import Examples
from minilora.errors import UserError
from minilora.evaluation.comparison import Predictions
from minilora.evaluation.score import Scores

PREDICTIONS = "validation.safetensors"


def prediction_bytes(split: Examples, digest: str, scores: Scores) -> bytes:
    """The file's content; `digest` is the SHA-256 of the validation set's file."""
    lines = np.asarray(split.examples.lines, dtype=np.int64)  # a limit chooses some
    made_of = hashlib.sha256(digest.encode() + lines.tobytes()).digest()
    tensors = {
        "data": np.frombuffer(made_of, dtype=np.uint8),
        "loss": np.array([scores.loss]),
        "labels": np.asarray(split.labels, dtype=np.int32)
        if scores.probabilities is not None
        else np.zeros(0, np.int32),
        "probabilities": np.zeros((0, 0)) if scores.probabilities is None else scores.probabilities,
    }
    return bytes(save({name: np.ascontiguousarray(values) for name, values in tensors.items()}))  # it ignores strides


def read_predictions(directory: Path) -> Predictions:
    """Those of a finished run in its output folder; UserError if they cannot be read."""
    path = directory / PREDICTIONS
    try:
        found = load_file(path)
        return Predictions(
            found["data"].tobytes().hex(), float(found["loss"][0]), found["labels"], found["probabilities"]
        )
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); move {directory / 'checkpoints' / 'final'} away, and the same command "
            "writes both anew from the last checkpoint"
        ) from None
