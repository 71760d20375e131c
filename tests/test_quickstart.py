"""scripts/quickstart.sh as a new user meets it: from any working directory, twice, and with something missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

PROJECT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what the script reads; the package itself is the one that runs the tests."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for name in ("scripts", "configs"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(PROJECT / name, folder)
    return folder


def quickstart(checkout: Path, where: Path, **settings: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "KRONA_CACHE_DIR": str(where / "cache"), **settings}
    script = [shutil.which("bash") or "bash", str(checkout / "scripts/quickstart.sh")]
    return subprocess.run(script, cwd=where, env=env, capture_output=True, text=True, timeout=300)


def fake_python(folder: Path, name: str, body: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_it_ends_with_a_sheet_and_is_quick_the_second_time(checkout, tmp_path):
    bin_ = checkout / ".venv" / "bin"
    bin_.mkdir(parents=True)
    for name in ("python", "krona-train", "krona-sample"):
        (bin_ / name).symlink_to(Path(sys.executable).parent / name)
    done = quickstart(checkout, tmp_path, SKIP_INSTALL="1", STEPS="2")
    assert done.returncode == 0, done.stderr
    run = checkout / "runs" / "toybox"
    sheet = next(line for line in done.stdout.splitlines() if line.startswith("contact sheet:")).split(": ", 1)[1]
    with Image.open(sheet.strip()) as picture:
        assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096) or []) > 100  # not a blank page
    for name in ("report.html", "toybox.safetensors", "toybox.png", "metrics.jsonl"):
        assert f"{run / name}" in done.stdout or (run / name).stat().st_size > 0
    assert "krona-train init path/to/photos" in done.stdout

    written = (run / "toybox.safetensors").stat().st_mtime_ns
    again = quickstart(checkout, tmp_path, SKIP_INSTALL="1", STEPS="2")
    assert again.returncode == 0 and "exists: not trained again" in again.stdout
    assert (run / "toybox.safetensors").stat().st_mtime_ns == written


def test_the_studio_is_opened_on_the_poodle(checkout, tmp_path):
    bin_ = checkout / ".venv" / "bin"
    bin_.mkdir(parents=True)
    (bin_ / "python").symlink_to(sys.executable)
    fake_python(bin_, "krona-studio", 'echo "studio $*"')
    script = [shutil.which("bash") or "bash", str(checkout / "scripts/quickstart.sh"), "--studio"]
    env = {**os.environ, "SKIP_INSTALL": "1"}
    done = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "studio runs --demo\n"), done.stderr


def one_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_an_old_python_is_named(checkout, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("python3", "python3.13", "python3.12", "python3.11", "python"):
        fake_python(tools, name, '[ "$1" = --version ] && echo Python 3.8.1; exit 1')
    done = quickstart(checkout, tmp_path, PATH=f"{tools}:/usr/bin:/bin")
    assert "needs Python 3.11" in one_line(done) and "3.8.1" in done.stderr


def test_a_missing_venv_module_is_named(checkout, tmp_path):
    python = fake_python(tmp_path, "no-venv", 'case "$1" in -m) exit 1;; esac; exit 0')
    assert "cannot make a virtual environment" in one_line(quickstart(checkout, tmp_path, PYTHON=str(python)))


def test_no_network_is_named(checkout, tmp_path):
    """A venv whose pip finds no index."""
    pip = 'echo "ERROR: Could not find a version that satisfies the requirement torch" >&2; exit 1'
    venv = f"mkdir -p .venv/bin && printf '#!/bin/sh\\ncase \"$1\" in -c) exit 0;; esac\\n{pip}\\n' >.venv/bin/python"
    python = fake_python(tmp_path, "python", f'case "$2" in venv) {venv} && chmod +x .venv/bin/python;; esac; exit 0')
    assert "no network?" in one_line(quickstart(checkout, tmp_path, PYTHON=str(python)))
