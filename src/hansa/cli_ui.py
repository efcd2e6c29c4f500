"""The command ``hansa ui``."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer


def ui(
    folder: Annotated[Path, typer.Argument(help="The folder of runs.")] = Path("runs"),
    port: Annotated[
        int, typer.Option(help="Port on this machine; 0: any that is free.", min=0, max=65535)
    ] = 8321,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Open no browser, only tell the address.")
    ] = False,
) -> None:
    """Show the runs in a browser on this machine: list, compare, and watch those under way."""
    from hansa.ui import Server

    with Server(folder, port) as server:
        print(f"{server.url} (Ctrl-C ends it)", flush=True)
        if not no_browser:
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
