"""scripts/merge.py writes a whole model or none, measures what merging costs, and replaces only an earlier merge."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora import build
from minilora.config import Config, load_config
from minilora.errors import UserError
from minilora.runs.load_run import load_run_or_base
from minilora.runs.train import fit
from minilora.system.files import WRITING, StorageError
from minilora.system.manifest import read_manifest, verify_folder
from minilora.weights.bnb_checkpoint import write_quantized
from minilora.weights.load import load_model
from tests.conftest import copy_with_system
from tests.runs.conftest import flip_bit
from tests.scripts.conftest import SCRIPTS, load_script

Merge = Callable[..., dict[str, Any]]
KEYS = (
    "lora.r=2",
    "model.compute_dtype=float32",
    "prompt.instruction=评论：",
    "data.max_test_examples=8",
    "train.max_steps=3",
    "train.learning_rate=0.02",
    "train.per_device_train_batch_size=4",
)
MERGED = ["config.json", "generation_config.json", "manifest.json", "model.safetensors", "tokenizer.json"]
ADAPTER, DEQUANTIZED, ORIGINAL = "adapter on nf4", "merged dequantized", "merged original"


def train(model: Path, data: Path, output: Path, *keys: str) -> Path:
    """The final adapter of a short run."""
    places = (f"model.name_or_path={model}", f"data.dir={data}", f"train.output_dir={output}")
    return fit(load_config(None, [*KEYS, *places, *keys]), model)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("merge")


@pytest.fixture(scope="module")
def final(tiny_checkpoint: Callable[..., Path], processed_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_checkpoint(), processed_data, tmp_path_factory.mktemp("run"))


@pytest.fixture
def merge(
    script: ModuleType,
    final: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Merge:
    """Merges the final adapter into `tmp_path / "merged"`, with more arguments: the results that the script prints.

    What it printed is under "printed" and "warned".
    """

    def call(*arguments: object, model_path: Path = final, output: Path = tmp_path / "merged") -> dict[str, Any]:
        command = ["merge.py", "--model_path", model_path, "--output_dir", output, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        script.main()
        printed = capsys.readouterr()
        results: dict[str, Any] = json.loads(printed.out.splitlines()[-1])
        return {**results, "printed": printed.out, "warned": printed.err}

    return call


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_merge_is_a_whole_checkpoint_with_its_drift(merge: Merge, tmp_path: Path) -> None:
    results = merge()
    folder = tmp_path / "merged"
    assert names(tmp_path) == ["merged"]
    assert names(folder) == sorted([*MERGED, "drift.json"])
    assert verify_folder(folder) is None
    manifest = read_manifest(folder)
    assert sorted(manifest["files"]) == sorted(set(names(folder)) - {"manifest.json"})
    assert manifest["facts"]["merged_into"] == "original"
    assert json.loads((folder / "drift.json").read_text("utf-8")) == results["drift"]
    assert (results["output"], results["merged_into"], results["dtype"]) == (str(folder), "original", "float32")


def test_a_base_with_another_system_turn_is_told_how_to_talk_to_the_merge(
    merge: Merge, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = copy_with_system(tiny_checkpoint(), tmp_path / "math", "Reason.")
    assert "puts 'Reason.'; begin conversations with the merged model" in merge("--base", base, "--no_drift")["warned"]


def test_the_table_compares_both_merges_with_what_was_trained(merge: Merge, final: Path, processed_data: Path) -> None:
    results = merge()
    models = results["drift"]["models"]
    assert list(models) == [ADAPTER, DEQUANTIZED, ORIGINAL]
    test = json.loads((final / "metrics.json").read_text("utf-8"))["test"]
    assert results["drift"]["num_examples"] == test["num_examples"] == 8
    assert models[ADAPTER]["accuracy"] == test["accuracy"]
    assert models[ADAPTER]["largest_change"] == models[ADAPTER]["num_flipped"] == 0
    # Float32 on both sides: rounding only. The original weights have no quantisation error.
    assert 0 <= models[DEQUANTIZED]["largest_change"] < 1e-5
    assert models[ORIGINAL]["largest_change"] > 1e-3
    assert models[ORIGINAL]["mean_change"] <= models[ORIGINAL]["largest_change"]
    assert f"8 reviews of {processed_data / 'test.jsonl'}; written: merged original\n" in results["printed"]
    for name, row in models.items():
        (line,) = (line for line in results["printed"].splitlines() if line.startswith(f"{name}  "))
        assert f"{row['accuracy']:.4f}" in line
        assert f"({row['num_correct']}/8)" in line
        assert (f"{row['largest_change']:.4f}" in line) == (name != ADAPTER)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_figure_is_the_same_from_files_and_from_memory(merge: Merge, tmp_path: Path, dtype: str) -> None:
    both = [merge("--into", into, "--dtype", dtype)["drift"]["models"] for into in ("original", "dequantized")]
    assert both[0] == both[1]
    assert read_manifest(tmp_path / "merged")["facts"]["merged_into"] == "dequantized"  # it replaced the first
    tensors = load_file(tmp_path / "merged" / "model.safetensors").values()
    assert {str(tensor.dtype) for tensor in tensors} == {f"torch.{dtype}"}


def test_the_figures_of_what_is_written_are_those_of_its_files(
    merge: Merge, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = merge()["drift"]["models"]

    def write_and_spoil(merge: object, into: str, dtype: torch.dtype, folder: Path, **settings: Any) -> None:
        plain(merge, into, dtype, folder, **settings)
        path = folder / "model.safetensors"
        save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path)

    plain = script.write_merged
    monkeypatch.setattr(script, "write_merged", write_and_spoil)
    spoilt = merge()["drift"]["models"]
    assert spoilt[DEQUANTIZED] == right[DEQUANTIZED]
    assert spoilt[ORIGINAL]["largest_change"] > right[ORIGINAL]["largest_change"] + 0.01


def test_given_reviews_are_scored_and_bounded(merge: Merge, processed_data: Path) -> None:
    path = processed_data / "validation.jsonl"
    assert merge("--data", path)["drift"]["num_examples"] == 12
    assert merge("--data", path, "--max_examples", 5)["drift"]["num_examples"] == 5
    assert merge("--data", path, "data.max_test_examples=4")["drift"]["num_examples"] == 4
    with pytest.raises(UserError, match=r"data\.max_test_examples: got 0"):
        merge("--max_examples", 0)


def test_without_reviews_it_asks_for_some(merge: Merge, tmp_path: Path, processed_data: Path) -> None:
    elsewhere = f"data.dir={tmp_path / 'absent'}"
    with pytest.raises(UserError, match=r"absent/test\.jsonl: .*--data.*--no_drift"):
        merge(elsewhere)
    assert names(tmp_path) == []
    assert "drift" not in merge(elsewhere, "--no_drift")
    assert "drift.json" not in names(tmp_path / "merged")
    assert verify_folder(tmp_path / "merged") is None
    assert "drift" in merge(elsewhere, "--data", processed_data / "test.jsonl")


def test_reviews_without_a_label_are_refused_before_anything_is_merged(merge: Merge, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps({"messages": turns}), "utf-8")
    with pytest.raises(
        UserError, match=r"chat\.jsonl: 1 of its 1 records are conversations.+ give a file of .+--no_drift"
    ):
        merge("--data", path)
    assert names(tmp_path) == ["chat.jsonl"]


def test_what_is_there_stays_and_only_an_earlier_merge_is_replaced(merge: Merge, tmp_path: Path, final: Path) -> None:
    merge("--no_drift")
    merge("--no_drift")
    (tmp_path / "merged" / "notes.txt").write_text("mine", "utf-8")
    with pytest.raises(UserError, match=r"merged: holds notes\.txt.*--output"):
        merge("--no_drift")
    with pytest.raises(UserError, match=r"final: holds .*--output"):
        merge("--no_drift", output=final)
    assert verify_folder(final) is None


def test_the_base_itself_is_not_replaced_though_it_was_merged_once(
    merge: Merge, tmp_path: Path, processed_data: Path
) -> None:
    merge("--no_drift")
    base = tmp_path / "merged"
    second = train(base, processed_data, tmp_path / "second")
    with pytest.raises(UserError, match=r"merged: is the base model's own folder; .*--output_dir"):
        merge("--no_drift", model_path=second, output=base)
    merge("--no_drift", model_path=second, output=tmp_path / "merged twice")


@pytest.mark.parametrize("where", ["write_merged", "measure_drift", "finish_folder"])
def test_a_merge_that_fails_leaves_the_earlier_one_and_nothing_else(
    merge: Merge, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    merge()
    before = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise StorageError("No space left on device")

    monkeypatch.setattr(script, where, fail)
    for output in (tmp_path / "merged", tmp_path / "another"):
        with pytest.raises(StorageError, match="No space left"):
            merge("--into", "dequantized", output=output)
    assert names(tmp_path) == ["merged"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()} == before


def test_a_folder_that_cannot_be_removed_does_not_hide_why_a_merge_failed(
    merge: Merge, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        def refuse(path: Path) -> None:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

        monkeypatch.setattr(script, "remove", refuse)
        raise StorageError("No space left on device")

    monkeypatch.setattr(script, "write_merged", fail)
    with pytest.raises(StorageError, match="No space left"):
        merge("--no_drift")


@pytest.mark.parametrize("option", [("--data", "reviews.tsv"), ("--max_examples", "3")])
def test_reviews_for_a_table_that_is_not_wanted_are_a_mistake(
    merge: Merge, option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        merge("--no_drift", *option)
    assert "leave out --no_drift, or --data and --max_examples" in capsys.readouterr().err


def test_a_second_merge_into_the_same_folder_is_told_who_writes_there(
    merge: Merge, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = script.write_merged

    def write(*arguments: object, **more: object) -> None:
        plain(*arguments, **more)
        with pytest.raises(UserError, match=rf"merged: another run .+process {os.getpid()} .+another --output_dir"):
            merge("--no_drift")

    with monkeypatch.context() as patch:
        patch.setattr(script, "write_merged", write)
        merge("--no_drift")
    assert names(tmp_path) == ["merged"]
    assert verify_folder(tmp_path / "merged") is None


def test_a_merged_model_that_was_damaged_is_refused_as_a_base(
    merge: Merge, tmp_path: Path, processed_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge("--no_drift")
    base = tmp_path / "merged"
    config = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "comment": "mine"}), "utf-8")
    adapter = train(base, processed_data, tmp_path / "second")
    assert f"note: {base}: config.json: edited or damaged" in capsys.readouterr().err
    flip_bit(base / "model.safetensors")
    damaged = r"merged: model\.safetensors: damaged since they were written"
    with pytest.raises(UserError, match=damaged):
        train(base, processed_data, tmp_path / "third")
    with pytest.raises(UserError, match=damaged):
        merge("--no_drift", model_path=adapter, output=tmp_path / "twice")
    with pytest.raises(UserError, match=damaged):
        load_run_or_base(base, None, [], ())
    (base / "manifest.json").write_text("{}", "utf-8")  # as another program's
    load_run_or_base(base, None, [], ())
    assert "cannot be verified" in capsys.readouterr().err


def test_what_a_killed_merge_left_does_not_get_in(merge: Merge, tmp_path: Path) -> None:
    leftover = tmp_path / f"{WRITING}merged"
    leftover.mkdir()
    (leftover / "model-00001-of-00009.safetensors").write_bytes(b"half of it")
    merge("--no_drift")
    assert names(tmp_path) == ["merged"]
    assert names(tmp_path / "merged") == MERGED


def test_a_disk_without_room_is_named_before_the_work_starts(
    merge: Merge, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=300_000))
    monkeypatch.setattr(script, "write_merged", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(StorageError, match=r"merged: 444,672 bytes .* 300,000"):
        merge("--no_drift")
    # 111,168 elements of 2 bytes, twice, and 576 of norms and biases that a GGUF keeps in float32.
    with pytest.raises(StorageError, match=r"merged: 445,824 bytes"):
        merge("--no_drift", "--dtype", "bfloat16", "--gguf", "f16")
    assert names(tmp_path) == []


def test_a_loss_of_nan_is_an_error_and_nothing_is_left(
    merge: Merge, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_spoilt(*arguments: Any, **settings: Any) -> Any:
        model = load_model(*arguments, **settings)
        model.model.norm.weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(script, "load_model", load_spoilt)
    with pytest.raises(UserError, match="score merged original: the loss is nan"):
        merge()
    assert names(tmp_path) == []


def test_a_base_in_4_bits_is_merged_dequantized_and_never_called_original(
    merge: Merge, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "base-bnb-4bit"
    write_quantized(load_model(tiny_checkpoint(), torch.float32), tiny_checkpoint(), base, {})
    with pytest.raises(UserError, match=r"base-bnb-4bit: .*--into dequantized"):
        merge("--base", base)
    results = merge("--base", base, "--into", "dequantized")
    assert "was trained on another base model than" in results["warned"]  # it is another file
    assert list(results["drift"]["models"]) == [ADAPTER, DEQUANTIZED]
    assert results["drift"]["models"][DEQUANTIZED]["largest_change"] < 1e-5
    expected = tmp_path / "expected"
    merge("--into", "dequantized", "--no_drift", output=expected)
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def test_an_adapter_of_plain_lora_has_one_way_to_merge(merge: Merge) -> None:
    with pytest.raises(UserError, match=r"--into dequantized: .*model\.quantization=none"):
        merge("--into", "dequantized", "model.quantization=none")
    models = merge("model.quantization=none")["drift"]["models"]
    assert list(models) == ["adapter on the base", ORIGINAL]
    assert models[ORIGINAL]["largest_change"] < 1e-5


def test_a_loftq_adapter_is_told_where_it_fits(
    merge: Merge, tiny_checkpoint: Callable[..., Path], processed_data: Path, tmp_path: Path
) -> None:
    trained = train(tiny_checkpoint(), processed_data, tmp_path / "run", "lora.init_lora_weights=loftq")
    assert "warning: the run began with LoftQ" in merge("--no_drift", model_path=trained)["warned"]
    assert "LoftQ" not in merge("--no_drift", "--into", "dequantized", model_path=trained)["warned"]


def test_dequantized_is_what_training_saw_on_a_machine_that_would_choose_another_dtype(
    merge: Merge,
    tmp_path: Path,
    tiny_checkpoint: Callable[..., Path],
    processed_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def merged(is_native: bool, *keys: str) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(build, "_multiplies_bfloat16", lambda device: is_native)
        how = ("--into", "dequantized", "--dtype", "float32", "--no_drift", *keys)
        output = tmp_path / "of another"
        merge(*how, model_path=final, output=output)
        return load_file(output / "model.safetensors")

    monkeypatch.setattr(build, "_multiplies_bfloat16", lambda device: True)
    final = train(tiny_checkpoint(), processed_data, tmp_path / "run", "model.compute_dtype=auto")
    assert json.loads((final / "metrics.json").read_text("utf-8"))["machine"]["dtype"] == "bfloat16"
    there, here = merged(True), merged(False)
    assert all(torch.equal(there[name], here[name]) for name in there)
    otherwise = merged(False, "model.compute_dtype=float32")
    assert not all(torch.equal(there[name], otherwise[name]) for name in there)


def test_shards_are_as_large_as_asked(merge: Merge, tmp_path: Path) -> None:
    merge("--no_drift", "--max_shard_size", "0.2MB")
    shards = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert [path.name for path in shards] == [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize(("text", "expected"), [("500MB", 500_000_000), ("1.5 gb", 1_500_000_000), ("20KB", 20_000)])
def test_a_size_is_read_as_hugging_face_counts(script: ModuleType, text: str, expected: int) -> None:
    assert script.read_size(text) == expected


@pytest.mark.parametrize("text", ["2", "2GiB", "-1GB", "0MB", "GB", "two GB"])
def test_a_size_that_is_none_is_refused(merge: Merge, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        merge(f"--max-shard-size={text}")
    assert caught.value.code == 2
    assert f"got {text!r}, expected a size" in capsys.readouterr().err


def test_a_gguf_file_belongs_to_the_folder_with_a_modelfile(merge: Merge, tmp_path: Path) -> None:
    merge("--no_drift", "--gguf")
    assert {"model-f16.gguf", "Modelfile"} < read_manifest(tmp_path / "merged")["files"].keys()
    lines = (tmp_path / "merged" / "Modelfile").read_text("utf-8").splitlines()
    assert lines[1].startswith("FROM ./model-f16.gguf")
    assert not [line for line in lines if line.startswith("ADAPTER")]
    merge("--no_drift", "--gguf", "q8_0")
    assert [path.name for path in (tmp_path / "merged").glob("*.gguf")] == ["model-q8_0.gguf"]


def test_an_adapter_alone_is_a_gguf_file_with_a_modelfile(
    merge: Merge, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    assert merge("--gguf_adapter")["gguf_adapter"] == "f32"
    folder = tmp_path / "merged"
    assert names(folder) == ["Modelfile", "adapter-f32.gguf", "manifest.json"]
    assert verify_folder(folder) is None
    assert read_manifest(folder)["facts"]["gguf_adapter"] == "f32"
    lines = (folder / "Modelfile").read_text("utf-8").splitlines()
    assert lines[1:3] == [f"FROM {tiny_checkpoint().resolve()}", "ADAPTER ./adapter-f32.gguf"]
    assert 'SYSTEM """You are Qwen, created by Alibaba Cloud. You are a helpful assistant."""' in lines
    assert "PARAMETER temperature 0" in lines  # it answers with label words

    merge("--gguf_adapter", "f16", "--gguf", "q8_0")
    assert names(folder) == ["Modelfile", "adapter-f16.gguf", "base-q8_0.gguf", "manifest.json"]
    assert "FROM ./base-q8_0.gguf\nADAPTER ./adapter-f16.gguf\n" in (folder / "Modelfile").read_text("utf-8")
    merge("--no_drift")  # in its place
    assert names(folder) == MERGED


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["lora.use_dora=true"], r"q_proj has DoRA's magnitudes.* with --gguf and without --gguf_adapter"),
        (["lora.bias=lora_only"], r"q_proj has a trained bias.* with --gguf and without --gguf_adapter"),
    ],
)
def test_what_an_adapter_for_llama_cpp_cannot_hold_is_named(
    merge: Merge,
    tiny_checkpoint: Callable[..., Path],
    processed_data: Path,
    tmp_path: Path,
    keys: list[str],
    message: str,
) -> None:
    trained = train(tiny_checkpoint(), processed_data, tmp_path / "run", *keys)
    with pytest.raises(UserError, match=message):
        merge("--gguf_adapter", model_path=trained)
    assert names(tmp_path) == ["run"]
    merge("--no_drift", "--gguf", model_path=trained)


def test_a_base_in_4_bits_has_adapters_but_is_not_written(
    merge: Merge, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "base-bnb-4bit"
    write_quantized(load_model(tiny_checkpoint(), torch.float32), tiny_checkpoint(), base, {})
    with pytest.raises(UserError, match=r"base-bnb-4bit: is in 4 bits.*--base, or leave out --gguf"):
        merge("--base", base, "--gguf_adapter", "--gguf", "f16")
    said = merge("--base", base, "--gguf_adapter")["warned"]
    assert f"FROM in its Modelfile is {base}, in 4 bits of bitsandbytes, which Ollama does not read" in said


@pytest.mark.parametrize("option", [("--data", "a.tsv"), ("--dtype", "float16"), ("--into", "dequantized")])
def test_what_only_merging_reads_is_a_mistake_with_an_adapter_alone(
    merge: Merge, option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        merge("--gguf_adapter", "f32", *option)
    assert f"leave out --gguf_adapter, or {option[0]}" in capsys.readouterr().err


def test_a_system_turn_that_a_modelfile_cannot_hold_is_refused_before_the_work_starts(
    merge: Merge, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "write_merged", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(UserError, match=r"prompt\.system: holds"):
        merge("--no_drift", "--gguf", "f16", """prompt.system='say \"\"\" twice'""")
    assert names(tmp_path) == []


def test_a_merged_base_model_names_the_end_of_a_turn_and_keeps_its_licence(
    merge: Merge, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoint(), base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 500, "max_new_tokens": 20}), "utf-8")
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}), "utf-8")
    for name in ("LICENSE", "NOTICE.txt"):
        (base / name).write_text(f"of the base: {name}", "utf-8")
    merge("--base", base, "--no_drift", "--gguf", "f32")
    folder = tmp_path / "merged"

    def content(name: str) -> Any:
        return json.loads((folder / name).read_text("utf-8"))

    assert content("config.json")["eos_token_id"] == 502
    assert content("tokenizer_config.json")["eos_token"] == "<|im_end|>"
    assert content("generation_config.json") == {"eos_token_id": [502, 500], "max_new_tokens": 20}
    fields = gguf.GGUFReader(folder / "model-f32.gguf").fields
    for kind in ("eos", "eot"):
        assert fields[f"tokenizer.ggml.{kind}_token_id"].contents() == 502
    for output, options in (("merged", []), ("adapter", ["--gguf_adapter"])):
        if options:
            merge("--base", base, *options, output=tmp_path / output)
        assert (tmp_path / output / "LICENSE").read_text("utf-8") == "of the base: LICENSE"
        assert (tmp_path / output / "NOTICE.txt").is_file()


def test_a_merged_model_is_asked_as_its_adapter_was_trained(
    merge: Merge, tiny_checkpoint: Callable[..., Path], processed_data: Path, tmp_path: Path
) -> None:
    """Also with keys of the command line over it; another base has the defaults."""
    prompt = ["prompt.labels=[差评, 好评]", "prompt.instruction=好吗？", "data.max_length=100"]
    final = train(tiny_checkpoint(), processed_data, tmp_path / "run", *prompt)
    merge("--no_drift", model_path=final)
    trained = load_run_or_base(final, None, [], ())
    merged = load_run_or_base(tmp_path / "merged", None, [], ())
    assert merged.config.prompt == trained.config.prompt
    assert merged.config.data.max_length == 100
    other = load_run_or_base(tmp_path / "merged", None, ["prompt.labels=[负面, 正面]"], ("prompt.",))
    assert other.config.prompt.labels == ["负面", "正面"]
    assert load_run_or_base(tiny_checkpoint(), None, [], ()).config.prompt == Config().prompt


def test_the_end_tokens_of_another_programs_adapter_are_the_bases(merge: Merge, final: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(final / name, other / name)
    merge("--no_drift", model_path=other)
    assert "generation_config.json" not in names(tmp_path / "merged")


def test_without_the_gguf_package_it_says_how_to_get_it_before_the_work_starts(
    merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"--gguf: gguf is not installed; pip install gguf"):
        merge("--gguf")
    assert names(tmp_path) == []
    merge("--no_drift")


def test_quiet_leaves_the_table_and_a_mistake_ends_with_status_2(final: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, SCRIPTS / "merge.py", "--model_path", final, "--output", tmp_path / "merged"]
        environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent), "PYTHONWARNINGS": "default"}
        return subprocess.run(list(map(str, [*command, *arguments])), capture_output=True, text=True, env=environment)

    done = run("--quiet", "--max_examples", 4)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 6  # file, heading, three models, JSON
    mistaken = run("model.compute_type=float32")
    assert mistaken.returncode == 2
    assert mistaken.stdout == ""
    assert mistaken.stderr.startswith("error: model.compute_type: unknown key")


def test_the_drift_table_has_a_line_for_each_model_and_no_change_for_the_first(script: ModuleType) -> None:
    none = {"num_correct": 3, "accuracy": 0.75, "mean_change": 0, "largest_change": 0, "num_flipped": 0, "flipped": 0}
    some = {**none, "num_correct": 1, "accuracy": 0.25, "mean_change": 0.15, "largest_change": 0.3}
    models = {"adapter on nf4": none, "merged": {**some, "num_flipped": 2, "flipped": 0.5}}
    assert script.render_drift(models, 4).splitlines() == [
        "                          accuracy  mean change  largest         flipped",
        "adapter on nf4     0.7500    (3/4)",
        "merged             0.2500    (1/4)       0.1500   0.3000      50.00% (2)",
    ]
