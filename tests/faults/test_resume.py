"""Every step of a run is a valid place to stop: the rest is equal to the bit."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minilora.config import load_config
from minilora.evaluation import score as score_module
from minilora.qlora import step as step_module
from minilora.qlora.loss import next_token_nll
from minilora.qlora.step import StepResult
from minilora.runs import train
from minilora.runs.train import fit
from minilora.system.manifest import verify_folder
from minilora.system.signals import Interrupted, SafePoints
from tests.faults.conftest import Count, HowMany, outcome

STEPS = 24


@pytest.fixture
def fit_until(keys: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], int]:
    """A run in tmp_path/{name}, interrupted as by a signal at place `place` of those where one is answered.

    These are every micro-batch, every validation and the end of every step; at place 0 nothing happens. Returns how
    many steps it took.
    """
    model = next(key.partition("=")[2] for key in keys if key.startswith("model.name_or_path="))

    def run(name: str, place: int) -> int:
        passed, steps = [0], [0]

        class Places(SafePoints):
            def check(self) -> None:
                passed[0] += 1
                if passed[0] == place:
                    raise Interrupted(15)

            @contextlib.contextmanager
            def anywhere(self) -> Iterator[None]:
                for module in (step_module, score_module):
                    monkeypatch.setattr(module, "next_token_nll", lambda *a: (self.check(), next_token_nll(*a))[1])
                try:
                    yield
                finally:
                    for module in (step_module, score_module):
                        monkeypatch.setattr(module, "next_token_nll", next_token_nll)

            def __exit__(self, *_: Any) -> None:
                self._listening.__exit__(None, None, None)

        def counted(*arguments: Any) -> StepResult:
            result = step_module.train_step(*arguments)
            steps[0] += 1
            return result

        monkeypatch.setitem(sys.modules, "matplotlib", None)  # half of the run's time
        monkeypatch.setattr(train, "SafePoints", Places)
        monkeypatch.setattr(train, "train_step", counted)
        more = [f"train.max_steps={STEPS}", "train.eval_steps=5", "train.save_steps=100"]
        config = load_config(None, [*keys, *more, f"train.output_dir={tmp_path / name}"])
        fit(config, Path(model))
        return steps[0]

    return run


def final_of(output: Path) -> dict[str, Any]:
    last = output / "checkpoints" / f"step-{STEPS:06d}"
    (output / "checkpoints" / "step-000006").symlink_to(last)  # where `outcome` looks
    return outcome(output)


@pytest.mark.slow
def test_every_step_is_a_place_to_stop(
    fit_until: Callable[[str, int], int], tmp_path: Path, count: Count, how_many: HowMany, is_small: bool
) -> None:
    assert fit_until("whole", 0) == STEPS
    expected = final_of(tmp_path / "whole")
    # Two micro-batches and the end of each step; 5 validations have one batch each. The last end is not one of them.
    places = range(1, 3 * STEPS + 5, how_many(11, 1, 1))
    stopped_at = set()
    for place in places:
        output = tmp_path / f"stop-{place}"
        with pytest.raises(Interrupted) as caught:
            fit_until(output.name, place)
        saved = [int(path.name[5:]) for path in sorted((output / "checkpoints").glob("step-*"))]
        assert all(verify_folder(output / "checkpoints" / f"step-{step:06d}") is None for step in saved)
        if saved:
            assert str(caught.value).endswith(f"saved step {saved[-1]}; the same command resumes there")
            stopped_at.add(saved[-1])
        assert fit_until(output.name, 0) == STEPS - max(saved, default=0)  # it resumed, it did not begin anew
        assert final_of(output) == expected
    assert is_small or stopped_at >= set(range(1, STEPS))
    count(f"stopped within and after {STEPS} steps and validations: {len(places)} places, equal to the bit: all")
