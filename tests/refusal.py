"""Wrong arguments in tables: what each call is to say of them."""

from collections.abc import Callable
from typing import Any

import pytest

Call = Callable[..., Any]
Case = tuple[Call, tuple[Any, ...], str]
"""A function of one argument, wrong values of it, and what each message says."""


def refused(call: Call, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        call(value)
    assert "\n" not in (line := str(caught.value)) and len(line) < 400, line


def check(cases: list[Case]) -> None:
    for call, values, words in cases:
        for value in values:
            refused(call, value, words)
