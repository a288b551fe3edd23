"""Run commands one after the other in each process of a launch, with what `accelerate launch` would set for each.

accelerate launch ... tests/launched.py FILE.json, which holds [environment, arguments] of each.
"""

import json
import os
import sys
from pathlib import Path

import torch

from ddecode.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    for environment, arguments in json.loads(Path(sys.argv[1]).read_text()):
        os.environ.update(environment)
        if status := main(arguments):
            sys.exit(status)
