"""Models of published sizes with random weights, here of tiny sizes under names of the same kind."""

import argparse
import json

import pytest
import torch

from ddecode.cli import bench
from ddecode.plan import parse_plan
from ddecode.random_models import models_asked, random_pipeline
from ddecode.teacher import Recipe
from third_party_loaders import published
from third_party_loaders.llamagen_tokenizer import VQConfig
from third_party_loaders.llamagen_transformer import TransformerConfig
from third_party_loaders.published import ARCHITECTURES, Architecture, find, smallest, tokens_of

TOKENIZER = VQConfig(vocab_size=32, code_width=8, channels=32, channel_mult=(1, 1), res_blocks=1, z_channels=32)


def tiny(depth: int, *, captions: bool = False) -> Architecture:
    backbone = TransformerConfig(
        vocab_size=32, width=32, depth=depth, heads=2, tokens=16, num_classes=0 if captions else 10,
        caption_width=12 if captions else None, caption_length=6,
    )  # fmt: skip
    return Architecture(
        family="llamagen", backbone=backbone, tokenizer=TOKENIZER, recipe=Recipe(guidance_scale=2.0, top_k=5)
    )


@pytest.fixture(autouse=True)
def architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"tiny-b": tiny(2), "tiny-l": tiny(4), "tiny-t2i-l": tiny(4, captions=True)}
    monkeypatch.setattr(published, "ARCHITECTURES", known)
    monkeypatch.setattr("ddecode.machine.MATMUL_SIDE", {"cpu": 64})


def measure(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    args = parser.parse_args(["bench", "--repeats", "1", "--warmup", "0", *arguments])
    args.run(args)


def test_only_what_plans_name_is_built() -> None:
    assert models_asked(["teacher", 1, "small:0-4,light:4-16"]) == {"student", "small", "light"}
    assert set(random_pipeline("tiny-l", ["teacher"]).models) == {"teacher", "map", "skip"}
    pipe = random_pipeline("tiny-l", [1, "small:0-4,light:5-16"])
    assert set(pipe.models) == {"student", "teacher", "map", "small", "light", "skip"}
    depths = {name: model.backbone.depth for name, model in pipe.models.items() if name not in ("map", "skip")}
    assert depths == {"student": 4, "teacher": 4, "small": 2, "light": 2}
    assert random_pipeline("tiny-l", ["light:0-16"], layers=3).models["light"].backbone.depth == 3


def test_weights_follow_the_seed_and_every_part_matters() -> None:
    first, again, other = (random_pipeline("tiny-l", [1], seed=seed) for seed in (0, 0, 1))

    def sampled(pipe: object) -> torch.Tensor:
        return pipe([3], generator=torch.Generator().manual_seed(0), output_type="pt").images  # type: ignore[operator]

    assert torch.equal(sampled(first), sampled(again))
    assert not torch.equal(sampled(first), sampled(other))
    assert sampled(first).std() > 0.05, "a picture, not a grey field"
    logits_LV = first.teacher.logits(torch.zeros(1, 16, dtype=torch.int64), [3])[0]  # type: ignore[union-attr]
    assert logits_LV.std() > 0.3 and len(logits_LV.argmax(-1).unique()) > 1


def test_the_recipe_is_the_authors() -> None:
    assert random_pipeline("tiny-l", ["teacher"]).recipe == Recipe(guidance_scale=2.0, top_k=5)


def test_smallest_of_the_same_tokens() -> None:
    assert smallest(find("tiny-l")) == find("tiny-b")
    assert smallest(find("tiny-b")) is None
    assert smallest(find("tiny-t2i-l")) is None, "classes cannot stand for captions"


def test_published_families_share_their_tokens() -> None:
    var, llamagen = (tokens_of(ARCHITECTURES[name]) for name in ("var-d16", "llamagen-b"))
    shared = {name: tokens_of(ARCHITECTURES[name]) for name in ARCHITECTURES}
    assert all(shared[name] == var for name in ("var-d20", "var-d24", "var-d30"))
    assert shared["var-d36"] != var and shared["llamagen-t2i-xl"] != llamagen
    assert all(shared[f"llamagen-{size}"] == llamagen for size in ("l", "xl", "xxl", "3b"))


@pytest.mark.parametrize(
    ("name", "plans", "layers", "message"),
    [
        ("tiny-m", [1], None, "unknown architecture 'tiny-m'; did you mean tiny-"),
        ("tiny-b", ["small:0-16"], None, "no smaller published teacher than tiny-b"),
        ("tiny-t2i-l", [1], None, "no student for captions"),
        ("tiny-l", ["light:0-16"], 5, "student of 5 layers cannot be cut from a teacher of 4"),
        ("tiny-l", ["light:0-16"], 0, "student of 0 layers"),
    ],
)
def test_wrong_asks_are_refused(name: str, plans: list, layers: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_pipeline(name, plans, layers=layers)


def test_bench_of_an_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    plan = "small:0-4,teacher:4-16"
    measure("--arch", "tiny-l", "--plan", plan, "--plan", "light:0-16", "--batch", "2")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "tiny-l with random weights: teacher (cached, guidance 2 with both halves in one batch, top-k 5, top-p off) "
        f"against student 1, student 2, {plan}, light:0-16; from noise"
    )
    rows = {row["plan"]: row for row in json.loads(lines[-1])["rows"]}
    assert list(rows) == ["teacher", "1", "2", plan, "light:0-16"]
    assert {name: row["network_evaluations"] for name, row in rows.items()} == {
        "teacher": 16, "1": 1, "2": 2, plan: 16, "light:0-16": 1,
    }  # fmt: skip
    assert rows["light:0-16"]["network_operations"] < rows["1"]["network_operations"]
    assert rows[plan]["network_operations"] > rows["teacher"]["network_operations"], "it reads the small one's tokens"


def test_bench_of_captions_measures_the_teacher_alone(capsys: pytest.CaptureFixture[str]) -> None:
    measure("--arch", "tiny-t2i-l", "--batch", "1,2")
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["plan"], row["batch"], row["network_evaluations"]) for row in rows] == [
        ("teacher", 1, 16),
        ("teacher", 2, 16),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "MODEL or --arch"),
        (("--arch", "tiny-l", "--with", "small=fashion-llamagen-small"), "--with is for a MODEL"),
        (("--arch", "tiny-l", "--plan", "huge:0-16"), "no model 'huge'"),
        (("--arch", "tiny-l", "--plan", "student:0-16,student:3-16"), "not trained to start at 3"),
    ],
)
def test_bench_refuses_contradictions(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        measure(*arguments)
    assert capsys.readouterr().out == ""


def test_plans_are_over_the_tokens_of_the_architecture() -> None:
    pipe = random_pipeline("tiny-l", [1])
    assert pipe.plan(plan="student:0-16,student:5-16") == parse_plan("student:0-16,student:5-16", 16)
