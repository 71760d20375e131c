"""Atomic writes: the old file or the new one, never half of one."""

from __future__ import annotations

import hashlib
import os

import pytest

from diffusekrona_train.common.files import atomic, remove_abandoned, sha256


def test_a_file_takes_its_name_at_the_end_and_parents_are_made(tmp_path):
    target = tmp_path / "a" / "b.txt"
    with atomic(target) as path:
        path.write_text("new")
        assert not target.exists() and path.suffix == ".txt"
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_an_error_leaves_the_old_file_and_no_rubbish(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_whole_too_and_replaces_no_full_folder(tmp_path):
    target = tmp_path / "pipe"
    with atomic(target) as path:
        path.mkdir()
        (path / "x").write_text("1")
    assert (target / "x").read_text() == "1"
    with pytest.raises(OSError), atomic(target) as path:
        path.mkdir()
    assert (target / "x").read_text() == "1" and list(tmp_path.iterdir()) == [target]


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 10**6)
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 10**6).hexdigest()


def test_a_file_has_the_permissions_that_any_new_file_has(tmp_path):
    (tmp_path / "usual").touch()
    with atomic(tmp_path / "a.txt") as path:
        path.write_text("written by something that keeps it to the owner")
        path.chmod(0o600)
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_only_what_nobody_touched_for_an_hour_is_removed(tmp_path):
    for name in ("dead", "alive", "growing"):
        room = tmp_path / "latents" / "ab" / f".writing-{name}"
        room.mkdir(parents=True)
        (room / "entry.safetensors").write_bytes(b"half")
        if name != "alive":
            for path in (room / "entry.safetensors", room):
                os.utime(path, (0, 0))
        if name == "growing":
            os.utime(room / "entry.safetensors")
    entry = tmp_path / "latents" / "ab" / "whole.safetensors"
    entry.write_bytes(b"whole")
    os.utime(entry, (0, 0))
    remove_abandoned(tmp_path)
    left = sorted(path.name for path in (tmp_path / "latents" / "ab").iterdir())
    assert left == [".writing-alive", ".writing-growing", "whole.safetensors"]
    remove_abandoned(tmp_path / "nowhere")
