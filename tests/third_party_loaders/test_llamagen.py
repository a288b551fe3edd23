"""LlamaGen: equal to upstream where its tensors are at hand, its names, its strictness, its safety.

B batch, L token positions, V codes, C code width.
"""

import argparse
import copy
import pathlib
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import close, fixture, needs_parity
from safetensors.torch import save_file
from tiny import C, L, make_student, make_teacher, seeded
from torch import Tensor
from torch.nn import functional as F

from ddecode.cli.info import upstream_facts
from ddecode.conversion import Options, convert
from ddecode.files import read_json
from ddecode.student import Student
from ddecode.teacher import Teacher
from third_party_loaders import load_dd1_student, load_llamagen
from third_party_loaders.adapter import own_student_state, upstream_student_state
from third_party_loaders.llamagen import load_tokenizer, transformer_config
from third_party_loaders.llamagen_tokenizer import VQConfig, VQModel
from third_party_loaders.llamagen_transformer import LlamaGenTransformer, TransformerConfig
from third_party_loaders.state import read_state


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    """Upstream-named states of a tiny teacher, its tokenizer and its student."""
    teacher = make_teacher(seed=3)
    student = make_student(teacher)
    return {
        "model": teacher.backbone.state_dict(),
        "tokenizer": teacher.tokenizer.state_dict(),
        "student": upstream_student_state(student.state_dict()),
    }


def load(states: dict[str, Any], **changes: Any) -> Teacher:
    return load_llamagen(
        **{"model": states["model"], "tokenizer": states["tokenizer"], "n_head": 2, "block_size": L} | changes
    )


def same_logits(a: Teacher, b: Teacher) -> bool:
    ids = torch.randint(32, (2, L), generator=seeded(0))
    return torch.equal(a.logits(ids, [0, 1]), b.logits(ids, [0, 1]))


# --- upstream's own figures -----------------------------------------------------------------------------------


