"""``python -m nbhd.compat.natten run [--version VERSION] (SCRIPT | -m MODULE) [ARGUMENTS ...]``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys

from nbhd.compat.natten import _finder, install
from nbhd.errors import ArgumentError


def main(arguments: list[str] | None = None) -> None:
    """Run a program in which ``import natten`` finds nbhd. Exits with 2 if the call is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m nbhd.compat.natten",
        description="Run a program that imports natten on nbhd, with no line of it changed.",
    )
    usage = "%(prog)s [--version V] (SCRIPT | -m MODULE) ..."
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run a script or module", usage=usage)
    run.add_argument("--version", help="the NATTEN version to stand for, such as 0.17.5 (default: the newest)")
    run.add_argument("-m", dest="module", action="store_true", help="what follows is a module's name, not a file")
    run.add_argument("program", nargs=argparse.REMAINDER, metavar="SCRIPT ARGUMENTS", help="as for python itself")
    options = parser.parse_args(arguments)
    if not options.program:
        run.error("name a script, or -m and a module")
    program, *rest = options.program
    try:
        if not install(options.version):
            print("NATTEN itself is installed here: it is used.", file=sys.stderr)
    except ArgumentError as error:
        run.error(str(error))
    # For child processes, which read it where nbhd was installed by pip.
    os.environ[_finder.VARIABLE] = options.version or "newest"
    if options.module:
        sys.argv = [program, *rest]
        sys.path[0] = os.getcwd()
        if not _exists(program):
            run.error(f"there is no module {program!r}")
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        return
    if not os.path.exists(program):
        run.error(f"there is no file {program!r}")
    sys.argv = [program, *rest]
    sys.path[0] = os.path.dirname(os.path.abspath(program))
    runpy.run_path(program, run_name="__main__")


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


if __name__ == "__main__":
    main()
