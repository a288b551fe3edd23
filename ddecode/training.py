"""The training loop: one, for teachers and students alike, on accelerate.

Everything random in step i follows from (seed, i): the batch, and the generator handed to the objective. So a run
that was stopped and resumed equals one that was not.
"""

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ddecode.config import TrainingConfig
from ddecode.randomness import derived_seed

Preview = Callable[[nn.Module, int], None]
"""Called with the EMA model and the step, to write pictures."""


class Samples(Protocol):
    """A training set that is read by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: list[int]) -> tuple[Tensor, ...]:
        """The tensors of these samples, as the objective's `forward` takes them."""


def batch_indices(size: int, batch: int, step: int, seed: int) -> list[int]:
    """The samples of one step: epochs are permutations, one after the other without a gap."""
    indices: list[int] = []
    position = step * batch
    while len(indices) < batch:
        epoch, offset = divmod(position + len(indices), size)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(derived_seed(seed, 1, epoch)))
        indices += order[offset : offset + batch - len(indices)].tolist()
    return indices


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warm-up, then a cosine to `final_lr`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """EMA with the decay min(decay, (1 + step) / (10 + step)) (DD2, arXiv 2510.21003)."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    ours = dict(average.named_parameters())
    for name, parameter in model.named_parameters():
        ours[name].lerp_(parameter.detach().to(ours[name].dtype), weight)


class Checkpoint:
    """The state of a run on disk: `RUN/checkpoint`, replaced as a whole.

    `model.safetensors` and `ema.safetensors` hold weights, `optimizer.pt` Adam's moments, `state.json` the step and
    the config it belongs to.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / "checkpoint"

    def exists(self) -> bool:
        return (self.folder / "state.json").is_file()

    def save(self, step: int, identity: dict[str, Any], model: nn.Module, ema: nn.Module, optimizer: Any) -> None:
        aside = self.folder.with_name("checkpoint.new")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, module in (("model", model), ("ema", ema)):
            state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
            save_file(state, aside / f"{name}.safetensors")
        torch.save(optimizer.state_dict(), aside / "optimizer.pt")
        (aside / "state.json").write_text(json.dumps({"step": step, "identity": identity}, indent=2))
        for path in aside.iterdir():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        old = self.folder.with_name("checkpoint.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(old)
        aside.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def restore(self) -> None:
        """Put back the previous checkpoint where a kill fell between the two renames of `save`."""
        old = self.folder.with_name("checkpoint.old")
        if not self.folder.exists() and old.exists():
            old.rename(self.folder)

    def load(self, identity: dict[str, Any], model: nn.Module, ema: nn.Module, optimizer: Any) -> int:
        """Returns the number of steps done.

        Raises:
            ValueError: the run was made with another config.
        """
        state = json.loads((self.folder / "state.json").read_text())
        if state["identity"] != json.loads(json.dumps(identity)):
            raise ValueError(f"{self.folder.parent} was begun with another config; choose another --out")
        model.load_state_dict(load_file(self.folder / "model.safetensors"))
        ema.load_state_dict(load_file(self.folder / "ema.safetensors"))
        optimizer.load_state_dict(torch.load(self.folder / "optimizer.pt", weights_only=True))
        return state["step"]


def train(
    objective: nn.Module,
    samples: Samples,
    config: TrainingConfig,
    run: Path,
    *,
    identity: dict[str, Any],
    resume: bool = False,
    preview: Preview | None = None,
    show_progress: bool = True,
) -> nn.Module:
    """Train `objective.model` and return its EMA.

    Args:
        objective: a module whose `forward(*batch, generator=..., progress=...)` gives (loss, metrics), progress in
            [0, 1) being the share of the run behind it, and whose attribute `model` is trained; whatever else it
            holds must be frozen.
        samples: the training set.
        config: length, batch, optimiser.
        run: folder for `log.jsonl` and `checkpoint/`.
        identity: what the run is made of; a resumed run must have the same.
        resume: go on from the checkpoint in `run`.
        preview: called every `config.preview_every` steps.
        show_progress: draw a progress bar.

    Raises:
        ValueError: `run` holds a checkpoint and `resume` is off, or it belongs to another config.
        FloatingPointError: the loss is no longer finite.
    """
    # terms that begin late, or are off, leave parameters without a gradient
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(kwargs_handlers=[unused])
    if config.batch % accelerator.num_processes:
        raise ValueError(f"training.batch {config.batch} does not divide over {accelerator.num_processes} processes")
    checkpoint = Checkpoint(run)
    checkpoint.restore()
    if checkpoint.exists() and not resume:
        raise ValueError(f"{run} holds a run already; add --resume to go on with it, or choose another --out")
    run.mkdir(parents=True, exist_ok=True)

    model: nn.Module = objective.model  # type: ignore[assignment]
    model.train()
    ema = copy.deepcopy(model).eval().requires_grad_(False).to(accelerator.device)
    optimizer = torch.optim.AdamW(weight_decay_groups(model, config.weight_decay), lr=config.lr, betas=config.betas)
    begin = 0
    if resume and checkpoint.exists():
        begin = checkpoint.load(identity, model, ema, optimizer)
    if config.compile:
        compile_blocks(model)
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    main = accelerator.is_main_process
    log = Log(run / "log.jsonl", begin) if main else None
    clock = time.monotonic()
    with tqdm(total=config.steps, initial=begin, unit="step", disable=not (show_progress and main)) as bar:
        for step in range(begin, config.steps):
            loss, metrics, norm = optimise(wrapped, optimizer, samples, config, step, accelerator)
            update_average(ema, model, step, config.ema_decay)
            done = step + 1
            bar.update()
            last = done == config.steps
            logs, saves = last or done % config.log_every == 0, last or done % config.save_every == 0
            if logs or saves:
                value = accelerator.gather(loss.detach()[None]).mean().item()
                if not math.isfinite(value):
                    raise FloatingPointError(f"the loss is {value} at step {done}; lower training.lr and --resume")
            if logs:
                bar.set_postfix(loss=f"{value:.3f}")
                if log is not None:
                    row = {"step": done, "loss": value} | {name: float(metric) for name, metric in metrics.items()}
                    row |= {"grad_norm": norm, "lr": learning_rate(config, step), "seconds": time.monotonic() - clock}
                    log.write(row)
            if main and saves:
                checkpoint.save(done, identity, model, ema, optimizer)
            if main and preview and config.preview_every and done % config.preview_every == 0:
                preview(ema, done)
    accelerator.wait_for_everyone()
    return ema


def optimise(
    objective: nn.Module, optimizer: Any, samples: Samples, config: TrainingConfig, step: int, accelerator: Accelerator
) -> tuple[Tensor, dict[str, Tensor], float]:
    """One optimiser step; returns the loss and metrics of this process's share of the batch, and the gradient norm."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    rank, world = accelerator.process_index, accelerator.num_processes
    indices = batch_indices(len(samples), config.batch, step, config.seed)[rank::world]
    batch = [tensor.to(accelerator.device) for tensor in samples.batch(indices)]
    generator = torch.Generator().manual_seed(derived_seed(config.seed, 2, step, rank))
    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        loss, metrics = objective(*batch, generator=generator, progress=step / config.steps)
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(objective.parameters(), config.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, metrics, float(norm)


def compile_blocks(model: nn.Module) -> None:
    """Compile in place the blocks that a model repeats; they share what is compiled."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                if any(True for _ in block.children()):
                    block.compile()


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices, not vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


class Log:
    """One JSON object a line; lines from beyond the step a run resumes at are dropped first."""

    def __init__(self, path: Path, begin: int) -> None:
        kept = []
        if path.exists():
            rows = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in rows if json.loads(line)["step"] <= begin]
        path.write_text("".join(line + "\n" for line in kept))
        self.stream = path.open("a")

    def write(self, row: dict[str, float]) -> None:
        self.stream.write(json.dumps(row) + "\n")
        self.stream.flush()
