"""The wheel holds the product and its recipes, and finds them when it is installed."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built offline by the backend that .venv holds."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_it_holds_the_packages_and_the_recipes_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    python = {
        file.relative_to(ROOT).as_posix() for top in ("arat_dist", "launcher") for file in (ROOT / top).rglob("*.py")
    }
    recipes = {f"arat_dist/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "recipes").rglob("*.yaml")}
    shown = {"arat_dist/report/peers.yaml", "arat_dist/report/page/report.html", "arat_dist/report/page/report.css"}
    assert recipes
    assert python | recipes | shown <= held
    assert [name for name in held if name.startswith(("tests/", "recipes/", "benchmarks/", "docs/"))] == []


def test_it_finds_its_recipes_when_installed(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = "from arat_dist.recipe import *; print(shipped_recipes()); load_recipe(recipe_names()[0])"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "site" / "arat_dist" / "recipes")
