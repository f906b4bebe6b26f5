"""A run is resumed as what it is, or the difference is named."""

import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minilora.config import FREE_KEYS, KEYS, REMOVED_KEYS, config_from_dict, load_config
from minilora.data.split_files import SPLITS
from minilora.errors import UserError
from minilora.runs import setup
from minilora.runs.provenance import (
    CUTS,
    Provenance,
    changed_keys,
    describe_machine,
    of_earlier_version,
    read_provenance,
    refuse_other_run,
)
from minilora.runs.train import fit
from minilora.system.files import json_bytes, sha256
from tests.runs.conftest import (
    STEPS,
    Fit,
    contents,
    lasting,
    load_no_model,
    make_config,
    read,
    remove_folders,
    rewrite,
)


@pytest.mark.parametrize(
    ("report", "is_noted"),
    [(None, False), ("{}", False), ("right", False), ("wrong", True)],
)
def test_a_split_that_is_not_as_it_was_prepared_is_noted(
    run: Fit, data: Path, capsys: pytest.CaptureFixture[str], report: str | None, is_noted: bool
) -> None:
    digests = {f"{split}.jsonl": sha256(data / f"{split}.jsonl") for split in SPLITS}
    if report == "wrong":
        digests["validation.jsonl"] = "0" * 64
    if report is not None:
        text = json.dumps({"sha256_out": digests}) if report in ("right", "wrong") else report
        (data / "data_report.json").write_text(text, "utf-8")
    run()
    assert (f"note: {data}: validation.jsonl: " in capsys.readouterr().err) == is_noted


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_on_other_data_is_refused(final: Path, run: Fit, data: Path, is_finished: bool) -> None:
    if not is_finished:
        remove_folders(final)
    lines = (data / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    (data / "train.jsonl").write_text("".join(reversed(lines)), "utf-8")
    with pytest.raises(UserError, match=r"another data in .+ \(SHA-256 of train\.jsonl\).+--restart"):
        run()


def on_another_machine(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    plain = setup.describe_machine
    monkeypatch.setattr(setup, "describe_machine", lambda *arguments: {**plain(*arguments), **changes})


@pytest.mark.parametrize(
    ("changes", "shown"),
    [({"device": "cuda"}, "device: cpu -> cuda"), ({"dtype": "float16"}, "dtype: float32 -> float16")],
)
def test_a_run_does_not_resume_with_another_device_or_dtype(
    final: Path, run: Fit, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], shown: str
) -> None:
    expected = contents(final)
    remove_folders(final)
    with monkeypatch.context() as patch:
        on_another_machine(patch, threads=99, **changes)
        load_no_model(patch)
        with pytest.raises(UserError, match=rf"\({shown}\); set model\.device and model\.compute_dtype"):
            run()
    assert contents(run()) == expected


def test_a_run_that_resumes_with_other_versions_or_threads_says_so_once(
    final: Path, run: Fit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads, version = torch.get_num_threads(), importlib.metadata.version("torch")
    remove_folders(final, 4)
    on_another_machine(monkeypatch, threads=99, torch="9.9")
    capsys.readouterr()
    run()
    assert f"note: threads: {threads} -> 99, torch: {version} -> 9.9" in capsys.readouterr().err
    remove_folders(final)
    run()  # from step 4, which was computed there
    assert "note: " not in capsys.readouterr().err


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_is_known_by_checksums_and_not_by_paths_and_names(
    tiny_checkpoint: Callable[..., Path],
    final: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_finished: bool,
) -> None:
    expected = contents(final)
    moved = shutil.copytree(tiny_checkpoint(), tmp_path / "mounted" / "base")
    shutil.move(data, tmp_path / "mounted" / "data")
    if not is_finished:
        remove_folders(final, 4, 3)
    monkeypatch.chdir(tmp_path)
    keys = {
        "model.name_or_path": "mounted/base",
        "model.revision": "main",
        "model.device": "cpu",
        "data.source": "demo",
    }
    assert fit(make_config(Path("mounted/data/"), Path("run/"), **keys), moved) == Path("run/checkpoints/final")
    found = contents(final)
    for name in ("adapter_model.safetensors", "metrics.json"):
        assert found[name] == expected[name]
    if not is_finished:
        assert read(final / "adapter_config.json")["base_model_name_or_path"] == "mounted/base"
        assert read(final / "training_args.json")["data"]["dir"] == "mounted/data"


def test_ranks_may_have_their_files_at_other_places(tmp_path: Path) -> None:
    configs = [load_config(None, [f"data.dir={place}", f"model.name_or_path={place}"]) for place in ("/a", "/b")]
    first, second = (Provenance(config.to_dict(), {"train.jsonl": "1"}, {}, {}).facts for config in configs)
    assert first == second
    assert first["train.jsonl"] == "1"


@pytest.mark.parametrize(
    ("key", "now", "masks"),
    [("max_tokens_per_micro_batch", 100, True), ("per_device_eval_batch_size", 1, False)],
)
def test_a_run_may_resume_with_smaller_passes_and_says_what_they_change(
    final: Path, run: Fit, capsys: pytest.CaptureFixture[str], key: str, now: int, masks: bool
) -> None:
    expected, log = read(final / "metrics.json"), lasting(final.parent.parent)
    remove_folders(final, 4, 3)
    run(**{f"train.{key}": now})
    (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"note: train.{key}: ")]
    assert note.endswith("dropout masks" if masks else "last bits")
    found = read(final / "metrics.json")
    assert found["test"]["loss"] == pytest.approx(expected["test"]["loss"], rel=0.2 if masks else 1e-5)
    losses = [[entry["train_loss"] for entry in entries] for entries in (log, lasting(final.parent.parent))]
    assert masks or losses[0] == losses[1]


@pytest.mark.parametrize(("size", "accumulation"), [(2, 2), (1, 4)])
def test_a_run_may_resume_with_its_steps_divided_differently(
    final: Path, run: Fit, capsys: pytest.CaptureFixture[str], size: int, accumulation: int
) -> None:
    expected = read(final / "metrics.json")
    keys = {"train.per_device_train_batch_size": size, "train.gradient_accumulation_steps": accumulation}
    assert run(**keys) == final  # finished is finished
    assert "note: " not in capsys.readouterr().err
    remove_folders(final, 4, 3)
    run(**keys, **{"lora.dropout": 0.05})
    sizes = f"train.per_device_train_batch_size: 4 -> {size}, train.gradient_accumulation_steps: 1 -> {accumulation}"
    assert f"note: {sizes}" in capsys.readouterr().err
    found = read(final / "metrics.json")
    assert found["test_before"] == expected["test_before"]
    assert found["test"]["loss"] == pytest.approx(expected["test"]["loss"], rel=0.2)  # two of four steps' masks differ
    run(**keys)


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_does_not_resume_with_larger_steps(final: Path, run: Fit, is_finished: bool) -> None:
    if not is_finished:
        remove_folders(final)
    with pytest.raises(UserError, match=r"train\.gradient_accumulation_steps: 1 -> 2\n.*_train_batch_size=2$"):
        run(**{"train.gradient_accumulation_steps": 2})


def test_a_checkpoint_from_before_there_were_ranks_had_one(final: Path, run: Fit) -> None:
    remove_folders(final)
    newest = final.with_name(f"step-{STEPS:06d}")
    state = read(newest / "state.json")
    assert state["machine"].pop("ranks") == 1
    rewrite(newest, "state.json", json_bytes(state))
    assert read_provenance(newest).step_factors["processes"] == 1
    assert read(run() / "metrics.json")["machine"]["ranks"] == 1


def test_a_run_with_another_schedule_may_not_change_its_length(final: Path, run: Fit) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match=r"train\.max_steps: 4 -> 6  \(free with lr_scheduler_type=constant"):
            run(**{"train.max_steps": 6})
        if final.exists():
            remove_folders(final)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank_pattern", "{q_proj: 1}"), ("use_dora", True), ("bias", "all"), ("layers_to_transform", 0)],
)
def test_a_run_does_not_resume_with_another_kind_of_adapter(final: Path, run: Fit, name: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"\n  lora\.{name}: "):
        run(**{f"lora.{name}": value})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("training_args.json", "[]"),
        ("training_args.json", '{"model": {}}'),
        ("metrics.json", "null"),
        ("metrics.json", '{"data_sha256": 3}'),
        ("state.json", "null"),
        ("state.json", '{"config": 3}'),
        ("state.json", '{"config": {"train": {}}}'),
    ],
)
def test_a_file_that_does_not_say_what_a_run_was_made_from_is_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "training_args.json").write_text(json.dumps(load_config().to_dict()), "utf-8")
    (tmp_path / "metrics.json").write_text('{"data_sha256": {}, "model_sha256": {}}', "utf-8")
    assert read_provenance(tmp_path) == Provenance(load_config().to_dict(), {}, {}, {})
    (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path / name))}: .+ put the file back"):
        read_provenance(tmp_path)


