"""A layer's launches stay where they are; the goals are 200 and 120. A fast GPU waits for them with a small model."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(("is_gpu", "limit"), [(False, 191), (True, 118)], ids=["CPU", "GPU"])
def test_a_layer_starts_few_kernels(is_gpu: bool, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import launches

    forward, backward = launches.per_layer(lambda layers: launches.count_minilora(layers, 0.0, False, is_gpu))
    assert forward.total() + backward.total() <= limit
    attention = {"_flash_attention_forward", "_flash_attention_backward"}
    assert ({*forward, *backward} & attention == attention) == is_gpu
