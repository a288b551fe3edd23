"""Pairs on disk: the same bytes however the work was cut up, and no damage goes unnoticed."""

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import C, L, tree_of

from ddecode import pairs as module
from ddecode.config import PairsConfig
from ddecode.pairs import ForcedPairs, Manifest, Pairs, make_manifest, read_shard, write_pairs
from ddecode.randomness import sample_seed
from ddecode.teacher import Recipe, Teacher
from ddecode.trajectory import resolve

CONFIG = PairsConfig(num=28, num_steps=8, seed=3, batch=4, shard_size=9)
SHARDS = [f"shard-{i:05d}.safetensors" for i in range(4)]


def manifest_of(teacher: Teacher, config: PairsConfig = CONFIG, **changes: Any) -> Manifest:
    return make_manifest(teacher, "tiny", "0123", dataclasses.replace(config, **changes))


def write(teacher: Teacher, folder: Path, **changes: Any) -> int:
    return write_pairs(teacher, manifest_of(teacher, **changes), folder, show_progress=False)


@pytest.fixture(scope="module")
def whole(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written in one go. Shared: do not change it."""
    folder = tmp_path_factory.mktemp("pairs") / "whole"
    assert write(teacher, folder) == 28
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def test_a_folder_holds_a_manifest_and_shards(whole: Path) -> None:
    assert sorted(tree_of(whole)) == ["manifest.json", *SHARDS]
    assert json.loads((whole / "manifest.json").read_text())["num"] == 28
    shards = [read_shard(whole / name) for name in SHARDS]
    assert [len(s["ids"]) for s in shards] == [9, 9, 9, 1]
    assert all(set(s) == {"ids", "labels", "seeds"} for s in shards)


def test_pairs_are_what_resolve_makes_of_the_seeded_noise(whole: Path, teacher: Teacher) -> None:
    pairs = Pairs(whole, teacher_hash="0123")
    assert len(pairs) == 28
    noise, ids, labels = pairs.batch(list(range(28)))
    assert labels.tolist() == [i % 4 for i in range(28)]
    assert pairs.seeds_N.tolist() == [sample_seed(3, i) for i in range(28)] and pairs.seeds_N.unique().numel() == 28
    for i in (0, 9, 27):
        g = torch.Generator().manual_seed(sample_seed(3, i))
        assert torch.equal(noise[i], torch.randn(L, C, generator=g))
    recipe = teacher.recipe
    expected = resolve(
        teacher,
        noise,
        labels,
        guidance_scale=recipe.guidance_scale,
        top_k=recipe.top_k,
        top_p=recipe.top_p,
        num_steps=8,
    )
    assert ids.dtype == torch.int64 and torch.equal(ids, expected)
    few = pairs.batch([5, 2])
    assert torch.equal(few[0], noise[[5, 2]]) and torch.equal(few[1], ids[[5, 2]])


def test_no_two_samples_of_any_sets_share_a_seed() -> None:
    assert len({sample_seed(seed, i) for seed in range(20) for i in range(50)}) == 20 * 50


def test_a_recipe_in_the_config_replaces_the_teachers(teacher: Teacher, tmp_path: Path) -> None:
    write(teacher, tmp_path / "a", num=4, recipe=Recipe(guidance_scale=3.0))
    pairs = Pairs(tmp_path / "a")
    noise, ids, labels = pairs.batch([0, 1, 2, 3])
    assert torch.equal(ids, resolve(teacher, noise, labels, guidance_scale=3.0, num_steps=8))


def test_missing_shards_come_back_byte_for_byte(whole: Path, copy: Path, teacher: Teacher) -> None:
    rng = random.Random(0)
    for _ in range(3):
        gone = rng.sample(SHARDS, rng.randint(1, 4))
        for name in gone:
            (copy / name).unlink()
        write(teacher, copy)
        assert tree_of(copy) == tree_of(whole), gone
    assert write(teacher, copy) == 0


@pytest.mark.parametrize("kill_at", [0, 1, 2, 4])
def test_a_killed_run_goes_on_to_the_same_bytes(
    kill_at: int, whole: Path, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, write_aside = [], module.write_aside

    def killed(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) - 1 == kill_at:  # half written beside its name, as SIGKILL leaves it
            path.with_name(path.name + ".new").write_bytes(data[: len(data) // 2])
            raise KeyboardInterrupt
        write_aside(path, data)

    folder = tmp_path / "killed"
    monkeypatch.setattr(module, "write_aside", killed)
    with pytest.raises(KeyboardInterrupt):
        write(teacher, folder)
    monkeypatch.setattr(module, "write_aside", write_aside)
    assert len([name for name in tree_of(folder) if name in SHARDS]) == max(0, kill_at - 1)
    write(teacher, folder)
    assert tree_of(folder) == tree_of(whole)


def test_a_grown_number_equals_that_number_at_once(whole: Path, teacher: Teacher, tmp_path: Path) -> None:
    for num in (5, 12, 28):
        write(teacher, tmp_path / "grown", num=num)
        assert len(Pairs(tmp_path / "grown")) == num
    assert tree_of(tmp_path / "grown") == tree_of(whole)


def test_a_number_that_was_too_large_may_be_taken_back(whole: Path, copy: Path, teacher: Teacher) -> None:
    """As long as it is not less than what was made."""
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"num": 3_000_000}))
    with pytest.raises(ValueError, match="holds 28 pairs already; --num may only grow, got 27"):
        write(teacher, copy, num=27)
    write(teacher, copy, num=28)
    assert tree_of(copy) == tree_of(whole)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied", "missing", "swapped"])
def test_a_damaged_shard_is_named(damage: str, copy: Path, teacher: Teacher) -> None:
    path = copy / SHARDS[1]
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-5] ^= 1
        path.write_bytes(data)
    elif damage == "truncated":
        path.write_bytes(data[:-10])
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "swapped":
        path.write_bytes((copy / SHARDS[3]).read_bytes())
    else:
        path.unlink()
    with pytest.raises(ValueError, match=SHARDS[1]):
        Pairs(copy)
    if damage not in ("missing", "swapped"):
        with pytest.raises(ValueError, match=SHARDS[1]):
            write(teacher, copy)


def test_every_changed_byte_of_a_shard_is_noticed(whole: Path, tmp_path: Path) -> None:
    """Of its header, too, where it matters."""
    data, expected = (whole / SHARDS[3]).read_bytes(), read_shard(whole / SHARDS[3])
    body = 8 + int.from_bytes(data[:8], "little")
    path = tmp_path / "broken.safetensors"
    for place in [*range(body), *random.Random(1).sample(range(body, len(data)), 20)]:
        path.write_bytes(
            data[:place] + bytes([data[place] ^ random.Random(place).randrange(1, 256)]) + data[place + 1 :]
        )
        try:
            tensors = read_shard(path)
        except ValueError as error:
            assert "broken.safetensors is damaged" in str(error)
            continue
        assert place < body and all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("name", "how"),
    [("ids", (16, 9)), ("ids", (144,)), ("ids", (9, 4, 4)), ("labels", (3, 3)), ("ids", torch.float32),
     ("seeds", torch.float64)],
)  # fmt: skip
def test_dtypes_and_shapes_are_checked_as_values_are(name: str, how: Any, whole: Path, tmp_path: Path) -> None:
    tensors = read_shard(whole / SHARDS[0])
    path = tmp_path / "shard.safetensors"
    for broken in (tensors | {name: tensors[name].view(how)}, {k: t for k, t in tensors.items() if k != name}):
        save_file(broken, path, metadata={"checksum": module.checksum(broken)})
        with pytest.raises(ValueError, match=r"shard\.safetensors is damaged"):
            read_shard(path)


def test_shards_that_were_swapped_are_named(copy: Path, teacher: Teacher) -> None:
    first, second = (copy / name for name in SHARDS[:2])
    first.rename(copy / "x")
    second.rename(first)
    (copy / "x").rename(second)
    for read in (lambda: Pairs(copy), lambda: write(teacher, copy)):
        with pytest.raises(ValueError, match=rf"{SHARDS[0]} is none of the manifest's"):
            read()


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"seed": 4}, "seed"), ({"num_steps": 16}, "num_steps"), ({"recipe": Recipe(top_k=3)}, "recipe"),
     ({"shard_size": 7}, "shard_size"), ({"batch": 3}, "batch")],
)  # fmt: skip
def test_pairs_of_another_manifest_are_refused(changes: dict, key: str, copy: Path, teacher: Teacher) -> None:
    before = tree_of(copy)
    with pytest.raises(ValueError, match=rf"another {key} \("):
        write(teacher, copy, **changes)
    assert tree_of(copy) == before


def test_pairs_of_another_teacher_are_refused(copy: Path, teacher: Teacher) -> None:
    with pytest.raises(ValueError, match="another teacher"):
        Pairs(copy, teacher_hash="4567")
    with pytest.raises(ValueError, match="another teacher_hash"):
        write_pairs(teacher, dataclasses.replace(manifest_of(teacher), teacher_hash="4567"), copy, show_progress=False)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"num": 3}', "\udcff"])
def test_a_damaged_manifest_is_named(text: str, copy: Path) -> None:
    (copy / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        Pairs(copy)


def test_a_folder_without_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no pairs.*ddecode pairs"):
        Pairs(tmp_path / "nothing")


def test_shards_of_other_pairs_are_not_taken_over_when_the_manifest_is_gone(copy: Path, teacher: Teacher) -> None:
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match="shard-00000"):
        write(teacher, copy, seed=4)


def test_bf16_leaves_noise_and_length_alone(teacher: Teacher, tmp_path: Path) -> None:
    write(teacher, tmp_path / "bf16", num=16, precision="bf16")
    write(teacher, tmp_path / "fp32", num=16)
    half, full = Pairs(tmp_path / "bf16"), Pairs(tmp_path / "fp32")
    assert torch.equal(half.seeds_N, full.seeds_N)
    # the first position differs by the teacher's rounding alone
    assert (half.ids_NL[:, 0] == full.ids_NL[:, 0]).float().mean() >= 0.8


def test_forced_pairs_come_with_what_the_walk_saw(whole: Path, teacher: Teacher) -> None:
    pairs = Pairs(whole)
    seen = []

    def pick(log_probs_BNV: torch.Tensor, start: int) -> torch.Tensor:
        seen.append(log_probs_BNV)
        return pairs.ids_NL[:6, start : start + log_probs_BNV.shape[1]].long()

    teacher.walk(pairs.labels_N[:6].long(), pick, teacher.recipe)
    noise, ids, labels, log_probs = ForcedPairs(pairs, teacher).batch([3, 0, 5])
    for ours, plain in zip((noise, ids, labels), pairs.batch([3, 0, 5]), strict=True):
        assert torch.equal(ours, plain)
    torch.testing.assert_close(log_probs.float(), torch.cat(seen, 1)[[3, 0, 5]], atol=5e-3, rtol=2e-3)


@pytest.mark.parametrize("kept", [0, 6, 28])
def test_forced_pairs_are_the_same_from_memory(kept: int, whole: Path, teacher: Teacher) -> None:
    pairs = Pairs(whole)
    fresh = ForcedPairs(pairs, teacher)
    forced = ForcedPairs(pairs, teacher, cache_gib=kept * L * 32 * 2 / 2**30)
    for _ in range(2):
        for indices in ([0, 4, 9], [4, 5, 27]):
            assert torch.equal(forced.batch(indices)[3], fresh.batch(indices)[3])
    assert int(forced.cached_N.sum()) == {0: 0, 6: 3, 28: 5}[kept]


def test_what_is_in_memory_is_not_computed_again(
    whole: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else is in the batch."""
    computed, log_probs = [], teacher.log_probs

    def counted(ids_BL: torch.Tensor, *arguments: Any) -> torch.Tensor:
        computed.append(len(ids_BL))
        return log_probs(ids_BL, *arguments)

    monkeypatch.setattr(teacher, "log_probs", counted)
    forced = ForcedPairs(Pairs(whole), teacher, cache_gib=6 * L * 32 * 2 / 2**30)
    for indices in ([0, 9], [0, 4, 9], [4, 27, 0], [0, 4]):
        forced.batch(indices)
    assert computed == [2, 2, 1]
