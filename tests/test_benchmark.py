"""The benchmark on a tiny random model: what is measured and how it is refused, never how long it takes."""

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageColor
from tiny import make_pipeline

from ddecode.benchmark import BenchmarkRow, Cost, benchmark, named_plans
from ddecode.checkpoint import save_model
from ddecode.cli import bench
from ddecode.cli.arguments import read_steps
from ddecode.latency_plot import COLORS, HEIGHT, WIDTH, Axis
from ddecode.pipeline import DistilledPipeline
from ddecode.plan import Plan
from ddecode.teacher import Recipe
from third_party_loaders import llamagen

STABLE_KEYS = {
    "plan", "batch", "dtype", "threads", "network_evaluations", "median_s", "p10_s", "p90_s",
    "images_per_s", "peak_bytes", "network_s", "decode_s", "speedup",
}  # fmt: skip
KEYS = STABLE_KEYS | {
    "rest_s", "network_operations", "decode_operations", "network_rate", "network_share", "decode_rate",
    "decode_share", "floor_s", "warmup_s",
}  # fmt: skip
TOKENIZER = {
    "vocab_size": 32, "code_width": 8, "channels": 32, "channel_mult": [1, 1], "res_blocks": 1, "z_channels": 32,
}  # fmt: skip
BACKBONE = {"vocab_size": 32, "width": 32, "depth": 2, "heads": 2, "tokens": 16, "num_classes": 10}
RECIPE = Recipe(guidance_scale=1.5, top_k=8)
MIXED = "student:0-4,teacher:4-8,student:4-16"


@pytest.fixture(autouse=True)
def small_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddecode.machine.MATMUL_SIDE", {"cpu": 64})


@pytest.fixture(scope="module")
def pipe() -> DistilledPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = llamagen.build_tokenizer(llamagen.TokenizerConfig(**TOKENIZER), None)
        teacher = llamagen.build_teacher(llamagen.BackboneConfig(**BACKBONE), tokenizer, None, RECIPE)
        student = llamagen.build_student(
            llamagen.BackboneConfig(**BACKBONE, code_width=8), tokenizer, None, starts=(0, 4), split=16
        )
    return DistilledPipeline(tokenizer=tokenizer, teacher=teacher, student=student)


