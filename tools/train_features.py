"""Train a small classifier on Fashion-MNIST: the zoo's feature networks.

    .venv/bin/python tools/train_features.py --seed 0 --out ddecode/zoo/features/fashion-eval
    .venv/bin/python tools/measure_tokenizer.py --write-statistics ddecode/zoo/features/fashion-eval
    .venv/bin/python tools/train_features.py --seed 1 --widths 24,48,96,128 --epochs 5 \\
        --out ddecode/zoo/features/fashion-perceptual

The first judges (`ddecode eval --protocol zoo`), the second serves as perceptual loss; they share no weights, so that
no model is trained on the features that judge it.
"""

import argparse
import time
from pathlib import Path

import torch
from fashion_mnist import DEFAULT_FOLDER, load_fashion_mnist, to_model_range
from torch.nn import functional as F

from ddecode.evaluation.features import FeatureNetwork, save_features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--widths", default="32,64,128")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=250)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    widths = tuple(int(w) for w in args.widths.split(","))
    network = FeatureNetwork(widths=widths, blocks=args.blocks)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    train, labels = load_fashion_mnist("train", args.data)
    test, test_labels = load_fashion_mnist("test", args.data)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.02)
    steps = args.epochs * len(train) // args.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(args.seed)
    step, begin = 0, time.time()
    for epoch in range(args.epochs):
        network.train()
        order = torch.randperm(len(train), generator=generator)
        for index in order.split(args.batch):
            flip_B = torch.rand(len(index), generator=generator) < 0.5
            x = to_model_range(train[index], flip_B)
            shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
            x = torch.roll(x, shift, (2, 3)).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits_BK = network(x).logits_BK
            loss = F.cross_entropy(logits_BK.float(), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
        network.eval()
        with torch.no_grad():
            predicted = torch.cat([network(to_model_range(x)).logits_BK.argmax(1) for x in test.split(500)])
        accuracy = (predicted == test_labels).float().mean().item()
        print(
            f"epoch {epoch + 1}: loss {loss.item():.3f} test accuracy {accuracy:.4f} {time.time() - begin:.0f} s",
            flush=True,
        )

    save_features(args.out, network, seed=args.seed, test_accuracy=round(accuracy, 4))


if __name__ == "__main__":
    main()
