"""scripts/predict.py predicts as scripts/evaluate.py does, in every format, from every source, or refuses."""

import codecs
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.config import load_config
from minilora.data.records import ReadOptions, Record, iter_texts
from minilora.errors import UserError
from minilora.evaluation.calibration import at_temperature
from minilora.evaluation.predict import LAST_WINDOW
from minilora.runs.train import fit
from minilora.system.console import set_quiet
from tests.conftest import make_reviews
from tests.scripts.conftest import SCRIPTS, RunMain, load_script

KEYS = (
    "lora.r=2",
    "model.compute_dtype=float32",
    "prompt.instruction=评论：",  # not the default
    "train.max_steps=2",
    "train.per_device_train_batch_size=4",
    "train.do_predict=false",
)
TEXTS = [text for text, _ in make_reviews(20, seed=7)]
Predict = Callable[..., str]
no_windows = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals and pipes")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("predict")


@pytest.fixture(scope="module")
def final(tiny_checkpoint: Callable[..., Path], processed_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a finished run. Shared: copy before you change it."""
    model, output = tiny_checkpoint(), tmp_path_factory.mktemp("run")
    places = (f"model.name_or_path={model}", f"data.dir={processed_data}", f"train.output_dir={output}")
    return fit(load_config(None, [*KEYS, *places]), model)


@pytest.fixture
def predict(
    script: ModuleType, final: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Predict:
    """What the script prints with these arguments, and with `piped` on its standard input."""

    def call(*arguments: object, model: Path = final, piped: bytes = b"") -> str:
        monkeypatch.setattr(script, "standard_input", lambda: io.BytesIO(piped))
        monkeypatch.setattr(sys, "argv", ["predict.py", "--model_path", str(model), *map(str, arguments)])
        capsys.readouterr()
        try:
            script.main()
        finally:
            set_quiet(False)
        return capsys.readouterr().out

    return call


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.tsv"
    path.write_text("label\ttext_a\n" + "".join(f"1\t{text}\n" for text in TEXTS), "utf-8")
    return path


def command(model: Path, *arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPTS / "predict.py"), "--model_path", str(model), *map(str, arguments)]


def read_json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_predictions_are_those_of_evaluation(
    predict: Predict, final: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--model_path", str(final), "--data", str(reviews), "--output_dir", str(tmp_path / "scored")]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    load_script("evaluate").main()
    scored = read_json_lines((tmp_path / "scored" / "predictions.jsonl").read_text("utf-8"))
    found = read_json_lines(predict("--input", reviews))
    assert len(found) == len(TEXTS)
    for ours, theirs in zip(found, scored, strict=True):
        assert ours["label"] == theirs["prediction"]
        assert (ours["index"], ours["text"]) == (theirs["index"], theirs["text"])
        # float32 sums in another order
        assert ours["probabilities"] == pytest.approx(theirs["probabilities"], rel=1e-4)
        assert ours["probability"] == max(ours["probabilities"].values())


def test_every_source_gives_the_same_lines(predict: Predict, reviews: Path, tmp_path: Path) -> None:
    lines = "".join(f"{text}\n" for text in TEXTS).encode()
    (tmp_path / "a.txt").write_bytes(lines)
    (tmp_path / "a.csv").write_text("comment\n" + "".join(f'"{text}"\n' for text in TEXTS), "utf-8")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), "utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    expected = predict("--input", tmp_path / "a.jsonl")
    assert [line["text"] for line in read_json_lines(expected)] == TEXTS
    for line, with_label in zip(read_json_lines(expected), read_json_lines(predict("--input", reviews)), strict=True):
        assert with_label == {**line, "input_label": "1"}
    assert predict("--input", tmp_path / "a.txt") == expected
    assert predict("--input", tmp_path / "a.csv", "--text_column", "comment") == expected
    assert predict("--input", tmp_path / "a.parquet") == expected
    assert predict(*TEXTS) == expected
    for arguments in ((), ("-",), ("--input", "-")):
        assert predict(*arguments, piped=lines) == expected
    gb = "".join(f"{text}\n" for text in TEXTS).encode("gb18030")
    assert predict("--encoding", "gb18030", piped=gb) == expected


def test_csv_is_quoted_and_can_be_read_again(predict: Predict, tmp_path: Path) -> None:
    texts = ['好，"推荐"', "一行\n两行", "a,b", "回\r车", "=1+1", "最后"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines, "utf-8")
    predict("--input", tmp_path / "a.jsonl", "--output", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file, strict=True))
    assert [line["text"] for line in found] == texts
    assert list(found[0]) == ["index", "text", "label", "probability", "probability_负面", "probability_正面"]
    for line, expected in zip(found, read_json_lines(predict("--input", tmp_path / "a.jsonl")), strict=True):
        assert int(line["index"]) == expected["index"]
        assert line["label"] == expected["label"]
        assert float(line["probability"]) == expected["probability"] == float(line[f"probability_{line['label']}"])
    again = list(csv.DictReader(io.StringIO(predict("--input", tmp_path / "out.csv", "--format", "csv"), newline="")))
    for line, before in zip(again, found, strict=True):
        carried = {f"input_{name}": value for name, value in before.items() if name != "text"}
        assert line == {**before, **carried}


def test_other_columns_are_carried_in_every_format(predict: Predict, tmp_path: Path) -> None:
    records = [
        {"id": 7, "text": "好", "label": None, "input_label": "x", "tags": ["a", "b"]},
        {"text": "差", "id": "八\ud83d", "later": 1},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    predict("--input", tmp_path / "a.jsonl", "--output", tmp_path / "out.jsonl")
    first, second = read_json_lines((tmp_path / "out.jsonl").read_text("utf-8"))
    assert second["id"] == "八\ud83d"
    assert (first["id"], first["input_label"], first["tags"]) == (7, None, ["a", "b"])
    assert (first["input_input_label"], first["label"] in ("正面", "负面")) == ("x", True)
    assert second["later"] == 1
    predict("--input", tmp_path / "a.jsonl", "--output", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file, strict=True))
    assert list(lines[0])[6:] == ["id", "input_label", "input_input_label", "tags"]
    assert [list(line.values())[6:] for line in lines] == [["7", "", "x", '["a", "b"]'], ["八\\ud83d", "", "", ""]]


@pytest.mark.parametrize(
    ("name", "mark", "encoding"),
    [("utf-8-sig", codecs.BOM_UTF8, "utf-8-sig"), ("UTF8-SIG", codecs.BOM_UTF8, "utf-8-sig"), ("GBK", b"", "gb18030")],
)
def test_predictions_are_written_for_excel(
    predict: Predict, tmp_path: Path, name: str, mark: bytes, encoding: str
) -> None:
    output = tmp_path / "out.csv"
    (tmp_path / "a.txt").write_text("".join(f"{text}\n" for text in TEXTS), "utf-8")  # more than a window
    predict("--input", tmp_path / "a.txt", "--output", output, "--output-encoding", name)
    found = output.read_bytes()
    assert found.startswith(mark + b'"index"')
    assert found.count(codecs.BOM_UTF8) == len(mark) // 3
    assert [line["text"] for line in csv.DictReader(io.StringIO(found.decode(encoding)))] == TEXTS
    with pytest.raises(UserError, match="encoding 'latin-1': is not one of"):
        predict("好", "--output", tmp_path / "other.csv", "--output_encoding", "latin-1")


def test_memory_does_not_grow_with_the_columns_that_are_carried(
    predict: Predict, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = weakref.WeakSet[Record]()
    most = [0]

    def watched(path: Path, reading: ReadOptions) -> Iterator[Record]:
        for record in iter_texts(path, reading):
            alive.add(record)
            most[0] = max(most[0], len(alive))
            yield record

    monkeypatch.setattr(script, "iter_texts", watched)
    (tmp_path / "a.jsonl").write_text('{"text": "好", "id": 1}\n' * 2500, "utf-8")
    assert predict("--input", tmp_path / "a.jsonl").count('"id": 1') == 2500
    assert most[0] <= 3 * LAST_WINDOW


def test_a_table_has_its_columns_under_each_other_and_no_control_characters(predict: Predict, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "好\n\x1b[31m\t坏"}) + "\n", "utf-8")
    header, line = predict("--input", tmp_path / "a.jsonl", "--format", "table").splitlines()
    assert header.split() == ["index", "label", "probability", "text"]
    index, label, probability, text = line.split(maxsplit=3)
    assert (index, text) == ("0", "好  [31m 坏")
    assert label in ("正面", "负面")
    assert 0.5 <= float(probability) <= 1
    assert line.index(text) == header.index("text") - 2  # each of the label's two characters takes two columns


@pytest.mark.parametrize(
    ("arguments", "terminal", "kind"),
    [
        ([], True, "table"),
        ([], False, "jsonl"),
        (["--format", "csv"], True, "csv"),
        (["--output", "a.CSV"], True, "csv"),
        (["--output", "a.jsonl"], True, "jsonl"),
        (["--output", "a.csv", "--format", "jsonl"], True, "jsonl"),
        (["--output", "a.txt", "--format", "table"], False, "table"),
    ],
)
def test_the_format_follows_what_the_output_is(
    script: ModuleType, arguments: list[str], terminal: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "argv", ["predict.py", "--model_path", "x", "review", *arguments])
    assert script.parse_arguments().format == kind


def test_words_are_reviews_unless_they_are_keys(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["价格=120", "model.device=cpu", "a.b=c", "--quiet", "prompt.instruction=a\nb", "model.device"]
    monkeypatch.setattr(sys, "argv", ["predict.py", "--model_path", "x", *words])
    arguments = script.parse_arguments()
    set_quiet(False)
    assert arguments.reviews == ["价格=120", "a.b=c", "model.device"]
    assert arguments.overrides == ["model.device=cpu", "prompt.instruction=a\nb"]
    literal = ["-5分", "--quiet", "model.device=cpu", "--", "-"]
    monkeypatch.setattr(sys, "argv", ["predict.py", "--model_path", "x", "lora.r=4", "好", "--", *literal])
    arguments = script.parse_arguments()
    assert arguments.reviews == ["好", *literal]
    assert arguments.overrides == ["lora.r=4"]


def test_labels_of_several_tokens_and_more_than_two_work(predict: Predict) -> None:
    labels = ["负面", "好评", "一般般"]
    (line,) = read_json_lines(predict("好", f"prompt.labels={json.dumps(labels, ensure_ascii=False)}"))
    assert list(line["probabilities"]) == labels
    assert sum(line["probabilities"].values()) == pytest.approx(1)


def test_a_base_model_needs_no_adapter(
    predict: Predict, final: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_checkpoint()
    keys = ("model.compute_dtype=float32", "prompt.instruction=评论：")
    (alone,) = read_json_lines(predict("好", *keys, model=base))
    (adapted,) = read_json_lines(predict("好"))
    assert alone["probability"] != adapted["probability"]
    zeroed = Path(shutil.copytree(final, tmp_path / "zeroed"))
    (zeroed / "manifest.json").unlink()  # as another program's adapter
    path = zeroed / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(path).items()}, path)
    (unchanged,) = read_json_lines(predict("好", model=zeroed))
    assert alone["probability"] == pytest.approx(unchanged["probability"], rel=1e-5)
    with pytest.raises(UserError, match=r"is a base model itself; .*--base"):
        predict("好", "--base", base, model=base)


@pytest.mark.parametrize("override", ["lora.r=4", "train.per_device_eval_batch_size=1", "data.max_test_examples=1"])
def test_a_key_that_prediction_does_not_read_is_noted(
    script: ModuleType,
    final: Path,
    tiny_checkpoint: Callable[..., Path],
    override: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for model in (final, tiny_checkpoint()):
        keys = ("model.compute_dtype=float32", "prompt.system=s", "data.max_length=400", override)
        monkeypatch.setattr(sys, "argv", ["predict.py", "--model_path", str(model), "--raw", "好", *keys])
        script.main()
        notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
        assert notes == [f"note: {override.partition('=')[0]} changes nothing here: an adapter is as its files say"]


def test_the_model_of_the_package_is_found_from_anywhere(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = read_json_lines(predict("好", model=Path("minilora/assets/tiny-qwen2.5")))
    assert line["label"] in ("正面", "负面")


def test_what_is_no_model_is_named(predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no adapter_config\.json; give the folder"):
        predict("好", model=tmp_path / "empty")
    for missing in ("nowhere", "empty/nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(UserError, match=r"nowhere: is neither a folder nor a name on the hub; give the"):
            predict("好", model=Path(missing))
    with pytest.raises(UserError, match=r"some/model: not in the cache .*; unset HF_HUB_OFFLINE"):
        predict("好", model=Path("some/model"))  # conftest.py sets HF_HUB_OFFLINE


def test_an_index_counts_empty_reviews_too(predict: Predict, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("好\n\n一般\n \n差\n", "utf-8")
    assert [line["index"] for line in read_json_lines(predict("--input", tmp_path / "a.txt"))] == [0, 2, 4]


@pytest.mark.parametrize("to_file", [True, False])
def test_every_record_is_written_or_counted(
    script: ModuleType,
    final: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    to_file: bool,
) -> None:
    (tmp_path / "a.txt").write_text(f"好\n\n{'很差。' * 400}\n \n差\n", "utf-8")
    output = ["--output", "out.jsonl"] if to_file else []
    monkeypatch.chdir(tmp_path)
    arguments = ["--model_path", str(final), "--input", "a.txt", *output, "data.max_length=128"]
    monkeypatch.setattr(sys, "argv", ["predict.py", *arguments])
    script.main()
    expected = (
        f"note: predictions written{' to out.jsonl' * to_file}: 3; empty reviews skipped: 2, the first at a.txt:2"
    )
    assert f"{expected}; cut to 128 tokens: 1\n" in capsys.readouterr().err


def test_an_output_without_results_is_created(predict: Predict, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\n""\n', "utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n', "utf-8")
    predict("--input", tmp_path / "a.jsonl", "--output", tmp_path / "out.csv")
    predict("--input", tmp_path / "a.jsonl", "--output", tmp_path / "out.jsonl")
    assert (tmp_path / "out.csv").read_text("utf-8").count("\n") == 1
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_an_encoding_that_is_not_read_is_refused_before_anything_is_loaded(
    predict: Predict, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "load_run_or_base", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(UserError, match="encoding 'latin-1': is not one of utf-8, gb18030"):
        predict("--encoding", "latin-1", piped=b"x\n")


def test_what_is_predicted_is_said_beside_the_results(
    script: ModuleType, final: Path, reviews: Path, run_main: RunMain
) -> None:
    out, err = run_main(script, "--model_path", final, "--input", reviews)
    assert f"{reviews}: text from 'text_a'; other columns: label\n" in err
    assert len(read_json_lines(out)) == len(TEXTS)
    assert "text from" not in run_main(script, "--model_path", final, "--input", reviews, "-q")[1]


def test_results_before_a_bad_line_are_written(predict: Predict, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n\xff\nfour\n")
    message = r"a\.txt:3: is not UTF-8 \(byte 0xFF\); save it as UTF-8\n  predictions written to .*out\.jsonl: 2$"
    with pytest.raises(UserError, match=message):
        predict("--input", tmp_path / "a.txt", "--output", tmp_path / "out.jsonl")
    found = read_json_lines((tmp_path / "out.jsonl").read_text("utf-8"))
    assert [line["text"] for line in found] == ["one", "two"]


def test_an_existing_output_stays_without_overwrite(
    predict: Predict, script: ModuleType, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine", "utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(script, "load_run_or_base", lambda *_, **__: pytest.fail("too late"))
        with pytest.raises(UserError, match=r"--output.*--overwrite"):
            predict("好", "--output", output)
        with pytest.raises(UserError, match=r"reviews\.tsv: .*--output"):
            predict("--input", reviews, "--output", reviews, "--overwrite", "--format", "jsonl")
        with pytest.raises(UserError, match=r"is a folder; give --output a file's name"):
            predict("好", "--output", tmp_path, "--format", "csv")
        with pytest.raises(UserError, match=r"below: cannot be written to .*--output"):
            predict("好", "--output", output / "below" / "out.csv")
        with pytest.raises(UserError, match=r"nowhere\.tsv: cannot be read"):
            predict("--input", tmp_path / "nowhere.tsv", "--output", output, "--overwrite")
    assert output.read_text("utf-8") == "mine"
    predict("好", "--output", output, "--overwrite")
    assert len(read_json_lines(output.read_text("utf-8"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["好", "--input", "a.txt"], "give reviews or --input, not both"),
        (["好", "--output", "a.tsv"], "--output a.tsv: "),
        (["好", "--max-batch-tokens", "0"], "--max_batch_tokens: expected 1 or more"),
    ],
)
def test_a_command_line_that_makes_no_sense_ends_with_status_2(
    predict: Predict, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        predict(*arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_without_anything_to_predict_a_terminal_is_told_what_to_give(
    predict: Predict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(SystemExit):
        predict()
    assert "give a review, a file with --input, or lines on standard input" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "a,b\n1,2\n", r"a\.csv:2: no text column .*; the file has a, b; rename .* --text_column"),
        ("a.doc", "x", r"a\.doc: is not one of \.tsv"),
        ("a.txt", "", r"a\.txt: is empty"),
        ("a.txt", "早餐很好".encode("gb18030"), r"a\.txt:1: .* it looks like gb18030: give --encoding gb18030"),
        ("a.parquet", None, r"a\.parquet: holds no record; give another file with --input"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_before_a_model_is_loaded(
    predict: Predict,
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: str | bytes | None,
    message: str,
) -> None:
    monkeypatch.setattr(script, "load_run_or_base", lambda *_, **__: pytest.fail("too late"))
    if content is None:
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message):
        predict("--input", tmp_path / name)


def test_a_pipe_with_nothing_in_it_is_said(predict: Predict) -> None:
    with pytest.raises(UserError, match=r"^standard input: is empty; .+\n  predictions written: 0$"):
        predict()


@no_windows
def test_a_line_in_a_pipe_is_answered_while_the_pipe_is_open(final: Path) -> None:
    with subprocess.Popen(
        command(final, "-q"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", bufsize=1
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number, text in enumerate(["好", "差", "一般"]):
            process.stdin.write(f"{text}\n")
            process.stdin.flush()
            line = json.loads(process.stdout.readline())
            assert (line["index"], line["text"]) == (number, text)
        process.stdin.close()
        assert process.wait(60) == 0


@no_windows
def test_an_interruption_leaves_whole_lines_and_says_how_many(final: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with subprocess.Popen(
        command(final, "--output", output, "--max_batch_tokens", "64"),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write("".join(f"{text}\n" for text in TEXTS * 10))
        process.stdin.flush()  # and it stays open: the script waits for more
        deadline = time.monotonic() + 60
        while (not output.exists() or not output.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        status = process.wait(60)
        said = process.stderr.read()
    written = output.read_text("utf-8")
    assert written.endswith("\n")
    lines = read_json_lines(written)
    assert [line["text"] for line in lines] == (TEXTS * 10)[: len(lines)]
    assert status == 130
    assert f"stopped by SIGINT: predictions written to {output}: {len(lines)}\n" in said
    assert "Traceback" not in said


@no_windows
def test_a_reader_that_has_enough_ends_it_quietly(final: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"{text}\n" for text in TEXTS * 100), "utf-8")
    with subprocess.Popen(
        command(final, "--input", tmp_path / "a.txt", "-q"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["index"] == 0
        process.stdout.close()
        assert process.wait(120) == 141
        assert process.stderr.read() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, which is a full disk")
def test_a_full_disk_is_named(predict: Predict) -> None:
    message = r"^/dev/full: cannot be written \(No space left on device\); .+\n  predictions written to /dev/full: 0$"
    with pytest.raises(UserError, match=message):
        predict("好", "--output", "/dev/full", "--overwrite", "--format", "jsonl")


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="no /dev/null")
def test_an_output_that_has_no_disk_is_written_all_the_same(predict: Predict) -> None:
    assert "predictions written to /dev/null: 1" in predict(
        "好", "--output", "/dev/null", "--overwrite", "--format=csv"
    )


def test_help_shows_options_and_examples_and_what_the_probabilities_are(
    predict: Predict, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        predict("--help")
    said = capsys.readouterr().out
    options = "--model_path --input --text_column --encoding --output --overwrite --format --max_batch_tokens --base "
    options += "--min_probability --raw"
    assert set(options.split()) <= set(said.replace("[", " ").replace("]", " ").split())
    assert "python scripts/predict.py --model_path outputs/checkpoints/final" in said
    assert "evaluate.py --calibrate" in said


# --- calibrated probabilities, and labels only from a probability on


def test_probabilities_are_at_the_adapters_temperature_unless_raw_is_asked_for(
    predict: Predict, final: Path, reviews: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    temperature = json.loads((final / "calibration.json").read_text("utf-8"))["temperature"]
    assert temperature != 1
    calibrated, raw = (
        np.array([list(line["probabilities"].values()) for line in read_json_lines(predict("--input", reviews, *more))])
        for more in ((), ("--raw",))
    )
    np.testing.assert_allclose(calibrated, at_temperature(raw, temperature), rtol=1e-12)
    assert not np.allclose(calibrated, raw)


@pytest.mark.parametrize("more", [(), ("--raw",)])
def test_a_line_beside_the_results_says_which_probabilities_they_are(
    final: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["predict.py", "--model_path", str(final), "好", *more])
    script.main()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("probabilities: ")]
    assert len(said) == 1
    assert ("not calibrated (--raw)" if more else "calibrated, temperature ") in said[0]


@pytest.mark.parametrize("kind", ["table", "jsonl", "csv"])
def test_below_the_least_probability_the_label_is_empty_and_the_end_counts(
    predict: Predict, script: ModuleType, reviews: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    every = read_json_lines(predict("--input", reviews))
    limit = sorted(line["probability"] for line in every)[len(every) // 2]
    answered = [line["probability"] >= limit for line in every]
    assert 0 < sum(answered) < len(answered)
    notes: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "warn", notes.append)
        text = predict("--input", reviews, "--min_probability", limit, "--format", kind)
    assert notes == [
        f"note: predictions written: {len(every)}; without a label, below --min_probability {limit:g}: "
        f"{len(every) - sum(answered)}"
    ]
    if kind == "jsonl":
        found = read_json_lines(text)
        assert [line.pop("answered") for line in found] == answered
        assert found == [
            {**line, "label": line["label"] if yes else ""} for line, yes in zip(every, answered, strict=True)
        ]
    elif kind == "csv":
        rows = list(csv.DictReader(io.StringIO(text)))
        assert [row["answered"] for row in rows] == ["yes" if yes else "no" for yes in answered]
        assert [bool(row["label"]) for row in rows] == answered
    else:
        lines = text.splitlines()[1:]
        assert [" yes " in line for line in lines] == answered
        assert [any(word in line[:16] for word in ("负面", "正面")) for line in lines] == answered


@pytest.mark.parametrize("value", ["1.5", "-0.1", "nan", "x"])
def test_a_least_probability_is_one(predict: Predict, capsys: pytest.CaptureFixture[str], value: str) -> None:
    with pytest.raises(SystemExit) as stop:
        predict("好", f"--min-probability={value}")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "--min_probability" in said
    assert f"got {value}, expected 0 to 1" in said
