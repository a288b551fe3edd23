"""A folder of images to a distilled student: `ddecode train` and all that comes after it, at toy size, in colour."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command import Capture, refused, run
from interruption import interrupted
from PIL import Image
from tiny import make_tokenizer, make_var_tokenizer, seeded, tree_of, write_yaml

from ddecode.checkpoint import ModelFolder
from ddecode.config import DistillConfig, build, read_config
from ddecode.evaluation.features import FeatureNetwork, save_features
from ddecode.evaluation.zoo import write_statistics
from ddecode.objectives.recognition import ClassObjective, InstanceObjective, crops
from ddecode.objectives.reconstruction import ReconstructionObjective
from ddecode.own_images import ImageSamples, ImagesConfig, OwnImages, TokenSamples, split
from ddecode.own_teacher import OwnTeacherConfig, settle
from ddecode.pipeline import DistilledPipeline

ROOT = Path(__file__).parent.parent
SHORT = {"steps": 4, "batch": 8, "lr": 2.0e-3, "warmup_steps": 2, "log_every": 2, "save_every": 2, "preview_every": 2}
LONGER = SHORT | {"steps": 24, "batch": 4, "save_every": 6, "preview_every": 12}
SIZES = {
    "llamagen": {
        "vocab_size": 16, "code_width": 8, "channels": 32, "channel_mult": [1, 1, 1], "res_blocks": 1, "z_channels": 32,
    },
    "var": {
        "patch_nums": [1, 2, 4], "vocab_size": 16, "code_width": 8, "channels": 32, "channel_mult": [1, 1, 1],
        "res_blocks": 1, "recorded_scales": 3,
    },
}  # fmt: skip


def toy_recipe(family: str) -> dict[str, Any]:
    return {
        "teacher": "own/model",
        "own_teacher": {
            "family": family,
            "images": {"side": 16, "held_out": 0.1},
            "features": {"widths": [8, 16], "training": SHORT},
            "tokenizer": {
                "sizes": SIZES[family],
                "training": LONGER,
            },
            "backbone": {"width": 32, "depth": 2, "heads": 2, "mlp_width": 32},
            "training": SHORT,
            "recipe": {"guidance_scale": 1.5},
        },
        "pairs": {"num": 32, "batch": 16, "num_steps": 4},
        "student": {"starts": [0, 5]},
        "objective": {"logits": 1.0, "energy": {0.5: 1.0}, "features": "own/features/perceptual"},
        "training": SHORT,
    }


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of five classes, one of them larger than the others."""
    with pytest.MonkeyPatch.context() as change:
        change.syspath_prepend(ROOT / "tools")
        import draw_shapes

        folder = tmp_path_factory.mktemp("own") / "shapes"
        draw_shapes.draw_folder(folder, num=60, size=16, seed=0)
    first = next(iter(sorted(folder.rglob("*.png"))))
    Image.open(first).resize((40, 31)).save(first.with_suffix(".jpg"))
    first.unlink()
    return folder


@pytest.fixture(params=SIZES)
def family(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """In a folder with its recipe."""
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path / "recipe.yaml", toy_recipe(request.param))
    yield request.param


