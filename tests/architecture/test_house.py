"""The floors hold, every folder is a room, and our top-level names are ours alone."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = ("manifests", "traces", "eval", "runtime", "replay", "experiments", "dashboards")


def test_floors_hold() -> None:
    result = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_contracts_and_packaging_name_every_room() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert folders == set(ROOMS)
    assert set(PROJECT["tool"]["importlinter"]["root_packages"]) == folders
    assert set(PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]) == {f"{room}*" for room in folders}


def test_our_top_level_names_are_ours_alone() -> None:
    owners = importlib.metadata.packages_distributions()
    for name in (*ROOMS, "replaylab"):
        assert set(owners.get(name, ["replaylab"])) == {"replaylab"}, name


def test_front_door_imports_no_room() -> None:
    tree = ast.parse((ROOT / "replaylab.py").read_text())
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & set(ROOMS)


def test_every_folder_with_code_is_a_package() -> None:
    for room in (*ROOMS, "tests"):
        for path in (ROOT / room).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def test_every_module_says_which_question_it_answers() -> None:
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no module docstring"


def test_nothing_unpickles() -> None:
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    assert not {alias.name for alias in node.names} & {"pickle", "joblib", "dill"}, path
                if isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
                    assert node.value.id not in {"torch", "pickle"}, path
