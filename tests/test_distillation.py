"""A recipe assembled: where the first weights come from, and DD2's two stages, stopped anywhere."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interruption import interrupted
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import (
    distill_recipe,
    make_draft_student,
    make_pipeline,
    make_student,
    make_teacher,
    save_tiny,
    scramble,
    seeded,
    tree_of,
    write_yaml,
)
from torch import Tensor, nn

from ddecode import distillation
from ddecode.checkpoint import ModelFolder
from ddecode.config import DistillConfig, read_config
from ddecode.distillation import distill
from ddecode.evaluation.features import FeatureNetwork
from ddecode.files import read_tensors
from ddecode.objectives import positives
from ddecode.objectives.matching import TokenMatching
from ddecode.objectives.score import ScoreTerm
from ddecode.objectives.student import StudentObjective
from ddecode.objectives.tuning import TuningObjective
from ddecode.pairs import make_manifest, write_pairs
from ddecode.pipeline import DistilledPipeline
from ddecode.run_folder import EMA, SUMS, sha256
from ddecode.teacher import Recipe


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", make_pipeline())


def recipe_of(model: Path, tmp_path: Path, *overrides: str) -> DistillConfig:
    return read_config(write_yaml(tmp_path / "recipe.yaml", distill_recipe(model)), DistillConfig, overrides)


def first_student(model: Path, tmp_path: Path, *overrides: str) -> nn.Module:
    folder = ModelFolder.open(model)
    return distillation.make_student(folder, folder.teacher(), recipe_of(model, tmp_path, *overrides))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_first_weights_are_the_teachers_random_or_another_students(model: Path, tmp_path: Path) -> None:
    teacher = ModelFolder.open(model).teacher()
    fresh = first_student(model, tmp_path)
    assert torch.equal(fresh.backbone.output.weight, teacher.backbone.output.weight)
    random = first_student(model, tmp_path, "student.initial=random")
    assert not torch.equal(random.backbone.output.weight, teacher.backbone.output.weight)
    assert same(random, first_student(model, tmp_path, "student.initial=random"))
    other = save_tiny(tmp_path / "other", make_pipeline(seed=9))
    assert same(first_student(model, tmp_path, f"student.initial={other}"), ModelFolder.open(other).student())


def test_a_student_that_does_not_fit_is_no_beginning(model: Path, tmp_path: Path) -> None:
    teacher = make_teacher()
    drafting = DistilledPipeline(tokenizer=teacher.tokenizer, teacher=teacher, student=make_draft_student(teacher))
    save_tiny(tmp_path / "drafting", drafting)
    with pytest.raises(ValueError, match="has another shape than this recipe's"):
        first_student(model, tmp_path, f"student.initial={tmp_path / 'drafting'}")
    alien = make_teacher(seed=5)
    theirs = DistilledPipeline(tokenizer=alien.tokenizer, teacher=alien, student=make_student(alien))
    save_tiny(tmp_path / "alien", theirs)
    with pytest.raises(ValueError, match="has another teacher than"):
        first_student(model, tmp_path, f"student.initial={tmp_path / 'alien'}")
    alone = DistilledPipeline(tokenizer=teacher.tokenizer, teacher=teacher)
    save_tiny(tmp_path / "alone", alone)
    with pytest.raises(ValueError, match="alone has no student"):
        first_student(model, tmp_path, f"student.initial={tmp_path / 'alone'}")


def test_the_written_student_lies_between_the_trained_one_and_the_initial(
    model: Path, pairs: Path, tmp_path: Path
) -> None:
    initial = save_tiny(tmp_path / "initial", make_pipeline(seed=0))
    recipe = recipe_of(model, tmp_path, f"student.initial={initial}", "student.initial_share=0.25", "training.steps=2")
    written = ModelFolder.open(distill(recipe, pairs, tmp_path / "run", show_progress=False)).state("student")
    trained = load_file(tmp_path / "run" / "checkpoint" / "ema.safetensors")
    begun = ModelFolder.open(initial).state("student")
    assert not any(torch.equal(trained[name], begun[name]) for name in trained if "norm" not in name)
    for name, weight in written.items():
        torch.testing.assert_close(weight, 0.75 * trained[name] + 0.25 * begun[name])


MATCHING = ["objective.matching.weight=1.0", "objective.image_batch=4"]


def test_an_earlier_runs_guidance_network_goes_on(model: Path, pairs: Path, tmp_path: Path) -> None:
    """A stage of no learning rate leaves it as the stage before had it."""

    def run(name: str, *overrides: str) -> dict[str, Tensor]:
        recipe = recipe_of(model, tmp_path, *MATCHING, "training.steps=2", *overrides)
        distill(recipe, pairs, tmp_path / name, show_progress=False)
        return read_tensors(tmp_path / name / "checkpoint" / "critics.safetensors", "token_guidance.")

    before = run("before", "objective.matching.lr=0.01")
    still = ["objective.matching.lr=1e-30", "training.weight_decay=0"]
    after = run("after", *still, f"objective.matching.initial={tmp_path / 'before'}")
    fresh = run("fresh", *still)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(before["backbone.output.weight"], fresh["backbone.output.weight"])


def test_a_guidance_network_that_does_not_fit_is_refused(model: Path, pairs: Path, tmp_path: Path) -> None:
    def refusal(initial: str, *overrides: str) -> str:
        recipe = recipe_of(model, tmp_path, *MATCHING, f"objective.matching.initial={initial}", *overrides)
        with pytest.raises(ValueError) as caught:
            distill(recipe, pairs, tmp_path / "run", show_progress=False)
        return str(caught.value)

    assert "nowhere is neither teacher nor the folder of a run with objective.matching" in refusal("nowhere")
    before = tmp_path / "before"
    distill(recipe_of(model, tmp_path, *MATCHING, "training.steps=2"), pairs, before, show_progress=False)
    path = before / "checkpoint" / "critics.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "critics.safetensors is damaged" in refusal(str(before))


SCORE = [
    "objective.score.weight=1.0", "objective.score.updates=2", "objective.score.align_every=4",
    "objective.score.align_steps=1", "objective.image_batch=2",
    "objective.score.tuning={steps: 4, batch: 4, lr: 0.001, warmup_steps: 1, log_every: 1, save_every: 2}",
]  # fmt: skip


@pytest.fixture
def pairs(model: Path, tmp_path: Path) -> Path:
    config, folder = recipe_of(model, tmp_path), ModelFolder.open(model)
    teacher = folder.teacher()
    write_pairs(
        teacher, make_manifest(teacher, "m", folder.teacher_hash(), config.pairs), tmp_path / "pairs",
        show_progress=False,
    )  # fmt: skip
    return tmp_path / "pairs"


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


OWN_STUDENT = ["student.split=null", "student.diffusion_head=2", "student.initial=tuning", "objective.logits=0"]


@pytest.mark.parametrize(("stage", "overrides"), [("tuning", []), ("student", []), ("student", OWN_STUDENT)])
def test_dd2_goes_through_both_stages_and_resumes_in_either(
    stage: str, overrides: list[str], model: Path, pairs: Path, tmp_path: Path
) -> None:
    config = recipe_of(model, tmp_path, *SCORE, *overrides)
    distill(config, pairs, tmp_path / "whole", show_progress=False)
    rows = rows_of(tmp_path / "whole")
    assert [("score_gap" in row, "cross_entropy" in row) for row in rows[:4]] == [(False, False), (True, True)] * 2
    assert all("guidance_error" in row for row in rows)
    assert "score_gap" not in rows[4], "after going back to its EMA the guidance network learns alone"
    assert len(rows_of(tmp_path / "whole" / "tuning")) == 4

    kind = distillation.TuningObjective if stage == "tuning" else StudentObjective
    with interrupted(kind, "forward", at=4), pytest.raises(KeyboardInterrupt):
        distill(config, pairs, tmp_path / "parts", show_progress=False)
    distill(config, pairs, tmp_path / "parts", resume=True, show_progress=False)
    for run in ("", "tuning"):
        assert rows_of(tmp_path / "parts" / run) == rows_of(tmp_path / "whole" / run)
    for name in ("model/model.safetensors", "checkpoint/critics.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_score_terms_guidance_network_may_be_of_tokens(model: Path, pairs: Path, tmp_path: Path) -> None:
    tokens = [*SCORE[:-1], "objective.score.guidance=tokens", "training.preview_every=6"]
    distill(recipe_of(model, tmp_path, *tokens, "student.split=null"), pairs, tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run" / "tuning").exists() and (tmp_path / "run" / "previews" / "0000006.png").is_file()
    critics = load_file(tmp_path / "run" / "checkpoint" / "critics.safetensors")
    assert "guidance.backbone.output.weight" in critics and not any("head" in name for name in critics)
    with pytest.raises(ValueError, match=r"objective\.score\.guidance: tokens is for .* student\.split 10 on"):
        distill(recipe_of(model, tmp_path, *tokens), pairs, tmp_path / "b", show_progress=False)


@pytest.mark.parametrize("kind", [ScoreTerm, TuningObjective, TokenMatching])
def test_terms_are_of_the_teacher_as_the_pairs_have_it(
    kind: Any, model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(model, tmp_path, *SCORE, *MATCHING, "pairs.recipe={guidance_scale: 3, top_k: 5}")
    folder, found = ModelFolder.open(model), []
    teacher = folder.teacher()
    manifest = make_manifest(teacher, "m", folder.teacher_hash(), recipe.pairs)
    write_pairs(teacher, manifest, tmp_path / "others", show_progress=False)
    init = kind.__init__

    def recorded(self: Any, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        found.append(self.recipe)

    monkeypatch.setattr(kind, "__init__", recorded)
    distill(recipe, tmp_path / "others", tmp_path / "run", show_progress=False)
    own = Recipe(guidance_scale=3.0, top_k=5)
    assert found == [own]
    assert DistilledPipeline.from_pretrained(tmp_path / "run" / "model").recipe == own, "its teacher is sampled so, too"


def test_the_guidance_network_starts_from_the_first_stage(
    model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    init = ScoreTerm.__init__

    def recorded(self: ScoreTerm, teacher: Any, guidance: nn.Module, **options: Any) -> None:
        given.append(guidance.head.output.weight.detach().clone())
        init(self, teacher, guidance, **options)

    monkeypatch.setattr(ScoreTerm, "__init__", recorded)
    with_tuning, without = recipe_of(model, tmp_path, *SCORE), recipe_of(model, tmp_path, *SCORE[:-1])
    distill(with_tuning, pairs, tmp_path / "a", show_progress=False)
    distill(without, pairs, tmp_path / "b", show_progress=False)
    tuned, fresh = given
    assert tuned.abs().max() > 0 and fresh.abs().max() == 0
    assert not (tmp_path / "b" / "tuning").exists()


def test_dd2s_own_student_starts_from_the_first_stage_too(
    model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    students = []
    init = StudentObjective.__init__

    def recorded(self: StudentObjective, student: nn.Module, *args: Any, **options: Any) -> None:
        students.append(student.head.output.weight.detach().clone())
        init(self, student, *args, **options)

    monkeypatch.setattr(StudentObjective, "__init__", recorded)
    distill(recipe_of(model, tmp_path, *SCORE, *OWN_STUDENT), pairs, tmp_path / "run", show_progress=False)
    tuned = load_file(tmp_path / "run" / "tuning" / "checkpoint" / "ema.safetensors")["head.output.weight"]
    assert torch.equal(students[0], tuned)


def test_second_stages_may_share_a_first(model: Path, pairs: Path, tmp_path: Path) -> None:
    """Taken from an earlier run, it gives what a run of both stages gives; a run's second stage goes on as well."""
    both = recipe_of(model, tmp_path, *SCORE, *OWN_STUDENT)
    distill(both, pairs, tmp_path / "both", show_progress=False)
    first, second = tmp_path / "both" / "tuning", tmp_path / "both"
    later = recipe_of(model, tmp_path, *SCORE[:-1], *OWN_STUDENT, f"objective.score.initial={first}")
    distill(later, pairs, tmp_path / "later", show_progress=False)
    assert not (tmp_path / "later" / "tuning").exists()
    for name in ("model/model.safetensors", "checkpoint/critics.safetensors"):
        assert (tmp_path / "later" / name).read_bytes() == (tmp_path / "both" / name).read_bytes()

    still = ["objective.score.lr=1e-30", f"objective.score.initial={second}"]
    distill(
        recipe_of(model, tmp_path, *SCORE[:-1], *OWN_STUDENT, *still), pairs, tmp_path / "still", show_progress=False
    )
    ours, theirs = (load_file(run / "checkpoint" / "critics.safetensors") for run in (tmp_path / "still", second))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_first_stage_serves_students_of_other_starts(model: Path, pairs: Path, tmp_path: Path) -> None:
    """It knows one kind of pass, or none if it is of before they were told apart; the others begin at zero."""
    one = recipe_of(model, tmp_path, *SCORE, *OWN_STUDENT, "student.starts=[0]")
    distill(one, pairs, tmp_path / "one", show_progress=False)
    first = tmp_path / "one" / "tuning"
    begun = ["student.starts=[0, 4]", f"objective.score.initial={first}", "objective.score.lr=1e-30"]
    two = recipe_of(model, tmp_path, *SCORE[:-1], *OWN_STUDENT, *begun)

    def second(name: str) -> dict[str, Tensor]:
        distill(two, pairs, tmp_path / name, show_progress=False)
        return load_file(tmp_path / name / "checkpoint" / "critics.safetensors")

    told = second("told apart")
    assert len(told["guidance.passes.weight"]) == 2 and told["guidance.passes.weight"].abs().max() < 1e-20
    saved, sums = first / "checkpoint" / EMA, first / "checkpoint" / SUMS
    state = load_file(saved)
    del state["passes.weight"]
    before = sha256(saved)
    save_file(state, saved)
    sums.write_text(sums.read_text().replace(before, sha256(saved)))
    assert all(torch.equal(told[name], tensor) for name, tensor in second("before").items())


