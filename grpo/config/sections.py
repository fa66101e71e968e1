"""The sections that several jobs share: every key, its type, its default, what it means.

The string under a field is its documentation and appears in `--help`. Defaults are those of the reference trainer
(VA-π's `train_c2i_grpo.py`) wherever it has the setting, so that its command lines mean the same here. Checks of one
key live with its field, those across keys in `checks.py`; sections of one job or of rewards have files of their own.
"""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, FiniteFloat

LARGEST_INT = 2**31 - 1  # beyond it counts and sizes overflow somewhere below, in an error that names no key
LARGEST_SEED = 2**63 - 1

PositiveInt = Annotated[int, Gt(0), Le(LARGEST_INT)]
NonNegativeInt = Annotated[int, Ge(0), Le(LARGEST_INT)]
MinusOneOrMore = Annotated[int, Ge(-1), Le(LARGEST_INT)]
Seed = Annotated[int, Ge(0), Le(LARGEST_SEED)]
PositiveFloat = Annotated[FiniteFloat, Gt(0)]
NonNegativeFloat = Annotated[FiniteFloat, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
ProperFraction = Annotated[float, Ge(0), Lt(1)]
Temperature = Annotated[FiniteFloat, Ge(1e-30), Le(1e30)]  # what logits can be divided by in fp32
TopP = Annotated[float, Gt(0), Le(1)]
GuidanceScale = Annotated[FiniteFloat, Ge(1)]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
KernelBackend = Literal["auto", "triton", "reference"]
PolicyLoss = Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"]
AdvantageKind = Literal["group_std", "group_mean", "leave_one_out", "batch_std", "gdpo"]
KLEstimator = Literal["none", "k1", "k2", "k3"]


class MayChange:
    """Metadata of a key that a resumed run may change: it moves work around, it does not change it."""


class Section(BaseModel):
    """Base of all sections: strict about names, immutable, documented by attribute docstrings; no text is empty."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, str_min_length=1)

    @classmethod
    def free_keys(cls) -> set[str]:
        """The keys that a resumed run may change."""
        is_free = issubclass(cls, FreeSection)
        return {name for name, field in cls.model_fields.items() if is_free or MayChange in field.metadata}


class FreeSection(Section):
    """Base of the sections whose every key a resumed run may change."""


class Model(Section):
    """The autoregressive image generator."""

    name: str = "GPT-B"
    """Spec of the GPT, a key of `grpo.models.MODEL_SPECS`: GPT-B, GPT-L, GPT-XL, GPT-XXL, ..."""
    checkpoint: str | None = None
    """Weights to start from: a LlamaGen file, .safetensors, or a checkpoint folder. None starts from random weights."""
    from_fsdp: bool = False
    """The checkpoint is a bare state dict, as LlamaGen's FSDP trainer writes it (found out by itself when false)."""
    num_classes: PositiveInt = 1000
    """Number of classes; class id `num_classes` is the unconditional slot."""
    cls_token_num: PositiveInt = 1
    """Condition tokens before the image; must be 1, as in every class-conditional model."""
    class_dropout: Fraction = 0.0
    """Share of training rows that see the unconditional class (pre-training only)."""
    dropout: Fraction = 0.0
    """Dropout of tokens, residuals and feed-forwards in pre-training."""


class Tokenizer(Section):
    """The frozen VQ tokenizer between images and codes."""

    name: str = "VQ-16"
    """Spec of the tokenizer, a key of `grpo.models.TOKENIZER_SPECS`: VQ-16, VQ-8 or a small one."""
    checkpoint: str | None = None
    """Weights of the tokenizer. Required by every job but its own training."""
    codebook_size: PositiveInt = 16384
    """Number of codes, the GPT's vocabulary."""
    codebook_embed_dim: PositiveInt = 8
    """Dimensions of one code."""
    downsample_size: PositiveInt = 16
    """Pixels of the image along each side of one code."""


class Data(Section):
    """The images."""

    name: Literal["imagenet", "huggingface", "folder", "digits", "synthetic"] = "imagenet"
    """imagenet: a saved Hugging Face dataset or a folder of class folders, whichever `path` is; huggingface and folder
    insist on one of them; digits: MNIST digits, which come along; synthetic: random images, to try the machinery."""
    path: str | None = None
    """Folder of the data set (`datasets.save_to_disk` or one folder a class). Required unless digits or synthetic."""
    split: str = "train"
    """Split to read: a key of the saved dataset, a subfolder, or a part of the digits (train, its halves train_a and
    train_b, validation, test, heldout, all)."""
    image_size: PositiveInt = 256
    """Side of the square centre crop, pixels."""
    num_workers: Annotated[NonNegativeInt, MayChange] = 8
    """Loader processes of each rank."""
    cache_codes: Annotated[bool, MayChange] = False
    """Keep the codes of every image in memory after its first encoding, so that the tokenizer encodes it once."""
    max_bad_images: Annotated[NonNegativeInt, MayChange] = 100
    """Unreadable images to name, count and skip before the run is stopped."""


class Rollout(Section):
    """How completions are drawn from the policy."""

    mode: Literal["teacher_forced", "autoregressive"] = "teacher_forced"
    """teacher_forced: all positions at once under the codes of a real image; autoregressive: true sampling."""
    num_generations: Annotated[int, Gt(0), Le(4096)] = 8
    """Completions of each image (G)."""
    batch_size: PositiveInt = 32
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
    """That share."""
    importance_weight_cap: NonNegativeFloat = 0.0
    """Weight tokens by min(p_full / p_truncated, cap) when top-k or top-p truncate the draw; 0 is off."""
    max_rows: Annotated[NonNegativeInt, MayChange] = 0
    """Completions sampled together in autoregressive mode; 0 is what fits into a GPU's memory, and all on a CPU."""

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
    reference_checkpoint: str | None = None
    """Weights of the frozen reference; None is the policy's own start."""
    aux_ce_weight: NonNegativeFloat = 0.0
    """Weight of the cross-entropy on the real image's codes."""
    entropy_weight: FiniteFloat = 0.0
    """Weight of the mean token entropy, subtracted from the loss (a bonus)."""
    use_token_dropout: bool = False
    """Leave a random share of the tokens out of the policy loss."""
    token_dropout: ProperFraction = 0.5
    """That share."""

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


class Optimizer(Section):
    """AdamW; norms and biases are not decayed."""

    lr: NonNegativeFloat = 1e-5
    """Learning rate (peak)."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""
    beta1: ProperFraction = 0.9
    """Decay of the first moment."""
    beta2: ProperFraction = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global L2 norm."""
    schedule: Literal["constant", "cosine", "one_cycle"] = "constant"
    """Learning rate after warm-up: constant, or cosine to zero; one_cycle: 30 % of the steps up, then cosine to 0."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up (constant and cosine)."""


class Training(Section):
    """Length, batch and precision."""

    steps: Annotated[PositiveInt, MayChange] = 100
    """Steps of the run: rollouts with their updates in `train`, optimizer steps elsewhere."""
    seed: Seed = 0
    """Seed of initial weights, data order and sampling."""
    batch_size: PositiveInt | None = None
    """Completions (in `train`) or images (elsewhere) of one optimizer step, over all ranks. None is a whole rollout
    (exactly on-policy, and the fastest), and 64 images."""
    micro_batch_size: Annotated[PositiveInt, MayChange] = 8
    """Rows in one forward and backward on each rank, at most; it bounds memory and, but for rounding, changes nothing.
    With teacher forcing a row is an image with all its completions, elsewhere one completion or image."""
    mixed_precision: Precision = "bf16"
    """Precision of forward and backward; weights and optimizer stay fp32. fp16 uses loss scaling. auto: bf16 where the
    device multiplies it (a GPU, a CPU with AMX or AVX512-BF16), else fp32."""
    grad_precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Precision in which gradients are reduced across ranks; None is fp32."""
    dropout_mode: Literal["eval", "train", "twice"] = "eval"
    """Dropout in the update of `train`. Only eval (none, as in the rollout): the other two are refused."""
    max_skipped_steps: Annotated[PositiveInt, MayChange] = 10
    """Optimizer steps in a row with a non-finite loss or gradient (each skipped) after which the run stops."""
    kernels: KernelBackend = "auto"
    """Backend of sampling, log-probs and loss: Triton on a GPU and plain torch elsewhere, or one of them always."""

    @property
    def images(self) -> int:
        """Images of one optimizer step over all ranks, in the jobs whose steps take images."""
        return self.batch_size or 64


class Parallel(FreeSection):
    """How the model is spread over ranks."""

    data_parallel: Literal["fsdp", "sdp", "hsdp"] = "fsdp"
    """fsdp: shard parameters, gradients, optimizer; sdp: keep parameters gathered; hsdp: shard in groups of ranks."""
    shard_size: MinusOneOrMore = -1
    """Ranks of one shard group in hsdp; -1 is those of one host, or all ranks / replicate_size where that is set."""
    replicate_size: MinusOneOrMore = -1
    """Shard groups in hsdp, each with the whole model. -1 fills in: all ranks / shard_size."""
    reshard_after_forward: Literal["auto", "always", "never"] = "auto"
    """Free a block's gathered parameters after its forward. always saves memory, never a gather; auto: never in sdp."""
    defer_gradient_sync: bool = True
    """Reduce gradients over ranks once an optimizer step; until its last micro-batch each rank holds the gradient of
    the whole model. false: every micro-batch reduces, and ranks hold their shards only."""
    shard_blocks: bool = True
    """Gather and reduce each block apart; false: the whole model, where latency counts more than bytes."""
    timeout: PositiveInt = 600
    """Seconds after which a collective or checkpoint that a rank does not join ends the run. A start waits as long for
    another process that still writes into the run's folder."""


class Compile(FreeSection):
    """torch.compile over the GPT blocks and, in `train`, the networks of the rewards."""

    enabled: bool = False
    """Compile each block, where identical blocks share one compilation, and each network of the rewards."""


class ActivationCheckpoint(FreeSection):
    """Recompute activations in the backward to save memory."""

    mode: Literal["none", "selective", "full"] = "none"
    """none; selective: keep matrix products and attention, recompute the rest; full: keep block inputs only."""


class Checkpoint(FreeSection):
    """Saving and resuming."""

    interval: NonNegativeInt = 0
    """Steps between checkpoints; 0 saves only at the end."""
    dir: str = "checkpoints"
    """Folder of the checkpoints. The default is inside the run's folder; any other value is a path of its own."""
    sharded: bool = False
    """Write shards only; otherwise also `consolidated.pth`, the weights in one file that LlamaGen loads."""
    safetensors: bool = False
    """Write `consolidated.safetensors` too, the weights in one file that everyone can read without risk."""
    resume: str = "auto"
    """auto: the newest complete checkpoint of this run, if any; none: start anew; or the path of a checkpoint."""
    keep_last: NonNegativeInt = 0
    """Checkpoints to keep, the newest ones; 0 keeps all."""
    keep_best: NonNegativeInt = 0
    """Checkpoints to keep besides those: the best ones by best_metric."""
    best_metric: str = "reward_mean"
    """Metric of metrics.jsonl that keep_best ranks by, as its mean over the steps since the checkpoint before."""
    best_is: Literal["highest", "lowest"] = "highest"
    """Which values of best_metric are good."""
    save_final: bool = True
    """Write a checkpoint after the last step."""
    async_save: bool = True
    """Write in the background while training goes on."""


class Metrics(FreeSection):
    """What a run writes down and shows."""

    run_dir: str | None = None
    """The run's folder; None is runs/<name of the recipe file>."""
    interval: PositiveInt = 10
    """Steps between lines of the log and of Weights & Biases; metrics.jsonl has every step."""
    image_interval: NonNegativeInt = 100
    """Steps between image grids; 0 draws none."""
    image_groups: PositiveInt = 4
    """Images of one grid, each with its completions."""
    wandb: bool = False
    """Log to Weights & Biases (offline unless it is set up otherwise)."""
    wandb_project: str = "autoreg-grpo"
    """Its project."""
    wandb_entity: str | None = None
    """Its team or user."""
    wandb_run_name: str | None = None
    """Its run name; None is the name of the run's folder."""


class Debug(FreeSection):
    """For finding faults."""

    deterministic: bool = False
    """Deterministic algorithms only."""
    profile: NonNegativeInt = 0
    """Step of which each rank writes a trace into the run's folder, for Perfetto or chrome://tracing; 0 is none."""