def refused_late(capsys: Capture, *arguments: object) -> str:
    """The line of a refusal that comes after a progress bar."""
    capsys.readouterr()
    assert run(*arguments) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_images_to_a_student_that_is_judged(family: str, shapes: Path, capsys: Capture) -> None:
    recipe = ("--config", "recipe.yaml")
    assert run("train", *recipe, "--images", shapes, "--out", "own") == 0
    folder = ModelFolder.open("own/model")
    assert folder.config["class_names"] == ["circle", "cross", "square", "star", "triangle"]
    teacher = folder.teacher()
    assert (teacher.num_classes, teacher.family, teacher.length) == (5, family, 16 if family == "llamagen" else 21)
    log = [json.loads(line) for line in Path("own/teacher/log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 4 and 0 < log[-1]["heldout"] < np.log(16) + 0.5
    with Image.open("own/tokenizer/previews/0000024.png") as picture:
        pixels = np.asarray(picture).astype(int)
    assert np.abs(pixels[..., 0] - pixels[..., 2]).max() > 30, "the pictures have colours"

    assert run("pairs", *recipe, "--out", "own/pairs") == 0
    assert run("distill", *recipe, "--pairs", "own/pairs", "--out", "own/student") == 0
    assert run("eval", "own/student/model", "--num", 20, "--steps", "teacher,1,2", "--json", "eval.json") == 0
    result = json.loads(Path("eval.json").read_text())
    assert [row["plan"] for row in result["rows"]] == ["teacher", "control", "1", "2"]
    assert all(0 <= row["accuracy"] <= 1 and row["control_share"] is not None for row in result["rows"])
    images = DistilledPipeline.from_pretrained("own/student/model")([0, 4], output_type="np").images
    assert images.shape == (2, 16, 16, 3)

    judged = ("eval", "own/student/model", "--num", 20)
    other = ("--features", "few")
    save_features(Path("few"), FeatureNetwork(widths=(8,), num_classes=3))
    write_statistics(Path("few"), images)
    assert "the feature network knows 3 classes, the model 5" in refused(capsys, *judged, *other)
    assert "--features goes with --protocol zoo" in refused(
        capsys, *judged, *other, "--protocol", "adm", "--inception", "x", "--reference", "x"
    )
    shutil.rmtree("own/features")
    message = refused(capsys, *judged)
    assert "own/features/judge, which is not here: give --features FOLDER" in message


def test_a_stopped_run_ends_as_one_that_was_not(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path / "recipe.yaml", toy_recipe("llamagen"))
    whole = ("train", "--config", "recipe.yaml", "--images", shapes)
    assert run(*whole, "--out", "whole", "teacher=whole/model") == 0
    with interrupted(ReconstructionObjective, "forward", at=22):  # codes were moved in the step before
        assert run(*whole, "--out", "own") == 130
    assert not Path("own/model").exists()
    assert "own holds a run already; add --resume" in refused(capsys, *whole, "--out", "own")
    assert run(*whole, "--out", "own", "--resume") == 0
    ours, theirs = tree_of(Path("own/model")), tree_of(Path("whole/model"))
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    other = (*whole, "--out", "own", "--resume", "own_teacher.tokenizer.perceptual=1")
    assert "own/tokenizer was begun with another config" in refused_late(capsys, *other)
    other = (*whole, "--out", "own", "--resume", "own_teacher.label_drop=0.5")
    assert "own/teacher was begun with another config" in refused_late(capsys, *other)


def test_images_without_classes(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path / "recipe.yaml", toy_recipe("llamagen"))
    assert run("train", "--config", "recipe.yaml", "--images", shapes / "star", "--out", "own") == 0
    teacher = ModelFolder.open("own/model").teacher()
    assert teacher.num_classes == 1 and teacher.recipe.guidance_scale == 0, "there is nothing to guide to"
    assert json.loads(Path("own/features/judge/config.json").read_text())["told_apart"] == "images"
    assert run("eval", "own/model", "--num", 4, "--steps", "teacher", "--json", "eval.json") == 0
    assert [row["accuracy"] for row in json.loads(Path("eval.json").read_text())["rows"]] == [None, None]


def test_what_does_not_fit_is_refused_before_anything_is_trained(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path / "recipe.yaml", toy_recipe("llamagen"))

    def train(*arguments: object, images: Path = shapes, recipe: str = "recipe.yaml") -> str:
        return refused(capsys, "train", "--config", recipe, "--images", images, "--out", "own", *arguments)

    assert "there is no folder nowhere" in train(images=Path("nowhere"))
    assert "add teacher=own/model" in train("teacher=elsewhere/model")
    assert "says nothing of own_teacher" in train(recipe=str(ROOT / "configs" / "fashion-var.yaml"))
    assert "did you mean own_teacher.images.side?" in train("own_teacher.images.sides=16")
    assert "own_teacher.images.held_out must lie" in train("own_teacher.images.held_out=0.9")
    assert "images of 18 pixels do not divide into tokens of 4" in train("own_teacher.images.side=18")
    assert "too small for feature networks that need 32" in train("own_teacher.features.widths=[8,8,8,8,8]")
    assert "channels" in train("own_teacher.tokenizer.sizes.channels=24")
    assert "32 over 3 heads" in train("own_teacher.backbone.heads=3")
    assert "own_teacher.features.widths" in train("own_teacher.features.widths=[0]")
    assert "own_teacher.features.blocks must be at least 1" in train("own_teacher.features.blocks=0")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "wandb" in train("own_teacher.training.report_to=[wandb]")
    assert "own_teacher.label_drop" in train("own_teacher.label_drop=1")
    assert "own_teacher.tokenizer.perceptual" in train("own_teacher.tokenizer.perceptual=-1")
    assert "leave num_classes, tokens out" in train(
        "own_teacher.backbone.tokens=16", "own_teacher.backbone.num_classes=5"
    )
    assert "unknown config key own_teacher.backbone.widht" in train("own_teacher.backbone.widht=16")
    assert "unknown model family" in train("own_teacher.family=gpt")
    one = tmp_path / "one"
    shutil.copytree(shapes / "star", one)
    damaged = sorted(one.iterdir())[3]
    damaged.write_text("no image")
    arguments = ("train", "--config", "recipe.yaml", "--images", one, "--out", "own")
    assert f"delete them: {damaged.name}" in refused_late(capsys, *arguments)
    for path in sorted(one.iterdir())[1:]:
        path.unlink()
    assert "holds one image" in train(images=one) and not Path("own").exists()


def test_the_recipe_for_own_images_is_whole() -> None:
    for path in ROOT.glob("configs/own-images*.yaml"):
        recipe = read_config(path, DistillConfig)
        config = build(OwnTeacherConfig, recipe.own_teacher, "own_teacher")
        assert recipe.objective.features == str(Path(recipe.teacher).parent / "features" / "perceptual")
        assert yaml.safe_load(path.read_text())["expected"] and config.images.side == 32


def test_held_out_images_are_a_share_of_each_class() -> None:
    counts_K = torch.tensor([10, 1, 25])
    training, held_out = split(counts_K, 0.2)
    assert sorted([*training.tolist(), *held_out.tolist()]) == list(range(36))
    labels_N = torch.repeat_interleave(torch.arange(3), counts_K)
    assert labels_N[held_out].bincount(minlength=3).tolist() == [2, 0, 5]
    assert torch.equal(held_out, split(counts_K, 0.2)[1])
    counts_K = torch.tensor([4, 5, 60])
    labels_N, (_, held_out) = torch.repeat_interleave(torch.arange(3), counts_K), split(counts_K, 0.05)
    assert labels_N[held_out].bincount(minlength=3).tolist() == [0, 1, 3], "one of few, none of very few"
    assert len(split(counts_K, 0.0)[1]) == 0


def test_some_images_are_of_all_classes() -> None:
    samples = some_images(12)
    order = ImageSamples(samples.images_N3HW, samples.labels_N.sort().values)
    assert order.some(6)[1].tolist() == [0, 0, 1, 1, 2, 2] and len(order.some(100)[1]) == 12


def test_scaled_images_are_kept_and_checked(shapes: Path, tmp_path: Path) -> None:
    first = OwnImages.read(shapes, ImagesConfig(side=8), tmp_path, show_progress=False)
    (kept,) = tmp_path.iterdir()
    again = OwnImages.read(shapes, ImagesConfig(side=8), tmp_path, show_progress=False)
    assert torch.equal(first.whole.images_N3HW, again.whole.images_N3HW) and again.num_classes == 5
    kept.write_bytes(b"torn")
    with pytest.raises(ValueError, match="is damaged; delete it, it will be made again"):
        OwnImages.read(shapes, ImagesConfig(side=8), tmp_path, show_progress=False)


def some_images(num: int = 12, side: int = 16) -> ImageSamples:
    images = torch.randint(256, (num, 3, side, side), generator=seeded(0), dtype=torch.uint8)
    return ImageSamples(images, torch.arange(num) % 3)


def test_tokens_are_those_of_the_images_and_of_their_mirror_images() -> None:
    tokenizer, images = make_tokenizer(), some_images(side=8)
    samples = TokenSamples(tokenizer, images, mirror=True, show_progress=False)
    x, labels = images.batch([5])
    for index, image in ((5, x), (17, x.flip(-1))):
        ids, label = samples.batch([index])
        assert torch.equal(ids, tokenizer.encode(image)) and torch.equal(label, labels)
    assert len(samples) == 24 == 2 * len(TokenSamples(tokenizer, images, mirror=False, show_progress=False))


def test_crops_are_parts_of_the_image() -> None:
    """Of an image whose colours are its coordinates, a crop tells where it was taken."""
    x, y = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="xy")
    images = torch.stack([x, y, torch.zeros(16, 16)]).expand(64, -1, -1, -1)
    whole = crops(images, seeded(0), least=1.0, mirror=False)
    torch.testing.assert_close(whole, images, atol=1e-4, rtol=0)
    cut = crops(images, seeded(0), least=0.5, mirror=True)
    across, down = cut[:, 0, 0, -1] - cut[:, 0, 0, 0], cut[:, 1, -1, 0] - cut[:, 1, 0, 0]
    torch.testing.assert_close(across.abs(), down, atol=2e-2, rtol=0)
    assert 0.9 < float(down.min()) < 1.2 and 1.8 < float(down.max()) <= 2.01
    assert 16 < int((across < 0).sum()) < 48, "half are mirrored"


def test_instances_and_classes_are_learned() -> None:
    """Of 16 patterns in the colours of four classes: after a few steps most are told apart."""
    colours = torch.tensor([[200, 0, 0], [0, 200, 0], [0, 0, 200], [120, 120, 120]], dtype=torch.uint8)
    patterns = torch.randint(50, (16, 3, 4, 4), generator=seeded(1), dtype=torch.uint8).repeat_interleave(4, 2)
    labels = torch.arange(16) % 4
    samples = ImageSamples(patterns.repeat_interleave(4, 3) + colours[labels][:, :, None, None], labels)
    for kind, least in ((ClassObjective, 0.9), (InstanceObjective, 0.4)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = FeatureNetwork(widths=(16, 32), num_classes=4 if kind is ClassObjective else 16)
        objective, generator = kind(network, mirror=False), seeded(0)
        optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
        first = last = None
        for _ in range(30):
            loss, metrics = objective(*samples.batch(list(range(16))), generator=generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            first, last = loss.item() if first is None else first, loss.item()
        assert last < 0.8 * first and metrics["accuracy"] > least


def test_batch_norms_of_an_average_are_set() -> None:
    network = FeatureNetwork(widths=(8,), num_classes=3).eval()
    samples = some_images(64)
    settle(network, samples)
    h = network.stages[0][0](samples.batch(list(range(64)))[0])
    torch.testing.assert_close(network.stages[0][1].running_mean, h.mean((0, 2, 3)), atol=1e-4, rtol=1e-3)
    assert not network.training


@pytest.mark.parametrize("make", [make_tokenizer, make_var_tokenizer])
def test_codes_that_nobody_uses_move_to_where_vectors_are(make: Any) -> None:
    features = FeatureNetwork(widths=(8,)).eval().requires_grad_(False)
    tokenizer = make().requires_grad_(True)
    objective = ReconstructionObjective(tokenizer, features, perceptual=0.1, mirror=False)
    with torch.no_grad():
        objective.model.codes_VC[8:] = 50.0  # equal ones: of them at most the first is ever nearest
    images = some_images(side=8 if make is make_tokenizer else 6).batch(list(range(12)))
    loss, metrics = objective(*images, generator=seeded(0), step=1)
    assert metrics["dead_codes"] >= 23 and loss.requires_grad
    before = objective.model.codes_VC.detach().clone()
    unused = objective.model.used_V == 0
    objective(*images, generator=seeded(0), step=100, progress=0.8)
    assert torch.equal(objective.model.codes_VC, before), "towards the end they stay"
    used = objective.model.used_V > 0
    objective(*images, generator=seeded(0), step=100, progress=0.1)
    assert bool((objective.model.codes_VC[~used].abs() < 50).all())
    assert torch.equal(objective.model.codes_VC[used], before[used]) and bool(unused[~used].all())
    moved = objective.model.codes_VC.detach().clone()
    objective(*images, generator=seeded(1), step=100, progress=0.1)
    assert torch.equal(objective.model.codes_VC, moved), "once a step, of how many parts it may be"


def test_grey_images_keep_a_tokenizer_grey() -> None:
    features = FeatureNetwork(widths=(8,)).eval().requires_grad_(False)
    objective = ReconstructionObjective(
        make_tokenizer().requires_grad_(True), features, perceptual=0.1, mirror=True, grey=True
    )
    optimizer = torch.optim.AdamW(objective.model.parameters(), lr=1e-2)
    x, labels = some_images(side=8).batch(list(range(12)))
    grey = x.mean(1, keepdim=True).expand_as(x)
    for step in range(3):
        objective(grey, labels, generator=seeded(step), step=step)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    decoded = objective.model.tokenizer.decode(torch.zeros(1, 16, dtype=torch.int64))
    torch.testing.assert_close(decoded[:, 0], decoded[:, 2])
