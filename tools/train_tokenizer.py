"""Train the zoo's VQ tokenizer on Fashion-MNIST: squared and perceptual error, codes that die are restarted.

    .venv/bin/python tools/train_tokenizer.py --family llamagen --out RUN
    .venv/bin/python tools/train_tokenizer.py --family var --out RUN2

`RUN/tokenizer.safetensors` is the EMA, under the names of our modules; `RUN/log.jsonl` has the losses.
"""

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from fashion_mnist import DEFAULT_FOLDER, load_fashion_mnist, to_model_range
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.checkpoint import zoo_folder
from ddecode.codebook import nearest_code
from ddecode.evaluation.features import load_features, perceptual_distance
from third_party_loaders.llamagen_tokenizer import VQConfig, VQModel
from third_party_loaders.var_tokenizer import MultiScaleVQ, MultiScaleVQConfig

VOCAB_SIZE = 512
LLAMAGEN = VQConfig(
    vocab_size=VOCAB_SIZE, code_width=8, channels=32, channel_mult=(1, 2, 2), res_blocks=1, z_channels=64
)
VAR = MultiScaleVQConfig(
    patch_nums=(1, 2, 3, 4, 6, 8), vocab_size=VOCAB_SIZE, code_width=8, channels=32, channel_mult=(1, 2, 2),
    res_blocks=1, recorded_scales=6,
)  # fmt: skip
COMMITMENT = 0.25
COARSE_SHARE = 0.4
"""Share of the samples that are decoded from their first scales alone: it moves an image's structure into them, so that
the tokens of the last scale are all but independent given those before, as next-scale prediction assumes."""


class Restarter:
    """Moves codes that nobody used for a while onto random latents."""

    def __init__(self, vocab_size: int, every: int = 100) -> None:
        self.used_V = torch.zeros(vocab_size, dtype=torch.long)
        self.every, self.step, self.dead = every, 0, vocab_size

    def __call__(self, codes_VC: Tensor, ids: Tensor, latents_NC: Tensor) -> None:
        self.used_V += ids.flatten().bincount(minlength=len(self.used_V))
        self.step += 1
        if self.step % self.every == 0 or self.step == 20:
            dead = (self.used_V == 0).nonzero().flatten()
            self.dead = len(dead)
            codes_VC[dead] = latents_NC[torch.randint(len(latents_NC), (len(dead),))]
            self.used_V.zero_()


def new_model(family: str) -> VQModel | MultiScaleVQ:
    """Fresh weights; the three rows of the last convolution start, and with equal gradients stay, equal: grey."""
    model = VQModel(LLAMAGEN) if family == "llamagen" else MultiScaleVQ(VAR)
    nn.init.normal_(model.quantize.embedding.weight)
    with torch.no_grad():
        last = model.decoder.conv_out
        last.weight.copy_(last.weight[:1].expand_as(last.weight))
        last.bias.zero_()
    return model


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    images_B3HW: Tensor
    ids: Tensor
    """All codes used."""
    targets_NC: Tensor
    """The vectors that were quantised, where dead codes may move to."""
    code_loss: Tensor


def reconstruct(model: VQModel | MultiScaleVQ, x: Tensor) -> Reconstruction:
    """Encode, quantise and decode, straight through."""
    return reconstruct_flat(model, x) if isinstance(model, VQModel) else reconstruct_scales(model, x)


def reconstruct_flat(model: VQModel, x: Tensor) -> Reconstruction:
    latents_BLC = rearrange(model.latents(x), "b c h w -> b (h w) c")
    with torch.no_grad():
        ids_BL = nearest_code(latents_BLC.float(), model.codebook_VC)
    codes_BLC = F.embedding(ids_BL, model.codebook_VC)
    straight_through = latents_BLC + (codes_BLC - latents_BLC).detach()
    commitment = F.mse_loss(latents_BLC, codes_BLC.detach())
    return Reconstruction(
        images_B3HW=model.decode(straight_through.float()),
        ids=ids_BL,
        targets_NC=latents_BLC.detach().flatten(0, 1),
        code_loss=F.mse_loss(codes_BLC, latents_BLC.detach()) + COMMITMENT * commitment,
    )


def reconstruct_scales(model: MultiScaleVQ, x: Tensor) -> Reconstruction:
    """The code loss is the mean over scales of how far the sum so far is from the latents (arXiv 2404.02905)."""
    latents_BChw = model.latents(x)
    steps = list(model.quantise(latents_BChw))
    code_loss = torch.zeros(())
    for step in steps:
        commitment = F.mse_loss(step.latents_BChw.detach(), latents_BChw)
        code_loss = code_loss + F.mse_loss(step.latents_BChw, latents_BChw.detach()) + COMMITMENT * commitment
    targets = [step.target_BNC for step in steps]
    last_B = torch.full((len(x),), len(steps) - 1)
    coarse_B = torch.rand(len(x)) < COARSE_SHARE
    last_B[coarse_B] = torch.randint(len(steps) - 1, (int(coarse_B.sum()),))
    quantised_BChw = torch.stack([step.latents_BChw for step in steps])[last_B, torch.arange(len(x))]
    straight_through = latents_BChw + (quantised_BChw - latents_BChw).detach()
    return Reconstruction(
        images_B3HW=model.decode_latents(straight_through),
        ids=torch.cat([step.ids_BN for step in steps], 1),
        # as many of each scale, whatever its size
        targets_NC=torch.cat([t[:, torch.randint(t.shape[1], (4,))] for t in targets], 1).flatten(0, 1),
        code_loss=code_loss / len(steps),
    )


def grey(images_B3HW: Tensor) -> Tensor:
    return images_B3HW.float().mean(1, keepdim=True).expand(-1, 3, -1, -1)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    decay = min(0.998, (step + 1) / (step + 10))
    for a, m in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        a.lerp_(m, 1 - decay)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=("llamagen", "var"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--features", type=Path, default=zoo_folder() / "features" / "fashion-perceptual")
    parser.add_argument("--perceptual-weight", type=float, default=0.03)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    features = load_features(args.features)
    model = new_model(args.family)
    average = copy.deepcopy(model)
    images, _ = load_fashion_mnist("train", args.data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    restart = Restarter(VOCAB_SIZE)
    log = (args.out / "log.jsonl").open("w")
    begin = time.time()
    for step in range(args.steps):
        progress = step / args.steps
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        x = to_model_range(images[torch.randint(len(images), (args.batch,))], torch.rand(args.batch) < 0.5)
        with torch.autocast("cpu", torch.bfloat16):
            rebuilt = reconstruct(model, x)
            y = grey(rebuilt.images_B3HW)
            losses = {
                "codes": rebuilt.code_loss,
                "square": F.mse_loss(y, x),
                "perceptual": args.perceptual_weight * perceptual_distance(features, y, x).mean(),
            }
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if progress < 0.7:
            restart(model.quantize.embedding.weight.data, rebuilt.ids, rebuilt.targets_NC)
        update_average(average, model, step)
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            row = {"step": step + 1, "seconds": round(time.time() - begin), "dead": restart.dead}
            row |= {name: round(value.item(), 5) for name, value in losses.items()}
            print(row, flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
    save_file({k: v.contiguous() for k, v in average.state_dict().items()}, args.out / "tokenizer.safetensors")


if __name__ == "__main__":
    main()
