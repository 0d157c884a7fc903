"""The rules on who imports whom, read from the source of every file; imports inside functions count."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("arat_dist", "launcher")

SOLE_IMPORTER = {
    "deepspeed": "arat_dist/zero.py",
    "ffcv": "arat_dist/data/ffcv_import.py",
    "mlflow": "arat_dist/tracking.py",
    "optuna": "arat_dist/search/proposals.py",
    "onnxruntime": "arat_dist/export_onnx.py",
}
"""Each of these libraries is imported by one file alone."""


def sources() -> dict[str, str]:
    """The text of every product file by its path."""
    files = (file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


def imported_modules(path: str, source: str) -> Iterator[str]:
    """Every module that a file imports, dotted in full, wherever the import stands."""
    package = path.split("/")[:-1]
    for node in ast.walk(ast.parse(source, path)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parents = package[: len(package) - level + 1] if level else []
                base = ".".join([*parents, *([module] if module else [])])
                yield from (f"{base}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Name(id="import_module" | "__import__"), args=[ast.Constant(value=str(name)), *_]):
                yield name
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                yield name


def violations(files: dict[str, str]) -> list[str]:
    """One line for every import that breaks a rule."""
    broken = []
    for path, source in files.items():
        for module in imported_modules(path, source):
            top, *rest = module.split(".")
            if top == "ray" and not path.startswith("launcher/"):
                broken.append(f"{path}: ray belongs to launcher/")
            if path != SOLE_IMPORTER.get(top, path):
                broken.append(f"{path}: {top} belongs to {SOLE_IMPORTER[top]}")
            if top == "launcher" and path.startswith("arat_dist/"):
                broken.append(f"{path}: arat_dist never imports launcher")
            if top == "recipes" or (top in PACKAGES and "recipes" in rest):
                broken.append(f"{path}: recipes are data")
    return broken


def test_every_file_keeps_the_rules():
    files = sources()
    assert {"arat_dist/recipe.py", "launcher/__init__.py"} <= files.keys()
    assert violations(files) == []


@pytest.mark.parametrize("statement", ["import {}", "import {}.sub as x", "from {} import x", "from {}.sub import x"])
@pytest.mark.parametrize(
    "place", ["{}", "def f():\n    {}", "class A:\n    def f(self):\n        {}", "if True:\n    {}"]
)
@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("arat_dist/train.py", "ray"),
        ("arat_dist/train.py", "ffcv"),
        ("arat_dist/data/loader.py", "ffcv"),
        ("arat_dist/data/beton.py", "ffcv"),
        ("arat_dist/data/beton_writer.py", "ffcv"),
        ("arat_dist/evaluate.py", "mlflow"),
        ("launcher/fit.py", "mlflow"),
        ("arat_dist/optim.py", "deepspeed"),
        ("arat_dist/engine.py", "deepspeed"),
        ("launcher/fit.py", "deepspeed"),
        ("arat_dist/data/beton.py", "launcher"),
        ("arat_dist/plan.py", "recipes"),
        ("launcher/cli.py", "arat_dist.recipes"),
    ],
)
def test_a_forbidden_import_is_found(path, module, place, statement):
    source = place.format(statement.format(module))
    assert len(violations({path: source})) == 1, source


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("arat_dist/train.py", "import importlib\nimportlib.import_module('ray.train')"),
        ("arat_dist/train.py", "__import__('mlflow')"),
        ("arat_dist/train.py", "from ..launcher import fit"),
        ("arat_dist/data/order.py", "from ...launcher.fit import fit"),
        ("launcher/cli.py", "from arat_dist import recipes"),
    ],
)
def test_a_hidden_import_is_found(path, source):
    assert len(violations({path: source})) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("launcher/fit.py", "import ray\nfrom ray import train\nfrom arat_dist.train import train"),
        ("arat_dist/zero.py", "import deepspeed"),
        ("arat_dist/data/ffcv_import.py", "def write():\n    from ffcv.writer import DatasetWriter"),
        ("arat_dist/tracking.py", "import mlflow.tracking"),
        (
            "arat_dist/train.py",
            "import rayon, ffcv_like\nfrom .launchers import x\nfrom .config import shipped_recipes",
        ),
    ],
)
def test_an_allowed_import_passes(path, source):
    assert violations({path: source}) == []


@pytest.mark.parametrize("heavy", ["torch", "ray", "timm", "numpy"])
def test_reading_a_recipe_loads_nothing_heavy(heavy):
    script = f"import sys, arat_dist.recipe; sys.exit('{heavy}' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
