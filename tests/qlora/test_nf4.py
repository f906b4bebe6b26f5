"""4-bit weights: PyTorch against bitsandbytes to the bit, and the frozen layer over them."""

import io
import json
import logging
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from minilora.qlora import nf4
from minilora.qlora.nf4 import Linear4bit, quantize
from minilora.system import bnb

TYPES = ("nf4", "fp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Blocks that end within a row, rows that end within a block, an odd count, more blocks than one 256 holds.
SHAPES = ((8, 64), (7, 96), (1, 66), (3, 130), (5, 7), (1, 1), (1, 2), (9, 33), (64, 4160), (300, 512))
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny

pytest.importorskip("bitsandbytes", reason="the comparison needs bitsandbytes")


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """bitsandbytes cannot be imported here, and its absence has been noticed."""
    missing = pytest.MonkeyPatch()
    missing.setattr(bnb, "functional", lambda: None)
    try:
        yield
    finally:
        missing.undo()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_same_in_pytorch(weight: torch.Tensor, quant_type: str, double_quantization: bool) -> None:
    """Every stored byte and every dequantised value of the PyTorch path equal those of bitsandbytes."""
    assert bnb.is_available()
    expected = nf4._quantize_with_bitsandbytes(weight, quant_type, double_quantization)
    got = quantize(weight, quant_type, double_quantization)
    assert got.shape == expected.shape == weight.shape
    assert got.quant_type == expected.quant_type == quant_type
    assert got.tensors().keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():
        assert got.tensors()[name].dtype == tensor.dtype, name
        assert torch.equal(bits(got.tensors()[name]), bits(tensor)), name
    for dtype in DTYPES:
        dense = expected.dequantize(dtype)
        with without_bitsandbytes():
            in_pytorch = got.dequantize(dtype)
        assert dense.dtype == in_pytorch.dtype == dtype
        assert dense.shape == in_pytorch.shape == weight.shape
        if dtype == torch.bfloat16:
            # avx512_bf16's rounding instruction makes 0 of numbers that are subnormal in bfloat16; others do not.
            dense, in_pytorch = (torch.where(x.abs() < SMALLEST_NORMAL, 0, x) for x in (dense, in_pytorch))
        # FP4 has two zeros, and bitsandbytes' kernels differ in the sign of the second; `equal` takes -0 for 0.
        assert torch.equal(dense, in_pytorch), dtype
        if quant_type == "nf4":
            assert torch.equal(bits(dense), bits(in_pytorch)), dtype


@pytest.mark.parametrize("double_quantization", [True, False])
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_pytorch_equals_bitsandbytes_bit_for_bit(
    shape: tuple[int, int], quant_type: str, double_quantization: bool
) -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        assert_same_in_pytorch(torch.randn(shape).mul(0.02).to(dtype), quant_type, double_quantization)


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-39, 1e-37, 1e-20, 1e-4, 1e4, 1e20, 1e30])
def test_pytorch_equals_bitsandbytes_at_extremes(scale: float, quant_type: str) -> None:
    torch.manual_seed(1)
    for shape in ((8, 64), (5, 77)):
        weight = torch.randn(shape).mul(scale)
        weight.view(-1)[64:128] = 0  # a whole block of zeros, whatever the scale
        for double_quantization in (True, False):
            assert_same_in_pytorch(weight, quant_type, double_quantization)
            assert_same_in_pytorch(weight.bfloat16(), quant_type, double_quantization)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    seed=st.integers(0, 2**31),
    exponent=st.floats(-6, 6),
    spread=st.floats(0, 3),
    quant_type=st.sampled_from(TYPES),
    double_quantization=st.booleans(),
    dtype=st.sampled_from(DTYPES[:2]),
)
def test_pytorch_equals_bitsandbytes_on_any_weight(
    rows: int,
    columns: int,
    seed: int,
    exponent: float,
    spread: float,
    quant_type: str,
    double_quantization: bool,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 10**exponent
    weight *= torch.exp(spread * torch.randn(rows, 1, generator=generator))  # rows of unlike size
    assert_same_in_pytorch(weight.to(dtype), quant_type, double_quantization)


@pytest.mark.parametrize("quant_type", TYPES)
def test_midway_between_two_levels_rounds_as_in_bitsandbytes(quant_type: str) -> None:
    # Many scales, for whether x / absmax and x * (1 / absmax) differ depends on absmax; 46 numbers fill no block,
    # and bitsandbytes divides in a block that is not full.
    levels = torch.tensor(nf4.LEVELS[quant_type]).sort().values
    midway = (levels[1:] + levels[:-1]) / 2
    near = [midway, midway.nextafter(torch.tensor(2.0)), midway.nextafter(torch.tensor(-2.0))]
    numbers = torch.cat([torch.ones(1), *near])
    for absmax in torch.linspace(1, 2, 50):
        assert_same_in_pytorch((numbers * absmax).view(1, 46), quant_type, False)
        assert_same_in_pytorch(F.pad(numbers * absmax, (0, 18)).view(1, 64), quant_type, False)


def test_scales_at_every_place_and_midway_round_as_in_bitsandbytes() -> None:
    functional = bnb.functional()
    assert functional is not None
    places = torch.arange(2**16, dtype=torch.float64)
    points = torch.cat([(places + shift) * 2 / 65535 - 1 for shift in (0, 0.5)]).clamp(-1, 1).float()
    near = [points, points.nextafter(torch.tensor(2.0)), points.nextafter(torch.tensor(-2.0))]
    values = F.pad(torch.cat(near).clamp(-1, 1).view(-1, 128), (1, 127), value=1.0).flatten()  # every absmax is 1
    expected, state = functional.quantize_blockwise(values, blocksize=256)
    codes, absmax = nf4._quantize_scales(values, nf4._dynamic_levels())
    assert torch.equal(nf4._dynamic_levels(), state.code)
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("length", [1, 63, 64, 130, 1000])
def test_quantising_piece_by_piece_changes_no_bit(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    weight = torch.randn(3, length)
    whole = quantize(weight).tensors()
    monkeypatch.setattr(nf4, "PIECE", 128)
    pieces = quantize(weight).tensors()
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)


def test_a_kept_dense_weight_is_made_once_and_changes_nothing() -> None:
    x = torch.randn(5, 64, requires_grad=True)
    plain, kept = (
        Linear4bit(quantize(torch.randn(32, 64, generator=torch.Generator().manual_seed(0))), None) for _ in (0, 1)
    )
    kept.cache_dequantized = True
    with torch.inference_mode():  # as in a test before training
        kept(torch.randn(1, 64))
    assert kept.dense_weight(torch.float32) is kept.dense_weight(torch.float32)
    assert plain.dense_weight(torch.float32) is not plain.dense_weight(torch.float32)
    gradients = [torch.autograd.grad(layer(x).sum(), x)[0] for layer in (plain, kept)]
    assert torch.equal(*gradients)
    assert kept.dense_weight(torch.bfloat16).dtype == torch.bfloat16
    assert kept.dense_weight(torch.float32).dtype == torch.float32


def test_nf4_levels_are_quantiles_of_a_normal_distribution() -> None:
    # QLoRA, section 3: eight steps up to the quantile 0.9677083 above 0 and seven below, scaled to [-1, 1].
    normal, last = NormalDist(), 0.9677083
    above = [normal.inv_cdf(last + (0.5 - last) * i / 8) for i in range(8)]
    below = [-normal.inv_cdf(last + (0.5 - last) * i / 7) for i in range(7)]
    expected = sorted([*below, 0.0, *above])
    # bitsandbytes computed its table from float32 quantiles: 1e-6 is a few roundings of it.
    assert list(nf4.NF4_LEVELS) == pytest.approx([level / expected[-1] for level in expected], abs=1e-6)


def test_codes_of_a_block_worked_by_hand() -> None:
    # absmax 2, so 2 is level 1 (code 15), -2 level -1 (code 0), 0 code 7, 0.5 is 0.25, nearest 0.2461 (code 10).
    weight = torch.zeros(1, 64)
    weight[0, :4] = torch.tensor([2.0, -2.0, 0.0, 0.5])
    quantized = quantize(weight, "nf4", double_quantization=False)
    assert quantized.packed[:3].flatten().tolist() == [15 << 4 | 0, 7 << 4 | 10, 7 << 4 | 7]
    assert quantized.absmax.tolist() == [2.0]
    dense = quantized.dequantize(torch.float32)
    assert dense[0, :5].tolist() == [2.0, -2.0, 0.0, pytest.approx(2 * 0.24611230), 0.0]


@pytest.mark.parametrize("width", [16, 48, 80, 96, 32 * 11])
def test_rows_that_end_within_a_block_come_back_right(width: int) -> None:
    # bitsandbytes' own call returns another weight here on AVX512; see QuantizedTensor.dequantize.
    torch.manual_seed(3)
    weight = torch.randn(64, width)
    dense = quantize(weight, "nf4", double_quantization=False).dequantize(torch.float32)
    # The widest gap between levels is 0.3038 (from -1 to -0.6962), so no number moves more than half of it.
    absmax = weight.view(-1, 64).abs().amax(1).repeat_interleave(64).view_as(weight)
    assert bool(((dense - weight).abs() <= 0.152 * absmax).all())


@pytest.mark.parametrize(("double_quantization", "expected_bits"), [(True, 4.127), (False, 4.5)])
def test_bits_a_number(double_quantization: bool, expected_bits: float) -> None:
    quantized = quantize(torch.randn(1024, 1024), "nf4", double_quantization)
    table_bytes = 256 * 4 + 4 if double_quantization else 0  # the 256 levels and the mean, once a weight
    held_bytes = sum(tensor.nbytes for tensor in quantized.tensors().values())
    assert (held_bytes - table_bytes) * 8 / 1024**2 == pytest.approx(expected_bits, abs=5e-4)


def test_fields_have_the_documented_shapes_and_types() -> None:
    quantized = quantize(torch.randn(300, 512), "nf4")
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in quantized.tensors().items()}
    assert found == {
        "packed": ((76800, 1), torch.uint8),
        "absmax": ((2400,), torch.uint8),
        "nested_absmax": ((10,), torch.float32),
        "nested_code": ((256,), torch.float32),
        "offset": ((1,), torch.float32),
    }
    assert quantize(torch.randn(3, 64), "fp4", False).absmax.dtype == torch.float32


