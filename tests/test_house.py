"""The house stands: imports are cheap and one-way, the wheel is complete, the lists in two places agree."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings tomli to Python 3.10
    import tomli as tomllib

import diffplug
from benchmarks import house

ROOT = Path(__file__).resolve().parents[1]
WINGS = ("samplers", "steering", "training", "demos")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def _run(code: str, *, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_costs_milliseconds_and_loads_nothing_heavy() -> None:
    code = (
        "import time; start = time.perf_counter(); import diffplug; print(time.perf_counter() - start);"
        "import sys; print([m for m in ('torch', 'numpy', 'diffusers', 'typer', 'PIL') if m in sys.modules])"
    )
    runs = [_run(code).splitlines() for _ in range(3)]
    assert min(float(seconds) for seconds, _ in runs) < 0.15
    assert all(loaded == "[]" for _, loaded in runs)


def test_help_comes_without_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from diffplug.cli.main import app;"
        "assert CliRunner().invoke(app, ['generate', '--help']).exit_code == 0; print('torch' in sys.modules)"
    )
    assert _run(code) == "False"


def test_dir_lists_what_there_is() -> None:
    assert {"plug", "load", "noise", "shapes", "samplers", "steering", "testing"} <= set(dir(diffplug))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        diffplug.nonsense  # noqa: B018


def test_plug_is_the_function_whoever_imports_its_module_first() -> None:
    module = import_module("diffplug.plug")
    assert diffplug.plug is module.plug
    vars(diffplug).pop("plug", None)  # as nobody had imported it yet
    assert diffplug.plug is module.plug
    setattr(diffplug, "plug", module)  # noqa: B010  what the import system does after loading a submodule
    assert diffplug.plug is module.plug


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_has_one_name_only(wing: str) -> None:
    code = f"import {wing}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and f"diffplug.{wing}" in done.stderr
    assert _run(f"import diffplug.{wing} as w; print(w.__name__)") == f"diffplug.{wing}"


def _sources() -> list[tuple[Path, str]]:
    """Every module of the package with its import name."""
    found = [(path, "diffplug") for path in sorted((ROOT / "diffplug").rglob("*.py"))]
    for wing in WINGS:
        found += [(path, f"diffplug.{wing}") for path in sorted((ROOT / wing).rglob("*.py"))]
    return found


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def _wing_of(name: str) -> str:
    return next((wing for wing in WINGS if f"{name}.".startswith(f"diffplug.{wing}.")), "diffplug")


@pytest.mark.parametrize(("path", "package"), _sources(), ids=lambda v: v.stem if isinstance(v, Path) else "")
def test_arrows_run_one_way(path: Path, package: str) -> None:
    allowed = {
        "diffplug": set(),
        "diffplug.samplers": {"samplers"},
        "diffplug.steering": {"steering"},
        "diffplug.training": {"training", "samplers"},
        "diffplug.demos": set(WINGS),
    }[package]
    if path.is_relative_to(ROOT / "diffplug" / "cli"):  # the front door may ask everybody
        allowed = set(WINGS)
    used = {_wing_of(name) for name in _imports(path)} - {"diffplug"}
    assert used <= allowed, f"{path.relative_to(ROOT)} imports {sorted(used - allowed)}"


def test_every_package_is_listed_and_mapped() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    folders = {package_name(path.parent) for path, _ in _sources() if path.name == "__init__.py"}
    assert listed == folders
    assert set(PROJECT["tool"]["setuptools"]["package-dir"]) == {
        "diffplug",
        *(f"diffplug.{w}" for w in WINGS),
    }


def package_name(folder: Path) -> str:
    parts = folder.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "diffplug" else ("diffplug", *parts))


def test_versions_agree() -> None:
    assert PROJECT["project"]["version"] == diffplug.__version__
    assert f"## {diffplug.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_doctor_asks_for_what_the_project_needs() -> None:
    from diffplug.cli.environment import CORE, EXTRAS

    everywhere = [line for line in PROJECT["project"]["dependencies"] if ";" not in line]
    needed = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in everywhere)
    assert needed == CORE
    extras = PROJECT["project"]["optional-dependencies"]
    for name, extra in EXTRAS.items():
        assert any(line.startswith(name) for line in extras[extra])


def test_nobody_imports_in_a_circle_and_the_house_stays_low() -> None:
    """Circles count imports inside functions too; floors are those of `benchmarks.house`."""
    files = house.sources()
    deep = {name: house.imports(path, set(files), inside_functions=True) for name, path in files.items()}
    assert [group for group in house.circles(deep) if len(group) > 1] == []
    assert house.floors({name: house.imports(path, set(files)) for name, path in files.items()}) <= 12


def test_no_file_grows_out_of_hand() -> None:
    long = {str(path): n for path, _ in _sources() if (n := len(path.read_text("utf-8").splitlines())) > 400}
    assert not long


def test_no_folder_grows_out_of_hand() -> None:
    """A room that one look can take in has at most twenty files."""
    counted = Counter(path.parent for path, _ in _sources() if path.stem != "__init__")
    assert {str(folder): n for folder, n in counted.items() if n > 20} == {}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_wheel_holds_the_tree(tmp_path: Path) -> None:
    """Built from a copy, so that no stale build folder can add or hide a file."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("diffplug", *WINGS):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "notebooks", "examples")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        "wheels",
        ".",
    ]
    subprocess.run(command, cwd=copy, check=True, timeout=250)
    wheel = next((copy / "wheels").glob("*.whl"))
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {
        p.relative_to(copy).as_posix() for name in ("diffplug", *WINGS) for p in (copy / name).rglob("*.*")
    }
    wanted = {name for name in wanted if (copy / name).is_file()}
    assert packed == {name if name.startswith("diffplug/") else f"diffplug/{name}" for name in wanted}
    assert all(name.endswith((".py", ".json", ".safetensors", ".txt", "py.typed")) for name in packed)
