"""Wrong input to every command, option and key: one line that says what, exit status 2, and nothing left behind."""

import dataclasses
import json
import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Capture, refused
from tiny import distill_recipe, tree_of, write_yaml

from ddecode import cli
from ddecode.cli import VERBS, build_parser, main
from ddecode.config import DistillConfig, read_config
from ddecode.evaluation.results import Result
from ddecode.yaml_text import LARGEST_FILE

MANY = "9" * 5000
COUNTS = ("", "x", "-1", "0", "1.5", "nan", "inf", "1e3", "0x10", "１", "9" * 30, MANY)
SEEDS = ("", "x", "-1", "1.5", "9" * 30)
STEPS = ("", ",", "0", "-1", "3", "x", "1.5", "teacher,", "²", MANY)
PLANS = ("", ",", "student", "student:0-8", "student:0-99", "oracle:0-16", "student:3-16", "student:0-16;", "x" * 5000,
         f"student:0-{MANY}", "étudiant:0-16", "student:０-16", "teacher:0-16,student:5-16", "skip:0-16,", "a b:0-16",
         "student:0-16,student:4-4", "student:0-1\n6")  # fmt: skip
OTHERS = ("", "x", "=x", "x=", "1=tiny", "student=tiny", "skip=tiny", "a=nowhere", "a=tiny#x", "a=file", "a=folder",
          "a b=tiny", "a=tiny#student#teacher")  # fmt: skip
DEVICES = ("", "x", "meta", "cuda:99", "cpu:-1", "9")
FILES = ("", "folder", "file/x")
MODELS = ("", " ", ".", "file", "folder", "nowhere", "a/b/c", "a//b", "/nowhere", "~/x", "tiny/config.json", "x" * 300,
          "recipe.yaml")  # fmt: skip
OUT = ("", "x.jpg", "x.PNG", "file", "file/x.png", "file/x", "o.png/", "x" * 300 + ".png")

OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "sample tiny --out new.png": {
        "--num": COUNTS, "--batch": COUNTS, "--seed": SEEDS, "--steps": (*STEPS, "teacher,1"), "--plan": PLANS,
        "--classes": ("", ",", "-1", "4", "0,", "0 1", "1.0", "x", "²", MANY), "--labels": ("", "x", "Balanced"),
        "--device": DEVICES, "--with": OTHERS, "--out": OUT, "--npz": ("", "x.npz", "x.png"),
    },
    "eval tiny --num 8": {
        "--num": (*COUNTS, "7"), "--batch": COUNTS, "--seed": SEEDS, "--steps": STEPS[:3], "--plan": PLANS[2:6],
        "--device": DEVICES[:3], "--with": OTHERS[:4], "--json": FILES, "--protocol": ("", "fid", "ZOO", "adm", "dd1"),
        "--features": ("", "nowhere", "file", "folder"), "--inception": ("x",), "--reference": ("x",),
    },
    "bench tiny": {
        "--repeats": COUNTS, "--warmup": ("", "x", "-1", "1.5", MANY), "--threads": COUNTS, "--batch": COUNTS,
        "--steps": STEPS[:3], "--plan": PLANS[2:6], "--dtype": ("", "x", "fp8", "FP32"), "--with": OTHERS[:4],
        "--json": FILES, "--device": DEVICES[:3], "--plot": FILES, "--arch": ("", "x"), "--layers": COUNTS[:5],
    },
    "convert tiny --family llamagen --out new": {
        "--family": ("", "x", "VAR", "var"), "--out": ("", ".", "tiny", "file", "file/x", "folder/../file"),
        "--n-head": (*COUNTS, "3"), "--block-size": COUNTS, "--num-classes": COUNTS,
        "--split": ("", "x", "-1", "1.5", MANY),
        "--patch-nums": ("", ",", "1,x", "-1", "1.5", MANY, "1,2"), "--starts": ("", "x", "0,", "-1", "0,4"),
        "--tokenizer": ("x",),
    },
    "pairs --config recipe.yaml --out new": {
        "--num": COUNTS, "--config": ("", ".", "nowhere.yaml", "tiny/model.safetensors"),
        "--out": ("", "file", "file/x", "recipe.yaml/x"),
    },
    "distill --config recipe.yaml --pairs folder --out new": {
        "--config": ("", ".", "nowhere.yaml"), "--pairs": ("", "file", "nowhere", "tiny"),
        "--out": ("", "file", "file/x"),
    },
    "demo --out new": {
        "--model": ("", "nowhere", "tiny", "fashion-llamagen-small"), "--out": ("", ".", "file", "tiny"),
        "--pairs": COUNTS, "--steps": COUNTS, "--samples": (*COUNTS, "19"),
    },
    "train --config recipe.yaml --images folder --out new": {
        "--config": ("", "nowhere.yaml", "recipe.yaml"), "--images": ("",), "--out": ("",),
    },
    "card tiny --license mit --teacher x --teacher-license mit": {
        "--license": ("", " "), "--teacher": ("", " "), "--teacher-license": ("",), "--recipe": ("nowhere", "folder"),
        "--metrics": ("nowhere", "folder", "file"),
    },
}  # fmt: skip
"""By command, wrong values of its options; of several values of one option the last is taken."""