def test_of_another_programs_adapter_nothing_is_known(tmp_path: Path) -> None:
    assert read_provenance(tmp_path) == Provenance({}, {}, {}, {})


def test_a_gpu_is_known_by_its_name_and_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3060")
    machine = describe_machine(torch.device("cuda"), torch.bfloat16, 1)
    assert machine["gpu"] == "NVIDIA GeForce RTX 3060, sm_86"
    assert machine["cuda"] == torch.version.cuda
    assert "gpu" not in describe_machine(torch.device("cpu"), torch.bfloat16, 1)


def test_changed_keys_names_old_and_new_value() -> None:
    before = load_config().to_dict()
    now = load_config(None, ["lora.r=4", "prompt.labels=[差评, 好评]", "train.max_steps=3"])
    assert changed_keys(before, now) == [
        "lora.r: 8 -> 4",
        'prompt.labels: ["负面", "正面"] -> ["差评", "好评"]',
        "train.max_steps: null -> 3  (free with lr_scheduler_type=constant, warmup_ratio=0)",
    ]


@pytest.mark.parametrize(
    ("schedule", "warmup", "is_free"), [("constant", 0, True), ("constant", 0.1, False), ("linear", 0, False)]
)
def test_a_run_may_become_longer_where_its_learning_rate_does_not_depend_on_it(
    schedule: str, warmup: float, is_free: bool
) -> None:
    keys = [f"train.lr_scheduler_type={schedule}", f"train.warmup_ratio={warmup}"]
    before = load_config(None, keys).to_dict()
    changes = changed_keys(before, load_config(None, [*keys, "train.num_train_epochs=9", "train.max_steps=9"]))
    assert [line.partition(":")[0] for line in changes] == (
        [] if is_free else ["train.num_train_epochs", "train.max_steps"]
    )
    assert changed_keys(before, load_config(None, [*keys, "train.seed=1"])) == ["train.seed: 42 -> 1"]


