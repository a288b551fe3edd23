"""Memory and time of loading a checkpoint of a published size, and its conversion both ways, on random weights.

Writes fp32 `.pth` files in upstream's layout to a temporary folder, then measures in a fresh process: peak resident
memory above that of a process with torch imported, over the size of the files. Linux only: it reads /proc.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ddecode.conversion import adapter_of, convert
from ddecode.teacher import Teacher
from third_party_loaders import load_llamagen, load_var
from third_party_loaders.published import ARCHITECTURES
from third_party_loaders.state import meta_module, read_state

LOADERS: dict[str, Callable[[Path, Path], Teacher]] = {"var": load_var, "llamagen": load_llamagen}


def random_state(kind: str, sizes: object) -> dict[str, Tensor]:
    """Weights of a published size under upstream's names, derived buffers among them."""
    adapter = adapter_of(kind)
    blank = meta_module(lambda: adapter.blank(sizes)).state_dict()
    own = {n: torch.zeros(t.shape) if adapter.is_optional(n) else 0.02 * torch.randn(t.shape) for n, t in blank.items()}
    return adapter.upstream(own, sizes)


def write_checkpoint(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    arch = ARCHITECTURES[name]
    torch.save({"model": random_state(arch.family, arch.backbone)}, folder / "model.pth")
    torch.save({"model": random_state(f"{arch.family}-tokenizer", arch.tokenizer)}, folder / "tokenizer.pth")


def peak_bytes() -> int:
    """This process's high-water mark; unlike `ru_maxrss` it does not count the parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(name: str, folder: Path) -> dict[str, float]:
    """Load and sample one image; to be run in a process of its own."""
    size = sum(path.stat().st_size for path in folder.glob("*.pth"))
    before, begin = peak_bytes(), time.perf_counter()
    teacher = LOADERS[ARCHITECTURES[name].family](folder / "model.pth", folder / "tokenizer.pth")
    loaded_s, loaded = time.perf_counter() - begin, peak_bytes() - before
    for part in (teacher.backbone, teacher.tokenizer):
        assert isinstance(part, nn.Module)
        assert all(tensor.isfinite().all() for tensor in part.state_dict().values())  # reads every weight once
    read = peak_bytes() - before
    ids = teacher.generate([207], guidance_scale=2.0, top_k=900, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image = teacher.tokenizer.decode(ids)
    assert image.isfinite().all()
    return {
        "files_mib": round(size / 2**20),
        "load_s": round(loaded_s, 2),
        "load_share": round(loaded / size, 3),
        "all_read_share": round(read / size, 3),
        "sample_share": round((peak_bytes() - before) / size, 3),
        "total_s": round(time.perf_counter() - begin, 1),
    }


def converts_exactly(name: str, folder: Path) -> bool:
    """Whether both files come back bit for bit from a model folder."""
    family = ARCHITECTURES[name].family
    convert(str(folder / "model.pth"), family, folder / "ours", tokenizer=str(folder / "tokenizer.pth"))
    convert(str(folder / "ours"), family, folder / "theirs")
    return all(
        same(read_state(folder / f"{part}.pth"), load_file(folder / "theirs" / f"{part}.safetensors"))
        for part in ("model", "tokenizer")
    )


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=ARCHITECTURES, required=True)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.arch, args.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(args.arch, Path(folder))
        command = [sys.executable, __file__, "--arch", args.arch, "--measure", folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        exact = converts_exactly(args.arch, Path(folder))
    print(json.dumps({"arch": args.arch, **json.loads(done.stdout), "converts_exactly": exact}))


if __name__ == "__main__":
    main()
