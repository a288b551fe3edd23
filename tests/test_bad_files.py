"""Damaged and hostile files to every reader: one line that names them, little memory, and no code run."""

import json
import os
import pickle
import random
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Capture, refused
from safetensors.torch import load_file, save_file
from tiny import distill_recipe, make_teacher, make_var_teacher, save_tiny, tree_of, write_yaml

from ddecode import DistilledPipeline
from ddecode.checkpoint import ModelFolder
from ddecode.config import PairsConfig
from ddecode.pairs import Pairs, make_manifest, read_shard, write_pairs
from ddecode.teacher import Teacher
from third_party_loaders import identify, load_dd1_student, load_llamagen, load_var
from third_party_loaders.state import read_state

MIB = 1 << 20


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """A reader that asks for three gigabytes more than there were fails."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3072 * MIB, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# --- safetensors ----------------------------------------------------------------------------------------------

NAME = "teacher.norm.weight"


def parts_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def file_of(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def changed(data: bytes, name: str, **entry: Any) -> bytes:
    """With another entry for one tensor."""
    header, body = parts_of(data)
    return file_of(header | {name: header[name] | entry}, body)


def twice(data: bytes, name: str) -> bytes:
    """A header that names one tensor twice, at different places."""
    header, body = parts_of(data)
    other = next(entry for key, entry in header.items() if key not in (name, "__metadata__"))
    return file_of(json.dumps(header)[:-1].encode() + f', "{name}": {json.dumps(other)}}}'.encode(), body)


Damage = Callable[[bytes, str], bytes]
DAMAGES: dict[str, Damage] = {
    "empty": lambda data, name: b"",
    "zeros": lambda data, name: bytes(8),
    "header of 2^60 bytes": lambda data, name: struct.pack("<Q", 1 << 60) + data[8:],
    "header of 2^64 - 1 bytes": lambda data, name: b"\xff" * 8 + data[8:],
    "header of 90 MB that is not there": lambda data, name: struct.pack("<Q", 90_000_000) + data[8:],
    "header cut": lambda data, name: data[:60],
    "body gone": lambda data, name: data[: 8 + int.from_bytes(data[:8], "little")],
    "body cut": lambda data, name: data[:-1],
    "body longer": lambda data, name: data + b"x",
    "header no JSON": lambda data, name: file_of(b"x" * 50, b""),
    "header deep": lambda data, name: file_of(b'{"a":' + b"[" * 50_000, b""),
    "header a list": lambda data, name: file_of([], b""),
    "header not UTF-8": lambda data, name: file_of(b"\xff\xfe{}", b""),
    "no tensors": lambda data, name: file_of({}, b""),
    "a tensor twice": twice,
    "another type": lambda data, name: changed(data, name, dtype="F64"),
    "no such type": lambda data, name: changed(data, name, dtype="F12"),
    "no type": lambda data, name: changed(data, name, dtype=None),
    "shape too large": lambda data, name: changed(data, name, shape=[1 << 62, 1 << 62]),
    "shape negative": lambda data, name: changed(data, name, shape=[-1]),
    "shape no list": lambda data, name: changed(data, name, shape="32"),
    "places overlap": lambda data, name: changed(data, name, data_offsets=[0, 128]),
    "places backwards": lambda data, name: changed(data, name, data_offsets=[128, 0]),
    "places beyond the end": lambda data, name: changed(data, name, data_offsets=[1 << 40, (1 << 40) + 128]),
    "a pickle": lambda data, name: pickle.dumps({"a": 1}),
    "a page": lambda data, name: b"<!doctype html><html>404</html>",
    "a pointer of git-lfs": lambda data, name: b"version https://git-lfs.github.com/spec/v1\nsize 1234\n",
    "noise": lambda data, name: random.Random(0).randbytes(5000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_named(damage: str, copy: Path, tmp_path: Path, capsys: Capture) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(DAMAGES[damage](path.read_bytes(), NAME))
    before = tree_of(tmp_path)
    for arguments in (("info",), ("sample", "--out", tmp_path / "new.png"), ("convert", "--family", "llamagen")):
        more = ("--out", tmp_path / "new") if arguments[0] == "convert" else ()
        line = refused(capsys, arguments[0], copy, *arguments[1:], *more)
        assert "model.safetensors" in line or "this state is no" in line
    with pytest.raises(ValueError, match=r"model\.safetensors|is empty|none of var"):
        identify(path)
    assert tree_of(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [{key: value} for key in ("length", "code_width", "num_classes", "num", "seed")
     for value in (None, -1, 10**9, 10**30, "x", 7)]
    + [{"recipe": {"top_l": 1}}, {"recipe": {"top_k": -1}}, {"precision": "fp8"}]
    + [{"shard_size": size} for size in (0, 2, 10**30)],
    ids=str,
)  # fmt: skip
def test_manifests_that_are_not_the_shards_are_named(
    change: dict[str, Any], shard: Path, model: Path, tmp_path: Path, capsys: Capture
) -> None:
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    (pairs / shard.name).write_bytes(shard.read_bytes())
    manifest = json.loads((shard.parent / "manifest.json").read_text())
    manifest["teacher_hash"] = ModelFolder.open(model).teacher_hash()
    (pairs / "manifest.json").write_text(json.dumps(manifest | change))
    recipe = write_yaml(tmp_path / "recipe.yaml", distill_recipe(model))
    before = tree_of(tmp_path)
    assert "pairs" in refused(capsys, "distill", "--config", recipe, "--pairs", pairs, "--out", tmp_path / "run")
    assert tree_of(tmp_path) == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shards_are_named(damage: str, shard: Path, tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    path.write_bytes(DAMAGES[damage](shard.read_bytes(), "labels"))
    with pytest.raises(ValueError, match=r"pair shard .*shard\.safetensors is damaged"):
        read_shard(path)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    manifest = make_manifest(make_teacher(), "tiny", "0123", PairsConfig(num=3, num_steps=4))
    write_pairs(make_teacher(), manifest, folder, show_progress=False)
    return folder / "shard-00000.safetensors"


def test_any_byte_of_a_header_may_be_wrong(copy: Path) -> None:
    path, rng = copy / "model.safetensors", random.Random(1)
    data = path.read_bytes()
    body = 8 + int.from_bytes(data[:8], "little")
    for _ in range(40):
        wrong = bytearray(data)
        for _ in range(rng.choice((1, 2, 5))):
            wrong[rng.randrange(body)] = rng.randrange(256)
        path.write_bytes(wrong)
        try:
            DistilledPipeline.from_pretrained(copy)
        except ValueError as error:
            assert "\n" not in str(error)


WEIGHTS = ("teacher.norm.weight", "tokenizer.quantize.embedding.weight", "student.indicator.weight")


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_that_are_not_finite_are_refused(name: str, value: float, dtype: torch.dtype, copy: Path) -> None:
    state = load_file(copy / "model.safetensors")
    state[name] = state[name].to(dtype)
    state[name].view(-1)[3] = value
    save_file(state, copy / "model.safetensors")
    with pytest.raises(ValueError, match=f"NaN or infinity in {name.partition('.')[2]}$"):
        DistilledPipeline.from_pretrained(copy)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.uint8], ids=str)
def test_weights_of_another_kind_are_refused(name: str, dtype: torch.dtype, copy: Path) -> None:
    state = load_file(copy / "model.safetensors")
    save_file(state | {name: state[name].to(dtype)}, copy / "model.safetensors")
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"not floating: {name.partition('.')[2]} is {kind}$"):
        DistilledPipeline.from_pretrained(copy)


@pytest.mark.parametrize("other", [make_var_teacher(), make_teacher(width=48)], ids=["family", "size"])
def test_weights_of_another_model_are_refused(other: Teacher, copy: Path, tmp_path: Path) -> None:
    theirs = save_tiny(tmp_path / "theirs", DistilledPipeline(tokenizer=other.tokenizer, teacher=other))
    for folder, weights in ((copy, theirs), (theirs, copy)):
        both = shutil.copytree(folder, tmp_path / "both", dirs_exist_ok=True)
        shutil.copy(weights / "model.safetensors", both)
        with pytest.raises(ValueError, match=r"this state is no .*: (missing|misshapen) "):
            DistilledPipeline.from_pretrained(both)


def test_large_finite_weights_are_taken(copy: Path) -> None:
    """Their sum is not finite, they are."""
    state = load_file(copy / "model.safetensors")
    state["tokenizer.decoder.conv_out.weight"].fill_(3e38)
    save_file(state, copy / "model.safetensors")
    DistilledPipeline.from_pretrained(copy)


# --- configs of models ----------------------------------------------------------------------------------------


def paths_of(tree: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield (*above, key)
        yield from paths_of(value, (*above, key))


def test_every_value_of_a_config_may_be_wrong(copy: Path, capsys: Capture) -> None:
    path = copy / "config.json"
    good = path.read_text()
    for place in paths_of(json.loads(good)):
        harmless = 0
        for value in (None, "x", -1, 10**9, [10**9], {"a": 1}):
            tree = json.loads(good)
            group = tree
            for key in place[:-1]:
                group = group[key]
            group[place[-1]] = value
            path.write_text(json.dumps(tree))
            try:
                DistilledPipeline.from_pretrained(copy)
            except ValueError as error:
                assert "\n" not in str(error), (place, value)
            else:
                harmless += 1
        assert harmless <= 3 or place == ("features",), place


@pytest.mark.parametrize(
    "text",
    [
        b"", b"null", b"3", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 50_000, b" " * (17 * MIB),
        b'{"format": ' + b"9" * 5000,
    ],
    ids=range(9),
)  # fmt: skip
def test_texts_that_are_no_config(text: bytes, copy: Path, tmp_path: Path, capsys: Capture) -> None:
    (copy / "config.json").write_bytes(text)
    refused(capsys, "info", copy)
    refused(capsys, "convert", copy, "--family", "var", "--out", tmp_path / "y")
    assert "config.json" in refused(capsys, "sample", copy, "--out", tmp_path / "x.png")
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    (pairs / "manifest.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        Pairs(pairs)


# --- pickles and zip files ------------------------------------------------------------------------------------


class Evil:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def zip_bomb(path: Path, entry: str, size: int) -> None:
    """A small file with an entry of zeros that is large when it is read."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(f"archive/{entry}", "w", force_zip64=True) as stream:
            for _ in range(size // MIB):
                stream.write(bytes(MIB))
        archive.writestr("archive/version", "3\n")


def save_pth(tree: Any, path: Path) -> None:
    torch.save(tree, path)


def recursive() -> dict[str, Any]:
    tree: dict[str, Any] = {}
    tree["model"] = tree
    return tree


STATE = {"a": torch.zeros(3)}
PICKLES: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: path.write_bytes(b"") and None,
    "text": lambda path: path.write_bytes(b"hello") and None,
    "noise": lambda path: path.write_bytes(random.Random(2).randbytes(3000)) and None,
    "an empty zip": lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)) and None,
    "a string of 2 GB": lambda path: path.write_bytes(b"\x80\x02X" + struct.pack("<I", 1 << 31)) and None,
    "a number of 2 GB": lambda path: path.write_bytes(b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1)) and None,
    "a bare pickle": lambda path: path.write_bytes(pickle.dumps(Evil(os.mkdir, "pwned"))) and None,
    "a function": lambda path: save_pth(STATE | {"x": Evil(os.mkdir, "pwned")}, path),
    "eval": lambda path: save_pth(STATE | {"x": Evil(eval, "open('pwned', 'w')")}, path),
    "a large buffer": lambda path: save_pth(STATE | {"x": Evil(bytearray, 1 << 34)}, path),
    "a large buffer, old": lambda path: path.write_bytes(pickle.dumps(Evil(bytearray, 1 << 34))) and None,
    "numbers repeated": lambda path: save_pth({"layers.0.w": torch.zeros(1).expand(1 << 20, 1 << 20)}, path),
    "a large array": lambda path: save_pth(STATE | {"x": Evil(torch.zeros, 1 << 40)}, path),
    "a zip bomb": lambda path: zip_bomb(path, "data.pkl", 64 * MIB),
    "a list": lambda path: save_pth([1, 2], path),
    "a tensor": lambda path: save_pth(torch.zeros(3), path),
    "no weights": lambda path: save_pth({"model": {"lr": 1}}, path),
    "itself": lambda path: save_pth(recursive(), path),
    "another model": lambda path: save_pth(STATE, path),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_are_named_and_not_run(
    kind: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    PICKLES[kind](tmp_path / "x.pth")
    assert "x.pth" in refused(capsys, "info", "x.pth")
    assert "x.pth" in refused(capsys, "convert", "x.pth", "--family", "var", "--out", "new")
    with pytest.raises(ValueError, match=r"x\.pth|this state"):
        load_var("x.pth", "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth|this state"):
        load_llamagen("x.pth", "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth|this state"):
        load_dd1_student("x.pth", make_teacher().tokenizer, "llamagen", split=3)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


def test_any_byte_of_a_pickle_may_be_wrong(tmp_path: Path) -> None:
    path, rng = tmp_path / "x.pth", random.Random(3)
    save_pth({f"layers.{i}.w": torch.randn(4, 4) for i in range(4)}, path)
    data = path.read_bytes()
    for _ in range(60):
        wrong = bytearray(data)
        for _ in range(rng.choice((1, 4))):
            wrong[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(wrong)
        try:
            read_state(path)
        except ValueError as error:
            assert "\n" not in str(error)


def upstream_like() -> dict[str, torch.Tensor]:
    """Names that make a LlamaGen transformer."""
    return {
        "output.weight": torch.zeros(8, 64), "tok_embeddings.weight": torch.zeros(8, 64),
        "layers.0.feed_forward.w1.weight": torch.zeros(4, 64),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.99999999.x": torch.zeros(1)}, "must be numbered 0, 1, 2, ... without a gap"),
        ({"layers.x.y": torch.zeros(1)}, "without a gap"),
        ({"layers.": torch.zeros(1)}, "without a gap"),
        ({"output.weight": torch.zeros(1).expand(1 << 40, 64)}, r"other tensors than plain numbers: output\.weight"),
        ({"output.weight": torch.zeros(8, 64, device="meta")}, r"other tensors than plain numbers: output\.weight"),
        ({"output.weight": torch.zeros(8, 64).to_sparse()}, r"other tensors than plain numbers: output\.weight"),
        ({"output.weight": torch.zeros(())}, "expected 2 dimensions"),
        ({"output.weight": torch.zeros(0, 0)}, "none 0"),
    ],
    ids=["layer", "word", "none", "wide", "meta", "sparse", "scalar", "empty"],
)
def test_made_up_names_and_shapes_build_nothing(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_llamagen(upstream_like() | change, {})


@pytest.mark.parametrize("option", [{"n_head": 0}, {"n_head": 7}, {"block_size": 0}, {"block_size": 1 << 40}])
def test_sizes_from_outside_are_checked(option: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"head|block_size"):
        load_llamagen(upstream_like(), {}, **option)
