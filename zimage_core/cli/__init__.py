"""The `zimage` command: one file a command, and `main`, the only place that turns errors into exit codes.

A command's file has `add_parser(commands)` and `run(args) -> exit code`. `options` and `output` hold what several
commands share. May import everything in zimage_core, inside functions: `zimage --help` does not wait for torch.
Results go to stdout, progress and complaints to stderr.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from .. import __version__
from ..failures import out_of_memory
from . import (
    batch,
    bench,
    compare,
    completion,
    convert,
    doctor,
    download,
    generate,
    inspect,
    quantize,
    quantize_encoder,
    tune,
    verify,
)
from .options import EXIT_INPUT, Parser
from .output import printable

EXIT_MEMORY, EXIT_INTERRUPT, EXIT_BROKEN_PIPE = 3, 130, 141
COMMANDS = (
    generate,
    batch,
    download,
    quantize,
    quantize_encoder,
    convert,
    inspect,
    compare,
    doctor,
    bench,
    tune,
    verify,
    completion,
)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code; input that cannot be used ends in one line with the remedy."""
    args = build_parser().parse_args(argv)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Printable())
    logging.basicConfig(handlers=[handler])
    level = logging.ERROR if args.quiet else logging.DEBUG if args.verbose else args.log_level
    logging.getLogger(__name__.partition(".")[0]).setLevel(level)
    try:
        with warnings.catch_warnings(), interruptible():
            warnings.showwarning = lambda message, *_: (
                None if args.quiet else print(f"zimage: {printable(str(message))}", file=sys.stderr)
            )
            code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("zimage: interrupted", file=sys.stderr)
        return EXIT_INTERRUPT
    except BrokenPipeError:
        # The reader has gone, as in `zimage inspect FILE | head -1`; keep the interpreter from flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            print("zimage: out of memory; try smaller pictures, one at a time, or --device cpu", file=sys.stderr)
            return EXIT_MEMORY
        if isinstance(error, RuntimeError):
            raise
        print(f"zimage: {one_line(error)}", file=sys.stderr)
        return EXIT_INPUT


class Printable(logging.Formatter):
    """A log's lines with their control characters escaped, as names in files are not ours."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).splitlines()))


@contextmanager
def interruptible() -> Iterator[None]:
    """Say at once that Ctrl-C was heard, and end the process at once at the second.

    Python itself raises KeyboardInterrupt only when a computation that runs is over, which can take minutes; the byte
    of `signal.set_wakeup_fd` comes at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def watch() -> None:
        heard = 0
        while numbers := receiver.recv(64):
            heard += numbers.count(signal.SIGINT)
            if heard > 1:
                os._exit(EXIT_INTERRUPT)
            if heard:
                print("zimage: stopping at the next chance; Ctrl-C again ends at once", file=sys.stderr, flush=True)

    thread = threading.Thread(target=watch, daemon=True)
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        sender.close()
        thread.join()
        receiver.close()


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="zimage", description="Z-Image Turbo from SVDQuant INT4 checkpoints.")
    parser.add_argument("--version", action="version", version=f"zimage {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for command in COMMANDS:
        added = command.add_parser(commands)
        loudness = added.add_mutually_exclusive_group()
        loudness.add_argument("-q", "--quiet", action="store_true", help="say nothing but results and errors")
        loudness.add_argument("-v", "--verbose", action="store_true", help="say more, such as why other backends rest")
        level = logging.INFO if command is generate else logging.WARNING
        added.set_defaults(run=command.run, log_level=level)
    return parser


def one_line(error: Exception) -> str:
    """The error as one sentence, in printable characters; for a file it is the system's own words."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "check the path and its permissions"
        text = f"{where}{error.strerror.lower()}; {remedy}"
    return printable(text)
