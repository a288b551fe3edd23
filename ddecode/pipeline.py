"""Class labels in, images out.

B batch, L token positions, C code width, H W image height and width.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ddecode.arguments import as_path, check_choice, check_kind, check_labels, check_vectors
from ddecode.callback import CALLBACK_TENSORS, StepCallback, call_back, check_callback
from ddecode.card import Card, check_upload, write_card
from ddecode.checkpoint import RECIPE, HubAccess, ModelFolder, UploadOptions, save_model, saved_family, upload
from ddecode.compilation import compile_blocks
from ddecode.config import build
from ddecode.files import check_room, write_aside
from ddecode.images import OUTPUT_TYPES, OutputType, to_output
from ddecode.members import check_members, check_places, named_models, recipe_of
from ddecode.plan import Plan, parse_plan, student_plan
from ddecode.precision import autocast, cast, check_device, check_dtype, decoder, dtype_of, network
from ddecode.randomness import draw_noise, draw_uniforms
from ddecode.sampling import AfterPass, Model, Progress, check_models, execute, passes
from ddecode.student import Student
from ddecode.teacher import Recipe, Teacher, batch_size
from ddecode.types import Generators, Labels, Tokenizer

Steps = int | Literal["teacher"]


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
        notes: what else its `config.json` says, for `save_pretrained`.
        training_recipe: the YAML that the student was distilled by, for the same and for cards.
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
        notes: Mapping[str, Any] | None = None,
        training_recipe: str | None = None,
    ) -> None:
        check_kind("others", others, Mapping, type(None))
        check_kind("recipe", recipe, Recipe, type(None))
        check_kind("notes", notes, Mapping, type(None))
        check_kind("training_recipe", training_recipe, str, type(None))
        check_members(tokenizer, student, teacher, others or {})
        self.tokenizer, self.student, self.teacher = tokenizer, student, teacher
        self.others = dict(others or {})
        self.recipe = recipe or recipe_of(teacher, self.others)
        self.class_names = build(tuple[str, ...], class_names, "class_names")
        self.notes = dict(notes or {})
        self.training_recipe = training_recipe
        self._bar_options: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        others: Mapping[str, Model] | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        torch_dtype: torch.dtype | None = None,
    ) -> "DistilledPipeline":
        """Load a model, on the CPU.

        Args:
            model: a bundled name, a directory or a hub id.
            others: join the models it holds.
            revision, cache_dir, token, local_files_only: of the hub, see `HubAccess`; the first two kinds need none.
            torch_dtype: of the networks, see `to`; None is fp32, whatever they have on disk.

        Raises:
            ValueError: there is no such model, it is damaged, or networks are not cast to this dtype.
        """
        if torch_dtype is not None:
            check_dtype(torch_dtype)
        check_kind("others", others, Mapping, type(None))
        access = HubAccess(revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
        folder = ModelFolder.open(model, access)
        tokenizer = folder.tokenizer()
        pipe = cls(
            tokenizer=tokenizer,
            student=folder.student(tokenizer) if folder.has("student") else None,
            teacher=folder.teacher(tokenizer) if folder.has("teacher") else None,
            others=folder.others(access) | dict(others or {}),
            class_names=folder.config.get("class_names", ()),
            notes={key: folder.config[key] for key in ("features", "others") if key in folder.config},
            training_recipe=folder.training_recipe(),
        )
        return pipe.to(dtype=torch_dtype)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        card: Card | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Unpack[UploadOptions],
    ) -> Path:
        """Write a model folder that `from_pretrained` reads, with this pipeline's recipes. Of `others` it names those
        that the model came with; what `ddecode convert` kept for the way back is left out.

        Args:
            folder: made if missing.
            dtype: of floating weights on disk: fp32, bf16 or fp16; None is what each has in memory.
            card: with it, a README.md for the hub is written as well.
            push_to_hub: upload the folder then; needs a card.
            repo_id: where to; None is the folder's name.
            options: see `ddecode.checkpoint.upload`.

        Raises:
            ValueError: the models are of no family with a loader, options contradict, or the hub refuses.
        """
        folder = as_path("a model folder", folder)
        if not push_to_hub and (repo_id or options):
            raise ValueError(f"{', '.join(['repo_id'] * bool(repo_id) + [*options])}: give push_to_hub=True as well")
        check_kind("card", card, Card, type(None))
        if push_to_hub:
            check_upload(card, folder.name if repo_id is None else repo_id, options)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; a model is a folder")
        check_room(folder, "the model folder")
        if dtype is not None:
            check_dtype(dtype)
        modules: dict[str, Any] = {"tokenizer": self.tokenizer}
        told = None if self.teacher is None else self.teacher.family
        config = {"family": saved_family(self.any_model.backbone, self.tokenizer, told), **self.notes}
        config |= {"class_names": self.class_names, "tokenizer": modules["tokenizer"].config}
        if self.teacher is not None:
            modules["teacher"] = self.teacher.backbone
            config["teacher"] = {"backbone": modules["teacher"].config, "recipe": self.recipe}
        if self.student is not None:
            modules["student"] = self.student
            config["student"] = {"backbone": modules["student"].backbone.config, **self.student.options()}
        save_model(folder, config, modules, dtype=dtype)
        if self.training_recipe is None:
            (folder / RECIPE).unlink(missing_ok=True)  # of the model that was here before
        else:
            write_aside(folder / RECIPE, self.training_recipe.encode())
        if card is not None:
            write_card(folder, card, model=repo_id or folder.name)
        if push_to_hub:
            upload(folder, repo_id or folder.name, **options)
        return folder

    def push_to_hub(
        self, repo_id: str, *, card: Card, dtype: torch.dtype | None = None, **options: Unpack[UploadOptions]
    ) -> str:
        """Upload the models with their card; returns the address of the commit.

        Args:
            repo_id: `owner/name`, made if there is none.
            card, dtype: see `save_pretrained`.
            options: see `ddecode.checkpoint.upload`.

        Raises:
            ValueError: see `save_pretrained`.
        """
        check_upload(card, repo_id, options)
        with TemporaryDirectory() as temporary:
            folder = self.save_pretrained(Path(temporary) / "model", dtype=dtype)
            write_card(folder, card, model=repo_id)
            return upload(folder, repo_id, **options)

    def to(
        self,
        *places: torch.device | torch.dtype | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "DistilledPipeline":
        """Move all models, cast their networks, or both; returns itself.

        Half precision is that of the parameters of networks and decoder and, by autocast, of all passes and of
        decoding. Encoder, codebook, noise, probabilities and the noise-to-token map stay fp32, and so does the head of
        a student that leaves the tokens to the map. A network that is then called by itself needs an autocast around
        it. `pipe.tokenizer.decoder.to(torch.bfloat16)` casts the decoder alone: the tokens are then those of fp32.

        Args:
            places: a device, a dtype, or both in either order.
            device, dtype: the same by name; fp32, bf16 or fp16.

        Raises:
            ValueError: more than one of either, a device that is not there, or another dtype.
        """
        devices = [p for p in (*(p for p in places if not isinstance(p, torch.dtype)), device) if p is not None]
        dtypes = [p for p in (*(p for p in places if isinstance(p, torch.dtype)), dtype) if p is not None]
        if len(devices) > 1 or len(dtypes) > 1:
            raise ValueError(f"give one device and one dtype, got {', '.join(map(str, [*devices, *dtypes]))}")
        for place in devices:
            check_device(place)
        for kind in dtypes:
            check_dtype(kind)
        own = (model.tokenizer for model in self.models.values() if isinstance(model, Student))
        for part in (self.tokenizer, *self.models.values(), *own):
            if devices and isinstance(part, nn.Module | Teacher):
                part.to(devices[0])
        for module in self.sampled():
            if dtypes:
                cast(module, dtypes[0])
        return self

    def sampled(self) -> list[nn.Module]:
        """What a call runs: the networks, and the tokenizer's decoder where it has one."""
        networks = [network(model) for model in self.models.values() if isinstance(model, Student | Teacher)]
        return [*networks, *filter(None, [decoder(self.tokenizer)])]

    def compile(self, **options: Any) -> "DistilledPipeline":
        """Compile the students' blocks in place with `torch.compile`; returns itself. It happens in the first call of
        each batch size, takes some seconds, and on a CPU a C++ compiler.

        Teachers and the decoder are left as they are. A teacher's keys and values grow from step to step, and each
        length would be compiled anew; the decoder's norms, compiled for a CPU, take longer than torch's own.

        Args:
            options: of `torch.compile`, such as `mode` or `backend`.
        """
        for model in self.models.values():
            if isinstance(model, Student):
                compile_blocks(model, **options)
        return self

    @property
    def device(self) -> torch.device:
        return self.any_model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the networks' parameters."""
        return next(network(self.any_model).parameters()).dtype

    def precision(self) -> AbstractContextManager[Any]:
        """What passes run under."""
        return autocast(self.device, self.dtype)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of the `tqdm` bar that a call shows over its passes, such as `disable=True`."""
        self._bar_options = options

    def progress_bar(self, total: int) -> "tqdm[Any]":
        """A bar as configured; one or two passes are over before a bar is read, so those have none unless asked for."""
        return tqdm(**{"total": total, "disable": total <= 2} | self._bar_options)

    @property
    def models(self) -> Mapping[str, Model]:
        """The models that plans may name."""
        return named_models(self.student, self.teacher, self.others, self.length)

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
            chosen = plan if isinstance(plan, Plan) else parse_plan(plan, self.length)
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
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = CALLBACK_TENSORS,
    ) -> PipelineOutput:
        """Sample one image for each label.

        Args:
            class_labels: int, list or LongTensor [B].
            num_inference_steps: student passes (1 if nothing is given), or "teacher" for plain AR sampling.
            plan: instead of them, a plan's text, such as "student:0-64,student:32-64".
            generator: one `torch.Generator` of the CPU, a list of B, or None for torch's own. Sample i's noise is
                `torch.randn(L, C, generator=g_i)`, with one generator drawn sample by sample, so that a student's image
                i does not depend on the batch. A teacher draws behind the noise of all: for it, give a list.
            output_type: see `PipelineOutput`.
            callback_on_step_end: called after each pass of a student and each AR step of a teacher with this
                pipeline, the pass's index, the number of tokens resolved and a dict of tensors. Those it changes in
                place or returns are what later passes read; a teacher reads changed tokens as their nearest codes, and
                within its span only those of the step just made. Of a student's pass it sees what later passes keep.
            callback_on_step_end_tensor_inputs: names of the tensors in that dict: embeddings_BLC, fp32, zero from the
                resolved tokens on in a first pass.

        Raises:
            ValueError: a label, step count, plan, output type or tensor that this model does not know.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        offered = check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        chosen, models = self.plan(num_inference_steps, plan), self.models
        with self.progress_bar(sum(passes(models[span.who], span) for span in chosen.spans)) as bar:

            def after_pass(progress: Progress) -> None:
                if callback_on_step_end is not None:
                    call_back(callback_on_step_end, self, progress, offered)
                bar.update()

            unwatched = callback_on_step_end is None and bar.disable
            progress = self.emit(class_labels, chosen, generator, None if unwatched else after_pass)
        if output_type == "latent":
            images: Any = progress.embeddings_BLC
        else:
            images = to_output(self.decode(progress.embeddings_BLC), output_type)
        return PipelineOutput(images=images, network_evaluations=progress.network_evaluations)

    def emit(
        self, class_labels: Labels, plan: Plan, generator: Generators = None, after_pass: AfterPass | None = None
    ) -> Progress:
        """Run a plan up to the token embeddings, without a bar; see `ddecode.sampling.execute`."""
        check_kind("a plan", plan, Plan)
        check_places(plan, models := self.models)
        code_width, device = self.any_model.codebook_VC.shape[1], self.any_model.device
        labels = check_labels(class_labels, None, self.num_classes, device)
        batch = batch_size(labels)
        noise_BLC = draw_noise(generator, batch, (self.length, code_width))
        uniforms_BL = draw_uniforms(generator, batch, self.length)
        with self.precision():
            return execute(
                plan,
                models,
                noise_BLC=noise_BLC.to(device),
                uniforms_BL=uniforms_BL.to(device),
                labels=labels,
                recipe=self.recipe,
                after_pass=after_pass,
            )

    @torch.no_grad()
    def decode(self, embeddings_BLC: Tensor) -> Tensor:
        """Embeddings [B,L,C] to decoder output fp32 [B,3,H,W], nominally in [-1,1].

        Raises:
            ValueError: they have another shape or are not finite, as those of a network that overflows.
        """
        check_vectors("embeddings", embeddings_BLC, self.length, self.any_model.codebook_VC.shape[1])
        with autocast(self.device, dtype_of(decoder(self.tokenizer)) or self.dtype):
            return self.tokenizer.decode(embeddings_BLC)
