"""What a run shows of itself: pictures of its networks from the same noise, and losses on sequences kept apart.

B batch, N sequences, L token positions, C code width, H W image height and width.
"""

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ddecode.files import write_aside
from ddecode.images import grid, png, to_uint8
from ddecode.objectives.guidance import Guidance
from ddecode.pairs import noise_of
from ddecode.plan import student_plan
from ddecode.randomness import derived_seed
from ddecode.sampling import execute
from ddecode.student import Student
from ddecode.teacher import Recipe, Teacher
from ddecode.training import Shown
from ddecode.trajectory import resolve

KEPT = 64
"""Sequences that the losses are measured on; the pictures show the first of them."""
COLUMNS, BANDS = 16, 2
"""Classes that a picture shows at most, evenly spaced, and samples of each."""
AT_ONCE = 16
"""Sequences in a network at once, so that a preview fits beside the training."""


class Preview:
    """Writes `FOLDER/STEP.png` and measures raw weights against their EMA; see `ddecode.training.Preview`.

    A column of a picture is a class, its rows come from the same noise: the teacher through its map, the student in
    one pass, in two where it has a second start, and the guidance network where there is one; then the same for
    further noise.

    Args:
        student: being trained.
        teacher: frozen.
        folder: of the pictures.
        recipe: how the pairs' teacher is guided and filtered, as `resolve` takes it.
        num_steps: evaluations of the map, as in the pairs.
        seed: the run's. The noise comes from a stream of its own, which no pairs share.
        guidance: of a score term.
        teacher_forcing: whether the student is trained by it; then losses are taken that way too.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        folder: Path,
        *,
        recipe: Mapping[str, Any],
        num_steps: int,
        seed: int,
        guidance: Guidance | None = None,
        teacher_forcing: bool = False,
    ) -> None:
        self.teacher_forcing = teacher_forcing
        self.student, self.teacher, self.folder, self.guidance = student, teacher, folder, guidance
        self.recipe, self.num_steps, self.seed = recipe, num_steps, seed
        self.columns = min(teacher.num_classes, COLUMNS)

    @torch.no_grad()
    def __call__(self, average: nn.Module, step: int) -> Shown:
        """
        Args:
            average: the student's EMA, which the pictures show.
            step: names them.

        Returns:
            The picture, and as metrics `heldout_raw` and `heldout_ema`, the cross-entropy of a pass from noise on the
            kept sequences, with `heldout_accuracy_raw` and `heldout_accuracy_ema`.
        """
        assert isinstance(average, Student)
        self.folder.mkdir(parents=True, exist_ok=True)
        picture = self.picture(average)
        write_aside(self.folder / f"{step:07d}.png", png(picture))
        metrics: dict[str, float] = {}
        for name, model in (("raw", self.student), ("ema", average)):
            # in the place of the average's weights: the student itself may be compiled, for its own batch
            cross_entropy, accuracy = self.held_out(average, dict(model.named_parameters())).tolist()
            metrics |= {f"heldout_{name}": cross_entropy, f"heldout_accuracy_{name}": accuracy}
        return Shown(metrics=metrics, pictures={"preview": picture})

    @cached_property
    def kept(self) -> tuple[Tensor, Tensor, Tensor]:
        """noise fp32 [N,L,C], labels int64 [N], and the ids int64 [N,L] that the teacher makes of them."""
        teacher, classes = self.teacher, self.teacher.num_classes
        seeds = [derived_seed(self.seed, 3, 1 + i) for i in range(KEPT)]
        noise_NLC = noise_of(seeds, (teacher.length, teacher.codebook_VC.shape[1])).to(teacher.device)
        labels_N = torch.tensor([i % self.columns * classes // self.columns for i in range(KEPT)])

        def tokens(noise_BLC: Tensor, labels_B: Tensor) -> Tensor:
            return resolve(teacher, noise_BLC, labels_B, **self.recipe, num_steps=self.num_steps)

        labels_N = labels_N.to(teacher.device)
        return noise_NLC, labels_N, in_parts(tokens, noise_NLC, labels_N)

    @cached_property
    def teachers(self) -> np.ndarray:
        """The teacher's images of the noise that the pictures show, uint8 [N,H,W,3]."""
        *_, ids_NL = self.kept
        return to_uint8(in_parts(self.teacher.tokenizer.decode, ids_NL[: self.columns * BANDS]))

    def images(self, sample: Callable[[Tensor, Tensor], Tensor]) -> np.ndarray:
        """The same of a network that samples ids or embeddings from noise and labels."""

        def decoded(noise_BLC: Tensor, labels_B: Tensor) -> Tensor:
            return self.teacher.tokenizer.decode(sample(noise_BLC, labels_B))

        noise_NLC, labels_N, _ = (part[: self.columns * BANDS] for part in self.kept)
        return to_uint8(in_parts(decoded, noise_NLC, labels_N))

    def picture(self, average: Student) -> Image.Image:
        """Bands of rows; see the class."""
        rows = [self.teachers]
        for passes in range(1, 1 + min(2, len(average.starts))):
            rows.append(self.images(partial(emitted, average, passes)))
        if self.guidance is not None:
            rows.append(self.images(partial(self.guidance.sample, codebook_VC=self.teacher.codebook_VC)))
        bands = [slice(band * self.columns, (band + 1) * self.columns) for band in range(BANDS)]
        images_NHW3 = np.concatenate([row[band] for band in bands for row in rows])
        return grid(images_NHW3, self.columns, scale=max(1, 96 // images_NHW3.shape[1]))

    def held_out(self, student: Student, weights: dict[str, Tensor]) -> Tensor:
        """Cross-entropy and accuracy of one pass over the kept sequences, with these weights in the student's place."""

        def errors(noise_BLC: Tensor, labels_B: Tensor, ids_BL: Tensor) -> Tensor:
            told = {"told_BL": ids_BL} if self.teacher_forcing else {}
            prediction = functional_call(student, weights, (noise_BLC, labels_B, torch.zeros_like(labels_B)), told)
            logits_BLV = prediction.logits_BLV
            cross_entropy_BL = F.cross_entropy(logits_BLV.transpose(1, 2), ids_BL, reduction="none")
            right_BL = (logits_BLV.argmax(-1) == ids_BL).float()
            return torch.stack([cross_entropy_BL.mean(1), right_BL.mean(1)], 1)

        return in_parts(errors, *self.kept).mean(0)


def emitted(student: Student, passes: int, noise_BLC: Tensor, labels_B: Tensor) -> Tensor:
    """The student's embeddings [B,L,C] in so many passes."""
    plan = student_plan(passes, student.starts, student.length)
    unused_BL = noise_BLC[..., 0]  # only a teacher's span draws by number
    models = {"student": student}
    progress = execute(plan, models, noise_BLC=noise_BLC, uniforms_BL=unused_BL, labels=labels_B, recipe=Recipe())
    return progress.embeddings_BLC


def in_parts(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A function of batches, `AT_ONCE` samples at a time."""
    return torch.cat([function(*part) for part in zip(*(tensor.split(AT_ONCE) for tensor in tensors), strict=True)])
