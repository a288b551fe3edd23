"""The public code's samplers: FoundationVision/VAR, FoundationVision/LlamaGen and microsoft/distilled_decoding.

Each function imports a clone as it is and calls it as its sampling scripts do. The packages of the clones share names
and change torch while they are imported, so each needs a process of its own.

B batch, L token positions, C code width, V codes, H W the image.
"""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddecode.images import to_uint8
from third_party_loaders.published import ARCHITECTURES, Architecture

LABEL, SEED = 207, 0
Sampler = Callable[[], np.ndarray]
"""Samples one image, uint8 [H,W,3]."""


def public_samplers(process: str, architecture: Architecture, folder: Path, clone: Path) -> dict[str, Sampler]:
    """What one of the clones samples, by its steps; `warm-up/STEPS` where a whole image would take too long for one.

    Args:
        process: `public-teacher` or `public-student`.
        architecture: a published one.
        folder: holds `tokenizer.pth`, `teacher.pth` and `student.pth` in upstream's layouts, and `noise.pth`.
        clone: of the code that this takes.
    """
    build: dict[tuple[str, str], Callable[[Architecture, Path, Path], dict[str, Sampler]]] = {
        ("var", "public-teacher"): public_var,
        ("var", "public-student"): public_dd1_var,
        ("llamagen", "public-teacher"): public_llamagen,
        ("llamagen", "public-student"): public_dd1_llamagen,
    }
    return build[architecture.family, process](architecture, folder, clone)


def public_var(architecture: Architecture, folder: Path, clone: Path) -> dict[str, Sampler]:
    sys.path.insert(0, str(clone))
    from models import build_vae_var

    sizes, recipe = architecture.backbone, architecture.recipe
    vae, model = build_vae_var(device="cpu", patch_nums=sizes.patch_nums, depth=sizes.depth)
    load(vae, folder / "tokenizer.pth")
    load(model, folder / "teacher.pth")

    def sample() -> np.ndarray:
        label_B = torch.tensor([LABEL])
        images = model.autoregressive_infer_cfg(
            B=1, label_B=label_B, g_seed=SEED, cfg=recipe.guidance_scale, top_k=recipe.top_k, top_p=recipe.top_p
        )
        return to_uint8(images * 2 - 1)[0]

    return {"teacher": sample}


def public_dd1_var(architecture: Architecture, folder: Path, clone: Path) -> dict[str, Sampler]:
    sys.path.insert(0, str(clone / "VAR"))
    without_torchvision()
    from models import build_vae_dd

    sizes = architecture.backbone
    vae, model = build_vae_dd(device="cpu", patch_nums=sizes.patch_nums, depth=sizes.depth)
    load(vae, folder / "tokenizer.pth")
    load(model, folder / "student.pth")
    given = torch.load(folder / "noise.pth")
    noise_1LC = given["noise_1LC"]
    split = next(scale for scale in range(len(sizes.steps)) if sum(sizes.steps[:scale]) == given["split"])

    def sample() -> np.ndarray:
        start_B = torch.zeros(1)
        x = model.perturb_data(noise_1LC, start_B, noise_1LC)
        x = model.get_final_sequence(*model.final_predict(torch.tensor([LABEL]), x, start_B), split)
        latents = x.new_zeros(1, x.shape[2], sizes.patch_nums[-1], sizes.patch_nums[-1])
        for scale, (side, part) in enumerate(zip(sizes.patch_nums, x.split(sizes.steps, 1), strict=True)):
            grid = part.transpose(1, 2).reshape(1, -1, side, side)
            latents, _ = vae.quantize.get_next_autoregressive_input(scale, len(sizes.steps), latents, grid)
        return to_uint8(vae.fhat_to_img(latents))[0]

    return {"1": sample}


def public_llamagen(architecture: Architecture, folder: Path, clone: Path) -> dict[str, Sampler]:
    sys.path.insert(0, str(clone))
    torch.set_float32_matmul_precision("high")  # as its scripts do
    from autoregressive.models.generate import generate
    from autoregressive.models.gpt import GPT_models

    sizes, recipe = architecture.backbone, architecture.recipe
    vq = public_vq(architecture, folder)
    model = GPT_models[gpt_name(architecture)](
        vocab_size=sizes.vocab_size, block_size=sizes.tokens, num_classes=sizes.num_classes, cls_token_num=1
    )
    load(model, folder / "teacher.pth")
    side = round(sizes.tokens**0.5)

    def tokens(count: int) -> Tensor:
        torch.manual_seed(SEED)
        settings = {"temperature": 1.0, "top_k": recipe.top_k, "top_p": recipe.top_p, "sample_logits": True}
        return generate(model, torch.tensor([LABEL]), count, cfg_scale=recipe.guidance_scale, **settings)

    def sample() -> np.ndarray:
        return to_uint8(vq.decode_code(tokens(sizes.tokens), [1, architecture.tokenizer.code_width, side, side]))[0]

    return {"teacher": sample, "warm-up/teacher": lambda: tokens(8).numpy()}


def public_dd1_llamagen(architecture: Architecture, folder: Path, clone: Path) -> dict[str, Sampler]:
    sys.path.insert(0, str(clone / "LlamaGen"))
    torch.set_float32_matmul_precision("high")  # as its scripts do
    from autoregressive.models.dd import GPT_models

    sizes = architecture.backbone
    vq = public_vq(architecture, folder)
    codebook_VC = nn.functional.normalize(vq.quantize.embedding.weight, dim=-1)
    model = GPT_models[gpt_name(architecture)](
        vocab_size=sizes.vocab_size,
        block_size=sizes.tokens,
        num_classes=sizes.num_classes,
        cls_token_num=1,
        model_type="c2i",
        codebook_dim=codebook_VC.shape[1],
        codebook=codebook_VC,
    )
    load(model, folder / "student.pth")
    given = torch.load(folder / "noise.pth")
    noise_1LC, split = given["noise_1LC"], given["split"]
    side = round(sizes.tokens**0.5)

    def sample() -> np.ndarray:
        start_B = torch.zeros(1)
        x = model.perturb_data(noise_1LC, start_B, noise_1LC)
        ids = (codebook_VC[:, None, None, :] - x).square().sum(-1).argmin(0)
        label_B = torch.tensor([LABEL])
        x = model.get_final_x_BLC(model.final_predict(x_BLC=x, cond_idx=label_B, timestep=start_B, idx=ids), split)
        return to_uint8(vq.decode(x.reshape(1, side, side, -1).permute(0, 3, 1, 2).contiguous()))[0]

    return {"1": sample}


def public_vq(architecture: Architecture, folder: Path) -> Any:
    from tokenizer.tokenizer_image.vq_model import VQ_models

    sizes = architecture.tokenizer
    vq = VQ_models["VQ-16"](codebook_size=sizes.vocab_size, codebook_embed_dim=sizes.code_width)
    load(vq, folder / "tokenizer.pth")
    return vq


def gpt_name(architecture: Architecture) -> str:
    name = next(name for name, known in ARCHITECTURES.items() if known == architecture)
    return name.replace("llamagen-", "GPT-").upper()


def load(module: nn.Module, state: Path) -> None:
    module.load_state_dict(torch.load(state), strict=True)
    module.eval()


def without_torchvision() -> None:
    """Stand in for a torchvision that does not load: the public code imports `save_image`, and does not call it here.

    PyPI's builds of it need another build of torch than the one for CPUs.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        package, utils = types.ModuleType("torchvision"), types.ModuleType("torchvision.utils")
        utils.save_image = None  # type: ignore[attr-defined]
        sys.modules |= {"torchvision": package, "torchvision.utils": utils}
