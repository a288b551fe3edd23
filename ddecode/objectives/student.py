"""What a student is trained with: a weighted sum of terms, each with its weight in the recipe.

DD1 regresses the noise-token pairs (arXiv 2412.17153, section 3.2): cross-entropy of the logits, and on what the
student would emit, decoded to images, a perceptual distance to the teacher's image. Beyond the pairs three terms see
distributions: the energy distance of a batch's image features (`energy`), a discriminator (`adversarial`), and the
difference between the teacher's conditional scores and the student's own (`score`, DD2). Pairs beside one of these
are the regression anchor of distribution matching distillation (arXiv 2311.18828).

B batch, L token positions, C code width, F feature width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ddecode.config import ObjectiveConfig, weight_at
from ddecode.evaluation.features import FeatureMaps, FeatureNetwork, perceptual_gap
from ddecode.objectives.adversarial import Discriminator, adversarial_losses
from ddecode.objectives.energy import energy_distance, standardise
from ddecode.objectives.score import ScoreTerm
from ddecode.student import Student
from ddecode.training import Objective
from ddecode.types import Prediction

Metrics = dict[str, Tensor]


class StudentObjective(Objective):
    """The loss of a student on a batch of pairs.

    Args:
        student: trained.
        config: the terms and their weights.
        features: frozen network of the image terms; needed where one of their weights is not 0.
        score: the score term; needed where its weight is not 0. Its guidance network is trained.
    """

    def __init__(
        self,
        student: Student,
        config: ObjectiveConfig,
        *,
        features: FeatureNetwork | None = None,
        score: ScoreTerm | None = None,
    ) -> None:
        super().__init__()
        self.model: Student = student
        self.features, self.config, self.score = features, config, score
        if config.uses_images and features is None:
            raise ValueError("objective.perceptual, energy and adversarial need a feature network")
        if config.score.weight and score is None:
            raise ValueError("objective.score needs a score term")
        if config.adversarial.weight:
            assert features is not None
            discriminator = Discriminator(features.widths, student.num_classes, width=config.adversarial.width)
            self.critics["discriminator"] = discriminator.to(student.device)
            self.critic_lr["discriminator"] = config.adversarial.lr
        if config.score.weight:
            assert score is not None
            self.critics["guidance"] = score.guidance
            self.critic_lr["guidance"] = config.score.lr
        self.starts = torch.tensor(student.starts)

    def realigns(self, step: int) -> bool:
        return self.config.score.realigns(step)

    def forward(
        self,
        noise_BLC: Tensor,
        ids_BL: Tensor,
        labels_B: Tensor,
        generator: torch.Generator,
        progress: float = 0.0,
        step: int = 0,
    ) -> tuple[Tensor, Metrics]:
        student, config = self.model, self.config
        batch, length = ids_BL.shape
        scored = weight_at(config.score.weight, progress)
        if scored and not config.score.students_turn(step):
            return self.guidance_turn(noise_BLC, labels_B, generator)
        codes_BLC = F.embedding(ids_BL, student.codebook_VC)
        start_B = self.starts[torch.randint(len(self.starts), (batch,), generator=generator)].to(ids_BL.device)
        open_BL = torch.arange(length, device=ids_BL.device) >= start_B[:, None]
        perceptual, energy = weight_at(config.perceptual, progress), weight_at(config.energy, progress)
        adversarial = weight_at(config.adversarial.weight, progress)
        sees_images = perceptual > 0 or energy > 0 or adversarial > 0
        few = slice(0, config.image_batch if sees_images or scored else 0)

        share = weight_at(config.own_prefix, progress)
        own_B = torch.zeros_like(start_B, dtype=torch.bool)
        own_B[few] = (torch.rand(batch, generator=generator).to(start_B.device) < share)[few] & (start_B[few] > 0)
        prefix_BLC = codes_BLC
        if bool(own_B.any()):
            first_pass = student.emit(noise_BLC[own_B], labels_B[own_B], 0, length)
            prefix_BLC = codes_BLC.clone()
            prefix_BLC[own_B] = first_pass.to(codes_BLC.dtype)
        sequence_BLC = torch.where(open_BL[..., None], noise_BLC, prefix_BLC)
        prediction = student(sequence_BLC, labels_B, start_B)

        # the pair's tokens follow from the teacher's prefix, not from the student's own
        loss, metrics = self.regression(prediction, ids_BL, codes_BLC, open_BL & ~own_B[:, None], progress)
        if not (sees_images or scored):
            return loss, metrics
        seen = Prediction(embeddings_BLC=prediction.embeddings_BLC[few], logits_BLV=prediction.logits_BLV[few])
        emitted_BLC = student.emitted(seen, sequence_BLC[few])
        emitted_BLC = torch.where(open_BL[few][..., None], emitted_BLC, prefix_BLC[few])
        if sees_images:
            ours, theirs = self.look(emitted_BLC, codes_BLC[few])
            if perceptual or energy:
                gap = perceptual_gap(ours, theirs)[~own_B[few]].mean()
                distance = energy_distance(*standardise(ours.descriptors(), theirs.descriptors()), labels_B[few])
                loss = loss + perceptual * gap + energy * distance
                metrics |= {"perceptual": gap.detach(), "energy": distance.detach()}
            if adversarial:
                discriminator = self.critics["discriminator"]
                assert isinstance(discriminator, Discriminator)
                fooled, told, verdicts = adversarial_losses(discriminator, ours, theirs, labels_B[few], labels_B[few])
                loss = loss + adversarial * fooled + told
                metrics |= verdicts
        if scored:
            assert self.score is not None
            gap, gaps = self.score.student_loss(emitted_BLC, labels_B[few], open_BL[few], generator)
            error, errors = self.score.guidance_loss(emitted_BLC, labels_B[few], generator, open_BL[few])
            loss = loss + scored * gap + error
            metrics |= gaps | errors
        return loss, metrics

    def regression(
        self, prediction: Prediction, ids_BL: Tensor, codes_BLC: Tensor, counted_BL: Tensor, progress: float
    ) -> tuple[Tensor, Metrics]:
        """DD1's terms on the positions that count, with the cross-entropy of drafts where the student makes any."""
        config = self.config
        logits, targets = prediction.logits_BLV[counted_BL], ids_BL[counted_BL]
        cross_entropy = F.cross_entropy(logits, targets)
        squared = (prediction.embeddings_BLC - codes_BLC).square().sum(-1)[counted_BL].mean()
        loss = weight_at(config.logits, progress) * cross_entropy + weight_at(config.embeddings, progress) * squared
        for draft_BNV in prediction.drafts:
            read = draft_BNV.shape[1]
            counted_BN = counted_BL[:, :read]
            drafted = F.cross_entropy(draft_BNV[counted_BN], ids_BL[:, :read][counted_BN])
            loss = loss + weight_at(config.drafts, progress) * drafted
        return loss, {
            "cross_entropy": cross_entropy.detach(),
            "accuracy": (logits.argmax(-1) == targets).float().mean(),
            "embedding_error": squared.detach(),
        }

    def look(self, emitted_BLC: Tensor, codes_BLC: Tensor) -> tuple[FeatureMaps, FeatureMaps]:
        """The feature network on the student's images and on the teacher's, which get no gradient."""
        assert self.features is not None
        decode = self.model.tokenizer.decode
        ours = self.features(decode(emitted_BLC))
        with torch.no_grad():
            return ours, self.features(decode(codes_BLC))

    def guidance_turn(self, noise_BLC: Tensor, labels_B: Tensor, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """A step in which the guidance network alone learns, on fresh samples of the student in one pass."""
        assert self.score is not None
        few = slice(0, self.config.image_batch)
        emitted_BLC = self.model.emit(noise_BLC[few], labels_B[few], 0, noise_BLC.shape[1])
        return self.score.guidance_loss(emitted_BLC, labels_B[few], generator)
