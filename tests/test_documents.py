"""README and docs: Python runs, commands are ones that exist with recipes that are valid, error lines are real.

Blocks of code are marked behind their language: `python no-test` is not run, `bash run` is, with `TOY` behind commands.
"""

import argparse
import dataclasses
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
from ddecode.yaml_text import parse_yaml

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
RUN = ("README.md", "docs/guide.md")
"""Those whose Python is run."""
PLAIN = (
    "HF_HUB_OFFLINE=1",
    "cd",
    "cp",
    "git",
    "pip",
    "python3",
    "sha256sum",
    "source",
    "tools/demo",
    "tools/test",
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


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether it is one of ours."""
    program, *arguments = words
    if program in ("accelerate", "torchrun"):  # what they launch
        program, *arguments = arguments[arguments.index("ddecode") :]
    if program in ("ddecode", ".venv/bin/ddecode"):
        check_verb(arguments)
    elif program in ("python", ".venv/bin/python") and arguments[0].startswith("tools/"):
        check_tool(arguments[0], arguments[1:], monkeypatch)
    else:
        assert program in PLAIN or arguments[0] in ("evaluator.py", "-m"), program
        return False
    return True


def texts(document: str) -> list[str]:
    """Of commands: blocks, and what stands in the text beside figures, with options and no name to be put in."""
    prose = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.S | re.M)
    spans = (" ".join(span.split()) for span in re.findall(r"`((?:ddecode|\.venv/bin/python tools/)[^`]*)`", prose))
    return [text for _, text in blocks(document, "bash")] + [
        span for span in spans if " --" in span and not re.search(r"NAME|\.\.\.|…", span)
    ]


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if texts(document)])
def test_commands_are_ones_that_exist(document: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    checked = 0
    for text in texts(document):
        for words in commands(text):
            try:
                checked += check_command(words, monkeypatch)
            except SystemExit:
                pytest.fail(f"{document}: {shlex.join(words)}: {capsys.readouterr().err}")
    assert checked > (10 if document in RUN else 0)


@pytest.mark.parametrize("document", RUN)
def test_python_runs(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "document"}
    found = [text for mark, text in blocks(document, "python") if mark != "no-test"]
    assert found
    for text in found:
        exec(compile(text, document, "exec"), names)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", (ROOT / document).read_text()):
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{path}#{anchor}"


def test_the_list_of_recipe_keys_is_whole_and_true() -> None:
    """It holds every key, and what is not marked as given stands at its default."""
    ((_, text),) = blocks("docs/recipes.md", "yaml")
    tree = parse_yaml(text, "docs/recipes.md")
    recipe = build(DistillConfig, tree, "")
    given = re.findall(r"^ *(\w+):.*# \*", text, re.M)
    sections = {key: section for key, section in tree.items() if isinstance(section, dict)}
    least = {key: {name: section[name] for name in section if name in given} for key, section in sections.items()}
    assert recipe == build(DistillConfig, {"teacher": tree["teacher"], **least}, "")
    terms = sections["objective"]
    sections |= {name: terms[name] for name in ("adversarial", "score", "matching")}
    configs = {key: getattr(recipe, key) for key in ("pairs", "student", "objective", "training")}
    configs |= {name: getattr(recipe.objective, name) for name in ("adversarial", "score", "matching")}
    for key, config in configs.items():
        assert sections[key].keys() == {field.name for field in dataclasses.fields(config)}, key
    assert tree.keys() == {field.name for field in dataclasses.fields(recipe)}


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
