"""Train the zoo's VQ tokenizers on Fashion-MNIST: squared and perceptual error, codes that die are moved.

    .venv/bin/python tools/train_tokenizer.py --family llamagen --out RUN
    .venv/bin/python tools/train_tokenizer.py --family var --steps 2000 --out RUN2

`RUN/tokenizer.safetensors` is the EMA, under the names of our modules; `--resume` goes on. The bundled ones come from
an earlier loop with the same losses and schedule, which drew other random numbers.
"""

import argparse
from pathlib import Path

from fashion_mnist import DEFAULT_FOLDER, load_fashion_mnist

from ddecode.checkpoint import family_module, save_tensors
from ddecode.config import as_dict
from ddecode.evaluation.features import features_folder, load_features
from ddecode.locks import held
from ddecode.objectives.reconstruction import CountedTokenizer, ReconstructionObjective
from ddecode.own_images import ImageSamples
from ddecode.randomness import fresh_weights
from ddecode.training import train
from ddecode.training_config import TrainingConfig
from third_party_loaders.llamagen_tokenizer import VQConfig
from third_party_loaders.var_tokenizer import MultiScaleVQConfig

SIZES = {
    "llamagen": VQConfig(
        vocab_size=512, code_width=8, channels=32, channel_mult=(1, 2, 2), res_blocks=1, z_channels=64
    ),
    "var": MultiScaleVQConfig(
        patch_nums=(1, 2, 3, 4, 6, 8), vocab_size=512, code_width=8, channels=32, channel_mult=(1, 2, 2),
        res_blocks=1, recorded_scales=6,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=SIZES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--features", default="fashion-perceptual", help="a bundled network, or a folder")
    parser.add_argument("--perceptual-weight", type=float, default=0.03)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    training = TrainingConfig(
        steps=args.steps, batch=args.batch, lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4, ema_decay=0.998,
        precision="bf16", seed=args.seed, save_every=100,
    )  # fmt: skip
    images_N1HW, labels_N = load_fashion_mnist("train", args.data)
    features = load_features(features_folder(args.features))
    with fresh_weights(args.seed):
        tokenizer = family_module(args.family).build_tokenizer(SIZES[args.family], None).requires_grad_(True)
        objective = ReconstructionObjective(
            tokenizer, features, perceptual=args.perceptual_weight, mirror=True, grey=True
        )
    identity = {"family": args.family, "perceptual": args.perceptual_weight, "training": as_dict(training)}
    samples = ImageSamples(images_N1HW.expand(-1, 3, -1, -1), labels_N)
    with held(args.out):
        average = train(objective, samples, training, args.out, identity=identity, resume=args.resume)
        assert isinstance(average, CountedTokenizer)
        save_tensors(args.out / "tokenizer.safetensors", average.tokenizer.state_dict())


if __name__ == "__main__":
    main()
