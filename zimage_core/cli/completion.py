"""`zimage completion`: a script that completes commands, options and their values in bash, zsh or fish."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

from .options import Commands, Parser

SHELLS = ("bash", "zsh", "fish")
HOW = "bash and zsh: source <(zimage completion SHELL); fish: zimage completion fish | source"

BASH = """_zimage() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    case "${{COMP_WORDS[1]}} $before" in
{values}
    esac
    if [[ -z $words ]]; then
        if [[ $COMP_CWORD -eq 1 ]]; then words={commands}
        elif [[ $word == -* ]]; then case "${{COMP_WORDS[1]}}" in
{options}
        esac; fi
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _zimage zimage
"""


def add_parser(commands: Commands) -> Parser:
    p = commands.add_parser("completion", help="a script that completes this command in a shell", epilog=HOW)
    p.add_argument("shell", choices=SHELLS, help="the shell to write it for")
    return p


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    from . import build_parser

    found = {name: list(options(parser)) for name, parser in subparsers(build_parser()).items()}
    if args.shell == "fish":
        print("\n".join(fish(found)))
    else:
        start = "autoload -U +X compinit bashcompinit && compinit -u && bashcompinit\n" if args.shell == "zsh" else ""
        print(start + bash(found), end="")
    return 0


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    actions = parser._actions
    return dict(next(action for action in actions if isinstance(action, argparse._SubParsersAction)).choices)


def options(parser: argparse.ArgumentParser) -> Iterator[tuple[list[str], list[str], str, bool]]:
    """Names, choices, help and whether a value follows, of each option; an argument has no names."""
    for action in parser._actions:
        choices = [str(choice) for choice in action.choices or ()]
        yield list(action.option_strings), choices, action.help or "", action.nargs != 0


def bash(commands: dict[str, list]) -> str:
    """The script for bash, which zsh understands too."""
    values = [
        f'        "{command} {name}") words={shlex.quote(" ".join(choices))};;'
        for command, found in commands.items()
        for names, choices, _, _ in found
        if choices
        for name in names or [command]
    ]
    flags = [
        f"            {command}) words={shlex.quote(' '.join(name for names, *_ in found for name in names))};;"
        for command, found in commands.items()
    ]
    return BASH.format(commands=shlex.quote(" ".join(commands)), values="\n".join(values), options="\n".join(flags))


def fish(commands: dict[str, list]) -> Iterator[str]:
    """The lines of the script for fish."""
    for command, found in commands.items():
        yield f"complete -c zimage -n __fish_use_subcommand -f -a {command}"
        within = f"complete -c zimage -n '__fish_seen_subcommand_from {command}'"
        for names, choices, help, value in found:
            flags = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in names]
            given = [f"-{'xa' if names else 'fa'} {shlex.quote(' '.join(choices))}"] if choices else []
            needs = ["-r"] if names and value and not choices else []
            if names or choices:
                yield " ".join([within, *flags, *needs, *given, "-d", shlex.quote(help.replace("%%", "%"))])
