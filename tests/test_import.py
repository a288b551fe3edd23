"""Importing ddecode changes nothing outside it."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import builtins, hashlib, json, logging, os, random, signal, sys, warnings
import accelerate, einops, huggingface_hub, numpy, PIL.Image, safetensors.torch, scipy, torch, tqdm, yaml
import torch.distributed.fsdp

def state():
    return {
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "gradients": torch.is_grad_enabled(),
        "matmul": [torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32,
                   torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch random": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "numpy random": str(numpy.random.get_state()),
        "python random": hashlib.sha256(repr(random.getstate()).encode()).hexdigest(),
        "warnings": [str(f) for f in warnings.filters],
        "environment": dict(os.environ),
        "hooks": [repr(sys.excepthook), repr(builtins.print), repr(sys.displayhook), repr(logging.root.handlers)],
        "patched": [repr(torch.nn.Linear.reset_parameters), repr(torch.nn.LayerNorm.reset_parameters)],
        "signals": repr(signal.getsignal(signal.SIGINT)),
        "accelerate": accelerate.PartialState._shared_state == {},
        "folder": os.getcwd(),
    }

before = state()
import ddecode
heavy = ("third_party_loaders", "ddecode.cli", "ddecode.training")
light = [name for name in sys.modules if name in heavy or name.startswith(tuple(f"{package}." for package in heavy))]
import importlib, pkgutil, third_party_loaders
for package in (ddecode, third_party_loaders):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
after = state()
print(json.dumps({"before": before, "after": after, "light": light}))
"""


def test_importing_changes_nothing_global() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert result["before"] == result["after"]
    assert result["light"] == [], "families, the command line and training are imported when they are needed"
