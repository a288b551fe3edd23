"""Ctrl-C in the midst of a run, for tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def interrupted(owner: Any, name: str, *, at: int) -> Iterator[list[tuple[Any, ...]]]:
    """KeyboardInterrupt at one call of a function, the first being 1; the others go through.

    Args:
        owner: the class or module that has it.
        name: its name there.
        at: the call.

    Yields:
        The positional arguments of each call so far.
    """
    function, calls = getattr(owner, name), []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == at:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counted)
        yield calls
