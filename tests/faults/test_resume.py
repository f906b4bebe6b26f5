"""Every step of a run is a valid place to stop: the rest is equal to the bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minilora import train
from minilora.config import load_config
from minilora.files import verify_folder
from minilora.script import Interrupted
from minilora.train import fit
from tests.faults.conftest import outcome

STEPS = 24


@pytest.fixture
def fit_until(keys: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """A run in tmp_path/{name}, interrupted as by a signal after `calls` micro-batches and batches of scoring."""
    model = next(key.partition("=")[2] for key in keys if key.startswith("model.name_or_path="))

    def run(name: str, calls: int) -> None:
        left = [calls]

        class Stop:
            def __enter__(self) -> Callable[[], None]:
                return self.check

            def __exit__(self, *_: Any) -> None:
                return None

            def check(self) -> None:
                left[0] -= 1
                if left[0] == 0:
                    raise Interrupted(15)

        monkeypatch.setattr(train, "safe_points", Stop)
        more = [f"train.max_steps={STEPS}", "train.eval_steps=5", "train.save_steps=100"]
        config = load_config(None, [*keys, *more, f"train.output_dir={tmp_path / name}"])
        fit(config, Path(model))

    return run


def final_of(output: Path) -> dict[str, Any]:
    last = output / "checkpoints" / f"step-{STEPS:06d}"
    (output / "checkpoints" / "step-000006").symlink_to(last)  # where `outcome` looks
    return outcome(output)


@pytest.mark.slow
def test_every_step_is_a_place_to_stop(
    fit_until: Callable[[str, int], None], tmp_path: Path, count: Callable[[str], None]
) -> None:
    fit_until("whole", 0)
    expected = final_of(tmp_path / "whole")
    # Two micro-batches and the pause after each step; 5 validations have one batch each.
    calls = 3 * STEPS + 5 - 1
    stopped_at = set()
    for number in range(1, calls + 1):
        output = tmp_path / f"stop-{number}"
        with pytest.raises(Interrupted) as caught:
            fit_until(output.name, number)
        saved = sorted((output / "checkpoints").glob("step-*"))
        assert all(verify_folder(path) is None for path in saved)
        if saved:
            stopped_at.add(int(saved[-1].name[5:]))
            assert str(caught.value).endswith(
                f"saved step {int(saved[-1].name[5:])}; the same command goes on from there"
            )
        fit_until(output.name, 0)
        assert final_of(output) == expected
    assert stopped_at >= set(range(1, STEPS))
    count(f"stopped within and after each of {STEPS} steps and validations: {calls} places, equal to the bit: {calls}")