WHOLE: tuple[str, ...] = (
    "", "smaple", "--version", "sample", "sample tiny", "info", "info tiny extra", "info tiny --jsn", "compare",
    "info tiny --json=3", "info tiny --debug=1", "convert tiny --out new", "pairs", "pairs --config recipe.yaml",
    "distill --config recipe.yaml --out new", "distill --config recipe.yaml --pairs folder --out new nonsense",
    "sample tiny --out new.png --steps 1 --plan student:0-16", "sample tiny --out new --npz new.png",
    "sample tiny --out new.png --with a=tiny --with a=tiny", "compare nowhere", "compare folder", "compare file",
    "compare empty", "bench", "card", "card nowhere --license mit --teacher x --teacher-license mit",
    "eval tiny --protocol adm --inception x", "eval tiny --protocol dd1 --features folder --inception x --reference x",
)  # fmt: skip
"""Commands that are wrong as they stand."""


@pytest.fixture
def here(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Iterator[Path]:
    """A folder to run commands in, which they must leave as it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(model)
    write_yaml(tmp_path / "recipe.yaml", distill_recipe(Path("tiny")))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "o.png").mkdir()
    before, paths = tree_of(tmp_path) | tree_of(model), sorted(tmp_path.rglob("*"))
    yield tmp_path
    assert tree_of(tmp_path) | tree_of(model) == before and sorted(tmp_path.rglob("*")) == paths


@pytest.mark.parametrize(
    ("command", "option"), [(command, option) for command, options in OPTIONS.items() for option in options]
)
def test_wrong_options_are_refused(command: str, option: str, here: Path, capsys: Capture) -> None:
    for value in OPTIONS[command][option]:
        line = refused(capsys, *command.split(), f"{option}={value}")
        assert len(line) < 600 and line.startswith(f"ddecode {command.split()[0]}: error: "), (value, line)


@pytest.mark.parametrize("command", WHOLE)
def test_wrong_commands_are_refused(command: str, here: Path, capsys: Capture) -> None:
    refused(capsys, *command.split())


@pytest.mark.parametrize(
    "command", ["sample {} --out new.png", "info {}", "eval {}", "bench {}", "convert {} --family var --out new"]
)
def test_what_is_no_model_is_refused(command: str, here: Path, capsys: Capture) -> None:
    for model in MODELS:
        refused(capsys, *(model if part == "{}" else part for part in command.split()))


def test_every_option_of_every_command_is_tried() -> None:
    words = {"--dataset", "--name"}
    (verbs,) = (action for action in build_parser()._actions if action.dest == "verb")
    tried: dict[str, set[str]] = {verb: set() for verb in VERBS}
    for command, options in OPTIONS.items():
        tried[command.split()[0]] |= set(options) | {part for part in command.split() if part.startswith("--")}
    for verb, parser in typing.cast(Any, verbs).choices.items():
        taking = [action for action in parser._actions if action.nargs != 0]
        known = {option for action in taking for option in action.option_strings if option.startswith("--")}
        assert known - tried[verb] <= words, verb


def test_out_of_memory_is_one_line_and_other_faults_of_ours_are_not_hidden(
    here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: Exception) -> Any:
        def load(*args: Any, **options: Any) -> None:
            raise error

        monkeypatch.setattr("ddecode.pipeline.DistilledPipeline.from_pretrained", load)
        return refused

    words = (
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    )
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nTried"), RuntimeError(words)):
        assert "smaller batches" in fail(error)(capsys, "sample", "tiny", "--out", "new.png")
    fail(RuntimeError("InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: (None,)"))
    assert "training.compile=false" in refused(capsys, "sample", "tiny", "--out", "new.png")
    fail(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["sample", "tiny", "--out", "new.png"])


def test_messages_fit_a_screen() -> None:
    assert cli.brief("a\n b\tc") == "a b c" and len(cli.brief("x" * 100_000)) < 500


# --- recipes --------------------------------------------------------------------------------------------------

VALUES = (
    "null", "''", "x", "-1", "0", "1", "1.5", "-1.5", ".nan", ".inf", "-.inf", "1e400", "true", "[]", "[1]", "[x]",
    "[null]", "[-1]", "[.nan]", "{}", "{a: 1}", "{0.5: x}", "{.nan: 1}", "{2.0: 1}", "{0.1: .nan}", "{0.1: .inf}",
    "{null: 1}", "[[1]]", "9" * 30, MANY, "0x" + "f" * 9000, "2026-13-45", "!!python/name:os.system", "!!bool x",
    "!!int ''", "!!timestamp x", "!!float x", "[0, 0]", "[0, 99999999999999999999]", "*a", "{a: 1, a: 2}",
    "[" * 40 + "]" * 40,
)  # fmt: skip


def keys_of(kind: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a config and its type, groups included."""
    for name, hint in typing.get_type_hints(kind).items():
        yield path + name, hint
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                yield from keys_of(inner, f"{path}{name}.")


KEYS = [(key, hint) for key, hint in keys_of(DistillConfig) if typing.get_origin(hint) is not dict]


@pytest.mark.parametrize(("key", "hint"), KEYS, ids=[key for key, _ in KEYS])
def test_every_key_takes_its_own_type_or_one_line_names_it(key: str, hint: Any, tmp_path: Path) -> None:
    recipe = write_yaml(tmp_path / "recipe.yaml", distill_recipe(Path("somewhere")))
    refusals = 0
    for value in VALUES:
        try:
            config: Any = read_config(recipe, DistillConfig, [f"{key}={value}"])
        except ValueError as error:
            line, refusals = str(error), refusals + 1
            assert "\n" not in line and re.search("|".join(key.split(".")), line), (value, line)
            continue
        for name in key.split("."):
            config = getattr(config, name)
        numbers = config if isinstance(config, tuple) else config.values() if isinstance(config, dict) else [config]
        for number in numbers:
            assert not isinstance(number, int) or 0 <= number < 2**63, (value, config)
            assert not isinstance(number, float) or 0 <= number < math.inf, (value, config)
    assert refusals >= 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "must hold a mapping"),
        (b"\xff\xfe", "is not UTF-8"),
        ("teacher: é".encode("latin-1"), "is not UTF-8"),
        ("teacher: x".encode("utf-16"), "is not UTF-8"),
        (b"teacher: x\nteacher: y", "the key teacher is given twice"),
        (b"teacher: x\ntraining: {steps: 1, lr: 1, steps: 2}", "the key steps is given twice"),
        (b"a: &a [1]\nb: [*a, *a]", "write out what *a stands for"),
        (b"a: &a [*a]", "write out what *a stands for"),
        (b"teacher: " + b"[" * 20_000, "inside each other"),
        (b"{a: " * 5_000, "inside each other"),
        (b"teacher: !!python/object/apply:os.system ['touch pwned']", "could not determine a constructor"),
        (b"a: 1\n---\nb: 2", "single document"),
        (b"teacher: x\0y", "special characters"),
        (b"x" * (LARGEST_FILE + 1), "is no config: it has"),
        (b"[1, 2]: 3", "unhashable key"),
        (b"3: 4", "unknown config key 3"),
    ],
    ids=range(16),
)
def test_files_that_are_no_recipe(text: bytes, message: str, here: Path, capsys: Capture) -> None:
    path = here.parent / f"{here.name}.yaml"
    path.write_bytes(text)
    assert message in refused(capsys, "pairs", "--config", path, "--out", "new")
    path.unlink()


# --- results --------------------------------------------------------------------------------------------------

RESULT = dict.fromkeys(typing.get_type_hints(Result), "x") | {
    "num": 8, "seed": 0, "versions": {"ddecode": "0"}, "rows": [{"plan": "1", "fid": 1.0}],
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"rows": rows}
        for rows in ([], None, 3, [1], [{}], [{"fid": 1}], {"a": 1}, [{"plan": "1"}, {"plan": "1", "b": 2}])
    ]
    + [{"num": None}, {"num": "8"}, {"seed": 1.5}, {"protocol": []}, {"versions": 3}, {"model": None}],
    ids=str,
)
def test_damaged_results_are_refused(change: dict[str, Any], tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(RESULT))
    assert main(["compare", str(path)]) == 0
    path.write_text(json.dumps(RESULT | change))
    assert "x.json" in refused(capsys, "compare", path)
    assert "x.json" in refused(capsys, "compare", path, path)
