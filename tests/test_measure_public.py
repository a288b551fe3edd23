"""The comparison with the public code, without that code: turns, ratios, processes, and our side at a tiny size."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from ddecode.teacher import Recipe
from third_party_loaders import published
from third_party_loaders.published import Architecture
from third_party_loaders.var_tokenizer import MultiScaleVQConfig
from third_party_loaders.var_transformer import VARConfig

SCALES = (1, 2, 3)
TINY = Architecture(
    family="var",
    backbone=VARConfig(vocab_size=32, code_width=8, width=64, depth=2, heads=2, patch_nums=SCALES),
    tokenizer=MultiScaleVQConfig(
        patch_nums=SCALES, vocab_size=32, code_width=8, channels=32, channel_mult=(1, 1), res_blocks=1
    ),
    recipe=Recipe(guidance_scale=1.5, top_k=5),
)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "tools"))
    monkeypatch.setitem(published.ARCHITECTURES, "var-tiny", TINY)
    import measure_public

    yield measure_public


def test_rows_take_turns_and_teachers_stop_earlier(tool: ModuleType, tmp_path: Path) -> None:
    rows = [
        tool.Row(name=name, process=name, steps=steps) for name, steps in (("a", "teacher"), ("b", "1"), ("c", "1"))
    ]
    order: list[str] = []

    def sample(row: object, steps: str, picture: Path) -> float:
        order.append(f"{row.name}{'*' if steps.startswith('warm-up/') else ''}")  # type: ignore[attr-defined]
        np.save(picture, np.zeros(1))
        return float(len(order))

    measured = tool.measure(rows, sample, tmp_path, repeats=3, teacher_repeats=1)
    assert order == ["a*", "b*", "c*", "a", "b", "c", "b", "c", "c", "b"]
    assert [found.warmup_s for found in measured.values()] == [1, 2, 3]
    assert [found.seconds for found in measured.values()] == [[4], [5, 7, 10], [6, 8, 9]]


def test_ratios_are_of_medians_and_pictures_against_our_exact_student(tool: ModuleType) -> None:
    grey, light = np.full((2, 2, 3), 100, np.uint8), np.full((2, 2, 3), 151, np.uint8)
    names = {tool.PUBLIC_TEACHER: ([8.0], "teacher"), tool.PUBLIC_STUDENT: ([4.0, 9.0, 3.0], "1")}
    names |= {tool.EXACT_STUDENT: ([2.0], "1"), "our student, 1 step, bf16, eager": ([1.0], "1")}
    measured = {
        tool.Row(name=name, process="", steps=steps): tool.Measured(
            warmup_s=1.0, seconds=seconds, picture=light if "bf16" in name else grey
        )
        for name, (seconds, steps) in names.items()
    }
    lines = {line["row"]: line for line in tool.report(measured)}
    bf16 = lines["our student, 1 step, bf16, eager"]
    assert (bf16["over_public_teacher"], bf16["over_public_student"]) == (8.0, 4.0)
    assert bf16["picture_difference"] == pytest.approx(51 / 255)
    assert lines[tool.PUBLIC_STUDENT]["picture_difference"] == 0
    assert lines[tool.PUBLIC_TEACHER]["picture_difference"] is None
    assert (
        "| our student, 1 step, bf16, eager | 1.000 (1.000 - 1.000) | 1 | 1.0 | 8.00x | 4.00x | 20.00% |"
        in tool.table(list(lines.values()))
    )


def test_what_was_not_measured_has_no_ratio(tool: ModuleType) -> None:
    row = tool.Row(name="our teacher, fp32", process="", steps="teacher")
    (line,) = tool.report({row: tool.Measured(warmup_s=1.0, seconds=[1.0], picture=np.zeros(1, np.uint8))})
    assert (line["over_public_teacher"], line["over_public_student"], line["picture_difference"]) == (None,) * 3
    assert tool.table([line]).endswith("|  |  |  |")


def test_our_side_samples_the_written_weights(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool.write_weights(TINY, tmp_path)
    asked = [f"warm-up/1 {tmp_path / 'a.npy'}", f"1 {tmp_path / 'b.npy'}", f"teacher {tmp_path / 'c.npy'}"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(asked)))
    tool.serve("ours-fp32-eager", TINY, tmp_path, None)
    seconds = [float(line) for line in capsys.readouterr().out.splitlines()]
    assert len(seconds) == 3 and min(seconds) > 0
    first, again, teacher = (np.load(tmp_path / f"{name}.npy") for name in "abc")
    assert first.shape == (6, 6, 3) and first.dtype == np.uint8 and first.std() > 0
    assert np.array_equal(first, again) and not np.array_equal(first, teacher)
    noise_1LC = torch.load(tmp_path / "noise.pth")["noise_1LC"]
    assert noise_1LC.shape == (1, 14, 8)


def test_a_process_answers_line_by_line_or_shows_its_last_words(tool: ModuleType, tmp_path: Path) -> None:
    script = "import sys\nfor line in sys.stdin:\n    print(len(line.split()), flush=True)\n    sys.exit('no weights')"
    worker = tool.Worker([sys.executable, "-c", script], tmp_path / "log")
    assert worker.sample("1", tmp_path / "picture.npy") == 2
    with pytest.raises(RuntimeError, match="no weights"):
        worker.sample("1", tmp_path / "picture.npy")
    worker.close()


def test_rows_without_a_clone_are_left_out(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["measure_public", "--arch", "var-tiny", "--only", "public"])
    with pytest.raises(SystemExit, match="no row has 'public' in its name; there are our teacher, fp32"):
        tool.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "var-16"], "unknown architecture 'var-16'; did you mean var-d16"),
        (["--arch", "llamagen-t2i-xl"], "takes captions"),
        (["--var", "nowhere"], "nowhere is no folder"),
        (["--repeats", "0"], "at least 1"),
    ],
)
def test_wrong_arguments_are_refused(
    tool: ModuleType,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["measure_public", *arguments])
    with pytest.raises(SystemExit) as stopped:
        tool.main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err
