"""scripts/quantize.py writes a whole checkpoint in 4 bits, or refuses before it computes anything."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minilora.errors import UserError
from minilora.system.locks import lock_output
from minilora.system.manifest import read_manifest, verify_folder
from minilora.weights.load import load_model
from tests.scripts.conftest import load_script

Quantize = Callable[..., str]


@pytest.fixture
def quantize(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Quantize:
    """A function: arguments of the command line -> what the script printed."""
    module = load_script("quantize")

    def call(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["quantize.py", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize(
    ("flags", "how"),
    [
        ([], (torch.bfloat16, "nf4", True)),
        (["--quant_type", "fp4", "--no_double_quantization"], (torch.bfloat16, "fp4", False)),
        (["--compute_dtype", "float32"], (torch.float32, "nf4", True)),
    ],
)
def test_what_is_written_is_the_model_that_loading_quantises(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    quantize: Quantize,
    flags: list[str],
    how: tuple[torch.dtype, str, bool],
) -> None:
    source, output = tiny_checkpoint(tie=False), tmp_path / "models" / "负面 4 bit"
    printed = quantize("--model_path", source, "--output_dir", output, *flags)
    found, expected = (load_model(folder, *how).state_dict() for folder in (output, source))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert verify_folder(output) is None
    facts = {"compute_dtype": str(how[0])[6:], "quant_type": how[1], "double_quantization": how[2]}
    assert read_manifest(output)["facts"] == {**facts, "made_from": str(source), "revision": None}
    assert json.loads((output / "config.json").read_text("utf-8"))["torch_dtype"] == facts["compute_dtype"]
    assert f"{output}: " in printed
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_the_licence_of_the_base_travels_with_it(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, quantize: Quantize
) -> None:
    source = shutil.copytree(tiny_checkpoint(), tmp_path / "base")
    for name in ("LICENSE", "NOTICE"):
        (source / name).write_text(f"of the base: {name}", "utf-8")
    quantize("--model_path", source, "--output_dir", tmp_path / "q")
    assert (tmp_path / "q" / "LICENSE").read_text("utf-8") == "of the base: LICENSE"
    assert {"LICENSE", "NOTICE"} < read_manifest(tmp_path / "q")["files"].keys()


def test_a_checkpoint_that_is_in_4_bits_already_is_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, quantize: Quantize
) -> None:
    quantize("--model_path", tiny_checkpoint(), "--output_dir", tmp_path / "once")
    with pytest.raises(UserError, match="once: is in 4 bits already"):
        quantize("--model_path", tmp_path / "once", "--output", tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_a_folder_that_another_process_writes_is_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, quantize: Quantize
) -> None:
    with lock_output(tmp_path / "once", "--output_dir"), pytest.raises(UserError, match="once: another run is writing"):
        quantize("--model_path", tiny_checkpoint(), "--output_dir", tmp_path / "once")


@pytest.mark.parametrize("is_file", [True, False])
def test_an_existing_output_is_not_replaced(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, quantize: Quantize, is_file: bool
) -> None:
    output = tmp_path / "mine"
    precious = output if is_file else output / "thesis.txt"
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("mine", "utf-8")
    with pytest.raises(UserError, match=r"mine: .*--output_dir"):
        quantize("--model_path", tiny_checkpoint(), "--output", output)
    assert precious.read_text("utf-8") == "mine"


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_computed(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, quantize: Quantize
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to .*--output_dir"):
        quantize("--model_path", tiny_checkpoint(), "--output", tmp_path / "file" / "below" / "model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_path", "no/such/folder"], "no/such/folder: is neither a folder nor a hub name"),
        (["--device", "tpu"], "model.device: 'tpu' is not"),
    ],
)
def test_a_wrong_argument_is_named(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, quantize: Quantize, arguments: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        quantize("--model_path", tiny_checkpoint(), "--output", tmp_path / "q", *arguments)
