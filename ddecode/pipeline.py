"""Class labels in, images out.

B batch, L token positions, C code width, H W image height and width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddecode.checkpoint import ModelFolder
from ddecode.plan import Plan, parse_plan, student_plan
from ddecode.sampling import Model, Progress, Skip, check_models, execute
from ddecode.student import Student
from ddecode.teacher import Recipe, Teacher, batch_size, check_labels, draw_noise, per_sample_generators
from ddecode.types import Generators, Labels, Tokenizer

OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Steps = int | Literal["teacher"]
OWN_NAMES = ("student", "teacher", "skip")
"""What plans call a pipeline's own models, and the control."""


@dataclass(frozen=True, kw_only=True)
class PipelineOutput:
    """`images`: list of PIL | uint8 [B,H,W,3] | fp32 [B,3,H,W] in [0,1] | embeddings fp32 [B,L,C]."""

    images: Any
    network_evaluations: int
    """Sequential passes of the networks that the plan took."""


class DistilledPipeline:
    """Samples images with a student, its teacher, or both.

    Args:
        tokenizer: decodes the tokens.
        student, teacher: either may be absent; plans name them `student` and `teacher`.
        others: further models of the same tokens by the names that plans give them, such as a small teacher.
        recipe: guidance and filtering of teacher spans; None takes the teacher's own.
        class_names: for people.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        student: Student | None = None,
        teacher: Teacher | None = None,
        others: Mapping[str, Model] | None = None,
        recipe: Recipe | None = None,
        class_names: tuple[str, ...] = (),
    ) -> None:
        if student is None and teacher is None:
            raise ValueError("a pipeline needs a student or a teacher")
        for name, model in (others or {}).items():
            if name in OWN_NAMES:
                raise ValueError(f"plans mean another model by {name!r}; call yours otherwise")
            if not isinstance(model, Skip) and not same_codes(model.codebook_VC, tokenizer.codebook_VC):
                raise ValueError(f"{name} has another codebook, so its tokens mean something else here")
        self.tokenizer, self.student, self.teacher = tokenizer, student, teacher
        self.others = dict(others or {})
        self.recipe = recipe or (teacher.recipe if teacher is not None else Recipe())
        self.class_names = class_names

    @classmethod
    def from_pretrained(cls, model: str | Path, *, others: Mapping[str, Model] | None = None) -> "DistilledPipeline":
        """Load a bundled name, a directory or a hub id; `others` join the models it holds.

        Raises:
            ValueError: there is no such model, or it is damaged.
        """
        folder = ModelFolder.open(model)
        tokenizer = folder.tokenizer()
        return cls(
            tokenizer=tokenizer,
            student=folder.student(tokenizer) if folder.has("student") else None,
            teacher=folder.teacher(tokenizer) if folder.has("teacher") else None,
            others=folder.others() | dict(others or {}),
            class_names=tuple(folder.config.get("class_names", ())),
        )

    @property
    def models(self) -> Mapping[str, Model]:
        """The models that plans may name."""
        named: dict[str, Model | None] = {"student": self.student, "teacher": self.teacher}
        present = {name: model for name, model in named.items() if model is not None}
        return present | self.others | {"skip": Skip(length=self.length)}

    @property
    def any_model(self) -> Teacher | Student:
        model = self.student or self.teacher
        assert model is not None
        return model

    @property
    def length(self) -> int:
        """L."""
        return self.any_model.length

    @property
    def num_classes(self) -> int:
        return self.any_model.num_classes

    def plan(self, steps: Steps | str | None = None, plan: str | Plan | None = None) -> Plan:
        """The plan that `steps` (student passes, or `teacher`) or the text `plan` stands for.

        Raises:
            ValueError: both are given, or the models here cannot do it.
        """
        if plan is not None:
            if steps is not None:
                raise ValueError("give num_inference_steps or plan, not both")
            chosen = parse_plan(plan, self.length) if isinstance(plan, str) else plan
            check_models(chosen, self.models)
            return chosen
        if steps == "teacher":
            if self.teacher is None:
                raise ValueError("this model has no teacher to sample")
            return parse_plan(f"teacher:0-{self.length}", self.length)
        if self.student is None:
            raise ValueError("this model has no student: sample its teacher with steps 'teacher', or distil one")
        if isinstance(steps, bool) or not isinstance(steps, int | None):
            raise ValueError(f"num_inference_steps must be an int or 'teacher', got {steps!r}")
        return student_plan(1 if steps is None else steps, self.student.starts, self.length)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels,
        *,
        num_inference_steps: Steps | None = None,
        plan: str | Plan | None = None,
        generator: Generators = None,
        output_type: OutputType = "pil",
    ) -> PipelineOutput:
        """Sample one image for each label.

        Args:
            class_labels: int, list or LongTensor [B].
            num_inference_steps: student passes (1 if nothing is given), or "teacher" for plain AR sampling.
            plan: instead of them, a plan's text, such as "student:0-64,student:20-64".
            generator: one `torch.Generator`, a list of B, or None for torch's global one. Sample i's noise is
                `torch.randn(L, C, generator=g_i)`; with one generator it is drawn sample by sample.
            output_type: see `PipelineOutput`.

        Raises:
            ValueError: a label, step count, plan or output type that this model does not know.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        progress = self.emit(class_labels, self.plan(num_inference_steps, plan), generator)
        if output_type == "latent":
            images: Any = progress.embeddings_BLC
        else:
            images = to_output(self.tokenizer.decode(progress.embeddings_BLC), output_type)
        return PipelineOutput(images=images, network_evaluations=progress.network_evaluations)

    def emit(self, class_labels: Labels, plan: Plan, generator: Generators = None) -> Progress:
        """Run a plan up to the token embeddings."""
        code_width, device = self.any_model.codebook_VC.shape[1], self.any_model.device
        labels = check_labels(class_labels, None, self.num_classes, device)
        batch = batch_size(labels)
        noise_BLC = draw_noise(generator, batch, (self.length, code_width))
        generators = per_sample_generators(generator, batch)
        uniforms_BL = torch.stack([torch.rand(self.length, generator=g) for g in generators])
        return execute(
            plan,
            self.models,
            noise_BLC=noise_BLC.to(device),
            uniforms_BL=uniforms_BL.to(device),
            labels=labels,
            recipe=self.recipe,
        )


def same_codes(first_VC: Tensor, second_VC: Tensor) -> bool:
    return first_VC.shape == second_VC.shape and bool(torch.equal(first_VC.cpu(), second_VC.cpu()))


def to_output(images_B3HW: Tensor, output_type: OutputType) -> Any:
    """Decoder output in [-1,1] to what the caller asked for; values outside are clamped."""
    if output_type == "pt":
        return (images_B3HW.float().clamp(-1, 1) + 1) / 2
    array = to_uint8(images_B3HW)
    return array if output_type == "np" else [Image.fromarray(image) for image in array]


def to_uint8(images_B3HW: Tensor) -> np.ndarray:
    """fp32 [B,3,H,W] in [-1,1] to uint8 [B,H,W,3]: round((x + 1) * 127.5)."""
    scaled = ((images_B3HW.float().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
