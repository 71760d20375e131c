"""Calling a door and catching all it prints: in this process, in a forked child, or as a program of its own.

A forked child shares what is imported already, so that killing a real process costs no start of torch. What is
printed is caught at the level of file descriptors, C libraries included.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import functools
import importlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOORS = {
    "train": "diffusekrona_train.cli.train",
    "sample": "diffusekrona_train.cli.sample",
    "eval": "diffusekrona_train.cli.evaluate",
    "inspect": "diffusekrona_train.cli.inspect",
    "convert": "diffusekrona_train.cli.convert",
    "studio": "diffusekrona_train.cli.studio",
    "page": "tests.faults.studio",
}
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "NO_COLOR": "1",
    "COLUMNS": "200",
    "MPLBACKEND": "Agg",
}


@dataclass
class Seen:
    status: int
    out: str
    err: str
    signal: int = 0
    """The signal that ended the process, 0 where it ended by itself."""
    timed_out: bool = False


class Late(BaseException):
    """Raised by the alarm in a door called in this process; no `except Exception` swallows it."""


def call(arguments: list[str], folder: Path, env: dict[str, str], limits: dict[str, Any], seconds: float) -> Seen:
    """The door in this process: working folder, environment, arguments, handlers and seeds are put back afterwards."""

    def late(*_: Any) -> None:
        raise Late

    kept = {number: signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM)}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        timed_out = False
        with _surroundings(arguments, folder, env), _caught(out, err):
            signal.signal(signal.SIGALRM, late)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                status = _enter(arguments)
            except Late:
                status, timed_out = -1, True
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                for number, handler in kept.items():
                    signal.signal(number, handler)
                _forget_accelerator()
        return Seen(status, _read(out), _read(err), timed_out=timed_out)


def fork(arguments: list[str], folder: Path, env: dict[str, str], limits: dict[str, Any], seconds: float) -> Seen:
    """The door in a forked child that may be killed, limited in file size, or robbed of root's rights."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _child(arguments, folder, env, limits, out, err)
        ended = _wait(child, limits.get("kill_after", seconds), limits.get("kill_with", signal.SIGKILL), seconds)
        status, timed_out = ended
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        code = 128 + number if number else os.WEXITSTATUS(status)
        return Seen(code, _read(out), _read(err), number, timed_out)


def spawn(arguments: list[str], folder: Path, env: dict[str, str], limits: dict[str, Any], seconds: float) -> Seen:
    """The door as a program. Arguments that begin with `command:` are a whole command line instead."""
    if arguments[0] == "command:":
        command = arguments[1:]
    else:
        command = [sys.executable, "-c", f"from {DOORS[arguments[0]]} import main; main()", *arguments[1:]]
    root = str(Path(__file__).resolve().parents[2])
    surroundings = {**os.environ, **QUIET, "PYTHONPATH": root, "PYTHON": sys.executable, **env}
    try:
        done = subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as late:
        return Seen(-1, _text(late.stdout or b""), _text(late.stderr or b""), timed_out=True)
    number = -done.returncode if done.returncode < 0 else 0
    return Seen(128 + number if number else done.returncode, _text(done.stdout), _text(done.stderr), number)


def preload() -> None:
    """Import what every training needs, so that forked children need not."""
    import accelerate  # noqa: F401
    import diffusers
    import torch

    torch.set_num_threads(1)
    for name in ("StableDiffusionXLPipeline", "UNet2DConditionModel", "AutoencoderKL"):
        getattr(diffusers, name)
    import transformers

    for name in ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPTokenizer"):
        getattr(transformers, name)
    import diffusekrona_train.training  # noqa: F401


