"""The sections of reinforcement learning: how completions are drawn, and what is made of their rewards."""

from collections.abc import Iterator
from typing import Annotated, Literal

from annotated_types import Gt, Le

from grpo.config.types import (
    AdvantageKind,
    Fraction,
    GuidanceScale,
    KLEstimator,
    LossLevel,
    MayChange,
    NonNegativeFloat,
    NonNegativeInt,
    PolicyLoss,
    PositiveFloat,
    ProperFraction,
    Section,
    Share,
    Size,
    Temperature,
    TopP,
    Wanted,
    Weight,
)


class Rollout(Section):
    """How completions are drawn from the policy."""

    mode: Literal["teacher_forced", "autoregressive"] = "teacher_forced"
    """teacher_forced: all positions at once under the codes of a real image; autoregressive: true sampling."""
    num_generations: Annotated[int, Gt(0), Le(4096)] = 8
    """Completions of each image (G)."""
    batch_size: Size = 32
    """Images of one rollout, over all ranks."""
    temperature: Temperature = 1.0
    """Divides the logits, in sampling and in the log-probs."""
    top_k: NonNegativeInt = 0
    """Draw from the k most likely codes only; 0 is off."""
    top_p: TopP = 1.0
    """Draw from the smallest set of codes whose probability exceeds p; 1 is off."""
    cfg_scale: GuidanceScale = 1.0
    """Classifier-free guidance of autoregressive rollouts; 1 is off."""
    guidance_in_loss: Literal["guided", "conditional"] = "guided"
    """What the loss scores under guidance: the guided distribution (exact) or the conditional one (cheaper, biased)."""
    use_context_noise: bool = False
    """Replace a share of the teacher-forced context by random codes."""
    context_noise: Fraction = 0.5
    """Share of the context that use_context_noise replaces."""
    importance_weight_cap: NonNegativeFloat = 0.0
    """Weight tokens by min(p_full / p_truncated, cap) when top-k or top-p truncate the draw; 0 is off."""
    max_rows: Annotated[NonNegativeInt, MayChange] = 0
    """Completions sampled together in autoregressive mode; 0 is what fits into a GPU's memory, and all on a CPU."""
    keep_memory: Annotated[Fraction, MayChange] = 0.1
    """Share of a GPU's memory that cache, weights and CUDA graph of sampling may hold through the update."""

    @property
    def loss_cfg_scale(self) -> float:
        """Guidance of the distribution that the loss scores."""
        return self.cfg_scale if self.guidance_in_loss == "guided" else 1.0

    @property
    def context_noise_share(self) -> float:
        """Share of the context tokens that are replaced: `context_noise` where it is switched on, else 0."""
        return self.context_noise if self.use_context_noise else 0.0


class Objective(Section):
    """Advantages, policy loss and its companions."""

    loss: PolicyLoss = "grpo"
    """grpo: mean over the tokens of each sequence, then over sequences; dapo: mean over all tokens; dr_grpo: sum over
    tokens divided by the constant length; gspo: ratio of whole sequences; cispo: clipped ratio as a detached weight."""
    advantage: AdvantageKind = "group_std"
    """Baseline and scale of the rewards: within the group of one image, or over the whole batch for the scale."""
    advantage_clip: PositiveFloat = 5.0
    """Advantages are clamped to plus and minus this."""
    clip_range: NonNegativeFloat = 1e-4
    """The ratio is clipped to 1 - clip_range .. 1 + clip_range."""
    clip_range_high: NonNegativeFloat | None = None
    """Upper side of the clip (DAPO's clip-higher); None is clip_range."""
    kl: KLEstimator = "none"
    """Estimator of KL(policy || reference), added to the loss with weight kl_coef."""
    use_kl_loss: bool = False
    """The reference trainer's switch: the same as kl = "k3"."""
    kl_coef: NonNegativeFloat = 0.01
    """Weight of the KL term; without effect while the KL is off."""
    kl_level: LossLevel = "token"
    """token: the estimator of each token's log-ratio, averaged like the loss; sequence: that of the mean log-ratio of
    a whole sequence."""
    reference: Literal["start", "ema"] = "start"
    """start: frozen weights; ema: the moving average of the policy (`training.ema_decay`), which follows it."""
    reference_checkpoint: Annotated[str | None, Wanted("weights of the frozen reference")] = None
    """Weights of the frozen reference; None is the policy's own start."""
    aux_ce_weight: NonNegativeFloat = 0.0
    """Weight of the cross-entropy on the real image's codes."""
    entropy_weight: Weight = 0.0
    """Weight of the mean token entropy in nats, subtracted from the loss (a bonus)."""
    entropy_target: Share | None = None
    """Entropy to steer to, as a share of the largest, log(codebook size). The weight starts at entropy_weight. After
    each optimizer step it is multiplied by exp(entropy_gain x distance of the entropy below the target). None keeps
    it."""
    entropy_dead_band: NonNegativeFloat = 0.015
    """Distance from entropy_target, on either side, within which the weight stays as it is."""
    entropy_gain: PositiveFloat = 3.0
    """How fast the weight follows, see entropy_target."""
    entropy_token_share: Share = 1.0
    """Policy loss and KL count only this share of the positions of each context, those with the highest entropy."""
    use_token_dropout: bool = False
    """Leave a random share of the tokens out of the policy loss."""
    token_dropout: ProperFraction = 0.5
    """Share of the tokens that use_token_dropout leaves out."""

    def files(self) -> Iterator[tuple[str, str, Wanted]]:
        if self.kl_estimator != "none":
            yield from super().files()

    @property
    def clip_low(self) -> float:
        """The ratio is clipped from below at 1 - clip_low."""
        return self.clip_range

    @property
    def clip_high(self) -> float:
        """The ratio is clipped from above at 1 + clip_high."""
        return self.clip_range if self.clip_range_high is None else self.clip_range_high

    @property
    def kl_estimator(self) -> KLEstimator:
        """The estimator of the KL term: `kl`, or k3 where only the reference trainer's switch is set."""
        return "k3" if self.kl == "none" and self.use_kl_loss else self.kl

    @property
    def token_dropout_share(self) -> float:
        """Share of the tokens left out of the loss: `token_dropout` where it is switched on, else 0."""
        return self.token_dropout if self.use_token_dropout else 0.0

    def positions_in_loss(self, length: int) -> int:
        """How many of the T = `length` positions of a context entropy_token_share is, at least one."""
        return max(1, round(self.entropy_token_share * length))
