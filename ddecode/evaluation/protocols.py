"""The protocols `adm` and `dd1`, for models of ImageNet at 256 pixels.

| | labels | how Inception sees | reference |
|---|---|---|---|
| `adm` | as many of each class: 50 at n 50 000 | as in TensorFlow 1 | `VIRTUAL_imagenet256_labeled.npz` |
| `dd1` | uniform at random | as in pytorch-fid | pytorch-fid's statistics, such as DD1's `statistic.pth` |

Images have 8 bits. Precision, recall and the kernel distance need a reference with images. Images are seen a batch at a
time; kept of each are the logits (4 KB) and, where the reference has images, the features (8 KB).
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from ddecode.arguments import check_kind, check_whole
from ddecode.evaluation.blocks import NOT_KEPT, Block, Blocks, counted, progress_bar
from ddecode.evaluation.fidelity import LEAST, Extractor, Resize, inception_score, kernel_distance, precision_recall
from ddecode.evaluation.metrics import frechet_distance
from ddecode.evaluation.reference import Reference, look, see
from ddecode.evaluation.results import Result, label_balance, row_lines, versions_of
from ddecode.files import file_hash
from ddecode.images import ROUNDING, ImageSet, to_uint8
from ddecode.pipeline import DistilledPipeline
from ddecode.plan import Plan
from ddecode.samples import Labelling, batches_of, draw, draw_labels, make_settings
from ddecode.sampling import passes

NUM = 50_000
BATCH = 50


@dataclass(frozen=True, kw_only=True)
class Protocol:
    name: str
    labelling: Labelling
    resize: Resize


PROTOCOLS = {
    "adm": Protocol(name="adm", labelling="balanced", resize="tensorflow"),
    "dd1": Protocol(name="dd1", labelling="uniform", resize="torch"),
}


@dataclass(frozen=True, kw_only=True)
class FidelityRow:
    """One set's figures, with standard errors; those that need real images are None without them."""

    plan: str
    network_evaluations: int | None
    fid: float
    inception_score: float
    inception_score_error: float
    precision: float | None
    recall: float | None
    kid: float | None
    kid_error: float | None


@dataclass(frozen=True, kw_only=True)
class FidelityResult(Result):
    rows: tuple[FidelityRow, ...]


@dataclass(frozen=True, kw_only=True)
class Inspector:
    """A protocol with the network and the real images it judges by."""

    protocol: Protocol
    extractor: Extractor
    reference: Reference

    def row(self, blocks: Iterable[Block], *, plan: str, network_evaluations: int | None) -> FidelityRow:
        """The figures of a set, from what `see` makes of its batches."""
        real_NF = self.reference.features_NF
        seen = look(blocks, keep_features=real_NF is not None)
        score = inception_score(seen.logits_NK)
        precision = recall = distance = None
        if seen.features_NF is not None and real_NF is not None:
            precision, recall = precision_recall(seen.features_NF, real_NF)
            distance = kernel_distance(seen.features_NF, real_NF)
        return FidelityRow(
            plan=plan,
            network_evaluations=network_evaluations,
            fid=frechet_distance(seen.gaussian, self.reference.real),
            inception_score=score.mean,
            inception_score_error=score.error,
            precision=precision,
            recall=recall,
            kid=None if distance is None else distance.mean,
            kid_error=None if distance is None else distance.error,
        )

    def result(
        self,
        rows: Iterable[FidelityRow],
        *,
        model: str,
        num: int,
        seed: int | None,
        labels: str,
        rounding: str,
    ) -> FidelityResult:
        """The record."""
        return FidelityResult(
            protocol=self.protocol.name,
            model=model,
            num=num,
            seed=seed,
            labels=labels,
            rounding=rounding,
            feature_hash=self.extractor.hash,
            reference_hash=self.reference.hash,
            versions=versions_of("torch", "numpy", "torch-fidelity"),
            rows=tuple(rows),
        )