def test_how_a_step_is_cut_is_no_change_by_itself() -> None:
    before = load_config().to_dict()
    assert changed_keys(before, load_config(None, [f"train.{name}=2" for name in CUTS])) == []
    assert not {f"train.{name}" for name in CUTS} & FREE_KEYS  # their product counts


def test_a_key_that_an_older_run_did_not_have_had_its_default() -> None:
    before = load_config().to_dict()
    del before["lora"]["r"]
    del before["data"]
    assert changed_keys(before, load_config()) == []
    changes = changed_keys(before, load_config(overrides=["lora.r=4", "data.max_length=100"]))
    assert "lora.r: 8 -> 4" in changes
    assert "data.max_length: 512 -> 100" in changes


@pytest.mark.parametrize("name", REMOVED_KEYS)
@pytest.mark.parametrize("file", ["training_args.json", "state.json"])
def test_a_run_of_a_version_that_had_a_removed_key_is_read_and_continued(name: str, file: str, tmp_path: Path) -> None:
    config = load_config(None, ["lora.r=3"])
    section, _, key = name.partition(".")
    saved = config.to_dict()
    saved[section][key] = True
    is_final = file == "training_args.json"
    folder = tmp_path / ("final" if is_final else "step-000001")
    folder.mkdir()
    facts = {"data_sha256": {"train.jsonl": "a"}, "model_sha256": {"config.json": "b"}}
    (folder / file).write_text(json.dumps(saved if is_final else {"config": saved, **facts}), "utf-8")
    if is_final:
        (folder / "metrics.json").write_text(json.dumps(facts), "utf-8")
    assert config_from_dict(read_provenance(folder).config, [], file) == config
    now = Provenance(config.to_dict(), machine={}, **facts)
    refuse_other_run(read_provenance(folder), now, config, tmp_path)
    with pytest.raises(UserError, match=r"lora\.r: 3 -> 4"):
        refuse_other_run(read_provenance(folder), now, load_config(None, ["lora.r=4"]), tmp_path)


def test_a_compute_dtype_of_auto_is_compared_as_what_it_became() -> None:
    auto, named, other = (
        load_config(None, [f"model.compute_dtype={name}"]) for name in ("auto", "float32", "bfloat16")
    )
    for before, now in ((auto, named), (named, auto)):
        assert changed_keys(before.to_dict(), now) == []
    assert changed_keys(named.to_dict(), other) == ['model.compute_dtype: "float32" -> "bfloat16"']


@pytest.mark.parametrize(("limit", "sample"), [(None, "stratified"), (7, "first")])
def test_a_limit_of_a_version_without_data_sample_took_the_first_records(limit: int | None, sample: str) -> None:
    config = load_config(None, [f"data.max_test_examples={json.dumps(limit)}"])
    saved = config.to_dict()
    del saved["data"]["sample"]
    assert of_earlier_version(saved)["data"].get("sample", "stratified") == sample
    lines = changed_keys(saved, config)
    assert [line.partition("  ")[0] for line in lines] == ['data.sample: "first" -> "stratified"'][: limit is not None]
    assert all("data.sample=first" in line for line in lines)
    assert of_earlier_version(config.to_dict()) == config.to_dict()  # one that says it


def test_free_keys_exist_and_may_change() -> None:
    assert set(KEYS) >= FREE_KEYS
    now = load_config(
        None, ["train.output_dir=elsewhere", "train.save_steps=7", "train.logging_steps=3", "train.save_dtype=bfloat16"]
    )
    assert changed_keys(load_config().to_dict(), now) == []


def test_the_order_of_target_modules_is_no_change() -> None:
    before = load_config(overrides=["lora.target_modules=[q_proj, v_proj]"]).to_dict()
    assert changed_keys(before, load_config(overrides=["lora.target_modules=[v_proj, q_proj]"])) == []
    assert len(changed_keys(before, load_config(overrides=["lora.target_modules=[q_proj]"]))) == 1
    assert len(changed_keys(before, load_config(overrides=["lora.target_modules=all-linear"]))) == 1
