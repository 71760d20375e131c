"""The house: imports go down only, as README.md draws it; heavy libraries stay in their rooms; modules are small."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "diffusekrona_train"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
LINES, FUNCTION_LINES = 400, 60
DOORS = ["train", "sample", "evaluate", "inspect", "convert", "studio"]
HEAVY = [
    "torch",
    "diffusers",
    "transformers",
    "matplotlib",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "peft",
    "lycoris",
]
ONLY_IN = {
    "diffusers": {"models"},
    "transformers": {"models", "evaluation/metrics", "training/check"},
    "datasets": {"data"},
    "tqdm": {"cli"},
    "jinja2": {"report", "app"},
    "starlette": {"app"},
    "uvicorn": {"cli"},
    "psutil": {"training"},
}
TORCH_ALONE = {"adapters/kron.py", "training/draw.py"}
NO_TORCH = {"config", "common/files.py", "common/progress.py", "common/run_folder.py"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of all modules that are imported anywhere in the file, inside functions and for type checks too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def packages(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imported(tree)}


def neighbours(path: Path) -> set[str]:
    """Other rooms of the house that this file imports."""
    names = (name.split(".") for name in imported(TREES[path]))
    return {parts[1] for parts in names if parts[0] == PACKAGE.name and len(parts) > 1} & set(FLOORS) - {room_of(path)}


def floors_of_the_readme() -> dict[str, int]:
    """Room -> floor, from the rows `| 4 | `inject`, `sample` | … |` of README.md."""
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    return {room: int(floor) for floor, rooms in rows for room in re.findall(r"`(\w+)`", rooms)}


FLOORS = floors_of_the_readme()


def test_the_readme_has_every_room_and_no_other():
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert rooms - set(FLOORS) == set(), "rooms that the table in README.md does not have"
    assert set(FLOORS) - rooms == set(), "rows of README.md without a room"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    floor = FLOORS.get(room_of(path), max(FLOORS.values()) + 1)  # the package itself, `__init__`, is above its rooms
    for other in neighbours(path):
        assert FLOORS[other] < floor, f"{room_of(path)} imports {other}, which is not below it"


def file_of(name: str) -> Path | None:
    """The file of a dotted name of this package; None where the name is no module of it."""
    path = ROOT.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file in TREES), None)


def files_imported(path: Path) -> set[Path]:
    """`from a import b` leads to a.b where that is a module, else to a; imports inside functions count too."""
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {file_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {file_of(f"{node.module}.{alias.name}") or file_of(str(node.module)) for alias in node.names}
    return {file for file in found if file}


def test_no_file_leads_back_to_itself():
    """Not inside a room either: two files that need each other are one file, or need a third below them."""
    shop_window = {PACKAGE / "__init__.py"}  # it only shows rooms, and its version is a constant
    arrows = {path: files_imported(path) - shop_window for path in FILES if path not in shop_window}
    order = list(graphlib.TopologicalSorter(arrows).static_order())
    models = PACKAGE / "models"
    assert order.index(models / "local.py") < order.index(models / "singlefile.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_stay_in_their_rooms(path):
    place, names = path.relative_to(PACKAGE).as_posix(), packages(TREES[path])
    for library, rooms in ONLY_IN.items():
        assert library not in names or is_in(place, rooms), f"{place} imports {library}; only {', '.join(rooms)} may"
    if is_in(place, TORCH_ALONE):
        assert names - set(sys.stdlib_module_names) <= {"torch"}
    if is_in(place, NO_TORCH):
        assert "torch" not in names


def is_in(place: str, rooms: set[str]) -> bool:
    return any(place == room or place.startswith(room + "/") for room in rooms)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_say_what_they_are_and_stay_small(path):
    tree, text = TREES[path], path.read_text(encoding="utf-8")
    assert ast.get_docstring(tree), "no module docstring"
    assert len(text.splitlines()) <= LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = (node.end_lineno or 0) - node.body[0].lineno  # a door's options are its signature, not its length
            assert body < FUNCTION_LINES, f"{node.name} is too long"


@pytest.mark.parametrize("door", DOORS)
def test_doors_import_nothing_heavy_before_a_command_runs(door):
    code = f"import sys, {PACKAGE.name}.cli.{door}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_doors_can_be_imported_in_any_order():
    """The doors' modules become names of their package: one of them is called `inspect`."""
    names = [f"{PACKAGE.name}.cli.{door}" for door in DOORS]
    code = f"import importlib; [importlib.import_module(name) for name in {sorted(names, reverse=True) + names!r}]"
    others = code.replace("import importlib;", f"import importlib, {PACKAGE.name}.cli.inspect;")
    for lines in (code, others):
        done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr


def test_the_package_offers_what_a_pipeline_needs_without_importing_torch():
    code = (
        f"import sys, {PACKAGE.name} as room; assert not [m for m in {HEAVY!r} if m in sys.modules];"
        "from diffusekrona_train import load_adapter, set_scale, unload;"
        "from diffusekrona_train.adapters import formats;"
        "print(load_adapter is formats.load_adapter, unload is formats.unload, hasattr(room, 'load_adaptor'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["True", "True", "False"], done.stdout + done.stderr


def test_a_door_whose_reader_has_gone_ends_in_silence():
    """As `krona-train schema | head -1`: the pipe is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    code = f"import sys; sys.argv[1:] = ['schema']; from {PACKAGE.name}.cli.train import main; main()"
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def speaks(tree: ast.AST) -> set[str]:
    """What only a command may do: print, read or write the terminal, read its arguments, exit, handle signals."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in ("print", "input", "exit", "quit", "SystemExit", "breakpoint"):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if name in ("sys.argv", "sys.exit", "sys.stdout", "sys.stderr", "os._exit", "signal.signal"):
                found.add(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_commands_print_exit_and_handle_signals(path):
    if room_of(path) in ("cli", "__main__"):
        return
    assert speaks(TREES[path]) == set(), "a library reports to a Progress and raises; the commands print and exit"


def test_the_old_names_of_0_1_still_work_and_say_what_to_write():
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "try:\n    import diffusekrona_train.weights\n"
        "except DeprecationWarning as warned:\n    print(warned)\n"
        "warnings.simplefilter('ignore')\n"
        "from diffusekrona_train.weights import load_adapter, read_adapter, set_scale, unload\n"
        "import diffusekrona_train; print(load_adapter is diffusekrona_train.load_adapter)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "from diffusekrona_train import load_adapter" in done.stdout and done.stdout.endswith("True\n"), done.stderr


def test_what_a_library_warns_of_on_import_does_not_reach_a_user():
    """bitsandbytes warns on some processors of kernels that are not installed; its errors still come as exceptions."""
    code = (
        f"import logging, typer; from {PACKAGE.name}.cli import PLAIN, enter; app = typer.Typer(**PLAIN);"
        "app.command()(lambda: logging.getLogger('bitsandbytes.backends.cpu.ops').warning('noise')); enter(app)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
