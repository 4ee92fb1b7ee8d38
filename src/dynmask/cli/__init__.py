"""The command line: ``dynmask calibrate | generate | evaluate | inspect | serve``.

Importing this package reads no model library; every command loads what it needs when it runs.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence

from . import calibrate, evaluate, generate, inspect, serve
from .common import FAILURE, INTERRUPTED, USAGE, by_options, say

__all__ = ["main", "parser"]

COMMANDS = (calibrate, generate, evaluate, inspect, serve)

DESCRIPTION = """\
Dynamic attention masks for long-context language models: choose which keys each
query reads, compute only those, and measure what that costs and keeps.

a first session:
  dynmask calibrate --model MODEL --out my-card        learn masks from MODEL's attention
  dynmask generate  --model MODEL --policy dam:my-card --file long.txt
  dynmask evaluate  --model MODEL --policy full --policy streaming --task needle
  dynmask inspect   my-card --out masks.png            draw what the masks let through
  dynmask serve     MODEL --card my-card               answer over HTTP, by vLLM

MODEL is a folder or a Hugging Face hub name of any causal language model.
"""

EPILOG = """\
exit codes: 0 done, 1 failed, 2 wrong usage or input, 130 stopped with Ctrl-C
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="dynmask",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=_version())
    commands = top.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for module in COMMANDS:
        command = commands.add_parser(
            module.__name__.rpartition(".")[2],
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return top


def _command(top: argparse.ArgumentParser, name: str) -> argparse.ArgumentParser:
    """The parser of one command."""
    (commands,) = (x for x in top._actions if isinstance(x, argparse._SubParsersAction))
    return commands.choices[name]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a usage error leaves through ``SystemExit(2)``."""
    top = parser()
    given = list(sys.argv[1:] if argv is None else argv)
    own, passed_on = _split(given)
    arguments, unknown = top.parse_known_args(own)
    if unknown and (arguments.command != "serve" or not unknown[0].startswith("-")):
        top.error(f"unrecognized arguments: {' '.join(unknown)}")
    if passed_on and arguments.command != "serve":
        top.error(f"arguments after --: expected none but for serve, received {passed_on[0]}")
    if unknown and not _follow(own, arguments.model, unknown):
        top.error(
            f"serve: expected MODEL before vLLM's own options, received {unknown[0]} and then "
            f"{arguments.model}; write dynmask serve MODEL ... {unknown[0]} ..."
        )
    arguments.passed_on = [*unknown, *passed_on]
    arguments.command_line = shlex.join(["dynmask", *given])
    if arguments.command is None:
        top.print_help()
        return USAGE
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _note
            return arguments.run(arguments)
    except KeyboardInterrupt:
        say("stopped")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left; Python would complain when it flushes at exit.
        sys.stdout = None
        return FAILURE
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        else:
            text = " ".join(str(error).split()) or type(error).__name__
            say(f"error: {by_options(text, _command(top, arguments.command), arguments)}")
            if not isinstance(error, ValueError):
                say("(run again with --debug for the full traceback)")
        return USAGE if isinstance(error, ValueError) else FAILURE


def _note(message: Warning | str, category: type[Warning], *place: object) -> None:
    """Say a warning like any other note, without the line of source that it comes from."""
    say(f"note: {' '.join(str(message).split())}")


def _split(given: list[str]) -> tuple[list[str], list[str]]:
    """Our arguments, and what follows ``--``: those of a program that a command starts."""
    if "--" not in given:
        return given, []
    at = given.index("--")
    return given[:at], given[at + 1 :]


def _follow(given: list[str], model: str, unknown: list[str]) -> bool:
    """Whether options that are not ours follow MODEL.

    Before it, what we take for MODEL may be the value of such an option.
    """
    return given.index(model) < given.index(unknown[0])


def _version() -> str:
    from dynmask import __version__

    return f"dynmask {__version__}"
