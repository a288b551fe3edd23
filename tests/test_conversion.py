"""Converting: what came in comes out bit for bit, what it is gets judged first."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from command import Capture, refused, run
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tiny import (
    VAR_SCALES,
    L,
    make_student,
    make_teacher,
    make_var_student,
    make_var_teacher,
    save_tiny,
    seeded,
    tree_of,
)  # fmt: skip
from upstream import OPTIONAL, OPTIONS, State

from ddecode import DistilledPipeline, load_teacher
from ddecode.checkpoint import ModelFolder
from ddecode.conversion import KINDS, Options, convert, family_of
from ddecode.teacher import Recipe
from third_party_loaders import identify, llamagen, var

SIZES = {"llamagen": ["--n-head", "2", "--block-size", str(L)], "var": ["--patch-nums", "1,2,3"]}


def cast(state: State, dtype: torch.dtype) -> State:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}


def identical(path: Path, state: State) -> None:
    """The file holds these names, types and bits, and no others."""
    back = load_file(path)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape, name
        assert back[name].flatten().view(torch.uint8).equal(tensor.contiguous().flatten().view(torch.uint8)), name


def there_and_back(tmp_path: Path, kind: str, state: State, tokenizer: State | None) -> Path:
    """The model folder on the way; asserts that what comes out is what came in."""
    torch.save({"model": state}, tmp_path / "state.pth")
    options = [*SIZES[family_of(kind)]]
    if tokenizer is not None:
        save_file(tokenizer, tmp_path / "tokens.safetensors")
        options += ["--tokenizer", tmp_path / "tokens.safetensors"]
    folder, out = tmp_path / "new" / "model", tmp_path / "out"
    assert run("convert", tmp_path / "state.pth", "--family", kind, "--out", folder, *options) == 0
    assert run("convert", folder, "--family", kind, "--out", out) == 0
    identical(out / "model.safetensors", state)
    assert sorted(tree_of(out)) == ["model.safetensors"] + (["tokenizer.safetensors"] if tokenizer else [])
    if tokenizer is not None:
        identical(out / "tokenizer.safetensors", tokenizer)
    return folder


# --- there and back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_in_comes_out_bit_for_bit(
    kind: str, dtype: torch.dtype, states: dict[str, State], tmp_path: Path
) -> None:
    tokenizer = cast(states[f"{family_of(kind)}-tokenizer"], dtype)
    folder = there_and_back(tmp_path, kind, cast(states[kind], dtype), tokenizer)
    assert sorted(tree_of(folder)) == ["config.json", "model.safetensors"]
    pipe = DistilledPipeline.from_pretrained(folder)
    steps = 2 if kind.startswith("dd1") else "teacher"
    assert pipe([0, 1], num_inference_steps=steps, generator=seeded(0), output_type="np").images.std() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_state_lacks_does_not_come_out(kind: str, states: dict[str, State], tmp_path: Path) -> None:
    def bare(state: State) -> State:
        return {n: t for n, t in state.items() if not n.endswith(OPTIONAL)}

    there_and_back(tmp_path, kind, bare(states[kind]), bare(states[f"{family_of(kind)}-tokenizer"]))


def test_old_rotary_factors_and_odd_types_come_out(states: dict[str, State], tmp_path: Path) -> None:
    factors = torch.randn(17, 8, 2, dtype=torch.float64)
    there_and_back(tmp_path, "llamagen", states["llamagen"] | {"freqs_cis": factors}, None)
    there = {"lvl_1L": states["var"]["lvl_1L"].int(), "head.bias": states["var"]["head.bias"].double()}
    (tmp_path / "var").mkdir()
    there_and_back(tmp_path / "var", "var", states["var"] | there, None)


def test_tensors_that_share_memory_come_out(states: dict[str, State], tmp_path: Path) -> None:
    state = dict(states["llamagen"])
    state["layers.1.ffn_norm.weight"] = state["layers.0.ffn_norm.weight"]
    there_and_back(tmp_path, "llamagen", state, None)


def test_a_folder_is_the_loaded_model(states: dict[str, State], tmp_path: Path) -> None:
    folder = there_and_back(tmp_path, "var", states["var"], states["var-tokenizer"])
    ours = load_teacher(folder)
    theirs = var.load_var(states["var"], states["var-tokenizer"], VAR_SCALES)
    ids = torch.randint(32, (2, 14), generator=seeded(0))
    assert torch.equal(ours.logits(ids, [0, 1]), theirs.logits(ids, [0, 1]))
    assert (ours.recipe.guidance_scale, ours.recipe.top_k, ours.recipe.top_p) == (2.0, 32, 0.95)
    assert load_teacher(str(folder)).recipe == ours.recipe


def test_a_llamagen_may_have_a_tokenizer_of_ones_own(states: dict[str, State]) -> None:
    tokenizer = make_teacher(seed=5).tokenizer
    teacher = llamagen.load_llamagen(states["llamagen"], tokenizer, n_head=2, block_size=L)
    assert teacher.tokenizer is tokenizer


def test_without_a_tokenizer_a_model_is_described_not_sampled(
    states: dict[str, State], tmp_path: Path, capsys: Capture
) -> None:
    folder = there_and_back(tmp_path, "llamagen", states["llamagen"], None)
    assert run("info", folder) == 0 and "heads" in capsys.readouterr().out
    error = refused(capsys, "sample", folder, "--steps", "teacher", "--out", tmp_path / "x.png")
    assert "model has no tokenizer: convert it again with --tokenizer" in error
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_teacher(folder)


@pytest.mark.parametrize("family", ["llamagen", "var"])
def test_classes_that_were_never_trained_are_left_out(
    family: str, states: dict[str, State], tmp_path: Path, capsys: Capture
) -> None:
    """What the others and the unconditional one say stays the same; a student's table is cut as well."""
    files = {kind: tmp_path / f"{kind}.safetensors" for kind in (family, f"dd1-{family}", f"{family}-tokenizer")}
    for kind, path in files.items():
        save_file({name: tensor.contiguous() for name, tensor in states[kind].items()}, path)
    options = [*SIZES[family], "--tokenizer", files[f"{family}-tokenizer"]]

    def converted(kind: str, out: str, *more: object) -> Path:
        assert run("convert", files[kind], "--family", kind, "--out", tmp_path / out, *options, *more) == 0
        return tmp_path / out

    whole = load_teacher(converted(family, "whole"))
    cut = load_teacher(converted(family, "cut", "--num-classes", 2))
    assert (whole.num_classes, cut.num_classes) == (4, 2)
    ids, labels = torch.randint(32, (2, whole.length), generator=seeded(0)), torch.tensor([0, 1])
    assert torch.equal(cut.logits(ids, labels), whole.logits(ids, labels))
    guided = Recipe(guidance_scale=3.0)
    assert torch.equal(whole.log_probs(ids, labels, guided), cut.log_probs(ids, labels, guided))
    student = ModelFolder.open(converted(f"dd1-{family}", "student", "--num-classes", 2)).student()
    assert student.num_classes == 2
    again = ["convert", files[family], "--family", family, "--out", tmp_path / "new", *options, "--num-classes"]
    assert "--num-classes must lie in 1..4, the classes of this state, got 5" in refused(capsys, *again, 5)


