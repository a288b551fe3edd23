"""README and guide: Python runs, commands are ones that exist with recipes that are valid, error lines are real.

Blocks of code are marked behind their language: `python no-test` is not run, `bash run` is, with `TOY` behind commands.
"""

import argparse
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import run

from ddecode.cli import build_parser
from ddecode.config import DistillConfig, build, read_config
from ddecode.own_teacher import OwnTeacherConfig

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/guide.md")
PLAIN = (
    "HF_HUB_OFFLINE=1",
    "accelerate",
    "cd",
    "cp",
    "git",
    "pip",
    "python3",
    "sha256sum",
    "source",
    "tools/demo",
    "tools/test",
    "torchrun",
)
"""First words of commands that are not ours, or take no arguments worth a check."""

SHORT = ("steps=4", "batch=8", "warmup_steps=2", "log_every=2", "save_every=2", "preview_every=4")


def short(group: str) -> list[str]:
    return [f"{group}.{override}" for override in SHORT]


TOY = {
    "draw_shapes.py": ["--num", "60", "--size", "16"],
    "sample": ["--num", "4"],
    "eval": ["--num", "20"],
    "bench": ["--repeats", "1", "--warmup", "1"],
    "train": [
        "own_teacher.images.side=16", "own_teacher.images.held_out=0.1", "own_teacher.features.widths=[8,16]",
        "own_teacher.tokenizer.sizes.channel_mult=[1,1,1]", "own_teacher.tokenizer.sizes.vocab_size=16",
        "own_teacher.backbone.width=32", "own_teacher.backbone.depth=2", "own_teacher.backbone.mlp_width=32",
        *short("own_teacher.features.training"), *short("own_teacher.tokenizer.training"),
        *short("own_teacher.training"),
    ],
    "pairs": ["--num", "32", "pairs.batch=16", "pairs.num_steps=4"],
    "distill": ["student.starts=[0,5]", *short("training")],
}  # fmt: skip
"""What makes a command of the guide small: later arguments win."""


def blocks(document: str, language: str) -> list[tuple[str, str]]:
    """Mark and text of each block of code in a language."""
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}(?: ([\w-]+))?\n(.*?)^```", text, re.S | re.M)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command; comments are dropped, variables put in."""
    known: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        for name, value in known.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line, comments=True)
        assignment = re.fullmatch(r"(\w+)=(.*)", words[0]) if len(words) == 1 else None
        if assignment:
            known[assignment[1]] = assignment[2]
        elif words:
            yield words[words[0] == "time" :]


class Parsed(Exception):
    """Raised in a tool in place of what it would do."""


def check_tool(path: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own parser takes these arguments."""
    real = argparse.ArgumentParser.parse_args

    def parse(self: Any, *_: Any) -> None:
        real(self, arguments)
        raise Parsed

    with monkeypatch.context() as change:
        change.setattr(argparse.ArgumentParser, "parse_args", parse)
        change.syspath_prepend(ROOT / "tools")
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / path), run_name="__main__")


def check_verb(arguments: list[str]) -> None:
    """The command line takes these arguments, and the recipe they name is valid."""
    args = build_parser().parse_args(["cpu" if word == "cuda" else word for word in arguments])
    if getattr(args, "config", None) is not None and args.config != Path("configs/x.yaml"):
        recipe = read_config(ROOT / args.config, DistillConfig, args.overrides)
        if args.verb == "train":
            build(OwnTeacherConfig, recipe.own_teacher, "own_teacher")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_are_ones_that_exist(document: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    checked = 0
    for _, text in blocks(document, "bash"):
        for program, *arguments in commands(text):
            try:
                if program in ("ddecode", ".venv/bin/ddecode"):
                    check_verb(arguments)
                    checked += 1
                elif program in ("python", ".venv/bin/python") and arguments[0].startswith("tools/"):
                    check_tool(arguments[0], arguments[1:], monkeypatch)
                    checked += 1
                else:
                    assert program in PLAIN or arguments[0] in ("evaluator.py", "-m"), program
            except SystemExit:
                pytest.fail(f"{document}: {program} {shlex.join(arguments)}: {capsys.readouterr().err}")
    assert checked > 10


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_runs(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "document"}
    found = [text for mark, text in blocks(document, "python") if mark != "no-test"]
    assert found
    for text in found:
        exec(compile(text, document, "exec"), names)


def test_the_guide_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At toy size: what a block leaves behind, the next finds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.syspath_prepend(ROOT / "tools")
    for mark, text in blocks("docs/guide.md", "bash"):
        for program, *arguments in commands(text) if mark == "run" else ():
            words = [*arguments, *TOY.get(Path(arguments[0]).name, [])]
            if program == "ddecode":
                assert run(*words) == 0, words
            else:
                monkeypatch.setattr("sys.argv", words)
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    assert (tmp_path / "own/student/model/config.json").exists() and (tmp_path / "own/two-steps.png").exists()


def test_the_error_lines_of_the_guide_are_real() -> None:
    """Each piece between dots stands in the code."""
    rooms = (path for room in ("ddecode", "third_party_loaders") for path in (ROOT / room).rglob("*.py"))
    code = "\n".join(path.read_text() for path in rooms)
    troubles = (ROOT / "docs/guide.md").read_text().split("## Troubleshooting")[1]
    lines = re.findall(r"^\| `([^`]+)` \|", troubles, re.M)
    assert len(lines) > 10
    for line in lines:
        for piece in line.split("…"):
            assert piece.strip() in code, f"{piece.strip()!r} of {line!r}"
