"""Where a value comes from, and what is refused, with the words that a user sees."""

import ast
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from minilora.config import (
    FREE_KEYS,
    REMOVED_KEYS,
    Config,
    config_from_dict,
    describe_keys,
    layer_of,
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


def test_who_names_a_key_is_known(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("data: {dir: x}\nlora:\n", "utf-8")
    names = ("data.dir", "train.seed", "lora.r")
    assert [layer_of(name, tmp_path / "a.yaml", ["train.seed=1"]) for name in names] == [1, 2, 0]
    assert layer_of("data.dir", None, []) == 0
    assert layer_of("data.dir", tmp_path / "a.yaml", ["data.dir=y"]) == 2


def test_the_last_override_wins() -> None:
    assert load_config(None, ["lora.r=4", "lora.r=2"]).lora.r == 2


def test_a_key_of_the_command_line_may_have_dashes() -> None:
    config = load_config(overrides=["train.learning-rate=1e-3", "data.dir=a-b"])
    assert (config.train.learning_rate, config.data.dir) == (1e-3, "a-b")


def test_defaults_are_not_shared_between_configurations() -> None:
    assert Config().prompt.labels is not Config().prompt.labels


def test_all_problems_come_in_one_error(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("lora:\n  rnak: 4\n  dropout: 2\ntrain: fast\n", "utf-8")
    lines = refusal("train.seed=soon", "lora.r=0", "nonsense", path=path)
    shown = [
        ("train", "'fast'"),
        ("nonsense", "section.key=value"),
        ("lora.rnak", "lora.r?"),
        ("lora.dropout", "got 2"),
    ]
    shown += [("train.seed", "'soon'"), ("lora.r", "got 0")]
    assert [line.partition(":")[0] for line in lines] == [key for key, _ in shown]
    assert all(part in line for line, (_, part) in zip(lines, shown, strict=True))
    assert [str(path) in line for line in lines] == [True, False, True, True, False, False]


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
    assert suggestion in line
    assert line.endswith("(command line)")


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
        ("train.max_tokens_per_micro_batch=many", "a whole number, or auto"),
        ("train.class_weights=balance", "a table, such as {name: 1}, or none, balanced"),
        ("train.class_weights=null", "a table, such as {name: 1}, or none, balanced"),
        ("train.class_weights={正面: 1, 负面: much}", "a number"),
        ("train.class_weights={正面: 1, 负面: .nan}", "a number"),
        ("train.class_weights={正面: 1, 负面: .inf}", "a number"),
        ("train.class_weights={0: 1, 1: 2}", "a table whose names are text (quote one"),
        ("train.max_tokens_per_micro_batch=15", "16 or more"),
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
def test_a_key_that_takes_text_takes_it_unchanged(text: str) -> None:
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
def test_a_path_of_any_system_is_taken_unchanged(path: str, tmp_path: Path) -> None:
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
    with pytest.raises(UserError, match=rf"training_args\.json: holds a {type(content).__name__}, expected"):
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
        ("train.class_weights={正面: 1, 负面: 0}", "1e-06 or more"),
        ("train.class_weights={正面: 1, 负面: -1}", "1e-06 or more"),
        ("train.class_weights={正面: 1e7, 负面: 1}", "1000000.0 or less"),
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


def test_both_ends_of_a_range_are_allowed() -> None:
    config = load_config(None, ["lora.dropout=0.9", "train.warmup_ratio=0", "lora.r=1", "lora.alpha=1e6"])
    assert (config.lora.dropout, config.train.warmup_ratio, config.lora.r, config.lora.alpha) == (0.9, 0, 1, 1e6)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["prompt.labels=[a]"], "prompt.labels: got ['a']"),
        (["prompt.labels=[a, a]"], "prompt.labels: got ['a', 'a']"),
        (["prompt.labels=[a, '']"], "prompt.labels: got ['a', '']"),
        (["prompt.positive_label=好"], "prompt.positive_label: '好' is not one of ['负面', '正面']"),
        (["model.compute_dtype=float16", "model.device=cpu"], "model.compute_dtype: float16"),
        (["train.offload_checkpoints=true"], "train.offload_checkpoints: "),
        (["train.class_weights={正面: 1}"], "train.class_weights: has no weight for 负面; name each label word"),
        (
            ["train.class_weights={正面: 1, 负: 2, 负面: 3}"],
            "train.class_weights: has one for 负, which is not in prompt.labels; name each label word",
        ),
        (
            ["train.class_weights={好: 1}"],
            "train.class_weights: has no weight for 负面, 正面 and one for 好, which is not in prompt.labels",
        ),
    ],
)
def test_a_contradiction_is_refused(overrides: list[str], line: str) -> None:
    (found,) = refusal(*overrides)
    assert found.startswith(line)
    assert found.endswith("(command line)")