def test_quantising_needs_a_known_type() -> None:
    with pytest.raises(ValueError, match=r"quant_type: got 'int4', expected one of \['nf4', 'fp4'\]"):
        quantize(torch.randn(2, 64), "int4")


@pytest.mark.parametrize("weight", [torch.zeros(64), torch.zeros(2, 64, dtype=torch.float64), torch.zeros(2, 2).int()])
def test_quantising_needs_a_floating_point_matrix(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"weight: got .*, expected \(out, in\) in float32, bfloat16 or float16"):
        quantize(weight)


def test_quantising_a_parameter_leaves_it_alone_and_returns_a_constant() -> None:
    weight = torch.nn.Parameter(torch.randn(64, 64))
    before = weight.detach().clone()
    dense = quantize(weight).dequantize(torch.float32)
    assert torch.equal(weight, before)
    assert weight.requires_grad
    assert not dense.requires_grad
    x = torch.randn(3, 64, requires_grad=True)
    (x * dense[:3]).sum().backward()
    assert torch.equal(x.grad, dense[:3])


@pytest.mark.parametrize("pure", [False, True])
def test_dequantised_weight_is_new_each_time(pure: bool) -> None:
    quantized = quantize(torch.randn(64, 64))
    with without_bitsandbytes() if pure else nullcontext():
        first = quantized.dequantize(torch.float32)
        kept = first.clone()
        first.zero_()
        assert torch.equal(quantized.dequantize(torch.float32), kept)


