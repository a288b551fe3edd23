"""What `ddecode convert` refuses: judged first, named as upstream names it, and nothing left behind."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Capture, refused, run
from safetensors.torch import save_file
from tiny import L, make_var_teacher, tree_of
from upstream import OPTIONS, State

from ddecode.conversion import KINDS, Options, convert, family_of
from ddecode.teacher import Teacher
from third_party_loaders import load_dd1_student, load_llamagen, load_var


@pytest.mark.parametrize("kind", KINDS)
def test_another_family_is_named_before_all_else(
    kind: str, states: dict[str, State], tmp_path: Path, capsys: Capture
) -> None:
    save_file(states[kind], tmp_path / "x.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for other in KINDS:
        if other != kind:
            wrong = ["--tokenizer", "nowhere.pth", "--out", tmp_path / "full", "--split", 3]
            error = refused(capsys, "convert", tmp_path / "x.safetensors", "--family", other, *wrong)
            assert f"({kind}), not {other}: give --family {kind}" in error
    assert tree_of(tmp_path / "full") == {"file": b"mine"}


def test_a_model_folder_is_judged_first(model: Path, tmp_path: Path, capsys: Capture) -> None:
    error = refused(capsys, "convert", model, "--family", "var", "--tokenizer", "x.pth", "--out", model)
    assert "tiny is a ddecode model, not var: it converts to --family llamagen or dd1-llamagen" in error
    error = refused(capsys, "convert", model, "--family", "llamagen", "--tokenizer", "x.pth", "--out", tmp_path / "o")
    assert "--tokenizer is for upstream's states" in error
    error = refused(capsys, "convert", model, "--family", "llamagen", "--out", model)
    assert "is there already" in error and sorted(tree_of(model)) == ["config.json", "model.safetensors"]


def break_missing(state: State) -> str:
    del state["final_layer_conti.linear.bias"], state["blocks.1.attn.proj.weight"]
    return "missing blocks.1.attn.proj.weight, final_layer_conti.linear.bias"


def break_extra(state: State) -> str:
    state["surprise"] = torch.zeros(1)
    return "unknown surprise"


def break_shape(state: State) -> str:
    state["layerwise_n_d_embed.0.weight"] = torch.zeros(3)
    return "misshapen layerwise_n_d_embed.0.weight is (3,), expected (16, 16)"


def break_sizes(state: State) -> str:
    state["head.weight"] = torch.zeros(3)
    return "misshapen head.weight is (3,), expected 2 dimensions"


def break_buffer(state: State) -> str:
    state["attn_bias_for_masking"] = torch.zeros_like(state["attn_bias_for_masking"])
    return "attn_bias_for_masking of this state does not belong to patch_nums [1, 2, 3]"


@pytest.mark.parametrize("change", [break_missing, break_extra, break_shape, break_sizes, break_buffer])
def test_wrong_keys_are_named_as_upstream_names_them(
    change: Callable[[State], str], states: dict[str, State], tmp_path: Path, capsys: Capture
) -> None:
    state = dict(states["dd1-var"])
    named = change(state)
    torch.save(state, tmp_path / "x.pth")
    out = tmp_path / "new" / "model"
    assert named in refused(capsys, "convert", tmp_path / "x.pth", "--family", "dd1-var", "--out", out)
    assert not out.parent.exists()
    assert run("info", tmp_path / "x.pth") == 0 and named in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["var-tokenizer", "llamagen-tokenizer"])
def test_wrong_keys_of_a_tokenizer_are_named(kind: str, states: dict[str, State], tmp_path: Path) -> None:
    family = family_of(kind)
    name = {"var": "encoder.mid.attn_1.qkv.weight", "llamagen": "decoder.conv_blocks.0.res.0.conv1.bias"}[family]
    save_file(states[family], tmp_path / "x.safetensors")
    for change, message in (
        ({name: None}, f"missing {name}"),
        ({"more": torch.zeros(1)}, "unknown more"),
        ({name: torch.zeros(6)}, rf"misshapen {name} is \(6,\), expected"),
    ):
        state = {n: t for n, t in (states[kind] | change).items() if t is not None}
        save_file(state, tmp_path / "tokens.safetensors")
        with pytest.raises(ValueError, match=message):
            convert(
                str(tmp_path / "x.safetensors"),
                family,
                tmp_path / "model",
                tokenizer=str(tmp_path / "tokens.safetensors"),
                options=OPTIONS[family],
            )
    assert not (tmp_path / "model").exists()


HARM: dict[str, tuple[Callable[[State, str], State], str]] = {
    "NaN": (lambda state, name: state | {name: state[name] * math.nan}, "NaN or infinity in "),
    "whole numbers": (lambda state, name: state | {name: state[name].int()}, "not floating: "),
    "turned": (lambda state, name: state | {name: state[name].T[1:]}, "misshapen|codes of width"),
    "none": (lambda state, name: {n: t for n, t in state.items() if n != name}, "missing"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("kind", KINDS)
def test_harm_to_a_state_is_named(
    kind: str, harm: str, suffix: str, states: dict[str, State], teacher: Teacher, tmp_path: Path
) -> None:
    family, path, (change, message) = family_of(kind), tmp_path / f"x{suffix}", HARM[harm]
    tokens = make_var_teacher().tokenizer if family == "var" else teacher.tokenizer
    sizes: Any = OPTIONS[family].given

    def load() -> object:
        if kind.startswith("dd1"):
            return load_dd1_student(path, tokens, family, **sizes, split=5)  # type: ignore[arg-type]
        return {"var": load_var, "llamagen": load_llamagen}[family](path, states[f"{family}-tokenizer"], **sizes)

    def write(state: State) -> None:
        save_file({n: t.contiguous() for n, t in state.items()}, path) if suffix != ".pth" else torch.save(state, path)

    name = "output.weight" if family == "llamagen" else "head.weight"
    write(dict(states[kind]))
    load()
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"x\{suffix} .*damaged"):
            load()
    write(change(dict(states[kind]), name))
    with pytest.raises(ValueError, match=message) as caught:
        load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.st.safetensors", "--n-head", "2"], "--n-head is no option of --family var, which takes --patch-nums"),
        (["x.st.safetensors", "--starts", "0"], "--starts is no option of --family var"),
        (["x.st.safetensors", "--patch-nums", "1,3"], "patch_nums [1, 3] do not fit"),
        (["x.st.safetensors", "--patch-nums", "1,x"], "'1,x' is no list of whole numbers"),
        (
            ["x.st.safetensors", "--tokenizer", "x.st.safetensors"],
            "not var-tokenizer: --tokenizer takes a VAR tokenizer",
        ),
        (["x.st.safetensors", "--tokenizer", "nowhere.pth"], "no checkpoint file nowhere.pth"),
        (["x.st.safetensors", "--tokenizer", "small.safetensors"], "32 codes of width 8, the tokenizer 20 of width 8"),
        (["tokens.safetensors"], "is a VAR tokenizer (var-tokenizer), not var: give its transformer as STATE"),
        (["nowhere.pth"], "no checkpoint file nowhere.pth"),
        (["nowhere"], "unknown model 'nowhere'"),
        (["other.safetensors"], "other.safetensors is none of var, dd1-var, var-tokenizer, llamagen"),
        (["broken.pth"], "broken.pth cannot be read safely: it is damaged"),
        (["empty"], "empty holds no file with weights"),
        (["damaged"], "config.json is damaged"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    arguments: list[str],
    message: str,
    states: dict[str, State],
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    small = states["var-tokenizer"] | {
        "quantize.embedding.weight": torch.zeros(20, 8),
        "quantize.ema_vocab_hit_SV": torch.zeros(3, 20),
    }
    save_file(states["var"], "x.st.safetensors")
    save_file(states["var-tokenizer"], "tokens.safetensors")
    save_file(small, "small.safetensors")
    save_file({"a": torch.zeros(1)}, "other.safetensors")
    Path("broken.pth").write_bytes(b"PK\x03\x04 and no more")
    Path("empty").mkdir()
    Path("damaged").mkdir()
    Path("damaged/config.json").write_text("{")
    before = tree_of(tmp_path)
    assert message in refused(capsys, "convert", *arguments, "--family", "var", "--out", "new/model")
    assert tree_of(tmp_path) == before and not Path("new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": 17}, r"split must lie in 0\.\.16, got 17"),
        ({"starts": (0, 16)}, r"starts must lie in 0\.\.15"),
        ({"starts": (4, 8)}, "starts must begin with 0"),
        ({"patch_nums": (1, 2)}, "--patch-nums is no option of --family dd1-llamagen"),
        ({"block_size": 15}, "15 tokens do not form a square"),
    ],
    ids=str,
)
def test_wrong_options_of_a_student_are_refused(
    options: dict[str, Any], message: str, states: dict[str, State], tmp_path: Path
) -> None:
    save_file(states["dd1-llamagen"], tmp_path / "x.safetensors")
    given = Options(**{"n_head": 2, "block_size": L} | options)
    with pytest.raises(ValueError, match=message):
        convert(str(tmp_path / "x.safetensors"), "dd1-llamagen", tmp_path / "out", options=given)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_there_is_refused_unless_empty(
    states: dict[str, State], tmp_path: Path, capsys: Capture
) -> None:
    save_file(states["var"], tmp_path / "x.safetensors")
    command = ["convert", tmp_path / "x.safetensors", "--family", "var", "--out"]
    full, empty = tmp_path / "full", tmp_path / "empty"
    for folder in (full, empty):
        folder.mkdir()
    (full / "file").write_text("mine")
    for out in (full, full / "file"):
        assert "is there already: give a new or an empty folder" in refused(capsys, *command, out)
    assert tree_of(full) == {"file": b"mine"}
    assert run(*command, empty, "--patch-nums", "1,2,3") == 0
    assert sorted(tree_of(empty)) == ["config.json", "model.safetensors"]


def test_a_full_disk_leaves_nothing(
    states: dict[str, State], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(states["var"], tmp_path / "x.safetensors")
    before = tree_of(tmp_path)

    def full(*arguments: Any) -> None:
        Path(arguments[1]).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("ddecode.checkpoint.save_file", full)
    command = ["convert", tmp_path / "x.safetensors", "--family", "var", "--out", tmp_path / "model"]
    assert "no space left" in refused(capsys, *command)
    assert tree_of(tmp_path) == before and not list(tmp_path.glob(".model*"))
