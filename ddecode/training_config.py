"""What a recipe says of one training run."""

from dataclasses import dataclass
from typing import Literal

from ddecode.arguments import LARGEST_SEED, check_above, check_whole
from ddecode.typed import settle
from ddecode.weight import check_weight

ReporterName = Literal["tensorboard", "wandb"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training run, of a teacher or a student."""

    steps: int
    batch: int
    """Samples of one optimiser step, over all processes."""
    lr: float
    warmup_steps: int = 100
    final_lr: float = 0.0
    """Where the cosine of the learning rate ends."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    """Upper bound; the decay at step i is min(ema_decay, (1 + i) / (10 + i))."""
    precision: Literal["no", "bf16"] = "no"
    """bf16 is autocast; weights, EMA and optimiser stay fp32."""
    compile: bool = False
    """Compile the model's blocks: half again as fast on a CPU, where it needs a C++ compiler."""
    seed: int = 0
    log_every: int = 50
    save_every: int = 500
    preview_every: int = 0
    """Steps between sample grids; 0 is none."""
    report_to: tuple[ReporterName, ...] = ()
    """Who shows the run beside its `log.jsonl` (`ddecode.reporters`); it may change when the run goes on."""

    def __post_init__(self) -> None:
        settle(self, "training")
        for name in ("steps", "batch", "log_every", "save_every"):
            check_whole(f"training.{name}", getattr(self, name), 1)
        for name in ("warmup_steps", "preview_every"):
            check_whole(f"training.{name}", getattr(self, name), 0)
        check_whole("training.seed", self.seed, 0, LARGEST_SEED)
        for name in ("lr", "clip_norm"):
            check_above("training." + name, getattr(self, name))
        for name in ("final_lr", "weight_decay"):
            check_weight(f"training.{name}", getattr(self, name))
        for name, value in (("ema_decay", self.ema_decay), *(("betas", beta) for beta in self.betas)):
            if not 0 <= value < 1:
                raise ValueError(f"training.{name} must lie in [0, 1), got {value}")
        if len(set(self.report_to)) < len(self.report_to):
            raise ValueError(f"training.report_to names one twice: {', '.join(self.report_to)}")
