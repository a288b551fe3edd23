"""Wrong arguments to every public function: a `ValueError` of one line that says what was expected, what was given.

B batch, L token positions, V codes, C code width.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from refusal import check
from tiny import VAR_SCALES, C, L, V, distill_recipe, make_student, make_teacher, make_var_teacher, seeded, write_yaml
from torch import Tensor
from upstream import State

from ddecode import DistilledPipeline, load_teacher
from ddecode.card import Card, write_card
from ddecode.checkpoint import ModelFolder
from ddecode.config import DistillConfig, PairsConfig, StudentConfig, read_config
from ddecode.conformance import check_backbone, check_student_backbone, check_tokenizer
from ddecode.conversion import convert
from ddecode.evaluation import zoo
from ddecode.evaluation.features import FeatureNetwork
from ddecode.evaluation.fidelity import check_enough
from ddecode.evaluation.metrics import fit_gaussian, frechet_distance, intra_class_variance
from ddecode.evaluation.results import read_result
from ddecode.evaluation.zoo import Judge
from ddecode.flow import flow_grid, noise_to_tokens
from ddecode.images import grid
from ddecode.objective_config import ObjectiveConfig
from ddecode.pairs import Pairs, make_manifest, write_pairs
from ddecode.pipeline import PipelineOutput
from ddecode.plan import Plan, Span, parse_plan
from ddecode.samples import batches_of, draw_labels, make_settings, write_folder
from ddecode.student import Student
from ddecode.teacher import Recipe, Teacher
from ddecode.training_config import TrainingConfig
from ddecode.trajectory import resolve
from third_party_loaders import identify, load_dd1_student, load_llamagen, load_var

NOISE = torch.zeros(2, L, C)
IDS = torch.zeros(2, L, dtype=torch.int64)
LOG_PROBS = torch.zeros(2, L, V)
PICTURES = np.zeros((2, 8, 8, 3), np.uint8)
FEATURES = np.random.default_rng(0).normal(size=(30, 5))
NAN, INF = math.nan, math.inf
WHOLE = ("x", None, 1.5, True, -1, 10**30)
NO_TENSOR = (None, 3, [], "x", np.zeros((2, L, C)), torch.zeros(2, L, C, device="meta"))
NO_PATH = (None, 3, b"x", [], True)
NO_STATE = (None, 3, [], {}, b"x", "nowhere.pth", ".", {"a": 1}, {"a": np.zeros(2)}, {1: torch.zeros(2)})
CARD = {"license": "mit", "teacher": "x", "teacher_license": "mit"}


def test_pipelines_are_made_of_models_that_fit(pipe: DistilledPipeline, model: Path) -> None:
    teacher, student = pipe.teacher, pipe.student
    assert teacher is not None and student is not None

    def made(**parts: Any) -> DistilledPipeline:
        return DistilledPipeline(**{"tokenizer": pipe.tokenizer, "teacher": teacher} | parts)

    def opened(**options: Any) -> DistilledPipeline:
        return DistilledPipeline.from_pretrained(model, **options)

    shorter, fewer = make_teacher(tokens=9), make_teacher(num_classes=3)
    check([
        (DistilledPipeline.from_pretrained, NO_PATH, "a model's name must be str or Path, got "),
        (DistilledPipeline.from_pretrained, ("nope",), "unknown model 'nope'"),
        (load_teacher, NO_PATH, "a model's name must be str or Path, got "),
        (ModelFolder.open, NO_PATH, "a model's name must be str or Path, got "),
        (lambda v: opened(others=v), (3, "x", [1]), "others must be Mapping or None, got "),
        (lambda v: opened(torch_dtype=v), ("float16", 3, torch.int64), "dtype must be one of torch.float32"),
        (lambda v: made(tokenizer=v), (None, 3, "x", teacher, teacher.backbone), "needs a tokenizer with its codebook"),
        (lambda v: made(student=v), (3, "x", teacher, student.backbone), "student must be Student or None, got "),
        (lambda v: made(teacher=v), (3, "x", student, teacher.backbone), "teacher must be Teacher or None, got "),
        (lambda v: made(teacher=None, student=v), (None,), "needs a student or a teacher"),
        (lambda v: made(student=v), (make_student(make_teacher(5)),), "student has another codebook"),
        (lambda v: made(student=v), (make_student(shorter, starts=(0,), split=9),), "teacher has length 16, .* 9"),
        (lambda v: made(others={"a": v}), (shorter,), "a has length 9, .* 16"),
        (lambda v: made(others={"a": v}), (fewer,), "a has num_classes 3, .* 4"),
        (lambda v: made(others={"a": v}), (3, teacher.backbone), "a must be a teacher or a student, got "),
        (lambda v: made(others=v), (3, "x", [1]), "others must be Mapping or None, got "),
        (lambda v: made(recipe=v), (3, {"top_k": 3}), "recipe must be Recipe or None, got "),
        (lambda v: made(class_names=v), (3, "x", (1,)), "class_names"),
        (lambda v: made(notes=v), (3, "x"), "notes must be Mapping or None, got "),
    ])  # fmt: skip


def test_calls_of_a_pipeline(pipe: DistilledPipeline) -> None:
    def called(**options: Any) -> PipelineOutput:
        return pipe(**{"class_labels": [0, 1]} | options)

    def back(value: Any) -> PipelineOutput:
        return called(callback_on_step_end=lambda *given: {"embeddings_BLC": value})

    one = Plan(spans=(Span(who="student", start=0, stop=9),), length=9)
    check([
        (pipe, (None, "x", "3", 1.5, {}, np.array([1, 2]), [None], [1.0], [[1]], True), "label must be a whole"),
        (pipe, (-1, [9], torch.tensor([9])), r"class -?\d is out of range: this model knows 0\.\.3"),
        (pipe, ([], torch.zeros(2), IDS, IDS[0].to("meta"), IDS[0, :0]), "a list of ints or an integer tensor"),
        (lambda v: called(num_inference_steps=v), (1.5, "1", True, [], np.int64(1)), "an int or 'teacher', got "),
        (lambda v: called(num_inference_steps=v), (0, -1, 3, 10**30), "samples in 1 to 2 steps"),
        (lambda v: called(plan=v), (3, [], b"x", ("student", 0, 16)), "a plan must be text, got "),
        (lambda v: called(plan=v), (one,), "the plan is for 9 tokens, student has 16"),
        (lambda v: called(plan="student:0-16", num_inference_steps=v), (1,), "num_inference_steps or plan, not both"),
        (lambda v: called(generator=v), (3, "x", [1, 2], np.random.default_rng(0)), "must be one torch.Generator"),
        (lambda v: called(generator=v), ([], [seeded(0)] * 3), "[03] generators for 2 samples"),
        (lambda v: called(output_type=v), (3, None, "PIL", [], ["pil"]), "output_type must be one of pil, np"),
        (lambda v: called(callback_on_step_end=v), (3, "x", True, {}), "callback_on_step_end must be a function"),
        (lambda v: called(callback_on_step_end_tensor_inputs=v), (3, None, "x", {}), "must be a list of names, got "),
        (lambda v: called(callback_on_step_end_tensor_inputs=v), (["latents"], [1]), "knows embeddings_BLC, not "),
        (back, (NOISE * NAN,), "embeddings_BLC that callback_on_step_end returned must be finite"),
        (back, (NOISE.to("meta"), NOISE.long()), r"embeddings_BLC that .* must be \[B, 16, 8\], floating, got "),
        (lambda v: pipe.emit(0, v), (3, "student:0-16", None), "a plan must be Plan, got "),
        (pipe.decode, NO_TENSOR, r"embeddings must be \[B, 16, 8\], floating, got "),
        (pipe.decode, (NOISE * NAN, NOISE + INF), "embeddings must be finite"),
        (lambda v: pipe.to(dtype=v), ("float16", 3, float, np.float16, torch.int8), "dtype must be one of"),
        (lambda v: pipe.to(device=v), (torch.float16, 3, [], "x", "meta", "cuda:99"), "there is no device "),
        (pipe.to, (torch.int64,), "dtype must be one of"),
        (pipe.to, ("bf16", 3, 1.5, [], {}), "there is no device "),
    ])  # fmt: skip
    assert pipe.dtype == torch.float32 and pipe.device.type == "cpu"


def test_saving_and_uploading(pipe: DistilledPipeline, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "result.json").write_text("{}")
    card = Card(**CARD)
    new = tmp_path / "new"

    def saved(folder: Any = new, **options: Any) -> Path:
        return pipe.save_pretrained(folder, **options)

    def pushed(repo_id: Any = "a/b", **options: Any) -> str:
        return pipe.push_to_hub(repo_id, **{"card": card} | options)

    check([
        (saved, NO_PATH, "a model folder must be str or Path, got "),
        (saved, (tmp_path / "file",), "is a file; a model is a folder"),
        (saved, (tmp_path / "file" / "x",), "cannot write in "),
        (lambda v: saved(dtype=v), ("float16", 3, torch.int8), "dtype must be one of torch.float32"),
        (lambda v: saved(card=v), (3, "x", CARD), "card must be Card or None, got "),
        (lambda v: saved(**v), ({"private": True}, {"repo_id": "x"}, {"other": 1}), "give push_to_hub=True as well"),
        (lambda v: saved(push_to_hub=True, card=card, **v), ({"privat": True},), "knows private, .*, not privat$"),
        (lambda v: saved(push_to_hub=True, card=card, repo_id=v), (3, ["x"]), "repo_id must be str, got "),
        (pushed, (3, None, []), "repo_id must be str, got "),
        (lambda v: pushed(card=v), (None,), "push_to_hub needs a card"),
        (lambda v: pushed(card=v), (3, "x", CARD), "card must be Card, got "),
        (lambda v: Card(**CARD | {"license": v}), (None, 3, []), "the card's license must be str, got "),
        (lambda v: Card(**CARD | {"teacher": v}), ("", "  "), "the card needs teacher"),
        (lambda v: Card(**CARD, datasets=v), ("mnist", 3, None, (3,)), "the card's datasets"),
        (lambda v: Card(**CARD, recipe=v), (3, []), "the card's recipe must be str or Path, got "),
        (lambda v: Card(**CARD, metrics=v), ("nowhere", tmp_path), "the card's metrics: there is no file "),
        (lambda v: write_card(v, card, model="x"), NO_PATH, "a model folder must be str or Path, got "),
        (lambda v: write_card(model, v, model="x"), (None, CARD), "card must be Card, got "),
        (lambda v: write_card(model, card, model=v), (None, 3), "the model's name must be str, got "),
        (read_result, NO_PATH, "a result must be str or Path, got "),
        (read_result, (tmp_path, str(tmp_path / "nowhere")), "there is no file "),
        (read_result, (tmp_path / "result.json",), "is no result of ddecode eval"),
    ])  # fmt: skip
    assert not new.exists() and not (model / "README.md").exists()


def test_teachers_students_and_the_map(teacher: Teacher, student: Student) -> None:
    codes, tokenizer = teacher.codebook_VC, teacher.tokenizer

    def mapped(noise: Any = NOISE, log_probs: Any = LOG_PROBS, codebook: Any = codes, steps: Any = 2) -> Tensor:
        return noise_to_tokens(noise, log_probs, codebook, steps)

    def generated(**options: Any) -> Tensor:
        return teacher.generate(0, **options)

    check([
        (lambda v: Teacher(v, tokenizer, family="x"), (None, 3, tokenizer), "backbone must have vocab_size"),
        (lambda v: Teacher(teacher.backbone, v, family="x"), (None, "x"), "tokenizer must have codebook_VC"),
        (lambda v: Teacher(teacher.backbone, tokenizer, family="x", recipe=v), (3, {}), "recipe must be Recipe"),
        (lambda v: teacher.logits(v, 0), (*NO_TENSOR, IDS.float(), IDS[:, :3], IDS[0]), r"ids must be int64 \[B, 16\]"),
        (lambda v: teacher.logits(v, 0), (IDS - 1, IDS + V), r"ids must lie in 0\.\.31, got "),
        (lambda v: teacher.logits(IDS, v), ([0], [0, 1, 2]), "[13] class labels for a batch of 2"),
        (lambda v: generated(guidance_scale=v), ("x", None, NAN, INF, True, []), "guidance_scale must be a finite"),
        (lambda v: generated(guidance_scale=v), (-1, 1001), r"guidance_scale must lie in 0\.\.1000"),
        (lambda v: generated(top_k=v), WHOLE, "top_k must be "),
        (lambda v: generated(top_p=v), ("x", None, NAN, 0, -1, 1.5), "top_p must "),
        (lambda v: generated(temperature=v), ("x", None, NAN, 0, -1), "temperature must be "),
        (lambda v: generated(generator=v), (3, [1], np.random.default_rng(0)), "generator must be one torch.Generator"),
        (lambda v: resolve(v, NOISE, 0), (None, 3, student), "teacher must be Teacher, got "),
        (lambda v: resolve(teacher, v, 0), (*NO_TENSOR, NOISE.long(), NOISE[:, :3]), r"noise must be \[B, 16, 8\]"),
        (lambda v: resolve(teacher, v, 0), (NOISE * NAN, NOISE - INF), "noise must be finite"),
        (lambda v: resolve(teacher, NOISE, 0, num_steps=v), (*WHOLE, 0), "num_steps must be "),
        (mapped, (*NO_TENSOR, NOISE.long()), "noise, log_probs and codebook must be float tensors, got "),
        (mapped, (NOISE[0], NOISE[..., :3]), r"noise must be \[B, L, C\] and the codebook \[V, C\], got "),
        (lambda v: mapped(log_probs=v), (LOG_PROBS[:1], LOG_PROBS[..., :3]), r"log_probs must be \(2, 16, 32\)"),
        (lambda v: mapped(log_probs=v), (LOG_PROBS * NAN, LOG_PROBS - INF, LOG_PROBS + INF), "must have a finite"),
        (lambda v: mapped(codebook=v), (codes.numpy(), codes.long()), "must be float tensors, got "),
        (lambda v: mapped(codebook=v), (codes * NAN,), "codebook must be finite"),
        (lambda v: mapped(steps=v), (*WHOLE, 0), "num_steps must be "),
        (lambda v: flow_grid(v, 2), (*NO_TENSOR, codes.long(), codes[:0]), r"the codebook must be floats \[V, C\]"),
        (lambda v: student.predict(v, 0), (*NO_TENSOR, NOISE.long(), NOISE[0]), r"the sequence must be \[B, 16, 8\]"),
        (lambda v: student.predict(NOISE * v, 0), (NAN,), "the sequence must be finite"),
        (lambda v: student.predict(NOISE, 0, v), (None, "x", 1.5, [0], True), "start must be a whole number, got "),
        (lambda v: student.predict(NOISE, 0, v), (-1, L, torch.tensor([0, 99])), r"start must lie in 0\.\.15"),
        (lambda v: student.predict(NOISE, 0, v), (torch.zeros(2), IDS[0, :3]), "an int or an integer tensor"),
        (tokenizer.decode, (None, 3, "x", NOISE.numpy(), IDS.bool(), NOISE.to(torch.complex64)), "ids must be int64"),
        (tokenizer.decode, (NOISE[0], NOISE[..., :3]), r"embeddings must be \[B, L, 8\], got "),
        (tokenizer.decode, (IDS - 1, IDS + V), r"ids must lie in 0\.\.31"),
        (tokenizer.encode, (None, 3, PICTURES, torch.zeros(1, 8, 8, 3), IDS), r"images must be floats \[B, 3, H, W\]"),
        (tokenizer.encode, (torch.zeros(1, 3, 7, 8),), "sides of images must be multiples of"),
        (tokenizer.encode, (torch.full((1, 3, 8, 8), NAN),), "images must be finite"),
    ])  # fmt: skip


def test_plans() -> None:
    span = Span(who="student", start=0, stop=16)
    check([
        (lambda v: parse_plan(v, 16), (None, 3, [], b"student:0-16", span), "a plan must be text, got "),
        (lambda v: parse_plan("student:0-16", v), (None, "x", 0, -1, 1.5, True), "a plan's length must be "),
        (lambda v: Plan(spans=v, length=16), (None, 3, "student:0-16", ((0, 16),), (None,)), "must be a tuple of Span"),
        (lambda v: Plan(spans=v, length=16), ((), []), "at least one span"),
        (lambda v: Span(who=v, start=0, stop=16), (None, 3), "a span's who must be str, got "),
        (lambda v: Span(who="x", start=v, stop=16), (None, "0", 0.0, True), "a span's start must be a whole number"),
        (lambda v: Span(who="x", start=0, stop=v), (None, "16", 16.0), "a span's stop must be a whole number"),
    ])  # fmt: skip


def test_loaders(states: dict[str, State], teacher: Teacher, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("mine")
    var = make_var_teacher().tokenizer
    ours = {"model": states["dd1-llamagen"], "tokenizer": teacher.tokenizer, "family": "llamagen"}
    sizes = {"n_head": 2, "block_size": L, "split": 5}

    def llamagen(model: Any = states["llamagen"], tokens: Any = states["llamagen-tokenizer"], **more: Any) -> Teacher:
        return load_llamagen(model, tokens, **{"n_head": 2, "block_size": L} | more)

    def loaded(**changes: Any) -> Student:
        return load_dd1_student(**ours | sizes | changes)

    def scaled(patch_nums: Any) -> Teacher:
        return load_var(states["var"], states["var-tokenizer"], patch_nums)

    no_state = (*NO_STATE, tmp_path, tmp_path / "file.txt", teacher)
    words = "a state is|is empty|no checkpoint file|holds no file|found no weights|missing|expected .saf|is none of"
    check([
        (llamagen, no_state, words),
        (lambda v: llamagen(tokens=v), no_state, words),
        (lambda v: load_var(v, states["var-tokenizer"]), no_state, words),
        (lambda v: load_var(states["var"], v), no_state, words),
        (identify, no_state, words),
        (llamagen, (states["llamagen-tokenizer"], states["var"]), "is no LlamaGen transformer: missing "),
        (lambda v: llamagen(tokens=v), (states["llamagen"], states["var"]), "is no LlamaGen tokenizer: missing "),
        (lambda v: llamagen(n_head=v), ("x", 1.5, True, [], 0, -1, 10**30), "n_head must be "),
        (lambda v: llamagen(n_head=v), (3,), "width 32 over 3 heads"),
        (lambda v: llamagen(block_size=v), ("x", 1.5, True, [], 0, -1, 10**30), "block_size must be "),
        (lambda v: llamagen(block_size=v), (15,), "15 tokens do not form a square"),
        (scaled, (3, "1,2,3", (1.0, 2, 3), (True, 2, 3), torch.tensor([1, 2, 3])), "must be a sequence of whole"),
        (scaled, ([], (1, 2), (0, 1, 3), (3, 2, 1), (10**9,) * 3), r"patch_nums \[.*\] do not fit"),
        (lambda v: loaded(model=v), no_state, words),
        (lambda v: loaded(tokenizer=v), (None, 3, {}, teacher), "a model's tokenizer must be Tokenizer, got "),
        (lambda v: loaded(family=v), (None, 3, "", "LlamaGen", []), "family must be one of var, llamagen, got "),
        (lambda v: loaded(split=v), (None, "x", 1.5, True), "split must be a whole number"),
        (lambda v: loaded(split=v), (-1, L + 1), r"split must lie in 0\.\.16"),
        (lambda v: loaded(patch_nums=v), ((1, 2, 3), 3), "patch_nums is no option of family llamagen, which "),
        (
            lambda v: load_dd1_student(states["dd1-var"], var, "var", patch_nums=VAR_SCALES, n_head=v, split=5),
            (2,),
            "n_head is no option of family var, which takes patch_nums",
        ),
        (
            lambda v: load_dd1_student(states["dd1-var"], v, "var", patch_nums=VAR_SCALES, split=5),
            (None, 3, teacher, teacher.tokenizer),
            "a VAR model needs a VAR tokenizer, with residual scales, got ",
        ),
        (lambda v: convert(v, "llamagen", tmp_path / "new"), NO_PATH, "what to convert must be str or Path, got "),
        (lambda v: convert("nowhere.pth", "llamagen", v), NO_PATH, "--out must be str or Path, got "),
    ])  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt"]


def test_configs_made_in_python(model: Path, tmp_path: Path) -> None:
    recipe = write_yaml(tmp_path / "recipe.yaml", distill_recipe(model))

    def training(**changes: Any) -> TrainingConfig:
        return TrainingConfig(**{"steps": 2, "batch": 2, "lr": 1e-3} | changes)

    check([
        (lambda v: read_config(v, DistillConfig), NO_PATH, "a config file must be str or Path, got "),
        (lambda v: read_config(v, DistillConfig), (str(tmp_path), "nowhere.yaml"), "no config file "),
        (lambda v: read_config(recipe, DistillConfig, v), (["x"], "x=1"), "must read key.path=value"),
        *[
            (lambda v, key=key: training(**{key: v}), ("x", None, [], NAN), f"training.{key} must be ")
            for key in ("steps", "batch", "lr", "betas", "clip_norm", "ema_decay", "precision", "compile", "seed")
        ],
        (lambda v: training(report_to=v), (3, "wandb", None, ["x"]), "training.report_to"),
        (lambda v: PairsConfig(num=v), WHOLE, "pairs.num must be "),
        (lambda v: PairsConfig(num=3, recipe=v), ("x", 3, []), "pairs.recipe must be a group of keys, got "),
        (lambda v: StudentConfig(starts=v), (None, 3, "0,4", ["x"]), "student.starts"),
        (lambda v: StudentConfig(starts=v), ((), (4,), (4, 0), (0, 0)), "student.starts must begin with 0 and rise"),
        (lambda v: ObjectiveConfig(adversarial=v), ("x", 3, None), "objective.adversarial must be a group of keys"),
        (lambda v: ObjectiveConfig(energy_memory=v), (None, 3, (1,), (1, 2, 3)), "objective.energy_memory must be "),
        (lambda v: ObjectiveConfig(targets=v), ("x", None, 3), "objective.targets must be one of tokens"),
        (lambda v: Recipe(top_p=v), ("x", None, NAN, 0), "top_p must "),
    ])  # fmt: skip
    assert StudentConfig(starts=[0, 4]).starts == (0, 4)  # type: ignore[arg-type]


def test_pairs_samples_and_judging(pipe: DistilledPipeline, tmp_path: Path) -> None:
    teacher, plan = pipe.teacher, pipe.plan(1)
    assert teacher is not None
    config = PairsConfig(num=2, num_steps=2)
    manifest = make_manifest(teacher, "tiny", "0", config)
    settings = make_settings(pipe, plan, model="tiny", classes=[0], num=1)

    def made(**changes: Any) -> Any:
        return make_settings(**{"pipe": pipe, "plan": plan, "model": "x", "classes": [0], "num": 2} | changes)

    def judged(plans: Any, num: Any, seed: Any = 0) -> Any:
        judge = Judge(network=FeatureNetwork(widths=(4,), num_classes=4), real=fit_gaussian(FEATURES), hash="")
        return zoo.evaluate(pipe, plans, judge, model="x", num=num, seed=seed)

    own = np.zeros(30, np.int64)
    ours = fit_gaussian(FEATURES)
    no_features = (None, 3, [], FEATURES[0], FEATURES * NAN, np.zeros((4, 3, 2)), np.zeros((5, 0)))
    check([
        (lambda v: make_manifest(v, "x", "0", config), (None, 3, pipe), "teacher must be Teacher, got "),
        (lambda v: make_manifest(teacher, "x", "0", v), (None, {"num": 3}), "config must be PairsConfig, got "),
        (lambda v: write_pairs(v, manifest, tmp_path), (None, pipe), "teacher must be Teacher, got "),
        (lambda v: write_pairs(teacher, v, tmp_path), (None, {}, config), "manifest must be Manifest, got "),
        (lambda v: write_pairs(teacher, manifest, v), NO_PATH, "a folder of pairs must be str or Path, got "),
        (Pairs, NO_PATH, "a folder of pairs must be str or Path, got "),
        (Pairs, (str(tmp_path), "nowhere"), "holds no pairs"),
        (lambda v: made(pipe=v), (None, teacher), "pipe must be DistilledPipeline, got "),
        (lambda v: made(plan=v), (None, 1, "student:0-16"), "a plan must be Plan, got "),
        (lambda v: made(classes=v), (None, 3, [], "01"), "classes must be a list of whole numbers, got "),
        (lambda v: made(classes=v), ([-1], [1.5], ["x"], [True]), "a class must be "),
        (lambda v: made(num=v), (*WHOLE, 0), "num must be "),
        (lambda v: made(seed=v), WHOLE, "seed must be "),
        (lambda v: made(labelling=v), (None, 3, "Uniform"), "labelling must be one of balanced, uniform, got "),
        (lambda v: draw_labels([0], v), (*WHOLE, 0), "num must be "),
        (lambda v: batches_of(2, v), (*WHOLE, 0), "batch must be "),
        (lambda v: write_folder(pipe, plan, v, tmp_path, batch=1), (None, 3), "settings must be Settings, got "),
        (lambda v: write_folder(pipe, plan, settings, v, batch=1), NO_PATH, "a folder of images must be str or Path"),
        (grid, (None, 3, [], PICTURES[0], PICTURES[:0], PICTURES / 1, torch.zeros(1)), "must be a numpy array uint8"),
        (lambda v: grid(PICTURES, v), ("x", 1.5, 0, -1, 10**9), "columns must be "),
        (lambda v: grid(PICTURES, None, v), ("x", 1.5, 0, -1, 10**9), "scale must be "),
        (lambda v: judged({"1": v}, 8), (1, "student:0-16", None), "a plan must be Plan, got "),
        (lambda v: judged({}, v), ("x", None, 1.5, 0, 7), "--num must be "),
        (lambda v: judged({}, 8, v), WHOLE, "--seed must be "),
        (Judge.open, NO_PATH, "a folder of features must be str or Path, got "),
        (Judge.open, (str(tmp_path), "nowhere"), "no feature network in "),
        (fit_gaussian, no_features, r"features must be finite numbers \[N, F\], got "),
        (fit_gaussian, (FEATURES[:1],), "a covariance needs at least 2 samples, got 1"),
        (lambda v: frechet_distance(ours, v), (None, FEATURES), "what is compared must be Gaussian, got "),
        (lambda v: frechet_distance(ours, v), (fit_gaussian(FEATURES[:, :3]),), "of one width, got 5 and 3"),
        (lambda v: intra_class_variance(v, own), no_features[:-1], r"features must be finite numbers \[N, F\], got "),
        (lambda v: intra_class_variance(FEATURES, v), (None, own[:3]), "30 samples need a label each"),
        (check_enough, (None, FEATURES, torch.zeros(30), torch.zeros(30, 5) * NAN), "must be a finite float tensor"),
        (lambda v: check_enough(torch.zeros(30, 5), v), (torch.zeros(30, 3),), r"of one width, got \[3, 5\]"),
        (lambda v: check_enough(torch.zeros(30, 5), v), (torch.zeros(3, 5),), "at least 20 images, got 3"),
    ])  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_conformance_checks_name_what_is_lacking(teacher: Teacher, student: Student) -> None:
    backbone, tokenizer, codes = teacher.backbone, teacher.tokenizer, teacher.codebook_VC
    check([
        (check_backbone, (None, 3, tokenizer, teacher), "is no Backbone: it lacks "),
        (lambda v: check_backbone(backbone, seed=v), WHOLE, "seed must be "),
        (lambda v: check_tokenizer(v, L), (None, 3, backbone, teacher), "is no Tokenizer: it lacks "),
        (lambda v: check_tokenizer(tokenizer, v), (*WHOLE, 0), "length must be "),
        (lambda v: check_student_backbone(v, codes), (None, 3, student), "is no Backbone: it lacks "),
        (lambda v: check_student_backbone(student.backbone, v), (None, codes.numpy()), "codebook_VC must be Tensor"),
        (lambda v: check_student_backbone(student.backbone, v), (codes[0], codes.double()), r"must be fp32 \[V,C\]"),
    ])  # fmt: skip


def test_what_people_have_at_hand_is_taken(pipe: DistilledPipeline, tmp_path: Path) -> None:
    """A label of numpy's, a tuple or range of labels, folders as text."""
    for labels in (np.int64(1), (1,), range(1, 2), torch.tensor(1), torch.tensor([1], dtype=torch.uint8)):
        out = pipe(labels, generator=seeded(0), output_type="latent")
        torch.testing.assert_close(out.images, pipe(1, generator=seeded(0), output_type="latent").images)
    assert pipe.teacher is not None
    manifest = make_manifest(pipe.teacher, "tiny", "0", PairsConfig(num=2, num_steps=2))
    assert write_pairs(pipe.teacher, manifest, str(tmp_path / "pairs"), show_progress=False) == 2
    assert len(Pairs(str(tmp_path / "pairs"))) == 2
    settings = make_settings(pipe, pipe.plan(1), model="tiny", classes=[0], num=1)
    assert write_folder(pipe, pipe.plan(1), settings, str(tmp_path / "set"), batch=1, show_progress=False) == 1
    assert draw_labels(np.array([0, 1]), 3).tolist() == [0, 1, 0]