@pytest.fixture(scope="module")
def model(pipe: DistilledPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same models as a folder."""
    folder = tmp_path_factory.mktemp("model")
    config = {
        "family": "llamagen",
        "tokenizer": TOKENIZER,
        "teacher": {"backbone": BACKBONE, "recipe": dataclasses.asdict(RECIPE)},
        "student": {"backbone": BACKBONE | {"code_width": 8}, "starts": [0, 4], "split": 16},
    }
    assert pipe.teacher is not None
    parts = {"tokenizer": pipe.tokenizer, "teacher": pipe.teacher.backbone, "student": pipe.student}
    save_model(folder, config, {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)})
    return folder


def command_line(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    args = parser.parse_args(["bench", *map(str, arguments)])
    args.run(args)


def test_rows(pipe: DistilledPipeline) -> None:
    result = benchmark(pipe, [1, MIXED, "teacher", 2], [1, 3], repeats=3, warmup=1)
    evaluations = {"teacher": 16, "1": 1, MIXED: 1 + 4 + 1, "2": 2}
    assert [(row.batch, row.plan) for row in result.rows] == [
        (b, p) for b in (1, 3) for p in ("teacher", "1", MIXED, "2")
    ]
    for row in result.rows:
        assert row.network_evaluations == evaluations[row.plan]
        assert 0 < row.p10_s <= row.median_s <= row.p90_s
        assert min(row.network_s, row.decode_s, row.rest_s) > 0
        assert max(row.network_s, row.decode_s, row.rest_s) < row.p90_s
        assert row.network_rate == row.network_operations / row.network_s
        assert row.decode_share == row.decode_operations / row.decode_s / result.matmul_rate
        assert row.floor_s == (row.network_operations + row.decode_operations) / result.matmul_rate
        assert len(row.warmup_s) == 1 and row.warmup_s[0] > 0
        assert row.images_per_s == row.batch / row.median_s
        assert row.peak_bytes > 2**20
        assert (row.dtype, row.threads) == ("fp32", torch.get_num_threads())
    assert (result.guidance_scale, result.top_k, result.top_p) == (1.5, 8, 1.0)


def test_row_keys() -> None:
    assert {field.name for field in dataclasses.fields(BenchmarkRow)} == KEYS


def test_speedup_is_against_the_teacher_at_the_same_batch(pipe: DistilledPipeline) -> None:
    rows = benchmark(pipe, ["teacher", 1], [1, 2], repeats=2, warmup=0).rows
    teacher_s = {row.batch: row.median_s for row in rows if row.plan == "teacher"}
    assert [row.speedup for row in rows] == [teacher_s[row.batch] / row.median_s for row in rows]
    assert all(row.speedup is None for row in benchmark(pipe, [1, 2], repeats=1, warmup=0).rows)


def test_repetitions_take_turns(pipe: DistilledPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    emit = pipe.emit

    def recorded(labels: torch.Tensor, plan: Plan, generator: torch.Generator) -> object:
        order.append(str(plan))
        return emit(labels, plan, generator)

    monkeypatch.setattr(pipe, "emit", recorded)
    result = benchmark(pipe, [1, 2], repeats=2, warmup=1)
    one, two = "student:0-16", "student:0-16,student:4-16"
    counted = [one, one, two, two]  # once to be ready
    assert order == [*counted, two, one, one, two, two, one]
    assert len(result.rows) == 2


def test_threads_hold_inside_the_run_alone(pipe: DistilledPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), set()
    emit = pipe.emit

    def recorded(*args: object) -> object:
        seen.add(torch.get_num_threads())
        return emit(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(pipe, "emit", recorded)
    rows = benchmark(pipe, ["teacher", 1, MIXED], repeats=1, warmup=0, threads=before + 1).rows
    assert {row.threads for row in rows} == {before + 1} == seen
    assert torch.get_num_threads() == before


def test_operations_of_a_row_are_those_of_its_passes(pipe: DistilledPipeline) -> None:
    """By hand: a student's pass over 17 positions, 16 of them tokens, all of which go through the logits head."""
    width, hidden, positions, tokens, codes, code_width, depth = 32, 256, 17, 16, 32, 8, 2
    block = 2 * positions * width * (3 * width + width + 3 * hidden) + 4 * positions**2 * width
    one = 2 * tokens * code_width * width + depth * block + 2 * tokens * width * codes
    rows = benchmark(pipe, ["teacher", 1], [1, 3], repeats=1, warmup=0).rows
    teacher, student, _, three = rows
    assert student.network_operations == one and three.network_operations == 3 * one
    assert teacher.decode_operations == student.decode_operations == three.decode_operations / 3 > 0
    assert teacher.network_operations > student.network_operations, "guidance doubles them"


def test_compiling_is_asked_for_once_and_after_counting(
    pipe: DistilledPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(DistilledPipeline, "compile", lambda self: order.append("compile"))
    monkeypatch.setattr("ddecode.benchmark.cost", lambda *_: order.append("count") or Cost(network=1, decode=1))
    result = benchmark(pipe, [1, 2], [1, 2], repeats=1, warmup=1, compiled=True)
    assert order == ["count"] * 4 + ["compile"]
    assert result.compiled and result.as_dict()["compiled"]


def test_what_is_compiled_stays_so() -> None:
    """Counting operations is not to make torch give compiled code up, in this run or in later ones."""
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        def called(*values: torch.Tensor) -> Any:
            calls.append(1)
            return graph(*values)

        return called

    torch.compiler.reset()
    pipe = make_pipeline()
    pipe.compile(backend=backend)
    counts = []
    for _ in range(3):
        calls.clear()
        result = benchmark(pipe, [1], [1], repeats=2, warmup=1)
        assert result.compiled and result.rows[0].network_operations > 0
        counts.append(len(calls))
    blocks = pipe.student.backbone.depth
    assert counts == [4 * blocks] * 3, "one before counting, three that are timed"
    assert not benchmark(make_pipeline(), [1], [1], repeats=1, warmup=1).compiled


def test_plans_asked_for_twice_are_measured_once(pipe: DistilledPipeline) -> None:
    assert list(named_plans(pipe, [1, "student:0-16", 1, "teacher"])) == ["teacher", "1", "student:0-16"]


@pytest.mark.parametrize(
    ("plans", "options", "message"),
    [
        ([], {}, "nothing to measure"),
        ([3], {}, "1 to 2 steps"),
        ([0], {}, "1 to 2 steps"),
        (["student:0-8"], {}, "ends at 8"),
        (["oracle:0-16"], {}, "no model 'oracle'"),
        (["student:0-16,student:5-16"], {}, "not trained to start at 5"),
        ([1], {"batches": []}, "at least one batch"),
        ([1], {"batches": [4, 0]}, "batch must be at least 1"),
        ([1], {"repeats": 0}, "repeats"),
        ([1], {"warmup": -1}, "warmup"),
        ([1], {"threads": 0}, "threads"),
        ([1], {"compiled": True, "warmup": 0}, "warmup must be at least 1"),
    ],
)
def test_wrong_input_is_refused(pipe: DistilledPipeline, plans: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark(pipe, plans, **options)


def test_a_model_without_teacher_has_no_teacher_row(pipe: DistilledPipeline) -> None:
    with pytest.raises(ValueError, match="no teacher"):
        benchmark(DistilledPipeline(tokenizer=pipe.tokenizer, student=pipe.student), ["teacher", 1])


def test_command_ends_in_a_line_of_json(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "bench.json"
    command_line(
        model, "--steps", "1,teacher", "--plan", MIXED, "--batch", "1,2", "--batch", "3", "--repeats", 2,
        "--warmup", 0, "--json", out,
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        f"{model}: teacher (cached, guidance 1.5 with both halves in one batch, top-k 8, top-p off)"
    )
    assert f"against student 1, {MIXED}; from noise to uint8 images, decoding included; fp32, eager, cpu" in lines[0]
    assert re.search(r"a large matrix product here: \d+ GFLOP/s; median of 2 after 0 to warm up$", lines[0])
    result = json.loads(lines[-1])
    assert result == json.loads(out.read_text())
    assert [row["plan"] for row in result["rows"]] == ["teacher", "1", MIXED] * 3
    assert all(row.keys() == KEYS for row in result["rows"])
    assert (result["model"], result["torch"], result["repeats"]) == (str(model), torch.__version__, 2)
    assert len(lines) == 1 + 1 + 9 + 1
    assert [path.name for path in out.parent.iterdir()] == ["bench.json"]


def test_command_without_a_teacher_row_says_so(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command_line(model, "--steps", "1", "--repeats", 1, "--warmup", 0)
    lines = capsys.readouterr().out.splitlines()
    assert "student 1, without the teacher" in lines[0]
    assert json.loads(lines[-1])["rows"][0]["speedup"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "x"], "got 'x'"),
        (["--steps", "teacher,0"], "got '0'"),
        (["--steps", ""], "got ''"),
        (["--steps", "3"], "1 to 2 steps"),
        (["--plan", "student"], "who:start-stop"),
        (["--batch", "0"], "got '0'"),
        (["--batch", "1,two"], "got 'two'"),
        (["--json", "."], "folder"),
        (["--plot", "."], "folder"),
        (["--plot", "plot.jpg"], "writes a .png"),
        (["--arch", "var-d16"], "one of them"),
        (["--layers", "2"], "--layers is for --arch"),
        (["--json", "/proc/cpuinfo/bench.json"], "cannot write"),
    ],
)
def test_command_refuses_wrong_input_before_measuring(
    model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        command_line(model, *arguments)
    assert capsys.readouterr().out == ""


def test_teacher_without_guidance_is_called_so(pipe: DistilledPipeline) -> None:
    plain = DistilledPipeline(tokenizer=pipe.tokenizer, teacher=pipe.teacher, recipe=Recipe(guidance_scale=1.0))
    assert bench.teacher_title(plain) == "teacher (cached, no guidance, top-k off, top-p off)"


def test_steps() -> None:
    assert read_steps("teacher, 1,2") == ["teacher", 1, 2]


def test_half_precision_is_the_pipelines(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command_line(model, "--steps", "1", "--repeats", 1, "--warmup", 0, "--dtype", "bf16")
    lines = capsys.readouterr().out.splitlines()
    assert "; bf16, eager, cpu" in lines[0]
    assert json.loads(lines[-1])["rows"][0]["dtype"] == "bf16"


def test_plot_is_a_picture_with_a_colour_for_each_batch_size(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "plot.png"
    command_line(model, "--batch", "1,2", "--repeats", 1, "--warmup", 0, "--plot", out)
    with Image.open(out) as picture:
        assert (picture.format, picture.size) == ("PNG", (WIDTH, HEIGHT))
        colors = {color for _, color in picture.getcolors(WIDTH * HEIGHT)}
    assert {ImageColor.getrgb(color) for color in COLORS[:2]} <= colors
    assert ImageColor.getrgb(COLORS[2]) not in colors


def test_a_point_lies_where_its_numbers_say() -> None:
    axis = Axis(low=1, high=100, begin=0, end=200)
    assert [axis.place(value) for value in (1, 10, 100)] == pytest.approx([0, 100, 200])
    assert axis.ticks() == [1, 2, 5, 10, 20, 50, 100]