def _enter(arguments: list[str]) -> int:
    """Calls the door's main; the exit status."""
    try:
        importlib.import_module(DOORS[arguments[0]]).main()
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 0 if left.code is None else 1
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _child(arguments: list[str], folder: Path, env: dict[str, str], limits: dict, out: Any, err: Any) -> None:
    status = 1
    try:
        if "torch" in sys.modules:
            # A fork leaves torch's thread pool broken until the next call makes a new one; made here and not by the
            # threads that load weights, which may ask at the same moment and then fail.
            sys.modules["torch"].set_num_threads(1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        with _surroundings(arguments, folder, env), _caught(out, err):
            if "file_size" in limits:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond it is an OSError, as on a full disk
                resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_size"], limits["file_size"]))
            if "full_at" in limits:
                _fill_disk(limits["full_at"])
            if "signal_at" in limits:
                _signal_at(*limits["signal_at"])
            if "without" in limits:
                sys.modules[limits["without"]] = None  # type: ignore[assignment]
            if "unprivileged" in limits:
                _drop_privileges()
            status = _enter(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        os._exit(status & 255)


def _fill_disk(pattern: str) -> None:
    """From now on no file whose path matches `pattern` can be written: no space is left when it would take its name."""

    def full(target: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)

    _before_writing(pattern, full)


def _signal_at(pattern: str, number: int) -> None:
    """Sends this process the signal when a file whose path matches `pattern` would take its name, written whole."""
    sent: list[str] = []

    def send(target: str) -> None:
        if not sent:
            sent.append(target)
            os.kill(os.getpid(), number)

    _before_writing(pattern, send)


def _before_writing(pattern: str, act: Callable[[str], Any]) -> None:
    """Calls `act(path)` before a path that matches is renamed to, or opened to be written."""

    def hook(event: str, arguments: tuple) -> None:
        if event == "os.rename":  # os.replace too: the last act of every file that is written beside its target
            target = arguments[1]
        elif event == "open" and isinstance(arguments[1], str) and set("wax") & set(arguments[1]):
            target = arguments[0]
        else:
            return
        if not isinstance(target, int) and fnmatch.fnmatch(os.fsdecode(target), pattern):
            act(os.fsdecode(target))

    sys.addaudithook(hook)


def _drop_privileges() -> None:
    """Takes root's right to pass file permissions away; another user never had it."""
    if os.geteuid() == 0:
        header, no_rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        if ctypes.CDLL(None, use_errno=True).capset(header, no_rights) != 0:
            raise OSError(ctypes.get_errno(), "capset")


def _wait(child: int, kill_after: float, kill_with: int, seconds: float) -> tuple[int, bool]:
    """Waits for `child`; (wait status, whether it had to be ended because it was late)."""
    started, sent = time.monotonic(), False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status, False
        elapsed = time.monotonic() - started
        if elapsed > seconds:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1], True
        if elapsed > kill_after and not sent:
            os.kill(child, kill_with)
            sent = True
        time.sleep(0.02)


@contextlib.contextmanager
def _surroundings(arguments: list[str], folder: Path, env: dict[str, str]) -> Iterator[None]:
    kept_env, kept_folder, kept_argv = dict(os.environ), Path.cwd(), sys.argv
    os.environ.update(QUIET | env)
    os.chdir(folder)
    sys.argv = [f"krona-{arguments[0]}", *arguments[1:]]
    try:
        yield
    finally:
        os.chdir(kept_folder)
        os.environ.clear()
        os.environ.update(kept_env)
        sys.argv = kept_argv


@contextlib.contextmanager
def _caught(out: Any, err: Any) -> Iterator[None]:
    """File descriptors 1 and 2 and Python's own streams go to the files `out` and `err`."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    new_out, new_err = _streams()
    with contextlib.redirect_stdout(new_out), contextlib.redirect_stderr(new_err):
        try:
            yield
        finally:
            new_out.flush()
            new_err.flush()
            for descriptor, number in zip(kept, (1, 2), strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)


@functools.cache
def _streams() -> tuple[Any, Any]:
    """Text streams on descriptors 1 and 2 that are never closed: loggers keep the one they first saw."""
    out, err = (
        open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        for number in (1, 2)
    )
    err.reconfigure(line_buffering=True)
    return out, err


def _forget_accelerator() -> None:
    """accelerate keeps its state for the life of a process; the next case starts without it."""
    if "accelerate.state" in sys.modules:
        state = sys.modules["accelerate.state"]
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


def _read(file: Any) -> str:
    file.seek(0)
    return _text(file.read())


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
