"""What the architecture promises: the reading order, who imports what, and that nothing is pickled."""

import ast
import re
from pathlib import Path

import pytest

import minilora

PACKAGE = Path(minilora.__file__).parent
SCRIPTS = PACKAGE.parent / "scripts"
# The order stands once, in the package's docstring.
ORDER = re.findall(r"^    (\w+)  ", minilora.__doc__ or "", re.MULTILINE)
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
SOURCES = sorted([*PACKAGE.rglob("*.py"), *SCRIPTS.rglob("*.py")])
# nf4 stands in the order before model, and needs nothing but the kernels.
ALLOWED = {
    "errors": set(),
    "console": set(),
    "script": {"console", "errors"},
    "files": {"console", "errors"},
    "manifest": {"files", "errors"},
    "yamlfile": {"errors"},
    "bnb": {"errors"},
    "nf4": {"bnb"},
    "gemv": {"bnb", "nf4"},
    "targets": {"errors"},
    "dropout": set(),
    "dora": set(),
    "lora": {"nf4", "dropout", "dora"},
    "attach": {"targets", "lora", "dropout", "nf4"},
    "initial": {"attach", "lora", "model", "quantized", "tensorfile", "errors"},
    "recompute": set(),
    "keyvalues": set(),
    "model": {"ops", "batch", "lora", "fields", "errors", "recompute", "keyvalues"},
    "tensorfile": {"files", "errors"},
    "quantized": {"tensorfile", "files", "manifest", "model", "nf4", "errors"},
    "load": {"tensorfile", "files", "quantized", "model", "nf4", "errors"},
    "adapterconfig": {"files", "attach", "dropout", "model", "fields", "errors"},
    "adapter": {"adapterconfig", "tensorfile", "files", "manifest", "attach", "lora", "model", "errors"},
    "merge": {
        "tensorfile",
        "files",
        "manifest",
        "quantized",
        "load",
        "adapter",
        "attach",
        "lora",
        "model",
        "errors",
    },
    "ggufile": {"tensorfile", "files", "load", "errors"},
    "generate": {"gemv", "nf4", "keyvalues", "model", "loss", "attach"},
    "drift": set(),
    "trackers": {"console", "files", "errors"},
    "markup": set(),
    "plots": {"markup"},
    "answers": {"plots", "markup", "metrics", "rows"},
    "report": {"answers", "plots", "markup"},
    "memory": {"tensorfile", "loss", "attach", "batch", "load", "model", "errors"},
}


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


def imported_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports."""
    parts = [name.split(".") for name in imported_names(path)]
    return {part[1] for part in parts if part[0] == "minilora" and len(part) > 1 and part[1] in MODULES}


def test_the_map_names_every_module_and_no_other() -> None:
    assert len(ORDER) == len(set(ORDER))
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_modules_above_it(module: str) -> None:
    above = set(ORDER[: ORDER.index(module)])
    assert imported_modules(PACKAGE / f"{module}.py") <= above


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_the_core_depends_on_little(module: str) -> None:
    assert imported_modules(PACKAGE / f"{module}.py") <= ALLOWED[module]


def test_only_the_top_knows_the_configuration() -> None:
    readers = {module for module in MODULES if "config" in imported_modules(PACKAGE / f"{module}.py")}
    assert readers == {"build", "plan", "budget", "origin", "trained", "run", "final", "train"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nobody_needs_the_libraries_that_we_compare_with(path: Path) -> None:
    packages = {name.partition(".")[0] for name in imported_names(path)}
    assert not packages & {"transformers", "peft", "accelerate", "trl", "sklearn", "datasets"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_only_one_module_imports_bitsandbytes(path: Path) -> None:
    uses = any(name.partition(".")[0] == "bitsandbytes" for name in imported_names(path))
    assert uses == (path.name == "bnb.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_is_unpickled(path: Path) -> None:
    packages = {name.partition(".")[0] for name in imported_names(path)}
    assert not packages & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    loads = [
        node
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "numpy.load", "np.load")
    ]
    if path.name != "adapter.py":
        assert not loads
    for call in loads:
        assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_and_everything_public_in_it_says_what_it_is(module: str) -> None:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text("utf-8"))
    assert ast.get_docstring(tree)
    public = [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    assert public
    # The keys of a configuration section carry a meaning each.
    silent = [n.name for n in public if not ast.get_docstring(n) and not n.name.endswith("Section")]
    assert silent == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_module_or_class_has_a_name_that_says_nothing(path: Path) -> None:
    classes = [node.name for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ClassDef)]
    words = {word.lower() for name in [*classes, path.stem] for word in re.findall(r"[A-Z]?[a-z]+", name)}
    assert not words & {"utils", "common", "helpers", "helper", "manager", "process", "handle", "handler"}
