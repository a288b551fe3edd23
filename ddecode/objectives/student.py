"""What a student is trained with: a weighted sum of terms, each with its weight in the recipe.

DD1 regresses the noise-token pairs (arXiv 2412.17153, section 3.2): cross-entropy of the logits, and on what the
student would emit, decoded to images, a perceptual distance to the teacher's image. Beyond the pairs four terms see
distributions: the energy distance of a batch's image features (`energy`), a discriminator (`adversarial`), and the
difference between the teacher's conditional distributions and the student's own, as scores (`score`, DD2) or as
probabilities of tokens (`matching`). Pairs beside one of these are the regression anchor of distribution matching
distillation (arXiv 2311.18828).

B batch, L token positions, K autoregressive steps, C code width, F feature width.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ddecode.codebook import nearest_code
from ddecode.evaluation.features import FeatureMaps, Features, perceptual_gap
from ddecode.flow import flow_grid, tokens_to_noise
from ddecode.objective_config import ObjectiveConfig
from ddecode.objectives.adversarial import Discriminator, adversarial_losses
from ddecode.objectives.energy import RememberedEnergy, energy_distance, standardise
from ddecode.objectives.matching import TokenMatching
from ddecode.objectives.positives import Positives
from ddecode.objectives.score import ScoreTerm
from ddecode.processes import any_of_all, mean_of_all, mean_where, of_all, world
from ddecode.randomness import draw
from ddecode.student import Student
from ddecode.training import Objective
from ddecode.types import Prediction
from ddecode.weight import weight_at

Metrics = dict[str, Tensor]
REDRAWING_STEPS = 16
"""Evaluations of the inverse map for fresh noise."""


class StudentObjective(Objective):
    """The loss of a student on a batch of pairs.

    Args:
        student: trained.
        config: the terms and their weights.
        features: frozen network of the image terms; needed where one of their weights is not 0.
        score: the score term; needed where its weight is not 0. Its guidance network is trained.
        matching: the token-matching term; needed where its weight is not 0. Its guidance network is trained.
        positives: real images for the adversarial term; None takes the teacher's.
    """

    def __init__(
        self,
        student: Student,
        config: ObjectiveConfig,
        *,
        features: Features | None = None,
        score: ScoreTerm | None = None,
        matching: TokenMatching | None = None,
        positives: Positives | None = None,
    ) -> None:
        super().__init__()
        self.model: Student = student
        self.features, self.config, self.positives = features, config, positives
        self.score, self.matching = score, matching
        if config.uses_images and features is None:
            raise ValueError("objective.perceptual, energy and adversarial need a feature network")
        if config.score.weight and score is None:
            raise ValueError("objective.score needs a score term")
        if config.matching.weight and matching is None:
            raise ValueError("objective.matching needs a matching term")
        if config.adversarial.weight:
            assert features is not None
            discriminator = Discriminator(features.widths, student.num_classes, width=config.adversarial.width)
            self.critics["discriminator"] = discriminator.to(student.device)
            self.critic_lr["discriminator"] = config.adversarial.lr
        if config.score.weight:
            assert score is not None
            self.critics["guidance"] = score.guidance
            self.critic_lr["guidance"] = config.score.lr
        if config.matching.weight:
            assert matching is not None
            self.critics["token_guidance"] = matching.guidance
            self.critic_lr["token_guidance"] = config.matching.lr
        if config.energy and any(config.energy_memory):
            assert features is not None
            theirs, ours = (batches * config.image_batch for batches in config.energy_memory)
            remembered = RememberedEnergy(
                features.descriptor_width,
                theirs=theirs,
                ours=ours,
                kinds=2 * len(student.passes) - 1,
                spread_rate=config.energy_spread,
            )
            self.critics["energy"] = remembered.to(student.device)
        looks = config.uses_images or config.score.weight or config.matching.weight
        if looks and config.image_batch % world():
            raise ValueError(f"objective.image_batch {config.image_batch} does not divide over {world()} processes")
        self.starts, self.stops = torch.tensor(student.passes).unbind(1)
        """Of the kinds of pass."""
        self.told_L = torch.arange(student.length) < student.split
        """The positions that are emitted as tokens."""
        self.grid = flow_grid(student.codebook_VC, REDRAWING_STEPS)

    @property
    def few(self) -> slice:
        """This process's share of the samples whose output is seen."""
        return slice(self.config.image_batch // world())

    def realigns(self, step: int, progress: float) -> bool:
        return weight_at(self.config.score.weight, progress) > 0 and self.config.score.realigns(step)

    def forward(
        self,
        noise_BLC: Tensor,
        ids_BL: Tensor,
        labels_B: Tensor,
        log_probs_BLV: Tensor | None = None,
        *,
        generator: torch.Generator,
        progress: float = 0.0,
        step: int = 0,
    ) -> tuple[Tensor, Metrics]:
        student, config = self.model, self.config
        scored = weight_at(config.score.weight, progress)
        guidance_alone = bool(scored) and not config.score.students_turn(step)
        if guidance_alone:
            few = self.few
            noise_BLC, ids_BL, labels_B = noise_BLC[few], ids_BL[few], labels_B[few]
            log_probs_BLV = None if log_probs_BLV is None else log_probs_BLV[few]
        if config.fresh_noise:
            assert log_probs_BLV is not None
            fresh_BLC = tokens_to_noise(ids_BL, log_probs_BLV, student.codebook_VC, generator, grid=self.grid)
            # a filter's border may leave out what it let through when the pairs were made: no other noise leads there
            there_BL = log_probs_BLV.gather(2, ids_BL[..., None])[..., 0].isfinite()
            noise_BLC = torch.where(there_BL[..., None], fresh_BLC, noise_BLC)
        if guidance_alone:
            return self.guidance_turn(noise_BLC, ids_BL, labels_B, generator, progress)
        target_BLV = log_probs_BLV if config.targets == "probabilities" else None
        codes_BLC = F.embedding(ids_BL, student.codebook_VC)
        sees_images = any(self.image_weights(progress))
        # before either term begins its guidance network learns alone
        studied, guided = bool(config.score.weight), bool(config.matching.weight)
        few = self.few if sees_images or studied or guided else slice(0)
        asked = self.ask(noise_BLC, codes_BLC, labels_B, few, generator, progress)
        open_BL, own_B, chosen_B = asked.open_BL, asked.own_B, asked.chosen_B
        prediction = self.answer(asked, labels_B, ids_BL if config.teacher_forcing else None)

        # the pair's tokens follow from the teacher's prefix, not from the student's own
        loss, metrics = self.regression(prediction, ids_BL, codes_BLC, open_BL & ~own_B[:, None], progress, target_BLV)
        if not (sees_images or studied or guided):
            return loss, metrics
        seen = Prediction(embeddings_BLC=prediction.embeddings_BLC[few], logits_BLV=prediction.logits_BLV[few])
        emitted_BLC = self.emitted(seen, asked.sequence_BLC[few], open_BL[few])
        if sees_images:
            kind_B = 2 * chosen_B - own_B.long()  # of passes, and of two ways to come to all but the first of them
            terms, seen_metrics = self.image_terms(
                emitted_BLC, codes_BLC[few], labels_B[few], own_B[few], kind_B[few], generator, progress
            )
            loss = loss + terms
            metrics |= seen_metrics
        if guided:
            alone_B = own_B | (asked.start_B == 0)  # nothing of these is the teacher's
            counted_BL = (open_BL & alone_B[:, None])[few]
            push, error, matches = self.match(seen, emitted_BLC, labels_B[few], counted_BL, chosen_B[few])
            loss = loss + weight_at(config.matching.weight, progress) * push + error
            metrics |= matches
        if studied:
            assert self.score is not None
            if scored:
                gap, gaps = self.score.student_loss(
                    emitted_BLC, labels_B[few], open_BL[few], generator, pass_B=chosen_B[few]
                )
                loss = loss + scored * gap
                metrics |= gaps
            error, errors = self.score.guidance_loss(
                emitted_BLC, labels_B[few], generator, open_BL[few], pass_B=chosen_B[few]
            )
            loss = loss + error
            metrics |= errors
        return loss, metrics

    def ask(
        self,
        noise_BLC: Tensor,
        codes_BLC: Tensor,
        labels_B: Tensor,
        few: slice,
        generator: torch.Generator,
        progress: float,
    ) -> "Asked":
        """Draw for each sample which pass the student is to make and, among the `few`, what stands before it."""
        batch, length = codes_BLC.shape[:2]
        device = codes_BLC.device
        chosen_B = draw(partial(torch.randint, len(self.starts)), (batch,), generator).to(device)
        start_B, stop_B = self.starts.to(device)[chosen_B], self.stops.to(device)[chosen_B]
        position_L = torch.arange(length, device=device)
        open_BL = (position_L >= start_B[:, None]) & (position_L < stop_B[:, None])

        share = weight_at(self.config.own_prefix, progress)
        own_B = torch.zeros_like(start_B, dtype=torch.bool)
        own_B[few] = (draw(torch.rand, (batch,), generator).to(device) < share)[few] & (start_B[few] > 0)
        prefix_BLC = self.first_pass(codes_BLC, noise_BLC, labels_B, own_B, start_B) if share else codes_BLC
        return Asked(
            chosen_B=chosen_B,
            start_B=start_B,
            stop_B=stop_B,
            open_BL=open_BL,
            own_B=own_B,
            sequence_BLC=torch.where(open_BL[..., None], noise_BLC, prefix_BLC),
        )

    def answer(self, asked: "Asked", labels_B: Tensor, told_BL: Tensor | None = None) -> Prediction:
        """What the student says to it, along the tokens told if there are any."""
        options = {} if told_BL is None else {"told_BL": told_BL}
        if (self.stops < self.model.length).any():
            options["stop_B"] = asked.stop_B
        prediction: Prediction = self.model(asked.sequence_BLC, labels_B, asked.start_B, **options)
        return prediction

    def first_pass(
        self, codes_BLC: Tensor, noise_BLC: Tensor, labels_B: Tensor, own_B: Tensor, start_B: Tensor
    ) -> Tensor:
        """The codes, in `own_B` before the start the student's own of one pass from noise."""
        prefix_BLC = codes_BLC.clone()
        for start in self.model.starts[1:]:
            these_B = own_B & (start_B == start)
            if not any_of_all(these_B):
                continue
            # where weights are sharded all must make a pass: with none of its own a process makes one that nobody reads
            rows_B = these_B if these_B.any() else torch.arange(len(own_B), device=own_B.device) == 0
            emitted_BNC = self.model.emit(noise_BLC[rows_B], labels_B[rows_B], 0, start).to(codes_BLC.dtype)
            prefix_BLC[these_B, :start] = emitted_BNC[these_B[rows_B]]
        return prefix_BLC

    def emitted(self, prediction: Prediction, sequence_BLC: Tensor, open_BL: Tensor) -> Tensor:
        """What the student makes of a sequence: its own where it was asked, else what stood there."""
        return torch.where(open_BL[..., None], self.model.emitted(prediction, sequence_BLC), sequence_BLC)

    def regression(
        self,
        prediction: Prediction,
        ids_BL: Tensor,
        codes_BLC: Tensor,
        counted_BL: Tensor,
        progress: float,
        target_BLV: Tensor | None,
    ) -> tuple[Tensor, Metrics]:
        """DD1's terms on the positions that count, with the cross-entropy of drafts where the student makes any.

        `target_BLV` holds the teacher's log-probabilities where these are regressed instead of the pair's tokens.
        """
        config = self.config

        def cross_entropies(logits_BNV: Tensor) -> Tensor:
            n = logits_BNV.shape[1]
            target = ids_BL if target_BLV is None else target_BLV.float().exp()
            counted_BN = counted_BL[:, :n]
            return F.cross_entropy(logits_BNV[counted_BN], target[:, :n][counted_BN], reduction="none")

        count = counted_BL.sum()
        each = cross_entropies(prediction.logits_BLV)
        cross_entropy = mean_of_all(each.sum(), count)
        each_BL = each.new_zeros(counted_BL.shape).masked_scatter(counted_BL, each.detach())
        squared_BL = (prediction.embeddings_BLC - codes_BLC).square().sum(-1)
        squared = mean_of_all(squared_BL[counted_BL].sum(), count)
        loss = weight_at(config.logits, progress) * cross_entropy + weight_at(config.embeddings, progress) * squared
        for draft_BNV in prediction.drafts:
            drafted = counted_BL[:, : draft_BNV.shape[1]].sum()
            error = mean_of_all(cross_entropies(draft_BNV).sum(), drafted)
            loss = loss + weight_at(config.drafts, progress) * error
        metrics = {
            "cross_entropy": cross_entropy.detach(),
            "accuracy": mean_of_all((prediction.logits_BLV.argmax(-1) == ids_BL)[counted_BL].float().sum(), count),
            "embedding_error": squared.detach(),
            "cross_entropy_K": by_step(mean_where(each_BL, counted_BL.float(), 0), self.model.backbone.steps),
        }
        if target_BLV is not None:
            entropy_BL = torch.special.entr(target_BLV.float().exp()).sum(-1)
            metrics["divergence"] = cross_entropy.detach() - mean_of_all(entropy_BL[counted_BL].sum(), count)
        return loss, metrics

    def image_weights(self, progress: float) -> tuple[float, ...]:
        """Of the perceptual, the energy and the adversarial term."""
        weights = (self.config.perceptual, self.config.energy, self.config.adversarial.weight)
        return tuple(weight_at(weight, progress) for weight in weights)

    def image_terms(
        self,
        emitted_BLC: Tensor,
        codes_BLC: Tensor,
        labels_B: Tensor,
        own_B: Tensor,
        kind_B: Tensor,
        generator: torch.Generator,
        progress: float,
    ) -> tuple[Tensor, Metrics]:
        """The terms that see decoded output.

        Of the samples in `own_B` the student emitted all, its prefix too, so that they have no teacher's image each.
        `kind_B` is the kind of pass of each, and whose prefix is before it. What a pass leaves open at the end is the
        pair's.
        """
        perceptual, energy, adversarial = self.image_weights(progress)
        ours = self.look(emitted_BLC)
        with torch.no_grad():
            theirs = self.look(codes_BLC)
        loss, metrics = emitted_BLC.new_zeros(()), Metrics()
        if perceptual:
            gap = mean_of_all(perceptual_gap(ours, theirs)[~own_B].sum(), (~own_B).sum())
            loss = loss + perceptual * gap
            metrics["perceptual"] = gap.detach()
        if energy:
            described = of_all(ours.descriptors()), of_all(theirs.descriptors())
            if "energy" in self.critics:
                distance, spreads = self.critics["energy"](*described, of_all(labels_B), of_all(kind_B))
                metrics |= spreads
            else:
                distance = energy_distance(*standardise(*described), of_all(labels_B))
            loss = loss + energy * distance
            metrics["energy"] = distance.detach()
        if adversarial:
            discriminator = self.critics["discriminator"]
            assert isinstance(discriminator, Discriminator)
            if self.positives is not None:
                real_BL = self.positives.draw(labels_B, generator)
                with torch.no_grad():
                    theirs = self.look(F.embedding(real_BL, self.model.codebook_VC))
            fooled, told, verdicts = adversarial_losses(discriminator, ours, theirs, labels_B, labels_B)
            loss = loss + adversarial * fooled + told
            metrics |= verdicts
        return loss, metrics

    def match(
        self, seen: Prediction, emitted_BLC: Tensor, labels_B: Tensor, counted_BL: Tensor, pass_B: Tensor
    ) -> tuple[Tensor, Tensor, Metrics]:
        """The matching term's two losses, of counted positions that are emitted as tokens, and its metrics."""
        assert self.matching is not None
        ids_BL = nearest_code(emitted_BLC.detach(), self.model.codebook_VC)
        counted_BL = counted_BL & self.told_L.to(counted_BL.device)
        matched: tuple[Tensor, Tensor, Metrics] = self.matching(seen.logits_BLV, ids_BL, labels_B, counted_BL, pass_B)
        return matched

    def look(self, codes_BLC: Tensor) -> FeatureMaps:
        """The feature network on decoded images."""
        assert self.features is not None
        return self.features(self.model.tokenizer.decode(codes_BLC))

    def guidance_turn(
        self, noise_BLC: Tensor, ids_BL: Tensor, labels_B: Tensor, generator: torch.Generator, progress: float
    ) -> tuple[Tensor, Metrics]:
        """A step in which the guidance network alone learns, on what the student emits in each of its passes."""
        assert self.score is not None
        with torch.no_grad():
            codes_BLC = F.embedding(ids_BL, self.model.codebook_VC)
            asked = self.ask(noise_BLC, codes_BLC, labels_B, slice(None), generator, progress)
            prediction = self.answer(asked, labels_B)
            emitted_BLC = self.emitted(prediction, asked.sequence_BLC, asked.open_BL)
        return self.score.guidance_loss(emitted_BLC, labels_B, generator, asked.open_BL, pass_B=asked.chosen_B)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a student is asked for."""

    chosen_B: Tensor
    """Which kind of pass, int64."""
    start_B: Tensor
    """Its first token, int64."""
    stop_B: Tensor
    """Its end, int64."""
    open_BL: Tensor
    """bool, the tokens that it is to emit."""
    own_B: Tensor
    """bool, whether the prefix is the student's own rather than the pair's."""
    sequence_BLC: Tensor
    """Noise where open, else codes."""


def by_step(values_L: Tensor, steps: tuple[int, ...]) -> Tensor:
    """Means over the tokens of each AR step, [K]."""
    if len(steps) == len(values_L):
        return values_L
    return torch.stack([part.mean() for part in values_L.split(list(steps))])
