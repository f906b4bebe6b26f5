"""Where a value comes from, and what is refused, with the words that a user sees."""

import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from minilora.config import (
    CUTS,
    HARMLESS_KEYS,
    LENGTHS,
    Config,
    changed_keys,
    config_from_dict,
    describe_keys,
    load_config,
)
from minilora.errors import UserError

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "scripts" / "configs").glob("*.yaml"))
KEYS = [f"{s.name}.{k.name}" for s in dataclasses.fields(Config) for k in dataclasses.fields(s.type)]


def refusal(*overrides: str, path: Path | None = None) -> list[str]:
    """The lines of the error."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


def test_without_file_and_overrides_everything_is_default() -> None:
    assert load_config() == Config()
    assert Config().lora.r == 8
    assert Config().train.learning_rate == 2e-4
    assert Config().prompt.labels == ["负面", "正面"]


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lora: {r: 4, alpha: 32}\ntrain:\n  seed: 7\n", "utf-8")
    config = load_config(path, ["lora.r=16", "prompt.labels=[差评, 好评]"])
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (16, 32, 0.05)
    assert config.train.seed == 7
    assert config.prompt.labels == ["差评", "好评"]


def test_the_last_override_wins() -> None:
    assert load_config(None, ["lora.r=4", "lora.r=2"]).lora.r == 2


def test_defaults_are_not_shared_between_configurations() -> None:
    assert Config().prompt.labels is not Config().prompt.labels


def test_all_problems_come_in_one_error(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("lora:\n  rnak: 4\n  dropout: 2\ntrain: fast\n", "utf-8")
    lines = refusal("train.seed=soon", "lora.r=0", "nonsense", path=path)
    assert lines == [
        f"train: got 'fast', expected a section with keys ({path})",
        "nonsense: expected section.key=value (command line)",
        f"lora.rnak: unknown key; did you mean lora.r? ({path})",
        f"lora.dropout: got 2, expected 0.99 or less ({path})",
        "train.seed: got 'soon', expected a whole number (command line)",
        "lora.r: got 0, expected 1 or more (command line)",
    ]


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("lora.rnak=4", "did you mean lora.r?"),
        ("train.learning_rat=1e-4", "did you mean train.learning_rate?"),
        ("lora.learning_rate=1e-4", "did you mean train.learning_rate?"),
        ("learning_rate=1e-4", "did you mean train.learning_rate?"),
        ("train.epochs=3", "did you mean train.num_train_epochs?"),
        ("train.r=4", "did you mean lora.r?"),
        ("train.lr=1e-4", "--help lists all keys"),
        ("zzz.qqq=1", "--help lists all keys"),
    ],
)
def test_an_unknown_key_comes_with_a_suggestion(override: str, suggestion: str) -> None:
    (line,) = refusal(override)
    assert f"unknown key; {suggestion} (command line)" in line


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", ".0001", "1.0e-04"])
def test_a_number_may_be_written_as_people_write_it(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"train:\n  learning_rate: {text}\n", "utf-8")
    for config in (load_config(path), load_config(None, [f"train.learning_rate={text}"])):
        assert config.train.learning_rate == 1e-4
        assert isinstance(config.train.learning_rate, float)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rate=.nan", "a number"),
        ("train.learning_rate=.inf", "a number"),
        ("train.learning_rate=true", "a number"),
        ("train.learning_rate=[1]", "a number"),
        ("train.learning_rate=", "a number"),
        ("lora.r=8.5", "a whole number"),
        ("lora.r=yes", "a whole number"),
        ("train.gradient_checkpointing=1", "true or false"),
        ("train.gradient_checkpointing='true'", "true or false"),
        ("model.quantization=null", "one of nf4, fp4, none"),
        ("model.quantization=int8", "one of nf4, fp4, none"),
        ("prompt.labels=[no, yes]", "text (quote it if it looks like a number or a yes/no word)"),
        ("prompt.labels=正面", "a list, such as [a, b]"),
        ("train.output_dir=", "text (quote it"),
        ("train.seed=" + "9" * 5000, "a whole number"),
        ("train.seed=!!int x", "a whole number"),
        ("lora.r={[a]: b}", "a whole number"),
        ("lora.target_modules=[q_proj, 3]", "text (quote it"),
    ],
)
def test_a_wrong_type_says_what_is_expected(override: str, expected: str) -> None:
    name = override.partition("=")[0]
    (line,) = refusal(override)
    assert line.startswith(f"{name}: got ")
    assert f"expected {expected}" in line
    assert line.endswith("(command line)")


def test_traps_of_yaml_that_mean_what_they_say() -> None:
    config = load_config(
        None,
        [
            "model.quantization=none",
            "model.revision=null",
            "train.gradient_checkpointing=on",
            "lora.target_modules=[q_proj, v_proj]",
            "prompt.instruction=a: b: c",
            "lora.r=16.0",
            "train.max_steps=10",
        ],
    )
    assert config.model.quantization == "none"
    assert config.model.revision is None
    assert config.train.gradient_checkpointing is True
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert config.prompt.instruction == "a: b: c"  # no YAML, taken as the text it is
    assert config.lora.r == 16
    assert isinstance(config.lora.r, int)
    assert config.train.max_steps == 10


@pytest.mark.parametrize(
    "text",
    [
        "A # B",
        "a: b: c",
        "1e4",
        "2024-13-45",
        "true",
        "null",
        " a ",
        "{[a]: b}",
        "? [a]",
        "!!int x",
        "'a' b",
        "[" * 3000,
    ],
)
def test_a_key_that_takes_text_takes_it_as_it_stands(text: str) -> None:
    assert load_config(None, [f"prompt.system={text}"]).prompt.system == text


@pytest.mark.parametrize(
    "path",
    [
        r"C:\Users\new folder\table",
        r"\\server\share\名",
        "D:/models/qwen",
        "/Volumes/My Disk/评论 #1",
        "/Users/me/Library: a",
        "./~/x",
    ],
)
def test_a_path_of_any_system_is_taken_as_it_stands(path: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"train:\n  output_dir: '{path}'\ndata:\n  dir: '{path}'\n", "utf-8")
    keys = [f"model.name_or_path={path}", f"model.quantized_cache={path}"]
    config = load_config(file, keys)
    assert {config.train.output_dir, config.data.dir} == {path}
    assert {config.model.name_or_path, config.model.quantized_cache} == {path}


def test_a_path_may_begin_at_the_home_folder_and_other_text_keeps_its_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  output_dir: ~/out\ndata:\n  dir: ~/data\n", "utf-8")
    config = load_config(file, ["model.name_or_path=~/m", "model.quantized_cache=~/c", "prompt.system=~/s"])
    found = (config.train.output_dir, config.data.dir, config.model.name_or_path, config.model.quantized_cache)
    assert [Path(path) for path in found if path] == [tmp_path / name for name in ("out", "data", "m", "c")]
    assert config.prompt.system == "~/s"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        (r'prompt.instruction="判断\n评论："', "判断\n评论："),
        ("prompt.instruction='判断\\n'", r"判断\n"),
        ("prompt.instruction=''", ""),
        ("prompt.positive_label=null", None),
        ("model.revision=1234567", "1234567"),
        ("lora.target_modules=[q_proj]", ["q_proj"]),
        ("lora.target_modules=[kq]_proj", "[kq]_proj"),
    ],
)
def test_in_a_text_quotes_are_yaml_and_null_and_lists_where_the_key_takes_them(override: str, value: object) -> None:
    section, _, name = override.partition("=")[0].partition(".")
    assert getattr(getattr(load_config(None, [override]), section), name) == value


def test_a_merge_key_brings_the_keys_of_another_mapping(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("lora:\n  <<: {r: 4, alpha: 8}\n  r: 2\n", "utf-8")
    config = load_config(path)
    assert (config.lora.r, config.lora.alpha) == (2, 8)


@pytest.mark.parametrize("content", [[], None, 3, "lora"])
def test_a_written_configuration_that_holds_no_sections_is_named(content: object) -> None:
    kind = type(content).__name__
    with pytest.raises(UserError, match=rf"training_args\.json: holds a {kind}, expected sections such as 'lora:'"):
        config_from_dict(content, [], "training_args.json")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("lora.r=0", "1 or more"),
        ("lora.alpha=0", "more than 0"),
        ("lora.alpha=-1", "more than 0"),
        ("lora.alpha=1000001", "1000000.0 or less"),
        ("train.learning_rate=0", "more than 0"),
        ("train.seed=1e30", "9223372036854775807 or less"),
        ("train.seed=18446744073709551616", "9223372036854775807 or less"),
        ("train.seed=" + "9" * 400, "9223372036854775807 or less"),
        ("lora.dropout=1", "0.99 or less"),
        ("data.max_length=8", "16 or more"),
        ("train.warmup_ratio=1.5", "1 or less"),
        ("train.max_steps=0", "1 or more"),
        ("train.eval_steps=0", "1 or more"),
        ("train.adam_beta2=1", "0.999999 or less"),
        ("train.early_stopping_patience=0", "1 or more"),
        ("train.max_skipped_steps=0", "1 or more"),
    ],
)
def test_a_value_out_of_range_is_refused(override: str, problem: str) -> None:
    (line,) = refusal(override)
    assert f"expected {problem}" in line


@pytest.mark.parametrize("text", [r'"a\0"', r'"a\ud83d"', r'"\udc00a"'])
@pytest.mark.parametrize("override", ["train.output_dir={}", "prompt.instruction={}", "prompt.labels=[b, {}]"])
def test_a_text_that_no_file_and_no_tokenizer_takes_is_refused(override: str, text: str) -> None:
    (line,) = refusal(override.format(text))
    assert line.startswith(override.partition("=")[0])
    assert "expected text without a zero character or half a character" in line


def test_both_ends_of_a_range_are_allowed() -> None:
    config = load_config(None, ["lora.dropout=0.9", "train.warmup_ratio=0", "lora.r=1", "lora.alpha=1e6"])
    assert (config.lora.dropout, config.train.warmup_ratio, config.lora.r, config.lora.alpha) == (0.9, 0, 1, 1e6)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["prompt.labels=[a]"], "prompt.labels: got ['a'], expected two or more different words"),
        (["prompt.labels=[a, a]"], "prompt.labels: got ['a', 'a'], expected two or more different words"),
        (["prompt.labels=[a, '']"], "prompt.labels: got ['a', ''], expected two or more different words"),
        (["prompt.positive_label=好"], "prompt.positive_label: '好' is not one of ['负面', '正面']"),
        (
            ["model.compute_dtype=float16", "model.device=cpu"],
            "model.compute_dtype: float16 needs a GPU; use bfloat16 or float32 with model.device=cpu",
        ),
    ],
)
def test_a_contradiction_is_refused(overrides: list[str], line: str) -> None:
    assert refusal(*overrides) == [f"{line} (command line)"]


def test_the_positive_class() -> None:
    assert load_config().prompt.positive == 1
    assert load_config(None, ["prompt.positive_label=负面"]).prompt.positive == 0
    assert load_config(None, ["prompt.labels=[a, b, c]"]).prompt.positive is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"lora:\n  r: 4\n  r: 8\n", r"is not valid YAML; .*key 'r' is given twice.* line 3"),
        (b"lora:\n  r: 4\nlora:\n  alpha: 8\n", r"is not valid YAML; key 'lora' is given twice"),
        (b"lora: &a {r: 4}\ntrain: *a\n", r"is not valid YAML; .*alias \*a is not read.* line 2"),
        (b"lora: &a {r: 4}\ntrain:\n  <<: *a\n", r"is not valid YAML; .*alias \*a is not read.* line 3"),
        (b"lora: [", r"is not valid YAML; "),
        (b"- lora\n", r"holds a list, expected sections such as 'lora:' with keys"),
        (b"lora", r"holds a str, expected sections"),
        ("prompt: {system: 好}".encode("gbk"), r"is not UTF-8 \(byte \d+\); save it as UTF-8"),
        (b"prompt:\n  system: 2024-13-45\n", r"is not valid YAML; '2024-13-45' cannot be read; quote it .* line 2"),
        (b"lora: {r: !!int x}", r"is not valid YAML; 'x' cannot be read; quote it if it is text .* line 1"),
        (b"lora: {r: !!bool x}", r"is not valid YAML; 'x' cannot be read"),
        (b"lora: {? [a] : b}", r"is not valid YAML; .*found unhashable key.* line 1"),
        (b"lora: " + b"[" * 3000, r"is not valid YAML; brackets are nested too deep"),
        (b"lora: !!python/object/apply:os.system ['true']\n", r"is not valid YAML; could not determine a constructor"),
    ],
)
def test_a_bad_file_is_named_with_the_reason(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"mine\.yaml: {message}"):
        load_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml: cannot be read \(No such file or directory\); check --config"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize("content", ["", "lora:\n", "# nothing\n", "\ufeff"])
def test_an_empty_file_or_section_means_defaults(content: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content, "utf-8")
    assert load_config(path) == Config()


def test_a_written_configuration_reads_back_as_itself() -> None:
    config = load_config(
        None, ["lora.r=3", "prompt.labels=[a, b, c]", "train.max_steps=4", "lora.target_modules=[q_proj]"]
    )
    content = json.loads(json.dumps(config.to_dict()))
    assert config_from_dict(content, [], "training_args.json") == config
    assert changed_keys(content, config) == []


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
    assert not {f"train.{name}" for name in CUTS} & HARMLESS_KEYS  # their product counts: tests/test_run.py


def test_a_key_that_an_older_run_did_not_have_had_its_default() -> None:
    before = load_config().to_dict()
    del before["lora"]["r"]
    del before["data"]
    assert changed_keys(before, load_config()) == []
    changes = changed_keys(before, load_config(overrides=["lora.r=4", "data.max_length=100"]))
    assert "lora.r: 8 -> 4" in changes
    assert "data.max_length: 512 -> 100" in changes


def test_harmless_keys_exist_and_may_change() -> None:
    assert set(KEYS) >= HARMLESS_KEYS
    now = load_config(
        None, ["train.output_dir=elsewhere", "train.save_steps=7", "train.logging_steps=3", "train.save_dtype=bfloat16"]
    )
    assert changed_keys(load_config().to_dict(), now) == []


@pytest.mark.parametrize(
    "name", ["train.seed", "train.learning_rate", "train.eval_steps", "lora.dropout", "data.max_length"]
)
def test_what_decides_the_course_of_a_run_is_not_harmless(name: str) -> None:
    assert name not in HARMLESS_KEYS


def test_describe_keys_lists_every_key_with_type_default_and_meaning() -> None:
    lines = describe_keys().splitlines()
    assert [line.strip().partition("=")[0] for line in lines[::2]] == KEYS
    assert all(meaning.startswith("      ") and meaning.strip() for meaning in lines[1::2])
    assert "  lora.r=8  (whole number)" in lines
    assert "  train.max_steps=null  (whole number or null)" in lines
    assert '  model.quantization="nf4"  (nf4, fp4, none)' in lines
    assert '  prompt.labels=["负面", "正面"]  (list of text)' in lines
    assert "  train.do_predict=true  (true or false)" in lines


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(recipe: Path) -> None:
    load_config(recipe)


def test_the_recipes_are_there() -> None:
    assert {"quickstart", "chnsenticorp"} <= {recipe.stem for recipe in RECIPES}


def attributes_read() -> Iterator[str]:
    """Names of all attributes that the code outside config.py reads, `max_{split}_examples` spelled out."""
    for folder in ("minilora", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name == "config.py":
                continue
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    yield node.attr
                if isinstance(node, ast.JoinedStr) and ast.unparse(node)[2:-1] == "max_{split}_examples":
                    yield from (f"max_{split}_examples" for split in ("train", "validation", "test"))


@pytest.mark.parametrize("name", KEYS)
def test_every_key_is_read_somewhere(name: str) -> None:
    attribute = {"prompt.positive_label": "positive"}.get(name, name.partition(".")[2])
    assert attribute in set(attributes_read())


def test_readme_names_the_keys_that_may_change_in_the_middle_of_a_run() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    passage = readme[readme.index("Free to change in the middle are") : readme.index("Two runs in one folder")]
    named = set(re.findall(r"`(\w+)`", passage)) - {"train", "model"}
    assert named == {key.partition(".")[2] for key in HARMLESS_KEYS} | set(LENGTHS)


def test_tables_are_read_from_yaml_and_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("lora:\n  rank_pattern: {q_proj: 4}\n  layers_to_transform: [0, 3]\n", "utf-8")
    config = load_config(path, ["lora.alpha_pattern={'.*mlp.*': 1e1, v_proj: 2}"])
    assert config.lora.rank_pattern == {"q_proj": 4}
    assert config.lora.alpha_pattern == {".*mlp.*": 10.0, "v_proj": 2.0}
    assert config.lora.layers_to_transform == [0, 3]
    assert load_config(None, ["lora.layers_to_transform=2"]).lora.layers_to_transform == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rank_pattern=4", r"lora.rank_pattern: got 4, expected a table, such as \{name: 1\}"),
        ("lora.rank_pattern={q_proj: 0}", "lora.rank_pattern: got .*, expected 1 or more"),
        ("lora.rank_pattern={q_proj: many}", "lora.rank_pattern: got .*, expected a whole number"),
        ("lora.rank_pattern={1: 2}", "lora.rank_pattern: got .*, expected a table"),
        ("lora.alpha_pattern={q_proj: 0}", "lora.alpha_pattern: got .*, expected more than 0"),
        ("lora.layers_to_transform=[-1]", "lora.layers_to_transform: got .*, expected 0 or more"),
        ("lora.bias=some", "lora.bias: got 'some', expected one of none, lora_only, all"),
        ("lora.init_lora_weights=pissa", "lora.dropout: must be 0 with lora.init_lora_weights=pissa"),
        ("lora.modules_to_save=[lm_head]", "lora.modules_to_save: unknown key; the base stays frozen, also head and"),
    ],
)
def test_keys_of_other_kinds_of_adapters_are_checked(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, [override])


def test_loftq_needs_four_bits() -> None:
    with pytest.raises(UserError, match=r"loftq begins with what 4 bits lost, so it needs model\.quantization=nf4"):
        load_config(None, ["lora.init_lora_weights=loftq", "model.quantization=none"])
