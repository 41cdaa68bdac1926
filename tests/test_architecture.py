"""The rules of the house: who imports whom, how long things are, what is documented."""

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest

import lightning_rlhf
from lightning_rlhf import callbacks, datamodules, modules

ROOT = Path(lightning_rlhf.__file__).parent
PACKAGES = ("functional", "modules", "datamodules", "callbacks", "report")
LIBRARY = [path for folder in (".", *PACKAGES, "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))]
LONGEST_FUNCTION, LONGEST_FILE = 40, 350
FORBIDDEN = {  # package -> what its files must not import, at the top or inside a function
    "functional": ("lightning", "transformers", "peft", "datasets"),
    "modules": (
        "datasets",
        "lightning_rlhf.datamodules",
        "lightning_rlhf.callbacks",
        "lightning_rlhf.train",
        "lightning_rlhf.cli",
    ),
    "datamodules": (
        "peft",
        "lightning_rlhf.modules",
        "lightning_rlhf.callbacks",
        "lightning_rlhf.train",
        "lightning_rlhf.cli",
    ),
    "callbacks": ("transformers", "peft", "datasets", "lightning_rlhf.modules", "lightning_rlhf.datamodules"),
    "report": ("torch", "lightning", "lightning_rlhf.modules", "lightning_rlhf.callbacks"),  # it is quick
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def of(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in it; relative imports made absolute."""
    here = ["lightning_rlhf", *path.relative_to(ROOT).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def comes_from(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From `def` to the end, without the docstring."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)


def public_definitions(path: Path) -> list[tuple[str, ast.AST]]:
    """Public functions and classes of a file."""
    nodes = ast.parse(path.read_text()).body
    definitions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [(node.name, node) for node in definitions if not node.name.startswith("_")]


def shipped_classes() -> list[type]:
    packages = (modules, datamodules, callbacks)
    classes = [getattr(package, name) for package in packages for name in package.__all__]
    return [*classes, modules.on_policy.OnPolicyModule, modules.rollout_module.RolloutModule]


class TestImports:
    def test_the_lists_here_are_not_empty(self):
        assert len(LIBRARY) > 30
        assert {path.parent.name for path in LIBRARY} >= set(PACKAGES)

    @pytest.mark.parametrize("path", of("functional"), ids=name_of)
    def test_functional_imports_torch_the_standard_library_and_itself(self, path):
        allowed = (*sys.stdlib_module_names, "torch", "lightning_rlhf.functional")
        strangers = {name for name in imported(path) if not any(comes_from(name, one) for one in allowed)}
        assert not strangers

    @pytest.mark.parametrize("path", [p for package in PACKAGES for p in of(package)], ids=name_of)
    def test_imports_point_down(self, path):
        forbidden = FORBIDDEN[path.parent.name]
        assert not {name for name in imported(path) if any(comes_from(name, one) for one in forbidden)}

    @pytest.mark.parametrize("path", [p for package in PACKAGES for p in of(package)], ids=name_of)
    def test_inside_the_package_imports_are_relative(self, path):
        absolute = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if (isinstance(node, ast.ImportFrom) and not node.level and comes_from(node.module, "lightning_rlhf"))
            or (isinstance(node, ast.Import) and any(comes_from(a.name, "lightning_rlhf") for a in node.names))
        ]
        assert not absolute

    def test_these_rules_can_fail(self, monkeypatch):
        file = ROOT / "modules" / "imaginary.py"
        text = "from ..datamodules.text import pad\nfrom .. import callbacks\ndef f():\n    import datasets\n"
        monkeypatch.setattr(Path, "read_text", lambda path: text)
        assert imported(file) == {"lightning_rlhf.datamodules.text.pad", "lightning_rlhf.callbacks", "datasets"}


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
class TestEveryFile:
    def test_is_of_readable_length(self, path):
        assert len(path.read_text().splitlines()) <= LONGEST_FILE

    def test_functions_are_of_readable_length(self, path):
        long = {f.name: lines_of_code(f) for f in functions(path) if lines_of_code(f) > LONGEST_FUNCTION}
        constructors = {"__init__"}  # a constructor's arguments are the flags: one a line
        assert not {name: length for name, length in long.items() if name not in constructors}

    def test_constructors_are_short_beside_their_arguments(self, path):
        for function in functions(path):
            if function.name == "__init__":
                assert function.end_lineno - function.body[0].lineno < LONGEST_FUNCTION

    def test_leaves_nothing_to_do(self, path):
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text())

    def test_says_what_it_is(self, path):
        assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", [p for package in PACKAGES for p in of(package)], ids=name_of)
def test_public_functions_and_classes_have_docstrings(path):
    assert not [name for name, node in public_definitions(path) if ast.get_docstring(node) is None]


@pytest.mark.parametrize("shipped", shipped_classes(), ids=lambda shipped: shipped.__name__)
class TestEveryShippedClass:
    def test_describes_its_constructor_arguments(self, shipped):
        own = inspect.signature(shipped.__dict__.get("__init__", lambda self: None)).parameters
        named = [n for n, p in own.items() if n != "self" and p.kind is not p.VAR_KEYWORD]
        described = arguments_described(shipped)
        assert [name for name in named if name not in described] == []

    def test_describes_no_argument_that_it_lacks(self, shipped):
        parameters = {
            name
            for cls in shipped.__mro__
            if cls.__module__.startswith("lightning_rlhf") and "__init__" in cls.__dict__
            for name in inspect.signature(cls.__init__).parameters
        }
        assert arguments_described(shipped) <= parameters


def arguments_described(shipped: type) -> set[str]:
    """Names with a description in the Args section of a class's own docstring."""
    docstring = inspect.cleandoc(shipped.__dict__["__doc__"] or "")
    _, _, section = docstring.partition("\nArgs:\n")
    return set(re.findall(r"^    (\w+): \S", section, flags=re.MULTILINE))


def test_tests_mirror_the_tree():
    tests = Path(__file__).parent
    folders = {folder.name for folder in tests.iterdir() if folder.is_dir() and folder.name != "__pycache__"}
    assert folders <= set(PACKAGES) | {"benchmarks", "distributed"}
    assert not list(tests.rglob("__init__.py"))