@pytest.mark.parametrize("family", ["llamagen", "var"])
def test_models_made_here_come_out_in_the_published_layout(
    family: str, states: dict[str, State], tmp_path: Path
) -> None:
    teacher: Any = make_teacher(seed=3) if family == "llamagen" else make_var_teacher(seed=3)
    student = make_student(teacher) if family == "llamagen" else make_var_student(teacher)
    pipe = DistilledPipeline(tokenizer=teacher.tokenizer, teacher=teacher, student=student)
    folder = save_tiny(tmp_path / "model", pipe)
    for kind in (family, f"dd1-{family}"):
        assert convert(str(folder), kind, tmp_path / kind)[1:] == ["tokenizer"]
        out = load_file(tmp_path / kind / "model.safetensors")
        assert {n: (t.shape, t.dtype) for n, t in out.items()} == {
            n: (t.shape, t.dtype) for n, t in states[kind].items()
        }, "derived buffers are computed"
        assert all(torch.equal(out[n], states[kind][n]) for n in out if n.endswith(OPTIONAL))
        assert identify(tmp_path / kind)[0] == kind
        again = tmp_path / f"{kind}-again"
        tokens = str(tmp_path / kind / "tokenizer.safetensors")
        convert(str(tmp_path / kind), kind, again, tokenizer=tokens, options=OPTIONS[family])
        part = "student" if kind.startswith("dd1") else "teacher"
        ours, theirs = ModelFolder.open(folder).state(part), ModelFolder.open(again).state(part)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize(
    ("kind", "options", "starts", "split"),
    [
        ("dd1-var", {}, [0, 1], 1),
        ("dd1-llamagen", {}, [0, 5], 5),
        ("dd1-llamagen", {"starts": (0, 4, 8), "split": 0}, [0, 4, 8], 0),
    ],
)
def test_starts_and_split(
    kind: str, options: dict[str, Any], starts: list[int], split: int, states: dict[str, State], tmp_path: Path
) -> None:
    save_file(states[kind], tmp_path / "x.safetensors")
    sizes = OPTIONS[family_of(kind)].given
    convert(str(tmp_path / "x.safetensors"), kind, tmp_path / "model", options=Options(**sizes | options))
    group = ModelFolder.open(tmp_path / "model").config["student"]
    assert (group["starts"], group["split"]) == (starts, split)


