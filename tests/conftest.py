"""Settings of the whole test run: one thread for torch, no network, no colour in what doors print."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("NO_COLOR", "1")
os.environ.setdefault("COLUMNS", "200")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)


LONG = {
    "test_train": 70,
    "test_performance": 35,
    "test_families": 45,
    "test_memory": 40,
    "test_toybox": 5,
    "test_two_processes": 40,
    "test_fleet_train": 45,
    "test_graph": 40,
    "test_faults": 40,
    "test_devices": 35,
    "test_studio": 30,
    "test_average": 30,
    "test_library": 30,
    "test_resume": 30,
    "test_paper": 30,
    "test_quickstart": 60,
    "test_evaluate": 25,
    "test_sample": 25,
    "test_strengths": 25,
    "test_studio_browser": 20,
    "test_zimage": 20,
    "test_part_files": 20,
    "test_align": 20,
    "test_report": 20,
    "test_judge": 15,
    "test_confirm": 15,
    "test_api": 15,
}
"""File -> its seconds, about. Long ones come first, so that two processes end at nearly the same time."""


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist would begin with the files of the most tests
        config.option.loadscopereorder = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the long forms too (marked full): half an hour more")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: -LONG.get(item.path.stem, 0))
    if config.getoption("--all"):
        return
    long = [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="module", autouse=True)
def cheap_collections():
    """Let garbage collections, which runs ask for, pass over the millions of objects that libraries are."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    gc.unfreeze()