def evaluate(
    pipe: DistilledPipeline,
    plans: Mapping[str, Plan],
    inspector: Inspector,
    *,
    model: str,
    num: int = NUM,
    seed: int = 0,
    batch: int = BATCH,
    blocks: Blocks = NOT_KEPT,
    show_progress: bool = True,
) -> FidelityResult:
    """Sample and judge plans. Image i is the same as in a folder of `ddecode sample`, of the same seed and labels.

    Args:
        pipe: the models.
        plans: by the name their row shall carry.
        inspector: what judges.
        model: its name, for the record.
        num: images of each plan.
        seed: of all plans alike.
        blocks: what is kept of an evaluation that was stopped.

    Raises:
        ValueError: num is too small or, with balanced labels, no multiple of the number of classes; the images are not
            of the reference's size.
    """
    check_kind("pipe", pipe, DistilledPipeline)
    check_kind("plans", plans, Mapping)
    check_kind("inspector", inspector, Inspector)
    for plan in plans.values():
        check_kind("a plan", plan, Plan)
    labelling = inspector.protocol.labelling
    check_num(num, pipe.num_classes, inspector.protocol)
    blank_BLC = torch.zeros(1, pipe.length, pipe.tokenizer.codebook_VC.shape[1], device=pipe.device)
    inspector.reference.check_size(model, to_uint8(pipe.decode(blank_BLC)))
    labels_N = draw_labels(range(pipe.num_classes), num, labelling=labelling, seed=seed)

    def row(name: str, plan: Plan) -> FidelityRow:
        def identity() -> dict[str, Any]:
            settings = make_settings(
                pipe, plan, model=model, classes=range(pipe.num_classes), num=num, labelling=labelling, seed=seed
            )
            return {"images": settings.note(), "num": num, "batch": batch, "features": inspector.extractor.hash}

        def seen(part: range) -> Block:
            return see(inspector.extractor, draw(pipe, plan, labels_N, part, seed))

        evaluations = sum(passes(pipe.models[span.who], span) for span in plan.spans)
        with progress_bar(num, show_progress, name) as bar:
            made = counted(blocks.of(identity, seen, batches_of(num, batch)), bar)
            return inspector.row(made, plan=name, network_evaluations=evaluations)

    rows = [row(name, plan) for name, plan in plans.items()]
    labels = label_balance(labelling, labels_N)
    return inspector.result(rows, model=model, num=num, seed=seed, labels=labels, rounding=ROUNDING)


def check_num(num: int, num_classes: int, protocol: Protocol) -> None:
    """
    Raises:
        ValueError: num is too small for the metrics, or gives classes unequal shares where they are to be equal.
    """
    check_whole("--num", num, LEAST)
    if protocol.labelling == "balanced" and num % num_classes:
        raise ValueError(f"protocol {protocol.name}: --num must be a multiple of the {num_classes} classes, got {num}")


def evaluate_images(
    images: ImageSet,
    inspector: Inspector,
    *,
    num: int = NUM,
    batch: int = BATCH,
    blocks: Blocks = NOT_KEPT,
    show_progress: bool = True,
) -> FidelityResult:
    """Judge the first `num` of images that are there already; `blocks` as for `evaluate`.

    Raises:
        ValueError: see `check_images`; or they are not of the reference's size.
    """
    check_kind("images", images, ImageSet)
    check_kind("inspector", inspector, Inspector)
    check_images(images, inspector.protocol, num)
    inspector.reference.check_size(str(images.path), next(images.batches(1, 1)))
    note = images.note or {}

    def identity() -> dict[str, Any]:
        facts = {"num": num, "batch": batch, "features": inspector.extractor.hash}
        return {"images": file_hash(images.path)} | facts

    with progress_bar(num, show_progress, "images") as bar:
        seen = blocks.of(identity, partial(see, inspector.extractor), images.batches(num, batch))
        row = inspector.row(counted(seen, bar), plan=note.get("plan", "images"), network_evaluations=None)
    labels = label_balance(note.get("labelling"), None if images.labels_N is None else images.labels_N[:num])
    return inspector.result(
        [row],
        model=note.get("model", images.path.name),
        num=num,
        seed=note.get("seed"),
        labels=labels,
        rounding=note.get("rounding", "as given, 8 bits"),
    )


def check_images(images: ImageSet, protocol: Protocol, num: int) -> None:
    """
    Raises:
        ValueError: there are fewer than `num`, or `ddecode sample` labelled them otherwise than the protocol asks.
    """
    if num > images.num:
        raise ValueError(f"{images.path} holds {images.num} images, not {num}: sample more, or give --num")
    labelling, classes = (images.note or {}).get("labelling"), (images.note or {}).get("classes", [0])
    if labelling not in (None, protocol.labelling):
        raise ValueError(
            f"protocol {protocol.name} takes {protocol.labelling} labels, {images.path} has {labelling} ones"
        )
    check_num(num, len(classes), protocol)


def table(result: FidelityResult) -> str:
    """The rows for people."""
    head = (
        f"protocol {result.protocol}, n {result.num}, seed {result.seed}, labels {result.labels}, "
        f"Inception {result.feature_hash}, reference {result.reference_hash}"
    )
    rows = [asdict(row) for row in result.rows]
    return "\n".join([head, *row_lines([(row.pop("plan"), row) for row in rows])])
