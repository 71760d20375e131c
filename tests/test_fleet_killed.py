"""Many jobs, the process killed again and again: the short form of scripts/bench/many.py --kills."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.full
@pytest.mark.timeout(900)
def test_nothing_is_lost_or_trained_twice_by_kills():
    root = Path(__file__).resolve().parents[1]
    words = ["--subjects", "24", "--kills", "2", "--least", "4", "--longest", "6"]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.bench.many", *words],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 2 SIGKILLs, " in done.stdout and "nothing is half-written" in done.stdout