def test_a_transposed_weight_is_read_in_its_own_order() -> None:
    weight = torch.randn(96, 64).T
    assert not weight.is_contiguous()
    assert torch.equal(quantize(weight).packed, quantize(weight.contiguous()).packed)
    assert_same_in_pytorch(weight, "nf4", True)


def make_layer(with_bias: bool = True, dtype: torch.dtype = torch.float32) -> Linear4bit:
    torch.manual_seed(4)
    bias = torch.randn(96, dtype=dtype) if with_bias else None
    return Linear4bit(quantize(torch.randn(96, 128).to(dtype)), bias)


@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_layer_and_its_gradient_equal_a_dense_layer(dtype: torch.dtype, with_bias: bool, pure: bool) -> None:
    layer = make_layer(with_bias, dtype)
    x = torch.randn(5, 128, dtype=dtype, requires_grad=True)
    reference = x.detach().clone().requires_grad_()
    dy = torch.randn(5, 96, dtype=dtype)
    with without_bitsandbytes() if pure else nullcontext():
        y = layer(x)
        y.backward(dy)
    expected = F.linear(reference, layer.dense_weight(dtype), layer.bias)
    expected.backward(dy)
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, reference.grad)  # the same product of the same matrices


def test_layer_keeps_neither_input_nor_dense_weight_for_backward() -> None:
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        make_layer()(torch.randn(5, 128, requires_grad=True)).sum()
    assert kept == []


def test_layer_has_no_parameters_and_no_gradients() -> None:
    layer = make_layer()
    layer(torch.randn(2, 128, requires_grad=True)).sum().backward()
    assert list(layer.parameters()) == []
    assert all(buffer.grad is None and not buffer.requires_grad for buffer in layer.buffers())
    assert (layer.in_features, layer.out_features, layer.device.type) == (128, 96, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_a_model_casts_the_bias_and_not_the_scales(dtype: torch.dtype) -> None:
    layer = make_layer()
    before = layer.dense_weight(torch.float32)
    torch.nn.Sequential(layer).to(dtype)
    assert layer.bias is not None
    assert layer.bias.dtype == dtype
    assert layer.weight.offset is not None
    assert layer.weight.offset.dtype == torch.float32
    assert torch.equal(layer.dense_weight(torch.float32), before)


def test_moving_a_layer_moves_every_part() -> None:
    layer = make_layer().to("meta")
    assert {buffer.device.type for buffer in layer.buffers()} == {"meta"}
    assert layer.device.type == "meta"
    moved = quantize(torch.randn(64, 64)).to("meta")
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}


