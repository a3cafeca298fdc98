"""Functions as torch operators, which `torch.compile` takes as they are: it can neither trace kernels nor needs to.

A custom operator's dispatch takes the host longer than the functions themselves, so that outside of compilation they
are called directly. Their names are this package's, which ComfyUI may have loaded a second time.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
NAMESPACE = re.sub(r"\W", "_", __package__)
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[F], F]:
    """Make a function an operator of a schema while torch compiles; fake: its result without values."""
    name = schema.partition("(")[0]

    def wrap(function: F) -> F:
        ours = getattr(torch.ops, NAMESPACE)
        if not hasattr(ours, name):  # else this package was imported before, and what it defined then still serves
            _library.define(schema)
            _library.impl(name, function, "CompositeExplicitAutograd")
            torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        compiled = getattr(ours, name)

        @functools.wraps(function)
        def call(*given: Any) -> Any:
            return compiled(*given) if torch.compiler.is_compiling() else function(*given)

        return call  # type: ignore[return-value]

    return wrap