def test_published_students_start_where_they_were_trained() -> None:
    scales = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    sizes: dict[str, Any] = {"vocab_size": 4096, "code_width": 32, "width": 64, "heads": 1, "patch_nums": scales}
    found = {depth: var.student_spans(var.VARConfig(depth=depth, **sizes)) for depth in (16, 20, 24, 30)}
    assert found == {16: ((0, 55), 55), 20: ((0, 30), 30), 24: ((0, 30), 30), 30: ((0, 30), 30)}
    tokens = [
        llamagen.student_spans(llamagen.TransformerConfig(vocab_size=8, width=width, depth=1, heads=8, code_width=8))
        for width in (768, 1024, 1280)
    ]
    assert tokens == [((0, 80), 80), ((0, 80), 130), ((0, 80), 130)]


# --- judging --------------------------------------------------------------------------------------------------


def test_every_kind_is_recognised_and_described(states: dict[str, State], tmp_path: Path, capsys: Capture) -> None:
    for kind, state in states.items():
        assert identify(state)[0] == kind
        for name in sorted(state)[::7]:
            assert identify({n: t for n, t in state.items() if n != name})[0] == kind, f"without {name}"
        torch.save({"trainer": {"ema_parameters": cast(state, torch.float16)}}, tmp_path / "x.pth")
        assert run("info", tmp_path / "x.pth", "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["kind"], facts["wrapper"]) == (kind, "trainer.ema_parameters")
        assert facts["dtype"] == "float16"
        assert facts["parameters"] == sum(t.numel() for n, t in state.items() if not n.endswith(OPTIONAL))
    assert run("info", tmp_path / "x.pth") == 0
    assert "kind: " in capsys.readouterr().out


def test_of_a_training_file_model_and_tokenizer_are_both_found(states: dict[str, State], tmp_path: Path) -> None:
    trainer = {"var_wo_ddp": states["dd1-var"], "ema_parameters": cast(states["dd1-var"], torch.bfloat16)}
    torch.save({"trainer": trainer | {"vae_local": states["var-tokenizer"]}}, tmp_path / "ar-ckpt.pth")
    path = str(tmp_path / "ar-ckpt.pth")
    convert(path, "dd1-var", tmp_path / "model", tokenizer=path, options=OPTIONS["var"])
    convert(str(tmp_path / "model"), "dd1-var", tmp_path / "out")
    identical(tmp_path / "out" / "model.safetensors", cast(states["dd1-var"], torch.bfloat16))
    identical(tmp_path / "out" / "tokenizer.safetensors", states["var-tokenizer"])


def test_the_hub_is_asked_for_a_model_then_for_a_state(
    states: dict[str, State], model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(states["var"], tmp_path / "var_d16.pth")
    folder = tmp_path
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(folder))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: [f.name for f in tmp_path.iterdir()])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: str(tmp_path / name))
    assert run("info", "someone/something") == 0
    assert "kind: var" in capsys.readouterr().out
    folder = model
    assert run("info", "someone/something") == 0
    assert "family: llamagen" in capsys.readouterr().out

    def offline(*args: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert "the hub does not give it: offline" in refused(capsys, "info", "someone/something")