def test_state_dict_holds_the_whole_layer() -> None:
    source, target = make_layer(), Linear4bit(quantize(torch.zeros(96, 128)), torch.zeros(96))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 128)
    assert torch.equal(source(x), target(x))


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", env=environment, timeout=120, check=False
    )


STEP = """
import logging, sys, torch
from minilora.system import bnb
from minilora.qlora.nf4 import Linear4bit, quantize
torch.manual_seed(0)
for _ in range(2):
    layer = Linear4bit(quantize(torch.randn(64, 64)), None)
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
assert bnb.is_available() is {expected}
"""


def test_bitsandbytes_says_nothing_to_users() -> None:
    result = run_python(STEP.format(expected=True))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_only_the_one_notice_is_hidden_and_only_during_the_import() -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert bnb.is_available()
    assert logger.filters == []
    notice = logger.makeRecord(logger.name, logging.WARNING, "", 0, "from kernels-community: %s", ("x",), None)
    other = logger.makeRecord(logger.name, logging.WARNING, "", 0, "another warning", (), None)
    assert (bnb._is_worth_showing(notice), bnb._is_worth_showing(other)) == (False, True)


def test_bitsandbytes_asks_no_hub_for_kernels() -> None:
    present = """
import sys, types
kernels = sys.modules["kernels"] = types.ModuleType("kernels")
kernels.get_kernel = lambda *arguments, **options: print("asked")
"""
    result = run_python(present + STEP.format(expected=True) + "assert sys.modules['kernels'] is kernels")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_absence_of_bitsandbytes_is_noticed_once_and_changes_no_result() -> None:
    absent = "import sys; sys.modules['bitsandbytes'] = None\n"
    result = run_python(absent + STEP.format(expected=False) + "print(x.grad.double().sum().item())")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("nf4: bitsandbytes cannot be used") == 1
    assert len(result.stderr.splitlines()) == 1
    assert "pip install bitsandbytes" in result.stderr
    with_it = run_python(STEP.format(expected=True) + "print(x.grad.double().sum().item())")
    assert result.stdout == with_it.stdout


def test_a_broken_installation_counts_as_absent() -> None:
    broken = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "bitsandbytes":
            raise OSError("libcudart.so: cannot open shared object file")
sys.meta_path.insert(0, Broken())
"""
    result = run_python(broken + STEP.format(expected=False))
    assert result.returncode == 0, result.stderr
    assert "cannot be used (libcudart.so: cannot open shared object file)" in result.stderr


def test_quantising_leaves_global_state_alone() -> None:
    torch.manual_seed(5)
    before = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_rng_state())
    quantize(torch.ones(64, 64)).dequantize(torch.bfloat16)
    after = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_rng_state())
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])


def iter_real_projections(folder: Path) -> Iterator[torch.Tensor]:
    with (folder / "model.safetensors").open("rb") as file:
        header_bytes = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(header_bytes))
        for name, entry in header.items():
            if ".layers." in name and name.endswith("proj.weight"):
                assert entry["dtype"] == "BF16"
                begin, end = entry["data_offsets"]
                file.seek(8 + header_bytes + begin)
                data = bytearray(file.read(end - begin))
                yield torch.frombuffer(data, dtype=torch.bfloat16).view(entry["shape"])


@pytest.mark.real
@pytest.mark.skipif("MINILORA_REAL_MODEL" not in os.environ, reason="needs MINILORA_REAL_MODEL")
def test_pytorch_equals_bitsandbytes_on_every_real_projection() -> None:
    count = 0
    for weight in iter_real_projections(Path(os.environ["MINILORA_REAL_MODEL"])):
        assert_same_in_pytorch(weight, "nf4", True)
        if count < 7:  # the other variants differ in nothing that depends on the layer
            assert_same_in_pytorch(weight, "nf4", False)
            assert_same_in_pytorch(weight, "fp4", True)
        count += 1
    assert count >= 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_layer_on_a_gpu_equals_the_one_on_a_cpu() -> None:
    quantized = quantize(torch.randn(96, 128))
    on_gpu = quantized.to("cuda")
    assert torch.equal(on_gpu.dequantize(torch.float32).cpu(), quantized.dequantize(torch.float32))