@needs_parity
@pytest.mark.parametrize("fewest_products", [0, 2**62], ids=["onednn", "torch"])
def test_class_model_equals_upstream(fewest_products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddecode.linear.FEWEST_PRODUCTS", fewest_products)
    config, parts = fixture("llamagen_c2i")
    given, expected = parts["in"], parts["out"]
    teacher = load_llamagen(parts["model"], parts["tokenizer"], n_head=config["n_head"], block_size=config["grid"] ** 2)
    close(teacher.logits(given["tokens"], given["labels"]), expected["logits_cond"])
    close(teacher.logits(given["tokens"], config["num_classes"]), expected["logits_uncond"])
    with torch.no_grad():
        close(teacher.tokenizer.decode(given["tokens"]), expected["image"])
        codes = F.embedding(given["tokens"], teacher.codebook_VC)
        close(teacher.tokenizer.decode(codes), expected["image"])
    encoded = teacher.tokenizer.encode(given["image"].float())
    assert (encoded == expected["encoded_tokens"]).float().mean() > 0.99
    greedy = teacher.generate(given["labels"], guidance_scale=4.0, top_k=1)
    assert torch.equal(greedy, expected["greedy_tokens_cfg4"].long())


@needs_parity
def test_caption_model_equals_upstream() -> None:
    config, parts = fixture("llamagen_t2i")
    given, expected = parts["in"], parts["out"]
    tokenizer = parts["tokenizer"] or fixture("llamagen_c2i")[1]["tokenizer"]
    teacher = load_llamagen(parts["model"], tokenizer, n_head=config["n_head"], block_size=config["grid"] ** 2)
    caption, mask = given["caption"].float(), given["caption_mask"]
    close(teacher.logits(given["tokens"], (caption, torch.ones_like(mask))), expected["logits_cond"])
    greedy = teacher.generate((caption, mask), guidance_scale=4.0, top_k=1)
    assert torch.equal(greedy, expected["greedy_tokens_cfg4"].long())


@needs_parity
def test_student_equals_upstream() -> None:
    config, parts = fixture("dd_llamagen")
    given, expected = parts["in"], parts["out"]
    tokenizer = load_tokenizer(parts["tokenizer"] or fixture("llamagen_c2i")[1]["tokenizer"])
    sizes = {"n_head": config["n_head"], "block_size": config["grid"] ** 2}
    student = load_dd1_student(parts["model"], tokenizer, family="llamagen", split=config["split"], **sizes)
    noise, labels, k = given["noise"].float(), given["labels"], config["t2"]
    first = student.predict(noise, labels, start=0)
    close(first.logits_BLV, expected["logits_t0"], 3e-4)
    close(first.embeddings_BLC, expected["embeddings_t0"], 3e-4)
    one = student.emit(noise, labels.long(), 0, student.length)
    close(one, expected["sequence_1step"], 3e-4)
    two = student.emit(torch.cat([one[:, :k], noise[:, k:]], 1), labels.long(), k, student.length)
    close(two, expected["sequence_2step"][:, k:], 3e-4)


# --- names and shapes -----------------------------------------------------------------------------------------


def test_states_have_upstreams_names() -> None:
    with torch.device("meta"):
        model = LlamaGenTransformer(TransformerConfig(vocab_size=16384, width=768, depth=12, heads=12))
        caption = LlamaGenTransformer(
            TransformerConfig(vocab_size=16384, width=1280, depth=36, heads=20, caption_width=2048)
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    block = {
        "attention.wqkv.weight": (2304, 768), "attention.wo.weight": (768, 768),
        "feed_forward.w1.weight": (2048, 768), "feed_forward.w3.weight": (2048, 768),
        "feed_forward.w2.weight": (768, 2048), "attention_norm.weight": (768,), "ffn_norm.weight": (768,),
    }  # fmt: skip
    assert shapes == {
        "cls_embedding.embedding_table.weight": (1001, 768),
        "tok_embeddings.weight": (16384, 768),
        "norm.weight": (768,),
        "output.weight": (16384, 768),
        **{f"layers.{i}.{name}": shape for i in range(12) for name, shape in block.items()},
    }
    names = caption.state_dict()
    assert names["cls_embedding.uncond_embedding"].shape == (120, 2048)
    assert names["cls_embedding.cap_proj.fc1.weight"].shape == (1280, 2048)
    assert names["layers.0.feed_forward.w1.weight"].shape == (3584, 1280)


def test_the_published_tokenizer_has_upstreams_names() -> None:
    with torch.device("meta"):
        state = VQModel(VQConfig()).state_dict()
    expected = {
        "quantize.embedding.weight": (16384, 8),
        "quantize.codebook_used": (65536,),
        "quant_conv.weight": (8, 256, 1, 1),
        "post_quant_conv.weight": (256, 8, 1, 1),
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.conv_blocks.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.conv_blocks.2.res.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.conv_blocks.4.attn.1.proj_out.weight": (512, 512, 1, 1),
        "encoder.mid.1.q.weight": (512, 512, 1, 1),
        "encoder.norm_out.weight": (512,),
        "decoder.mid.2.conv2.bias": (512,),
        "decoder.conv_blocks.0.attn.2.k.bias": (512,),
        "decoder.conv_blocks.0.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.conv_out.weight": (3, 128, 3, 3),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected
    assert not any(name.startswith(("encoder.conv_blocks.4.down", "decoder.conv_blocks.4.up")) for name in state)


def test_student_names_go_to_upstream_and_back(states: dict[str, dict[str, Tensor]]) -> None:
    theirs = states["student"]
    expected = {"n_d_embed.weight", "final_layer_conti.linear.weight", "final_layer_conti.linear.bias"}
    expected |= {"final_layer_conti.scale_shift_table", "tok_embeddings.bias", "layers.1.attention.wqkv.weight"}
    assert expected <= set(theirs)
    assert list(upstream_student_state(own_student_state(theirs))) == list(theirs)
    with pytest.raises(ValueError, match="no parameter of a student"):
        upstream_student_state({"head.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("width", "depth", "heads"),
    [(768, 12, 12), (1024, 24, 16), (1536, 48, 24), (3200, 24, 32), (256, 6, 4), (32, 1, 1)],
)
def test_heads_follow_the_published_sizes_or_width_64(width: int, depth: int, heads: int) -> None:
    with torch.device("meta"):
        state = {
            "output.weight": torch.empty(16384, width),
            "tok_embeddings.weight": torch.empty(16384, width),
            "cls_embedding.embedding_table.weight": torch.empty(1001, width),
        }
        state |= {f"layers.{i}.feed_forward.w1.weight": torch.empty(256, width) for i in range(depth)}
    config = transformer_config(state, None, None)
    assert (config.heads, config.tokens, config.depth, config.num_classes) == (heads, 256, depth, 1000)
    given = transformer_config(state, 8, 576)
    assert (given.heads, given.tokens) == (8, 576)


@torch.no_grad()
def test_the_unit_codebook_is_kept_until_the_table_changes() -> None:
    tokenizer = make_teacher().tokenizer
    table = tokenizer.quantize.embedding.weight

    def check(tokenizer: VQModel) -> Tensor:
        codes = tokenizer.codebook_VC
        assert torch.equal(codes, F.normalize(tokenizer.quantize.embedding.weight, dim=-1))
        return codes

    first = check(tokenizer)
    assert tokenizer.codebook_VC is first
    state = tokenizer.state_dict()
    table.mul_(torch.rand(table.shape, generator=seeded(0)))
    check(tokenizer)
    twin = copy.deepcopy(tokenizer)
    twin.quantize.embedding.weight.neg_()
    check(twin)
    check(tokenizer)
    scaled = {name: tensor * 2 + 1 for name, tensor in state.items()}
    for assign in (False, True):
        tokenizer.load_state_dict(scaled, assign=assign)
        check(tokenizer)
    assert check(tokenizer.double()).dtype == torch.float64
    with torch.inference_mode():
        check(tokenizer)
    with torch.enable_grad():
        assert tokenizer.requires_grad_(True).codebook_VC.requires_grad
        assert not tokenizer.codebook_VC.detach().requires_grad


# --- the tokenizer --------------------------------------------------------------------------------------------


def test_tokens_and_their_codes_decode_alike_and_the_codebook_has_unit_rows(teacher: Teacher) -> None:
    tokenizer = teacher.tokenizer
    torch.testing.assert_close(teacher.codebook_VC.norm(dim=1), torch.ones(32))
    ids = torch.randint(32, (2, L), generator=seeded(0))
    images = tokenizer.decode(ids)
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.float32
    assert torch.equal(images, tokenizer.decode(teacher.codebook_VC[ids]))
    encoded = tokenizer.encode(images)
    assert encoded.shape == (2, L) and encoded.dtype == torch.int64
    latents = tokenizer.latents(images).flatten(2).transpose(1, 2)
    assert torch.equal(encoded, torch.cdist(latents, teacher.codebook_VC.expand(2, -1, -1)).argmin(-1))


def test_tokens_that_form_no_square_are_refused(teacher: Teacher) -> None:
    with pytest.raises(ValueError, match="15 tokens do not form a square"):
        teacher.tokenizer.decode(torch.zeros(1, 15, C))


# --- loading --------------------------------------------------------------------------------------------------


def test_loaded_models_are_in_evaluation_mode_fp32_on_the_cpu(states: dict[str, dict[str, Tensor]]) -> None:
    half = {part: {n: t.half() if t.is_floating_point() else t for n, t in s.items()} for part, s in states.items()}
    teacher = load(half)
    for part in (teacher.backbone, teacher.tokenizer):
        assert not part.training
        assert {(t.dtype, t.device.type) for t in part.state_dict().values()} == {(torch.float32, "cpu")}
    rounded = load({part: {n: t.half().float() for n, t in state.items()} for part, state in states.items()})
    assert same_logits(teacher, rounded)
    assert (teacher.length, teacher.num_classes, teacher.steps) == (L, 4, (1,) * L)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_files_load_as_their_states(suffix: str, states: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    paths = {}
    for part in ("model", "tokenizer"):
        paths[part] = tmp_path / f"{part}{suffix}"
        if suffix == ".safetensors":
            save_file(states[part], paths[part])
        else:
            args = argparse.Namespace(lr=1e-4, model="GPT-B")
            torch.save({"model": states[part], "steps": 7, "args": args, "optimizer": {"state": {}}}, paths[part])
    assert same_logits(load(states), load(paths))
    assert same_logits(load(states), load({part: str(path) for part, path in paths.items()}))


def test_files_of_the_old_format_load(states: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    torch.save({"model": states["model"]}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same_logits(load(states), load(states, model=tmp_path / "old.pt"))


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", "ema"])
def test_wrapped_states_load(wrapper: str, states: dict[str, dict[str, Tensor]]) -> None:
    assert same_logits(load(states), load(states, model={wrapper: states["model"], "epoch": 3}))
    parallel = {f"module.{name}": tensor for name, tensor in states["model"].items()}
    assert same_logits(load(states), load(states, model={wrapper: parallel}))


def test_old_buffers_are_optional(states: dict[str, dict[str, Tensor]]) -> None:
    tokenizer = {n: t for n, t in states["tokenizer"].items() if n != "quantize.codebook_used"}
    model = states["model"] | {"freqs_cis": torch.zeros(17, 8, 2)}
    assert same_logits(load(states), load(states, model=model, tokenizer=tokenizer))


def test_rotary_factors_tell_how_many_tokens_there_are(states: dict[str, dict[str, Tensor]]) -> None:
    model = states["model"] | {"freqs_cis": torch.zeros(26, 8, 2)}
    teacher = load_llamagen(model, states["tokenizer"], n_head=2)
    assert teacher.length == 25
    with pytest.raises(ValueError, match="has 25 tokens by its freqs_cis, not 16"):
        load_llamagen(model, states["tokenizer"], n_head=2, block_size=16)
    with pytest.raises(ValueError, match="misshapen freqs_cis"):
        load_llamagen(model | {"freqs_cis": torch.zeros(())}, states["tokenizer"], n_head=2)


@pytest.mark.parametrize(
    ("name", "length"),
    [("c2i_B_256.pt", 256), ("c2i_XL_384.pt", 576), ("t2i_XL_stage2_512.pt", 1024), ("mine_384.pt", 256)],
)
@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_published_name_tells_how_many_tokens_there_are(
    name: str, length: int, whole_folder: bool, states: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    """States of 256, 384 and 512 pixels have the same shapes."""
    torch.save({"model": states["model"]}, tmp_path / name)
    source = tmp_path if whole_folder else tmp_path / name
    assert load_llamagen(source, states["tokenizer"], n_head=2).length == length
    assert load_llamagen(source, states["tokenizer"], n_head=2, block_size=16).length == 16
    assert upstream_facts(str(source))["sizes"]["tokens"] == length
    convert(source, "llamagen", tmp_path / "out", options=Options(n_head=2))
    assert read_json(tmp_path / "out" / "config.json")["teacher"]["backbone"]["tokens"] == length


def test_a_student_loads_from_its_average(states: dict[str, dict[str, Tensor]]) -> None:
    tokenizer = load_tokenizer(states["tokenizer"])
    other = {name: torch.zeros_like(tensor) for name, tensor in states["student"].items()}

    def student(state: Any) -> Student:
        return load_dd1_student(state, tokenizer, family="llamagen", n_head=2, block_size=L, split=10)

    noise = torch.randn(2, L, C, generator=seeded(0))
    expected = make_student(make_teacher(seed=3)).predict(noise, [0, 1])
    for state in (states["student"], {"ema": states["student"], "model": other}, {"model": states["student"]}):
        loaded = student(state)
        assert not loaded.training and loaded.split == 10
        torch.testing.assert_close(loaded.predict(noise, [0, 1]).logits_BLV, expected.logits_BLV)
        torch.testing.assert_close(loaded.predict(noise, [0, 1]).embeddings_BLC, expected.embeddings_BLC)
    with pytest.raises(
        ValueError, match=r"missing continuous_head\.linear\.bias|missing final_layer_conti\.linear\.bias"
    ):
        student({n: t for n, t in states["student"].items() if n != "final_layer_conti.linear.bias"})
    with pytest.raises(ValueError, match="family must be one of var, llamagen, got 'gpt'"):
        load_dd1_student(states["student"], tokenizer, family="gpt", split=0)


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_missing_extra_and_misshapen_keys_are_named(part: str, states: dict[str, dict[str, Tensor]]) -> None:
    name = {"model": "layers.1.attention.wo.weight", "tokenizer": "decoder.mid.0.conv1.bias"}[part]
    state = states[part]
    with pytest.raises(ValueError, match=f"missing {name}"):
        load(states, **{part: {n: t for n, t in state.items() if n != name}})
    with pytest.raises(ValueError, match=r"unknown surprise\.weight"):
        load(states, **{part: state | {"surprise.weight": torch.zeros(1)}})
    with pytest.raises(ValueError, match=rf"misshapen {name} is \(3,\), expected"):
        load(states, **{part: state | {name: torch.zeros(3)}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"weight": torch.zeros(2)}}, "no LlamaGen transformer"),
        ({"tokenizer": {"weight": torch.zeros(2)}}, "no LlamaGen tokenizer"),
        ({"model": {}}, "empty"),
        ({"model": {"epoch": 3, "lr": 0.1}}, "found no weights"),
        ({"model": "nowhere/model.pt"}, r"no checkpoint file nowhere/model\.pt"),
        ({"n_head": 5}, "32 over 5 heads"),
        ({"block_size": 15}, "15 tokens do not form a square"),
    ],
    ids=str,
)
def test_wrong_input_is_refused(states: dict[str, dict[str, Tensor]], changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(states, **changes)


def test_a_tokenizer_of_another_codebook_is_refused(states: dict[str, dict[str, Tensor]]) -> None:
    tokenizer = states["tokenizer"] | {"quantize.embedding.weight": torch.randn(20, C)}
    with pytest.raises(ValueError, match="32 codes, the tokenizer has 20"):
        load(states, tokenizer=tokenizer)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return pathlib.os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_a_malicious_file_is_refused_and_not_run(suffix: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / f"evil{suffix}"
    torch.save({"model": {"a": torch.zeros(1)}, "extra": Evil(mark)}, path)
    with pytest.raises(ValueError, match=rf"evil\{suffix} cannot be read safely"):
        read_state(path)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["broken.pt", "broken.safetensors"])
def test_damaged_and_unknown_files_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02not a checkpoint")
    with pytest.raises(ValueError, match=name):
        read_state(tmp_path / name)
    (tmp_path / "weights.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights\.ckpt: expected \.safetensors, \.pt, \.pth or \.bin"):
        read_state(tmp_path / "weights.ckpt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt holds no dict"):
        read_state(tmp_path / "list.pt")
