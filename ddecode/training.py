"""The training loop: one, for teachers and students alike, on accelerate.

Everything random in step i follows from (seed, i): the batch, and the generator handed to the objective. So a run
that was stopped and resumed equals one that was not.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from tqdm import tqdm

from ddecode.config import TrainingConfig
from ddecode.randomness import derived_seed
from ddecode.run_folder import Checkpoint, Log

Preview = Callable[[nn.Module, int], Mapping[str, float]]
"""Called with the EMA model and the step, to write pictures; what it measures joins the log."""


class Samples(Protocol):
    """A training set that is read by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: list[int]) -> tuple[Tensor, ...]:
        """The tensors of these samples, as the objective's `forward` takes them."""


class Objective(nn.Module):
    """What `train` trains.

    `forward(*batch, generator=..., progress=..., step=...)` gives (loss, metrics), progress in [0, 1) being the share
    of the run behind it. Whatever it holds beside `model` and `critics` must be frozen.
    """

    model: nn.Module
    """Trained with the run's learning rate; its EMA is the result."""

    def __init__(self) -> None:
        super().__init__()
        self.critics = nn.ModuleDict()
        """Networks that are trained against the model, in the same backward pass; they are part of the checkpoint."""
        self.critic_lr: dict[str, float] = {}
        """The learning rate of each, constant after the warm-up."""

    def realigns(self, step: int) -> bool:
        """Whether the model goes back to its EMA before this step."""
        return False


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


def train(
    objective: Objective,
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
        objective: see `Objective`.
        samples: the training set.
        config: length, batch, optimiser.
        run: folder for `log.jsonl`, `checkpoint/` and `checkpoint.old/`; see `ddecode.run_folder`.
        identity: what the run is made of; a resumed run must have the same.
        resume: go on from the checkpoint in `run`.
        preview: called every `config.preview_every` steps.
        show_progress: draw a progress bar.

    Raises:
        ValueError: `run` holds a checkpoint and `resume` is off, or it belongs to another config or is damaged.
        FloatingPointError: the loss is no longer finite.
        OSError: the disk is full, say. The last checkpoint is whole then.
    """
    # terms that begin late, or are off, leave parameters without a gradient
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(kwargs_handlers=[unused])
    if config.batch % accelerator.num_processes:
        raise ValueError(f"training.batch {config.batch} does not divide over {accelerator.num_processes} processes")
    main = accelerator.is_main_process
    checkpoint = Checkpoint(run)
    if main:
        checkpoint.restore()
    accelerator.wait_for_everyone()
    if checkpoint.exists() and not resume:
        raise ValueError(f"{run} holds a run already; add --resume to go on with it, or choose another --out")
    run.mkdir(parents=True, exist_ok=True)

    model = objective.model.train()
    ema = copy.deepcopy(model).eval().requires_grad_(False).to(accelerator.device)
    optimizer = torch.optim.AdamW(parameter_groups(objective, config), lr=config.lr, betas=config.betas)
    networks = {"model": model, "ema": ema} | ({"critics": objective.critics} if len(objective.critics) else {})
    begin = 0
    if resume and checkpoint.exists():
        begin = checkpoint.load(identity, networks, optimizer)
    if config.compile:
        compile_blocks(model)
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    log = Log(run / "log.jsonl", begin) if main else None
    clock = time.monotonic()
    with tqdm(total=config.steps, initial=begin, unit="step", disable=not (show_progress and main)) as bar:
        for step in range(begin, config.steps):
            if objective.realigns(step):
                model.load_state_dict(ema.state_dict())
            loss, metrics, norm = optimise(wrapped, optimizer, samples, config, step, accelerator)
            if norm is not None:
                update_average(ema, model, step, config.ema_decay)
            done = step + 1
            bar.update()
            last = done == config.steps
            logs, saves = last or done % config.log_every == 0, last or done % config.save_every == 0
            if logs or saves:
                value = accelerator.gather(loss.detach()[None]).mean().item()
                if not math.isfinite(value):
                    raise FloatingPointError(f"the loss is {value} at step {done}; lower training.lr and --resume")
            # pictures and log first: what a checkpoint says is done will not be done again
            row: dict[str, Any] = {}
            if main and preview and config.preview_every and done % config.preview_every == 0:
                row |= preview(ema, done)
            if logs:
                bar.set_postfix(loss=f"{value:.3f}")
                row = {"loss": value} | {name: plain(metric) for name, metric in metrics.items()} | row
                row |= {"grad_norm": norm, "lr": learning_rate(config, step), "seconds": time.monotonic() - clock}
            if log is not None and row:
                log.write({"step": done} | row)
            if log is not None and saves:
                log.sync()
                checkpoint.save(done, identity, networks, optimizer)
    accelerator.wait_for_everyone()
    return ema


def optimise(
    objective: nn.Module, optimizer: Any, samples: Samples, config: TrainingConfig, step: int, accelerator: Accelerator
) -> tuple[Tensor, dict[str, Tensor], float | None]:
    """One optimiser step.

    Returns:
        The loss and metrics of this process's share of the batch, and the norm of the model's gradient, None where only
        critics were trained.
    """
    for group in optimizer.param_groups:
        constant = group["peak_lr"] * min(1.0, (step + 1) / max(1, config.warmup_steps))
        group["lr"] = constant if group["critic"] else learning_rate(config, step)
    rank, world = accelerator.process_index, accelerator.num_processes
    indices = batch_indices(len(samples), config.batch, step, config.seed)[rank::world]
    batch = [tensor.to(accelerator.device) for tensor in samples.batch(indices)]
    generator = torch.Generator().manual_seed(derived_seed(config.seed, 2, step, rank))
    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        loss, metrics = objective(*batch, generator=generator, progress=step / config.steps, step=step)
    accelerator.backward(loss)
    norm = None
    for critic in (False, True):  # each clipped for itself: neither's gradient shrinks the other's step
        groups = [group["params"] for group in optimizer.param_groups if group["critic"] is critic]
        parameters = [p for group in groups for p in group if p.grad is not None]
        if parameters:
            clipped = accelerator.clip_grad_norm_(parameters, config.clip_norm)
            norm = norm if critic else float(clipped)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, metrics, norm


def plain(metric: Tensor) -> float | list[float]:
    """A metric for JSON; vectors, which may be long, to four digits."""
    return float(metric) if metric.dim() == 0 else [float(f"{value:.4g}") for value in metric.tolist()]


def compile_blocks(model: nn.Module) -> None:
    """Compile in place the blocks that a model repeats; they share what is compiled."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                if any(True for _ in block.children()):
                    block.compile()


def parameter_groups(objective: Objective, config: TrainingConfig) -> list[dict[str, Any]]:
    """The optimiser's: the model's matrices, which decay, its vectors, which do not, and each critic."""
    trained = [p for p in objective.model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay, "critic": False, "peak_lr": config.lr},
        {"params": vectors, "weight_decay": 0.0, "critic": False, "peak_lr": config.lr},
    ]
    for name, critic in objective.critics.items():
        rate = objective.critic_lr[name]
        groups.append({"params": list(critic.parameters()), "weight_decay": 0.0, "critic": True, "peak_lr": rate})
    return groups
