"""The commands: thin typer functions that parse, call one function and print.

Nothing heavy is imported before a command runs, so `krona-* --help` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from inspect import Parameter, Signature, signature  # the name `inspect` belongs to krona-inspect's module
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar, get_type_hints

# Read when torch is loaded: OpenMP threads that spin while they wait make a step many times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Read when CUDA begins: images of other shapes and validations would else leave holes that nothing fits in.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

P = ParamSpec("P")
R = TypeVar("R")

PLAIN: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}
"""Settings of every typer.Typer: help without boxes, in which [V] is not taken for markup."""

USER_MISTAKES = (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError, PermissionError)
"""What a user can put right: shown as one line with exit status 2. pydantic's ValidationError is a ValueError."""


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Decorate a typer command: a user's mistake prints `error: …` (exit 2), anything else `fault: …` (exit 1).

    With the environment variable KRONA_DEBUG=1, or `--debug` on the command line, the traceback is printed too.
    """

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **{name: _filled(name, value) for name, value in kwargs.items()})  # type: ignore[arg-type]
        except USER_MISTAKES as error:
            _leave("error", error, 2)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise SystemExit(130) from None
        except BrokenPipeError:
            _leave_broken_pipe()
        except Exception as error:
            if _is_control_flow(error):
                raise
            _leave("fault", error, 1)

    return guarded


def _filled(name: str, value: Any) -> Any:
    """An option's path, or list of paths, with `~` and environment variables filled in."""
    from diffusekrona_train.config.paths import user_path

    if isinstance(value, list):
        return [_filled(name, item) for item in value]
    return Path(user_path(str(value), f"--{name.replace('_', '-')}")).expanduser() if isinstance(value, Path) else value


def with_options(command: Callable[..., R]) -> Callable[..., R]:
    """Decorate a typer command whose keyword-only parameters are dataclasses: their fields are options of their own, so
    that commands share options by naming the dataclass."""
    hints = get_type_hints(command, include_extras=True)
    parameters = signature(command).parameters.values()
    groups = {one.name: hints[one.name] for one in parameters if one.kind is one.KEYWORD_ONLY}
    own = [one.replace(annotation=hints[one.name]) for one in parameters if one.name not in groups]
    added = [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=get_type_hints(group, include_extras=True)[field.name],
        )
        for group in groups.values()
        for field in dataclasses.fields(group)
    ]

    @functools.wraps(command)
    def gathered(*args: Any, **given: Any) -> R:
        made = {
            name: group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        return command(*args, **given, **made)

    gathered.__signature__ = Signature([*own, *added])  # type: ignore[attr-defined]
    gathered.__annotations__ = {one.name: one.annotation for one in (*own, *added)}
    return gathered


def enter(app: Callable[..., Any]) -> NoReturn:
    """Run a command: a wrong option or argument is one line too (exit status 2); SIGTERM ends it cleanly."""
    signal.signal(signal.SIGTERM, _terminated)
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it warns on import of kernels that no one here needs
    try:
        status = app(standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        _leave_broken_pipe()
    except Exception as error:
        if not _is_control_flow(error):
            raise
        if type(error).__name__ == "Abort":
            print("stopped", file=sys.stderr)
            raise SystemExit(130) from None
        text = getattr(error, "format_message", error.__str__)
        context = getattr(error, "ctx", None)
        if not text() or type(error).__name__ == "NoArgsIsHelpError":
            getattr(error, "show", lambda: None)()
        else:
            hint = f" ({context.command_path} --help lists what there is)" if context else ""
            said = " ".join(text().split()).replace("Value error, ", "")
            print(f"error: {said}{hint}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", 2)) from None
    raise SystemExit(status if isinstance(status, int) else 0)


def read_prompts_file(path: Path | None) -> list[str]:
    """The lines of a text file that are no comment; ValueError where there is none. No file holds no prompt."""
    if path is None:
        return []
    from diffusekrona_train.common.files import decode_text

    text = decode_text(path.read_bytes(), f"--prompts-file {str(path)!r} is no UTF-8 text")
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"--prompts-file {str(path)!r} holds no prompt; write one a line")
    return prompts


def _terminated(number: int, frame: object) -> NoReturn:
    """SIGTERM as an exception, so that a file half written beside its target is removed."""
    print("stopped", file=sys.stderr)
    raise SystemExit(128 + number)


def _leave_broken_pipe() -> NoReturn:
    """Nobody reads on (`krona-inspect … | head`): end in silence, with the status that SIGPIPE would give."""
    with contextlib.suppress(OSError):  # else the interpreter flushes what is left at its end, and complains
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(128 + getattr(signal, "SIGPIPE", 13))


def one_line(error: BaseException) -> str:
    """The message of `error` on one line: a pydantic error as `field: what is wrong`, an OSError with its file."""
    details = getattr(error, "errors", None)
    if callable(details):
        return "; ".join(_pydantic_line(item) for item in details())  # type: ignore[union-attr]
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror or error}"
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _pydantic_line(item: dict[str, Any]) -> str:
    field = ".".join(str(part) for part in item.get("loc", ()))
    message = str(item.get("msg", "")).removeprefix("Value error, ")
    return f"{field}: {message}" if field else message


def _is_control_flow(error: BaseException) -> bool:
    """typer and click leave a command by raising Exit, Abort and UsageError."""
    return any(kind.__module__.split(".")[0] in ("click", "typer") for kind in type(error).__mro__)


def _leave(word: str, error: BaseException, status: int) -> NoReturn:
    if os.environ.get("KRONA_DEBUG", "") not in ("", "0") or "--debug" in sys.argv:
        traceback.print_exc()
    name = "" if word == "error" else f"{type(error).__name__}: "
    line = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in one_line(error))
    print(f"{word}: {name}{line}", file=sys.stderr)
    raise SystemExit(status) from None
