"""scripts/evaluate.py scores what was asked for, as the adapter's own run did, or refuses."""

import json
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.config import load_config
from minilora.data.prepare import prepare
from minilora.data.records import ReadOptions, read_records
from minilora.data.sampler import epoch_order, stratified_sample
from minilora.errors import UserError
from minilora.runs.calibration_file import read_calibration
from minilora.runs.load_run import warn_of_another_test_set
from minilora.runs.train import fit
from minilora.system.files import GrowingFile, StorageError, sha256
from minilora.system.manifest import verify_folder
from tests.conftest import make_reviews
from tests.scripts.conftest import RunMain, load_script

Evaluate = Callable[..., dict[str, Any]]
KEYS = (
    "lora.r=2",
    "model.compute_dtype=float32",
    "prompt.instruction=评论：",  # not the default
    "data.max_test_examples=6",
    "train.max_steps=2",
    "train.per_device_train_batch_size=4",
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("evaluate")


@pytest.fixture(scope="module")
def trained(
    tiny_checkpoint: Callable[..., Path], processed_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The checkpoints of a finished run."""
    model, output = tiny_checkpoint(), tmp_path_factory.mktemp("run")
    places = (f"model.name_or_path={model}", f"data.dir={processed_data}", f"train.output_dir={output}")
    return fit(load_config(None, [*KEYS, *places]), model).parent


@pytest.fixture
def final(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "final", tmp_path / "final"))


@pytest.fixture
def evaluate(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """The results that the script prints for a folder and more arguments."""

    def call(model_path: Path, *arguments: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model_path", str(model_path), *map(str, arguments)])
        script.main()
        results: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return results

    return call


def test_without_a_data_file_it_scores_what_the_run_scored(trained: Path, evaluate: Evaluate) -> None:
    test = json.loads((trained / "final" / "metrics.json").read_text("utf-8"))["test"]
    results = evaluate(trained / "final")
    assert results["num_examples"] == test["num_examples"] == 6
    assert results["loss"] == test["loss"]


def test_a_checkpoint_is_scored_with_its_runs_configuration(trained: Path, evaluate: Evaluate) -> None:
    assert evaluate(trained / "step-000002")["loss"] == evaluate(trained / "final")["loss"]


def test_the_runs_limit_is_not_for_other_data_and_a_limit_that_is_given_is(
    trained: Path, evaluate: Evaluate, processed_data: Path
) -> None:
    path = processed_data / "validation.jsonl"
    assert evaluate(trained / "final", "--data", path)["num_examples"] == 12
    assert evaluate(trained / "final", "--data", path, "data.max_test_examples=5")["num_examples"] == 5
    assert evaluate(trained / "final", "data.max_test_examples=4")["num_examples"] == 4


def write_reviews(path: Path, pairs: list[tuple[str, object]]) -> Path:
    path.write_text("label\ttext\n" + "".join(f"{label}\t{text}\n" for text, label in pairs), "utf-8")
    return path


def test_labels_that_are_not_the_adapters_words_are_mapped_to_them(
    trained: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    """A file of indices, of other words, of stars: the same figures, or a message with the very option."""
    pairs = make_reviews(12, seed=5)
    expected = evaluate(trained / "final", "--data", write_reviews(tmp_path / "a.tsv", pairs))
    for names in (("negative", "positive"), (1, 2), (-1, 1)):
        path = write_reviews(tmp_path / "a.tsv", [(text, names[label]) for text, label in pairs])
        with pytest.raises(UserError, match=r"the words that this adapter answers with; .*--map_labels") as caught:
            evaluate(trained / "final", "--data", path)
        assert "prompt.labels" not in str(caught.value)
        option = str(caught.value).rpartition(": ")[2]
        assert option.endswith(f"{names[0]}=负面,{names[1]}=正面")
        results = evaluate(trained / "final", "--data", path, *option.split())
        assert {**results, "reviews_per_s": 0} == {**expected, "reviews_per_s": 0}


def test_other_words_than_the_adapters_are_warned_of(
    trained: Path, script: ModuleType, run_main: RunMain, tmp_path: Path
) -> None:
    path = write_reviews(tmp_path / "a.tsv", [("好", "positive"), ("差", "negative")])
    own = ["--model_path", trained / "final", "--data", path]
    _, said = run_main(script, *own, 'prompt.labels=["negative", "positive"]')
    warning = (
        f"warning: {trained / 'final'}: prompt.labels: this adapter answers with 负面, 正面, in this order, not with"
    )
    assert f"{warning} negative, positive; leave the key out, and take --map_labels negative=负面,positive=正面" in said
    _, said = run_main(script, *own, "--map-labels", "negative=负面,positive=正面", 'prompt.labels=["正面", "负面"]')
    assert f"{warning} 正面, 负面; leave the key out\n" in said
    _, said = run_main(script, *own, "--map-labels", "negative=负面,positive=正面", 'prompt.labels=["负面", "正面"]')
    assert "prompt.labels" not in said


def test_the_first_reviews_of_a_sorted_file_are_not_all_that_a_limit_takes(
    trained: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    pairs = sorted(make_reviews(40, seed=5), key=lambda pair: -pair[1])
    path = write_reviews(tmp_path / "a.tsv", pairs)
    keys = ("--data", path, "data.max_test_examples=10")
    results = evaluate(trained / "final", *keys)
    assert [figures["support"] for figures in results["per_class"].values()] == [5, 5]
    assert results["warnings"] == []
    results = evaluate(trained / "final", *keys, "data.sample=first")
    assert [figures["support"] for figures in results["per_class"].values()] == [0, 10]


def test_a_class_without_a_review_and_one_answer_to_all_are_warned_of(
    trained: Path, script: ModuleType, run_main: RunMain, tmp_path: Path
) -> None:
    path = write_reviews(tmp_path / "a.tsv", [("好", 1)] * 3)
    printed, said = run_main(script, "--model_path", trained / "final", "--data", path, "--output_dir", tmp_path)
    results = json.loads(printed.splitlines()[-1])
    answer = "负面" if results["accuracy"] == 0 else "正面"
    warnings = [
        f"{path}: none of 3 examples is 负面: nothing is learned or measured of it there",
        f"{path}: all 3 predictions are {answer}",
    ]
    assert results["warnings"] == warnings
    for text in warnings:
        assert f"warning: {text}\n" in said
        assert f"<mark>{text}</mark>" in (tmp_path / "report.html").read_text("utf-8")
    assert "labels 1 are read as indices: 1 = 正面" in printed


def test_empty_texts_and_all_rows_that_cannot_be_scored_are_said(
    trained: Path, script: ModuleType, run_main: RunMain, tmp_path: Path
) -> None:
    path = write_reviews(tmp_path / "a.tsv", [("好", 1), ("", 0), (" ", 0)])
    _, said = run_main(script, "--model_path", trained / "final", "--data", path)
    assert f"note: {path}:3: one of 2 empty texts" in said
    path = write_reviews(tmp_path / "a.tsv", [("好", 1), ("差", ""), ("差", "")])
    with pytest.raises(UserError, match=r"a\.tsv:3: label is ''.* \(2 such records, also a\.tsv:4\)"):
        run_main(script, "--model_path", trained / "final", "--data", path)
    path = write_reviews(tmp_path / "a.tsv", [("好", "pos"), ("差", "neg")])
    with pytest.raises(UserError, match=r"--map_labels: got pos=positive, expected one of \['负面', '正面'\]"):
        run_main(script, "--model_path", trained / "final", "--data", path, "--map_labels", "pos=positive")


def test_a_raw_file_is_scored_by_the_columns_that_the_run_was_prepared_with(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, run_main: RunMain, script: ModuleType
) -> None:
    labels = ("酒店", "书籍", "电脑")
    lines = [f"{labels[n % 3]},{n % 2},评论{n}\n" for n in range(60)]
    raw = tmp_path / "raw.csv"
    raw.write_text("cat,label,review\n" + "".join(lines), "utf-8")
    reading = ReadOptions("review", "cat")
    prepare([raw], tmp_path / "data", reading=reading)
    places = (f"model.name_or_path={tiny_checkpoint()}", f"data.dir={tmp_path / 'data'}")
    words = f"prompt.labels={json.dumps(labels, ensure_ascii=False)}"
    config = load_config(None, [*KEYS, *places, words, f"train.output_dir={tmp_path / 'run'}"])
    final = fit(config, tiny_checkpoint())
    shutil.rmtree(tmp_path / "data")
    out, err = run_main(script, "--model_path", final, "--data", raw)
    results = json.loads(out.splitlines()[-1])
    assert f"{raw}: text from 'review', label from 'cat'; other columns: label\n" in err
    assert {name: figures["support"] for name, figures in results["per_class"].items()} == dict.fromkeys(labels, 20)
    named = json.loads(
        run_main(script, "--model_path", final, "--data", raw, "--label-column", "label")[0].splitlines()[-1]
    )
    assert [figures["support"] for figures in named["per_class"].values()] == [30, 30, 0]


def test_a_label_word_that_begins_another_is_trained_and_scored(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, run_main: RunMain, script: ModuleType
) -> None:
    labels = ("好评", "好", "差评")
    lines = "".join(f"{labels[n % 3]}\t评论{n}\n" for n in range(60))
    (tmp_path / "raw.tsv").write_text("label\ttext_a\n" + lines, "utf-8")
    prepare([tmp_path / "raw.tsv"], tmp_path / "data")
    places = (f"model.name_or_path={tiny_checkpoint()}", f"data.dir={tmp_path / 'data'}")
    words = f"prompt.labels={json.dumps(labels, ensure_ascii=False)}"
    config = load_config(None, [*KEYS, *places, words, f"train.output_dir={tmp_path / 'run'}"])
    out, _ = run_main(script, "--model_path", fit(config, tiny_checkpoint()), "--data", tmp_path / "raw.tsv")
    results = json.loads(out.splitlines()[-1])
    assert {name: figures["support"] for name, figures in results["per_class"].items()} == dict.fromkeys(labels, 20)


@pytest.mark.parametrize("override", ["lora.r=4", "train.seed=1", "data.max_train_examples=2"])
def test_a_key_that_scoring_does_not_read_is_noted(
    trained: Path,
    script: ModuleType,
    override: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model_path", str(trained / "final"), override])
    script.main()
    assert f"note: {override.partition('=')[0]} changes nothing here" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(
    trained: Path, evaluate: Evaluate, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "load_run_or_base", lambda *_: pytest.fail("too late"))
    (tmp_path / "file").write_text("a file", "utf-8")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"cannot be written to .*--output_dir"):
            evaluate(trained / "final", "--output_dir", path)


@pytest.mark.parametrize("folder", ["final", "step-000002"])
def test_a_test_set_that_is_not_the_runs_own_is_warned_of(
    trained: Path,
    script: ModuleType,
    processed_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: str,
) -> None:
    shutil.copyfile(processed_data / "train.jsonl", tmp_path / "test.jsonl")
    own = ["--model_path", str(trained / folder)]
    for arguments, is_another in ((own, False), ([*own, f"data.dir={tmp_path}"], True)):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        script.main()
        warning = f"warning: {tmp_path / 'test.jsonl'}: is not the file of the adapter's run, its SHA-256 is another"
        assert (warning in capsys.readouterr().err) == is_another


def test_another_base_of_the_same_shape_is_refused_unless_it_is_asked_for(
    final: Path,
    script: ModuleType,
    tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tiny_checkpoint(seed=1)
    message = f"{final}: was trained on another base model than {other} (SHA-256 of model.safetensors)"
    command = ["evaluate.py", "--model_path", str(final)]
    monkeypatch.setattr(sys, "argv", [*command, f"model.name_or_path={other}"])
    with pytest.raises(UserError) as caught:
        script.main()
    assert str(caught.value).startswith(f"{message}; ")
    assert "--base" in str(caught.value)
    monkeypatch.setattr(sys, "argv", [*command, "--base", str(other)])
    script.main()
    assert f"warning: {message}\n" in capsys.readouterr().err


def test_where_no_run_is_known_there_is_nothing_to_warn_of(
    final: Path, processed_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (final / "metrics.json").unlink()
    warn_of_another_test_set(final, processed_data / "test.jsonl")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["predictions.jsonl", "evaluation.json", "report.html"])
def test_results_that_cannot_be_written_are_named_and_the_figures_are_not_lost(
    trained: Path, evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "out" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"out: .*{name}.*--output_dir"):
        evaluate(trained / "final", "--output_dir", tmp_path / "out")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_examples"] == 6
    assert not list((tmp_path / "out").glob(".*"))


def test_a_full_disk_leaves_the_earlier_results_together(
    trained: Path, evaluate: Evaluate, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(trained / "final", "--output_dir", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert sorted(before) == ["evaluation.json", "predictions.jsonl", "report.html"]

    class FullDisk(GrowingFile):
        def append(self, content: bytes) -> None:
            is_full = "evaluation" in self._path.name
            super().append(content[:9] if is_full else content)
            if is_full:
                raise StorageError(f"{self._path}: cannot be written (No space left on device)")

    monkeypatch.setattr(script, "GrowingFile", FullDisk)
    with pytest.raises(UserError, match=r"out: the results cannot be written \(.+No space left on device"):
        evaluate(trained / "final", "--output_dir", tmp_path / "out", "data.max_test_examples=4")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_report_shows_the_evaluation_and_of_the_configuration_what_scoring_reads(
    trained: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    attack = "<script>alert(1)</script>"
    (tmp_path / "reviews.tsv").write_text(f"label\ttext\n1\t{attack}\n0\t{attack}\n", "utf-8")
    data, output = tmp_path / "reviews.tsv", tmp_path / "out"
    results = evaluate(trained / "final", "--data", data, "--output_dir", output, "--compare_base")
    page = (output / "report.html").read_text("utf-8")
    assert "<h1>Evaluation report</h1>" in page
    for metrics in (results, results["base"]):
        assert f"<td>{metrics['log_loss']:.4f}<small>" in page
    assert '<th scope="col">base model</th><th scope="col">adapter</th>' in page
    assert f"{data}: 2 reviews, 0 cut to 512 tokens. {results['mcnemar']['b']} only the adapter has right, " in page
    assert sha256(data) in page
    assert "<mark>prompt.<wbr>instruction</mark>" in page
    assert "train.<wbr>per_device_eval_batch_size" in page
    assert "lora.<wbr>r<" not in page
    assert "<script" not in page
    # one of two equal texts with different labels is answered wrong
    assert "1 of 2 reviews are answered wrong" in page
    assert '<p class="review" dir="auto">&lt;script&gt;alert(1)&lt;/script&gt;</p>' in page


def test_a_base_model_is_scored_as_it_is(
    trained: Path,
    tiny_checkpoint: Callable[..., Path],
    processed_data: Path,
    evaluate: Evaluate,
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = ("--data", processed_data / "test.jsonl", "prompt.instruction=评论：", "model.compute_dtype=float32")
    base = evaluate(tiny_checkpoint(), *keys, "--output_dir", tmp_path / "out")
    beside = evaluate(trained / "final", *keys[:2], "--compare_base")["base"]
    assert {name: base[name] for name in beside if name != "reviews_per_s"} == {
        name: value for name, value in beside.items() if name != "reviews_per_s"
    }
    assert base["model_path"] == str(tiny_checkpoint())
    assert not {"base", "mcnemar"} & base.keys()
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert '<th scope="col">base model</th>' in page
    assert '<th scope="col">adapter</th>' not in page
    with pytest.raises(UserError, match=r"--compare_base: .+ is the base model itself; leave it out, or give an"):
        evaluate(tiny_checkpoint(), *keys, "--compare_base")
    with pytest.raises(UserError, match=r"test\.jsonl: is not there; give labelled reviews with --data"):
        evaluate(tiny_checkpoint(), f"data.dir={tmp_path}")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model_path", str(tiny_checkpoint()), *map(str, keys)])
    script.main()
    (columns,) = (line for line in capsys.readouterr().out.splitlines() if "95 % interval" in line)
    assert columns.split()[:2] == ["base", "model"]


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"model": {}}', '{"train": {}}', '{"model": 3}'])
def test_a_configuration_that_is_none_is_named(final: Path, evaluate: Evaluate, content: str) -> None:
    (final / "training_args.json").write_text(content, "utf-8")
    (final / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"training_args\.json: "):
        evaluate(final)


def test_without_a_configuration_the_base_is_the_one_that_the_adapter_names(
    final: Path, evaluate: Evaluate, processed_data: Path
) -> None:
    (final / "training_args.json").unlink()
    (final / "manifest.json").unlink()
    results = evaluate(final, "--data", processed_data / "test.jsonl", "model.compute_dtype=float32")
    assert results["num_examples"] == 12
    config = json.loads((final / "adapter_config.json").read_text("utf-8"))
    (final / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}), "utf-8")
    with pytest.raises(UserError, match=r"adapter_config\.json .*--base"):
        evaluate(final, "--data", processed_data / "test.jsonl")


def test_a_loss_of_nan_is_an_error(final: Path, evaluate: Evaluate) -> None:
    (final / "manifest.json").unlink()  # as another program's adapter
    path = final / "adapter_model.safetensors"
    save_file({name: torch.full_like(value, 1e30) for name, value in load_file(path).items()}, path)
    with pytest.raises(UserError, match=r"evaluate: the loss is nan.*model\.compute_dtype"):
        evaluate(final)


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "training_args.json", "metrics.json"]
)
def test_a_damaged_adapter_is_not_scored(final: Path, evaluate: Evaluate, name: str) -> None:
    path = final / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"final: is damaged \({name} "):
        evaluate(final)


def test_an_adapter_whose_model_card_was_changed_is_scored(final: Path, evaluate: Evaluate) -> None:
    (final / "README.md").write_text("mine", "utf-8")
    assert evaluate(final)["num_examples"] == 6


@pytest.fixture
def long_review(tmp_path: Path) -> Path:
    """A file with a review that fits and one that does not."""
    path = tmp_path / "reviews.tsv"
    path.write_text(f"label\ttext\n1\t好\n0\t{'很差。' * 400}\n", "utf-8")
    return path


def test_evaluation_says_how_many_reviews_were_cut(
    script: ModuleType,
    trained: Path,
    long_review: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--model_path", trained / "final", "--data", long_review, "data.max_length=128"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    script.main()
    assert f"2 reviews of {long_review}, 1 cut to 128 tokens\n" in capsys.readouterr().out


@pytest.mark.parametrize("more", [["--json"], []])
def test_inspection_says_how_many_examples_were_cut_and_never_between_lines_of_json(
    tiny_checkpoint: Callable[..., Path],
    long_review: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
) -> None:
    keys = ["data.max_length=128", f"model.name_or_path={tiny_checkpoint()}"]
    monkeypatch.setattr(sys, "argv", ["inspect_batch.py", "--data", str(long_review), *more, *keys])
    load_script("inspect_batch").main()
    printed = capsys.readouterr()
    assert "2 examples, 1 cut to 128 tokens" in (printed.err if more else printed.out)
    if more:
        assert len([json.loads(line) for line in printed.out.splitlines()]) == 2


def test_inspection_reads_the_columns_that_are_named(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], run_main: RunMain
) -> None:
    (tmp_path / "a.csv").write_text("label,stars,review\n0,1,好\n", "utf-8")
    keys = (f"model.name_or_path={tiny_checkpoint()}", f"data.dir={tmp_path / 'nowhere'}")
    inspect = load_script("inspect_batch")
    out, err = run_main(inspect, "--data", tmp_path / "a.csv", "--label_column", "stars", "--json", *keys)
    assert json.loads(out)["label"] == "正面"
    assert "text from 'review', label from 'stars'; other columns: label" in err


@pytest.mark.parametrize("function", ["first_records", "first_step"])
def test_of_a_large_file_an_inspection_holds_a_micro_batch(function: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(f'{{"text": "好{n}", "label": {n % 2}}}\n' for n in range(20_000)), "utf-8")
    take = getattr(load_script("inspect_batch"), function)
    records = read_records(path)
    for limit in ([], ["data.max_train_examples=200"]):
        config = load_config(None, ["train.per_device_train_batch_size=3", f"data.dir={tmp_path}", *limit])
        tracemalloc.start()
        try:
            found = take(path, ReadOptions(), config)
            assert tracemalloc.get_traced_memory()[1] < 1_500_000  # as a list of records, five times as much
        finally:
            tracemalloc.stop()
        chosen = stratified_sample([record.label for record in records], 200) if limit else range(20_000)
        order = epoch_order(len(chosen), config.train.seed, 0)[:3] if function == "first_step" else range(3)
        wanted = [chosen[index] for index in order] if function == "first_step" else list(order)
        assert found == [records[index] for index in wanted]


def test_inspection_of_data_that_is_not_prepared_says_how_to_prepare_it(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"data.dir={tmp_path / 'absent'}", f"model.name_or_path={tiny_checkpoint()}"]
    monkeypatch.setattr(sys, "argv", ["inspect_batch.py", *keys])
    with pytest.raises(UserError, match=r"train\.jsonl: .*scripts/preprocess_data\.py or scripts/train\.py"):
        load_script("inspect_batch").main()


# --- the temperature


def test_probabilities_are_at_the_adapters_temperature_unless_raw_is_asked_for(final: Path, evaluate: Evaluate) -> None:
    temperature = read_calibration(final)
    assert temperature is not None
    test = json.loads((final / "metrics.json").read_text("utf-8"))["test"]
    calibrated, raw = evaluate(final), evaluate(final, "--raw")
    for name in ("log_loss", "expected_calibration_error", "temperature", "uncalibrated", "change"):
        assert calibrated[name] == test[name]
    assert calibrated["temperature"] == temperature.temperature
    assert (raw["temperature"], "uncalibrated" in raw) == (None, False)
    for name in ("log_loss", "expected_calibration_error"):
        assert raw[name] == calibrated["uncalibrated"][name]
    for name in ("accuracy", "precision", "recall", "f1", "roc_auc", "confusion_matrix", "loss"):
        assert raw[name] == calibrated[name]


def test_calibrate_fits_a_temperature_keeps_it_and_uses_it(
    final: Path, evaluate: Evaluate, processed_data: Path, tmp_path: Path
) -> None:
    reviews = write_reviews(tmp_path / "more.tsv", make_reviews(40, seed=8))
    before = read_calibration(final)
    results = evaluate(final, "--calibrate", reviews)
    found = read_calibration(final)
    assert found is not None
    assert found != before
    assert (found.num_examples, found.data_sha256) == (40, {"more.tsv": sha256(reviews)})
    assert results["num_examples"] == 6  # the run's own test split
    assert results["temperature"] == evaluate(final)["temperature"] == found.temperature
    assert results["warnings"] == []
    assert verify_folder(final) is None
    # the log loss of the file itself goes down as the file says
    own = evaluate(final, "--data", reviews)
    assert own["log_loss"] == pytest.approx(found.log_loss_after, rel=1e-9)
    assert own["uncalibrated"]["log_loss"] == pytest.approx(found.log_loss_before, rel=1e-9)


def test_figures_of_the_file_that_it_was_fitted_on_are_said_to_flatter(
    final: Path, evaluate: Evaluate, processed_data: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copy(processed_data / "validation.jsonl", tmp_path / "another_name.jsonl"))
    results = evaluate(final, "--data", copy, "--output_dir", tmp_path / "scored")
    (warning,) = [text for text in results["warnings"] if "fitted on this file" in text]
    assert warning.startswith(str(copy))
    assert "fitted on this file" in (tmp_path / "scored" / "report.html").read_text("utf-8")
    assert not any("fitted on this file" in text for text in evaluate(final)["warnings"])


def test_an_adapter_of_another_program_is_calibrated_on_the_only_file_there_is(
    final: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    for name in ("metrics.json", "training_args.json", "calibration.json", "manifest.json"):
        (final / name).unlink()
    reviews = write_reviews(tmp_path / "more.tsv", make_reviews(20, seed=8))
    base = json.loads((final / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]
    places = ("--base", base, f"data.dir={tmp_path / 'none'}")
    results = evaluate(final, "--calibrate", reviews, *places)
    assert results["num_examples"] == 20
    assert any("fitted on this file" in text for text in results["warnings"])
    assert evaluate(final, "--data", reviews, *places)["temperature"] == results["temperature"]
    assert not (final / "manifest.json").exists()


def test_calibrating_on_the_training_data_is_warned_of(
    final: Path, evaluate: Evaluate, processed_data: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(script, "warn", said.append)
    evaluate(final, "--calibrate", processed_data / "train.jsonl", "data.max_test_examples=4")
    assert any("train.jsonl: is what the adapter was trained on" in text for text in said)


def test_a_base_model_and_an_adapter_on_the_hub_have_no_place_for_a_temperature(
    final: Path, evaluate: Evaluate, tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    reviews = write_reviews(tmp_path / "more.tsv", make_reviews(4, seed=8))
    base = json.loads((final / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]
    with pytest.raises(UserError, match=r"--calibrate: .+ is the base model itself"):
        evaluate(Path(base), "--data", reviews, "--calibrate", reviews)
    load = script.load_run_or_base
    monkeypatch.setattr(script, "load_run_or_base", lambda _, *more, **keys: load(final, *more, **keys))
    with pytest.raises(UserError, match=r"user/adapter is on the hub.+hf download user/adapter --local-dir"):
        evaluate(Path("user/adapter"), "--calibrate", reviews)


def test_raw_and_calibrate_exclude_each_other(
    final: Path, evaluate: Evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        evaluate(final, "--raw", "--calibrate", "x.tsv")
    assert "give one of them" in capsys.readouterr().err
