"""krona-studio: the pages over run folders, served on this machine."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from diffusekrona_train.cli import PLAIN, enter, guarded

app = typer.Typer(**PLAIN)


@app.command()
@guarded
def studio(
    runs: Annotated[Path, typer.Argument(metavar="[RUNS]", help="Folder of the runs; made if missing.")] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Other than loopback, the printed address holds a token.")
    ] = "127.0.0.1",
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
    demo: Annotated[bool, typer.Option("--demo", help="First train the embedded poodle, where there is none.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Show runs in a browser, and train new subjects there: krona-studio"""
    if runs.exists() and not runs.is_dir():
        raise ValueError(f"{runs}: is a file; give a folder for the runs")
    try:
        import uvicorn

        from diffusekrona_train.app.server import begin_demo, make_app
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'diffusekrona-train[studio]'") from None
    listening = listen(host, port)
    application, token = make_app(runs, host)
    page = begin_demo(runs) if demo else "/"
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    address = f"http://{f'[{shown}]' if ':' in shown else shown}:{listening.getsockname()[1]}{page}"
    address += f"?token={token}" if token else ""
    print(f"krona studio: {address}   (Ctrl-C ends it; training goes on)", flush=True)
    if open_ and (
        sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        import webbrowser

        webbrowser.open(address)
    config = uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=1, server_header=False)
    uvicorn.Server(config).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; ValueError of one line where the port is taken or the address is not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        if os.name == "posix":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        why = (
            "is in use; is a studio running already? Choose another with --port"
            if error.errno in (48, 98, 10048)
            else ""
        )
        raise ValueError(f"--port {port} {why}" if why else f"--host {host}: {error.strerror or error}") from None
    return listening


def main() -> None:
    """The entry point of krona-studio."""
    enter(app)


if __name__ == "__main__":
    main()