def test_the_positive_class() -> None:
    assert load_config().prompt.positive == 1
    assert load_config(None, ["prompt.positive_label=负面"]).prompt.positive == 0
    assert load_config(None, ["prompt.labels=[a, b, c]"]).prompt.positive is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"lora:\n  r: 4\n  r: 8\n", "'r'.* line 3"),
        (b"lora:\n  r: 4\nlora:\n  alpha: 8\n", "'lora'"),
        (b"lora: &a {r: 4}\ntrain: *a\n", r"alias \*a.* line 2"),
        (b"lora: &a {r: 4}\ntrain:\n  <<: *a\n", r"alias \*a.* line 3"),
        (b"lora: [", "not valid YAML"),
        (b"- lora\n", "holds a list, expected sections"),
        (b"lora", "holds a str, expected sections"),
        ("prompt: {system: 好}".encode("gbk"), r"byte \d+\); save it as UTF-8"),
        (b"prompt:\n  system: 2024-13-45\n", "'2024-13-45' .*quote it .* line 2"),
        (b"lora: {r: !!int x}", "'x' .*quote it .* line 1"),
        (b"lora: {r: !!bool x}", "'x' "),
        (b"lora: {? [a] : b}", "unhashable key.* line 1"),
        (b"lora: " + b"[" * 3000, "nested too deep"),
        (b"lora: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_a_bad_file_is_named_with_the_reason(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"mine\.yaml: .*{message}"):
        load_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml: .*check --config"):
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


@pytest.mark.parametrize("name", REMOVED_KEYS)
def test_a_key_that_was_removed_is_refused_with_the_reason_where_a_user_writes_it(name: str, tmp_path: Path) -> None:
    section, _, key = name.partition(".")
    path = tmp_path / "mine.yaml"
    path.write_text(f"{section}:\n  {key}: true\n", "utf-8")
    (line,) = refusal(path=path)
    assert line.startswith(f"{name}: was removed, because {REMOVED_KEYS[name]}; delete it")
    assert str(path) in line
    (line,) = refusal(f"{name}=true")
    assert line.startswith(f"{name}: was removed")


@pytest.mark.parametrize(
    "name", ["train.seed", "train.learning_rate", "train.eval_steps", "lora.dropout", "data.max_length"]
)
def test_what_decides_the_course_of_a_run_is_not_free(name: str) -> None:
    assert name not in FREE_KEYS


def test_describe_keys_lists_every_key_with_type_default_and_meaning() -> None:
    lines = describe_keys().splitlines()
    assert [line.strip().partition("=")[0] for line in lines[::2]] == KEYS
    assert all(meaning.startswith("      ") and meaning.strip() for meaning in lines[1::2])
    assert "  lora.r=8  (whole number)" in lines
    assert "  train.max_steps=null  (whole number or null)" in lines
    assert "  train.max_tokens_per_micro_batch=null  (whole number or auto or null, free)" in lines
    assert '  model.quantization="nf4"  (nf4, fp4, none)' in lines
    assert '  prompt.labels=["负面", "正面"]  (list of text)' in lines
    assert "  train.do_predict=true  (true or false, free)" in lines


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


def test_every_key_is_read_somewhere() -> None:
    read = set(attributes_read())
    attributes = {"prompt.positive_label": "positive"}
    assert [name for name in KEYS if attributes.get(name, name.partition(".")[2]) not in read] == []


def test_help_marks_the_keys_that_may_change_in_the_middle_of_a_run() -> None:
    marked = {line.partition("=")[0].strip() for line in describe_keys().splitlines() if line.endswith(", free)")}
    assert marked == FREE_KEYS
    assert {"train.save_steps", "train.output_dir", "train.gradient_checkpointing"} <= marked
    assert not marked & {"lora.r", "train.seed", "train.num_train_epochs"}


def test_tables_are_read_from_yaml_and_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("lora:\n  rank_pattern: {q_proj: 4}\n  layers_to_transform: [0, 3]\n", "utf-8")
    config = load_config(path, ["lora.alpha_pattern={'.*mlp.*': 1e1, v_proj: 2}"])
    weights = load_config(None, ["train.class_weights={负面: 1e-1, 正面: 3}"]).train.class_weights
    assert weights == {"负面": 0.1, "正面": 3.0}
    assert load_config(None, ["train.class_weights=balanced"]).train.class_weights == "balanced"
    assert config.lora.rank_pattern == {"q_proj": 4}
    assert config.lora.alpha_pattern == {".*mlp.*": 10.0, "v_proj": 2.0}
    assert config.lora.layers_to_transform == [0, 3]
    assert load_config(None, ["lora.layers_pattern=layers"]).lora.layers_pattern == "layers"
    assert load_config(None, ["lora.layers_to_transform=2"]).lora.layers_to_transform == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rank_pattern=4", "got 4, expected a table"),
        ("lora.rank_pattern={q_proj: 0}", "1 or more"),
        ("lora.rank_pattern={q_proj: many}", "a whole number"),
        ("lora.rank_pattern={1: 2}", "a table"),
        ("lora.alpha_pattern={q_proj: 0}", "more than 0"),
        ("lora.layers_to_transform=[-1]", "0 or more"),
        ("lora.bias=some", "got 'some', expected one of none, lora_only, all"),
        ("lora.modules_to_save=[lm_head]", "the base stays frozen"),
    ],
)
def test_keys_of_other_kinds_of_adapters_are_checked(override: str, message: str) -> None:
    (line,) = refusal(override)
    assert line.startswith(override.partition("=")[0])
    assert message in line


def test_pissa_has_no_dropout() -> None:
    (line,) = refusal("lora.init_lora_weights=pissa")
    assert line.startswith("lora.dropout: must be 0")
    load_config(None, ["lora.init_lora_weights=pissa", "lora.dropout=0"])


@pytest.mark.parametrize("kind", ["pissa", "loftq"])
def test_an_adapter_to_begin_with_has_its_first_values(kind: str) -> None:
    (line,) = refusal(f"lora.init_lora_weights={kind}", "model.adapter=outputs/final", "lora.dropout=0")
    assert line.startswith(f"lora.init_lora_weights: {kind} makes a new adapter, model.adapter brings one")


def test_loftq_needs_four_bits() -> None:
    with pytest.raises(UserError, match=r"^lora\.init_lora_weights: .*model\.quantization=nf4"):
        load_config(None, ["lora.init_lora_weights=loftq", "model.quantization=none"])