@pytest.mark.parametrize(
    ("initial", "overrides", "told"),
    [
        ("nowhere", [], "neither teacher nor the folder of a run with objective.score: it has no checkpoint/ema"),
        ("RUN", [], "has no guidance network of this recipe's shape"),
        ("RUN", SCORE[-1:], "leave it out, or objective.score.initial"),
    ],
)
def test_a_score_term_begins_at_a_guidance_network_that_fits(
    initial: str, overrides: list[str], told: str, model: Path, pairs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "plain"
    distill(recipe_of(model, tmp_path, "training.steps=1"), pairs, run, show_progress=False)
    begun = [f"objective.score.initial={str(run) if initial == 'RUN' else initial}", *overrides]
    with pytest.raises(ValueError, match=told):
        distill(recipe_of(model, tmp_path, *SCORE[:-1], *begun), pairs, tmp_path / "run", show_progress=False)


def test_a_run_that_is_there_is_told_before_anything_is_trained(model: Path, pairs: Path, tmp_path: Path) -> None:
    distill(recipe_of(model, tmp_path, "training.steps=1"), pairs, tmp_path / "run", show_progress=False)
    before = tree_of(tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run already"):
        distill(recipe_of(model, tmp_path, *SCORE), pairs, tmp_path / "run", show_progress=False)
    assert tree_of(tmp_path / "run") == before


def test_a_drafting_student_needs_pairs_of_its_own_map(model: Path, pairs: Path, tmp_path: Path) -> None:
    config = recipe_of(model, tmp_path, "student.split=null", "student.drafts=[1]", "pairs.num_steps=9")
    with pytest.raises(ValueError, match=r"made with 8 evaluations .* set it to 8"):
        distill(config, pairs, tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


def test_the_written_recipe_tells_of_the_pairs_that_were_used(model: Path, pairs: Path, tmp_path: Path) -> None:
    recipe = recipe_of(model, tmp_path, "training.steps=1")

    def written(config: DistillConfig, name: str) -> DistillConfig:
        folder = distill(config, pairs, tmp_path / name, show_progress=False)
        return read_config(folder / "recipe.yaml", DistillConfig)

    assert written(recipe, "as-asked") == recipe
    asked = replace(recipe.pairs, num=1000, seed=7, recipe=Recipe(guidance_scale=3.0))
    assert written(replace(recipe, pairs=asked), "otherwise") == recipe


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Of four classes, beside a feature network small enough for the tiny model's images."""
    network = FeatureNetwork(widths=(4, 8), blocks=1, num_classes=4)
    scramble(network, 7)
    (tmp_path / "features").mkdir()
    save_file(network.state_dict(), tmp_path / "features" / "model.safetensors")
    write_yaml(tmp_path / "features" / "config.json", {"widths": [4, 8], "blocks": 1, "num_classes": 4})
    folder = tmp_path / "images"
    for label in range(4):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(1 + label):
            pixels = torch.randint(256, (12, 10, 3), dtype=torch.uint8, generator=seeded(10 * label + i))
            Image.fromarray(pixels.numpy()).save(folder / f"class{label}" / f"{i}.png")
    return folder


def adversarial_recipe(model: Path, tmp_path: Path, images: Path | None) -> DistillConfig:
    term = f"objective.adversarial={{weight: 1.0, width: 8, images: {images or 'null'}}}"
    return recipe_of(model, tmp_path, term, f"objective.features={tmp_path / 'features'}", "student.split=16")


def test_real_positives_are_encoded_once_and_a_stopped_run_goes_on(
    model: Path, pairs: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = adversarial_recipe(model, tmp_path, images)
    distill(config, pairs, tmp_path / "whole", show_progress=False)
    assert all("verdict_positive" in row for row in rows_of(tmp_path / "whole"))
    distill(adversarial_recipe(model, tmp_path, None), pairs, tmp_path / "free", show_progress=False)
    first = [rows_of(tmp_path / run)[0] for run in ("whole", "free")]
    assert first[0]["verdict_student"] == first[1]["verdict_student"]
    assert first[0]["verdict_positive"] != first[1]["verdict_positive"]

    with interrupted(StudentObjective, "forward", at=4), pytest.raises(KeyboardInterrupt):
        distill(config, pairs, tmp_path / "parts", show_progress=False)
    tokens = tree_of(tmp_path / "parts" / "positives")
    assert tokens == tree_of(tmp_path / "whole" / "positives") and len(tokens) == 1
    monkeypatch.setattr(positives, "read_image", None)  # everything is encoded
    distill(config, pairs, tmp_path / "parts", resume=True, show_progress=False)
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")


def test_other_images_are_another_run(model: Path, pairs: Path, images: Path, tmp_path: Path) -> None:
    config = adversarial_recipe(model, tmp_path, images)
    distill(config, pairs, tmp_path / "run", show_progress=False)
    (images / "class3" / "3.png").unlink()
    with pytest.raises(ValueError, match="begun with another config"):
        distill(config, pairs, tmp_path / "run", resume=True, show_progress=False)


def test_images_that_do_not_fit_are_refused_before_anything_is_written(
    model: Path, pairs: Path, tmp_path: Path
) -> None:
    config = recipe_of(model, tmp_path, f"objective.adversarial={{weight: 1.0, images: {tmp_path}}}")
    with pytest.raises(ValueError, match="but the teacher knows 4 classes"):
        distill(config, pairs, tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


def test_previews_join_the_log_whether_or_not_it_is_their_turn(model: Path, pairs: Path, tmp_path: Path) -> None:
    for every, expected in ((3, [3, 6]), (0, [])):
        run = tmp_path / f"every{every}"
        config = recipe_of(model, tmp_path, f"training.preview_every={every}", "training.log_every=2")
        distill(config, pairs, run, show_progress=False)
        rows = rows_of(run)
        assert [row["step"] for row in rows] == sorted({2, 4, 6, *expected})
        assert [row["step"] for row in rows if "heldout_ema" in row] == expected
        assert ["loss" in row for row in rows] == [row["step"] % 2 == 0 for row in rows]
        assert sorted(path.name for path in run.glob("previews/*")) == [f"{step:07d}.png" for step in expected]
