"""The store: shares over processes by position, one failure for all, entries that are whole or absent."""

from __future__ import annotations

import signal
import threading

import pytest
import torch

from diffusekrona_train.data.cache import Entry, Store, read_entry, write_entry


def entries(count):
    return [Entry("kind", {"number": number}, number, f"{number} is wrong") for number in range(count)]


def maker_that_notes(made):
    def make(number):
        made.append(number)
        return {"x": torch.full((2,), float(number))}

    return make


class Process:
    """What the store asks of an accelerator."""

    def __init__(self, rank, world):
        self.process_index, self.num_processes = rank, world


@pytest.fixture
def gathering():
    """accelerate's gather_object between two threads that stand for two processes."""
    barrier, box = threading.Barrier(2, timeout=30), [[], []]
    lock = threading.Lock()

    def gather(rows):
        me = int(threading.current_thread().name)
        with lock:
            box[me] = rows
        barrier.wait()
        found = box[0] + box[1]
        barrier.wait()
        return found

    return gather


def in_two(action):
    results: list = [None, None]

    def run(rank):
        try:
            results[rank] = action(rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_two_processes_share_the_work_and_both_have_all(tmp_path, gathering):
    made = [[], []]

    def work(rank):
        store = Store(tmp_path, Process(rank, 2), lambda text: None, gathering)
        return store.get(entries(5), lambda: maker_that_notes(made[rank]))

    results = in_two(work)
    assert made == [[0, 2, 4], [1, 3]]
    for tensors, loaded in results:
        assert loaded and [float(row["x"][0]) for row in tensors] == [0, 1, 2, 3, 4]


def test_without_a_shared_disk_each_makes_the_rest(tmp_path, gathering):
    made = [[], []]

    def work(rank):
        store = Store(tmp_path / str(rank), Process(rank, 2), lambda text: None, gathering)
        return store.get(entries(3), lambda: maker_that_notes(made[rank]))

    results = in_two(work)
    assert sorted(made[0]) == sorted(made[1]) == [0, 1, 2]
    assert [float(row["x"][0]) for row in results[1][0]] == [0, 1, 2]


def test_a_failure_in_one_process_is_raised_in_both(tmp_path, gathering):
    def work(rank):
        def make(number):
            return {"x": torch.tensor([float("inf") if number == 1 else 0.0])}

        return Store(tmp_path, Process(rank, 2), lambda text: None, gathering).get(entries(4), lambda: make)

    assert [str(result) for result in in_two(work)] == ["1 is wrong", "1 is wrong"]


def test_equal_entries_are_made_once_and_key_order_does_not_matter(tmp_path):
    made = []
    twice = [Entry("kind", {"a": 1, "b": 2}, 7, ""), Entry("kind", {"b": 2, "a": 1}, 7, "")]
    tensors, loaded = Store(tmp_path, None, lambda text: None).get(twice, lambda: maker_that_notes(made))
    assert made == [7] and loaded and len(tensors) == 2
    assert Store(tmp_path, None, print).get(twice, lambda: maker_that_notes(made))[1] is False


def test_entry_round_trip_and_damage(tmp_path):
    path = tmp_path / "a.safetensors"
    assert read_entry(path) is None
    tensors = {"x": torch.randn(3, 4), "empty": torch.zeros(0)}
    write_entry(path, tensors)
    found = read_entry(path)
    assert found is not None and torch.equal(found["x"], tensors["x"]) and found["empty"].shape == (0,)
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 64]) + content[position + 1 :])
        damaged = read_entry(path)
        assert damaged is None or all(torch.equal(damaged[name], tensors[name]) for name in damaged)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("KRONA_FAULT", "cache:*:SIGINT")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process of pytest-xdist may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            write_entry(tmp_path / "a.safetensors", {"x": torch.zeros(1)})
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(tmp_path.rglob("*")) == []
