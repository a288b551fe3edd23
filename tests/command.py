"""Running the command line in tests."""

import pytest

from ddecode.cli import main

Capture = pytest.CaptureFixture[str]


def run(*arguments: object) -> int:
    """The exit status."""
    try:
        return main([str(a) for a in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def refused(capsys: Capture, *arguments: object) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    status = run(*arguments)
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, ""), captured.err
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("ddecode"), captured.err
    return lines[0]
