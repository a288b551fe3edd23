"""The training loop: one, for teachers and students alike, on accelerate.

Everything random in step i follows from (seed, i): the batch, and the generator handed to the objective. So a run
that was stopped and resumed equals one that was not. In a launch each process has its share of every batch; with a
gradient accumulation of n the batch is cut into n parts, one after the other, each a batch to the objective.
"""

import copy
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, AutocastKwargs, DistributedDataParallelKwargs
from PIL import Image
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from ddecode.arguments import as_path, check_kind
from ddecode.compilation import compile_blocks
from ddecode.config import decisive
from ddecode.processes import launch, rank, world
from ddecode.randomness import StepGenerator, derived_seed
from ddecode.reporters import opened_reports
from ddecode.run_folder import Log, check_new, found_checkpoint
from ddecode.sharding import Sharded, fsdp_options, whole
from ddecode.training_config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a preview shows: metrics join the log, pictures go to those of `training.report_to`."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)


Preview = Callable[[nn.Module, int], Shown]
"""Called with the EMA model and the step; it writes its pictures itself."""


class Samples(Protocol):
    """A training set that is read by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: list[int]) -> tuple[Tensor, ...]:
        """The tensors of these samples, as the objective's `forward` takes them."""


class Objective(nn.Module):
    """What `train` trains.

    `forward(*batch, generator=..., progress=..., step=...)` gives (loss, metrics), progress in [0, 1) being the share
    of the run behind it. Whatever it holds beside `model` and `critics` must be frozen.

    In a launch the batch is this process's share, and the mean of losses and metrics over processes counts. For that
    to be the whole batch's, `ddecode.randomness.draw` draws by sample, and `ddecode.processes` has `mean_of_all` where
    processes may have unequal numbers to average over, and `of_all` where a loss compares samples.
    """

    model: nn.Module
    """Trained with the run's learning rate; its EMA is the result."""

    def __init__(self) -> None:
        super().__init__()
        self.critics = nn.ModuleDict()
        """Networks that are trained against the model, in the same backward pass, and what else is to be part of the
        checkpoint."""
        self.critic_lr: dict[str, float] = {}
        """The learning rate of each that is trained, constant after the warm-up."""

    def realigns(self, step: int, progress: float) -> bool:
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
    run: str | Path,
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
        run: folder for `log.jsonl`, `checkpoint/` and `checkpoint.old/`, see `ddecode.run_folder`, and for what
            `ddecode.reporters` keep.
        identity: what the run is made of; a resumed run must have the same, but for what `decisive` leaves out.
        resume: go on from the checkpoint in `run`.
        preview: called every `config.preview_every` steps.
        show_progress: draw a progress bar.

    Raises:
        ValueError: `run` holds a checkpoint and `resume` is off, or it belongs to another config or is damaged, or a
            library of `config.report_to` is missing, or see `make_accelerator`.
        FloatingPointError: the loss is no longer finite.
        OSError: the disk is full, say. The last checkpoint is whole then.
    """
    check_kind("objective", objective, Objective)
    check_kind("config", config, TrainingConfig)
    check_kind("identity", identity, Mapping)
    if not callable(getattr(samples, "batch", None)):
        raise ValueError(f"samples must have a batch, as ddecode.pairs.Pairs, got {type(samples).__name__}")
    run = as_path("a run's folder", run)
    accelerator = make_accelerator(config)
    main = accelerator.is_main_process
    checkpoint = found_checkpoint(run)
    check_new(run, resume=resume)
    run.mkdir(parents=True, exist_ok=True)
    identity = decisive(identity) | told(accelerator)

    model = objective.model.train()
    ema = copy.deepcopy(model).eval().requires_grad_(False).to(accelerator.device)
    if config.compile:
        compile_blocks(model)
    options = fsdp_options() if distributed.is_initialized() else None
    sharded = Sharded.made(objective.to(accelerator.device), ema, options) if options else None
    optimizer = torch.optim.AdamW(parameter_groups(objective, config), lr=config.lr, betas=config.betas)
    networks = {"model": model, "ema": ema} | ({"critics": objective.critics} if len(objective.critics) else {})
    begin = 0
    if resume and checkpoint.exists():
        begin = checkpoint.load(identity, networks, optimizer)
    wrapped, optimizer = (objective, optimizer) if sharded else accelerator.prepare(objective, optimizer)
    log = Log(run / "log.jsonl", begin) if main else None
    names = config.report_to if main and begin < config.steps else ()
    reporters = opened_reports(names, run, begin=begin, config=identity)
    clock = time.monotonic()
    bar = tqdm(total=config.steps, initial=begin, unit="step", disable=not (show_progress and main))
    with bar, reporters as reports:
        for step in range(begin, config.steps):
            if objective.realigns(step, step / config.steps):
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
                    raise FloatingPointError(f"the loss is {value} at step {done}; begin anew with a lower training.lr")
            # pictures and log first: what a checkpoint says is done will not be done again
            row: dict[str, Any] = {}
            shown = Shown()
            if preview and config.preview_every and done % config.preview_every == 0:
                with sharded.whole() if sharded else nullcontext():
                    shown = preview(ema, done) if main else shown
                row |= shown.metrics
            if logs:
                bar.set_postfix(loss=f"{value:.3f}")
                metrics = accelerator.reduce(metrics, "mean")
                row = {"loss": value} | {name: plain(metric) for name, metric in metrics.items()} | row
                row |= {"grad_norm": norm, "lr": learning_rate(config, step), "seconds": time.monotonic() - clock}
            if log is not None and row:
                log.write({"step": done} | row)
            reports.write(done, row, shown.pictures)
            if saves:
                if log is not None:
                    log.sync()
                checkpoint.save(done, identity, networks, optimizer)
    accelerator.wait_for_everyone()
    if sharded:
        sharded.gather_average()
    return ema


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """With what `accelerate launch` or its config file say.

    Raises:
        ValueError: they ask for what is not there, or the batch does not divide over processes and parts.
    """
    for name in ("DEEPSPEED", "MEGATRON_LM"):  # accelerate passes them over on a CPU, without a word
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ValueError(f"{name} is not supported: launch without it, or with FSDP")
    options = fsdp_options()
    launch()
    # terms that begin late, or are off, leave parameters without a gradient
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(fsdp_plugin=options, kwargs_handlers=[unused, AutocastKwargs(cache_enabled=False)])
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed precision {accelerator.mixed_precision} is not supported: choose bf16 or no")
    parts = accelerator.gradient_accumulation_steps
    if config.batch % (parts * world()):
        accumulated = f" and {parts} steps of gradient accumulation" if parts > 1 else ""
        raise ValueError(f"training.batch {config.batch} does not divide over {world()} processes{accumulated}")
    return accelerator


def told(accelerator: Accelerator) -> dict[str, Any]:
    """What the launch says of the run beside its config, where it says anything."""
    options = {"mixed_precision": accelerator.mixed_precision, "parts": accelerator.gradient_accumulation_steps}
    return {} if options == {"mixed_precision": "no", "parts": 1} else {"accelerate": options}


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
    seen: list[dict[str, Tensor]] = []
    parts = accelerator.gradient_accumulation_steps
    adds_up = not isinstance(objective, FSDPModule)  # sharded gradients of a part join those of all before it at once
    for part in range(parts):
        with accelerator.no_sync(objective) if adds_up and part < parts - 1 else nullcontext():
            loss, metrics = look(objective, samples, config, step, part, accelerator)
            accelerator.backward(loss)
        seen.append({"loss": loss.detach()} | metrics)
    mean = {name: torch.stack([each[name].to(accelerator.device) for each in seen]).mean(0) for name in seen[0]}
    norm = None
    model = [parameter for group in optimizer.param_groups if not group["critic"] for parameter in group["params"]]
    critics = [group["params"] for group in optimizer.param_groups if group["critic"]]
    for network in (model, *critics):  # each clipped for itself: none's gradient shrinks another's step
        parameters = [parameter for parameter in network if parameter.grad is not None]
        if parameters:
            clipped = accelerator.clip_grad_norm_(parameters, config.clip_norm)
            norm = float(whole(clipped)) if network is model else norm
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean.pop("loss"), mean, norm


def look(
    objective: nn.Module, samples: Samples, config: TrainingConfig, step: int, part: int, accelerator: Accelerator
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective on this process's share of one part of a step's batch."""
    size = config.batch // accelerator.gradient_accumulation_steps
    places = range(part * size, (part + 1) * size)[rank() :: world()]
    indices = batch_indices(len(samples), config.batch, step, config.seed)
    batch = [tensor.to(accelerator.device) for tensor in samples.batch([indices[place] for place in places])]
    generator = StepGenerator(derived_seed(config.seed, 2, step), places)
    half = "bf16" in (config.precision, accelerator.mixed_precision)
    # without the cache: earlier versions of torch keep a weight's cast from a pass without gradients for one with them
    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
        result: tuple[Tensor, dict[str, Tensor]] = objective(
            *batch, generator=generator, progress=step / config.steps, step=step
        )
    return result


def plain(metric: Tensor) -> float | list[float]:
    """A metric for JSON; vectors, which may be long, to four digits."""
    return float(metric) if metric.dim() == 0 else [float(f"{value:.4g}") for value in metric.tolist()]


def parameter_groups(objective: Objective, config: TrainingConfig) -> list[dict[str, Any]]:
    """The optimiser's: the model's matrices, which decay, its vectors, which do not, whatever dimensions of size 1 they
    have besides, and each critic."""
    trained = [p for p in objective.model.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in trained if (sum(n > 1 for n in p.shape) > 1) == many] for many in (True, False))
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay, "critic": False, "peak_lr": config.lr},
        {"params": vectors, "weight_decay": 0.0, "critic": False, "peak_lr": config.lr},
    ]
    for name, rate in objective.critic_lr.items():
        parameters = list(objective.critics[name].parameters())
        groups.append({"params": parameters, "weight_decay": 0.0, "critic": True, "peak_lr": rate})
    return groups
