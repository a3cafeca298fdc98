"""The `zimage` command, and the only place that turns errors into exit codes.

May import everything in zimage_core; nothing imports it.
"""

from .app import main

__all__ = ["main"]
