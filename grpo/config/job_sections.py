"""The sections that belong to one job: what to train, sample, measure or convert besides the shared settings."""

from collections.abc import Iterator
from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import Field

from grpo.config.sections import Checkpoint, Data
from grpo.config.types import (
    LARGEST_COUNT,
    LARGEST_IMAGE,
    LARGEST_INT,
    VGG16,
    ClassIds,
    CropRanges,
    DiscriminatorLayers,
    DiscriminatorWidth,
    Fraction,
    GuidanceScale,
    ImageCount,
    ImageSize,
    KernelBackend,
    LearningRate,
    MayChange,
    MinusOneOrMore,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Precision,
    ProperFraction,
    Section,
    Seed,
    Share,
    Size,
    Temperature,
    TopP,
    Wanted,
    Written,
    backbone_file,
)


class Distill(Section):
    """What `distill` matches: the distribution of a frozen generator with guidance and temperature."""

    cfg_scale: GuidanceScale = 1.5
    """Classifier-free guidance of the teacher. The student learns to do without; 1 is off."""
    temperature: Temperature = 1.0
    """Divides the teacher's guided logits. The student draws, and is scored, at temperature 1."""
    reverse_share: Fraction = 0.0
    """Share s of the reverse direction in the loss (1 - s) KL(teacher || student) + s KL(student || teacher)."""
    teacher_checkpoint: Annotated[str | None, Wanted("weights of the teacher")] = None
    """Weights of the teacher; None is the student's own start."""
    max_rows: Annotated[NonNegativeInt, MayChange] = 0
    """Images drawn together on each rank; 0 is what fits into a GPU's memory, and all on a CPU."""


class Finetune(Section):
    """What `finetune` minimises on the codes of real images, so that images need no guidance."""

    loss: Literal["cca", "gft"] = "cca"
    """cca: condition contrastive alignment (arXiv 2410.09347) to a frozen reference; gft: guidance-free training
    (arXiv 2501.15420) with a fixed beta."""
    beta: PositiveFloat | None = None
    """cca: scale of the log-ratios to the reference, 0.02 if None. gft: share of the conditional logits in the mixture
    that the likelihood trains, at most 1, as if the model was to be guided by 1 / beta; 0.66 if None."""
    negative_weight: NonNegativeFloat = 1000.0
    """cca: weight of mismatched conditions (lambda). Published for LlamaGen: 1000 (B, XL, XXL), 300 (L), 500 (3B)."""
    reference_checkpoint: Annotated[str | None, Wanted("weights of the frozen reference")] = None
    """cca: weights of the frozen reference; None is the model's own start."""

    @property
    def scale(self) -> float:
        """beta, or what None stands for."""
        return self.beta if self.beta is not None else {"cca": 0.02, "gft": 0.66}[self.loss]


class TokenizerLoss(Section):
    """How the VQ tokenizer is trained."""

    reconstruction: Literal["l1", "l2"] = "l2"
    """Distance to the image: mean absolute or mean squared error over pixels in [-1, 1]."""
    commitment_weight: NonNegativeFloat = 0.25
    """Weight of the squared distance that draws the encoder's output to its code."""
    codebook_update: Literal["ema", "gradient"] = "ema"
    """ema: codes follow the running mean of the encoder outputs assigned to them; gradient: codes are trained by the
    squared distance to those outputs."""
    codebook_ema: ProperFraction = 0.95
    """Decay of that running mean, per optimizer step."""
    restart_threshold: NonNegativeFloat = 0.1
    """A code whose running count of uses a step falls below this is moved to an encoder output (ema only); 0 is off."""
    unquantised_steps: NonNegativeInt = 40
    """First optimizer steps without quantisation, after which the codebook is set from encoded images."""
    perceptual_weight: NonNegativeFloat = 0.0
    """Weight of LPIPS, a learned perceptual distance, to the image; 0 does without. LlamaGen's is 1."""
    perceptual_backbone: Annotated[str | None, Wanted(f"torchvision's VGG16, {VGG16}")] = None
    """File of torchvision's VGG16, vgg16-397923af.pth, that LPIPS needs. None looks for it where torch keeps its
    downloads, in hub/checkpoints of TORCH_HOME; nothing is downloaded."""

    def files(self) -> Iterator[tuple[str, str, Wanted]]:
        if self.perceptual_weight:
            yield backbone_file("perceptual_backbone", self.perceptual_backbone)


class Adversary(Section):
    """A PatchGAN discriminator that the tokenizer is trained against; it may reward a run later."""

    weight: NonNegativeFloat = 0.0
    """Weight of the discriminator in the tokenizer's loss; 0 trains without one. LlamaGen's is 0.5."""
    start: PositiveInt = 20_000
    """Step from which on the discriminator is trained and counts."""
    adaptive: bool = False
    """Multiply the weight by the ratio of the gradients of the rest of the reconstruction's loss and of its own at the
    decoder's last layer (VQGAN's; LlamaGen trained without)."""
    loss: Literal["hinge", "vanilla", "non_saturating"] = "hinge"
    """hinge: it learns by hinges around 1 and -1; vanilla: by cross-entropy. Under both the tokenizer raises its mean
    logit; non_saturating: cross-entropy too, and the tokenizer raises its log p(real)."""
    dim: DiscriminatorWidth = 64
    """Channels of its first layer."""
    num_layers: DiscriminatorLayers = 3
    """Its layers that halve the image."""
    lr: LearningRate | None = None
    """Learning rate of its own AdamW; None is optimizer.lr, and all else is as in the section [optimizer]."""
    checkpoint: Annotated[str | None, Wanted("a discriminator, as tokenizer training saves it")] = None
    """Weights to start from, as in reward.patchgan.checkpoint; None starts from random weights."""


class Encode(Section):
    """Codes of a data set, on disk."""

    output: str | None = None
    """Folder for the codes: a new one, or one that the same job has begun."""
    augmentation: Literal["none", "flip", "ten_crop"] = "none"
    """Views of each image that are encoded. none: the image; flip: and its mirror image; ten_crop: corners and centre
    of a larger one and of its mirror image, for pre-training. A pre-training run draws one of them each time."""
    crop_ranges: CropRanges = Field(default_factory=lambda: [1.1])
    """Sides of the larger images of ten_crop, over data.image_size; each gives ten views. LlamaGen's are 1.1 and
    1.05."""
    batch_size: PositiveInt = 64
    """Views that are encoded together on each rank."""
    shard_size: PositiveInt = 1024
    """Images in one file. A rank that is killed loses the one it was at."""


class Classifier(Section):
    """A small convolutional classifier: a reward, or the judge of an evaluation."""

    width: Size = 32
    """Channels of the first stage, a multiple of 8."""
    num_classes: Size = 10
    """Number of classes."""
    shift: Annotated[int, Ge(0), Le(LARGEST_IMAGE)] = 0
    """Training images are shifted at random by up to this many pixels each way, so that fewer of them suffice."""


class Reader(Section):
    """A small convolutional network that reads drawings of the world of shapes, to judge or to reward."""

    width: Size = 16
    """Channels of the first stage, a multiple of 8; the second has twice as many."""
    noise: Fraction = 0.15
    """Standard deviation, at most, of the noise on training images in [-1, 1]; blur, too, is of random strength."""


class Sampling(Section):
    """How images are drawn from a trained generator."""

    class_ids: ClassIds = "all"
    """Classes to draw: "all" or a list of class ids."""
    prompts: Annotated[str | None, Wanted("prompts")] = None
    """Texts to draw, taken in turn: a .txt with one a line, a .jsonl with objects that have it under prompt, text or
    caption, or a folder of .txt files, one a text."""
    prompt: str | None = None
    """One text to draw, in place of those."""
    image_size: ImageSize = 256
    """Side of the images that the generator was trained on, pixels."""
    class_order: Literal["in_turn", "random"] = "in_turn"
    """in_turn: the classes one after the other, again and again; random: each image's class is drawn, by the seed."""
    resize_to: ImageSize | None = None
    """Side to which drawn images are resized, pixels; none keeps them."""
    resize_filter: Literal["bicubic_antialiased", "bicubic"] = "bicubic_antialiased"
    """How they are resized; LlamaGen's evaluation does it without antialiasing."""
    temperature: Temperature = 1.0
    """Divides the logits."""
    top_k: NonNegativeInt = 0
    """Draw from the k most likely codes only; 0 is off."""
    top_p: TopP = 1.0
    """Draw from the smallest set of codes whose probability exceeds p; 1 is off."""
    cfg_scale: GuidanceScale = 1.0
    """Classifier-free guidance; 1 is off."""
    cfg_interval: MinusOneOrMore = -1
    """Last token position with guidance; -1 guides all positions."""
    seed: Seed = 0
    """Seed of the draws: the same seed gives the same images on any number of ranks."""
    batch_size: PositiveInt = 32
    """Images drawn together on each rank."""
    mixed_precision: Precision = "bf16"
    """Precision of the generator and of the tokenizer; auto as in `training.mixed_precision`."""
    kernels: KernelBackend = "auto"
    """Backend of sampling: Triton on a GPU and plain torch elsewhere, or one of them always."""

    def files(self) -> Iterator[tuple[str, str, Wanted]]:
        if self.prompt is None:
            yield from super().files()


class Output(Section):
    """Where drawn images go; at least one of grid, folder and npz."""

    num_images: ImageCount = 64
    """Images to draw in all."""
    grid: Annotated[str | None, Written()] = None
    """PNG file with all images in one grid."""
    grid_columns: Size = 8
    """Images in one row of the grid."""
    folder: Annotated[str | None, Written(folder=True)] = None
    """Folder of one PNG file an image."""
    layout: Literal["plain", "geneval", "dpg"] = "plain"
    """How images lie in `folder`. plain: 000123.png by number; geneval: 00012/samples/0000.png and 00012/metadata.jsonl
    by the number of the prompt; dpg: one PNG a prompt with its four images, named as the prompt's file."""
    images_per_prompt: Size = 4
    """Images of each prompt in the layouts geneval and dpg."""
    npz: Annotated[str | None, Written()] = None
    """File with `arr_0` [N, H, W, 3] uint8 and `arr_1` [N] int64, the class ids."""


class Evaluation(Section):
    """What is measured against what."""

    images: Annotated[str | None, Wanted("a folder of images or an .npz")] = None
    """Evaluate these images, a folder or an .npz with `arr_0`, instead of drawing them from a model."""
    reference: Annotated[str | None, Wanted("a folder of images or an .npz")] = None
    """Reference images: a folder or an .npz with `arr_0`; none takes those of the section [data]."""
    feature_checkpoint: Annotated[str | None, Wanted("weights of a classifier")] = None
    """Classifier, as `grpo classifier` writes it, whose features and accuracy are used."""
    inception_checkpoint: Annotated[str | None, Wanted("weights-inception-2015-12-05-6726825d.pth")] = None
    """Inception v3 weights of the published FID, for features and inception score; nothing is downloaded."""
    reader_checkpoint: Annotated[str | None, Wanted("weights of a reader of shapes")] = None
    """Reader, as `grpo reader` writes it, of the world of shapes: tells how much of what the prompts ask for is drawn,
    beside a fit of the renderer."""
    reward_checkpoint: Annotated[str | None, Wanted("weights of a classifier")] = None
    """Classifier that rewarded the run: its mean log p(class | image) is reported as the reward."""
    num_images: ImageCount = 50_000
    """Images to draw, or at most to take from `images`."""
    num_reference_images: Annotated[int, Ge(0), Le(LARGEST_COUNT)] = 0
    """Reference images to take at most; 0 takes all."""
    batch_size: PositiveInt = 64
    """Images whose features are computed together on each rank."""
    nearest_k: Size = 3
    """Neighbours that define the manifold of precision and recall."""
    kid_subset_size: Annotated[int, Ge(2), Le(LARGEST_INT)] = 1000
    """Images in each random subset of KID."""
    kid_subsets: Size = 100
    """Number of those subsets."""
    protocol: Literal["none", "llamagen"] = "none"
    """llamagen sets every key that LlamaGen's published numbers fix and the recipe leaves alone: 50,000 images of
    random classes, guidance by the model's size, no top-k, 256 pixels; and measures as ADM's evaluator does."""
    scores: Annotated[str | None, Wanted("results of GenEval or DPG-Bench")] = None
    """Read the scores from a file that GenEval (results.jsonl) or DPG-Bench (results .txt) has written, and add them to
    `json_path`; nothing else is done."""
    json_path: Annotated[str | None, Written()] = None
    """File for the results with their settings; none prints them only."""


class Judge(Section):
    """Evaluation during training, of the same classes and seeds every time, by a network that rewards nothing."""

    interval: Annotated[NonNegativeInt, MayChange] = 0
    """Steps between evaluations, which also come before the first step and after the last; 0 has none."""
    feature_checkpoint: Annotated[str | None, Wanted("weights of a classifier")] = None
    """Classifier, as `grpo classifier` writes it, that gives judge/fid, in its features, and judge/accuracy."""
    inception_checkpoint: Annotated[str | None, Wanted("weights-inception-2015-12-05-6726825d.pth")] = None
    """Inception v3 weights of the published FID, in place of a classifier: gives judge/fid."""
    reference: Annotated[str | None, Wanted("a folder of images or an .npz")] = None
    """Reference images, a folder or an .npz with `arr_0`; none takes those of the section [data]."""
    split: str | None = None
    """Split of the section [data] whose images are the reference; None is the one that is trained on."""
    num_reference_images: NonNegativeInt = 10_000
    """Reference images to take at most, of a data set evenly over its length; 0 takes all."""
    num_images: Annotated[ImageCount, Ge(2)] = 1000
    """Images to draw each time, with the classes of the data set in turn."""
    temperature: Temperature = 1.0
    """Divides the logits of these draws."""
    cfg_scale: GuidanceScale = 1.0
    """Classifier-free guidance of these draws; 1 is off."""
    seed: Seed = 1
    """Seed of these draws."""
    batch_size: Annotated[PositiveInt, MayChange] = 64
    """Images that are decoded and looked at together on each rank."""
    patience: Annotated[PositiveInt, MayChange] = 3
    """Evaluations in a row with a worse FID than the best, and a higher reward than then, that raise an alarm."""
    stop: Annotated[bool, MayChange] = False
    """Stop the run, with a checkpoint, at that alarm; false only tells."""
    max_time_share: Annotated[Share, MayChange] = 0.25
    """Share of the run's time that evaluations may take; one that would go beyond is left out. The first and the last
    are always done."""

    def problems(self, data: Data, checkpoint: Checkpoint) -> Iterator[str]:
        """A judge has one network and a reference, and is there if the best checkpoint goes by it."""
        by_judge = bool(checkpoint.keep_best) and checkpoint.best_metric.startswith("judge/")
        if by_judge and not self.interval:
            yield f"checkpoint.best_metric = {checkpoint.best_metric} needs judge.interval"
        if by_judge and checkpoint.best_metric == "judge/fid" and checkpoint.best_is == "highest":
            yield 'checkpoint.best_is must be "lowest" with checkpoint.best_metric = "judge/fid"'
        if not self.interval:
            return
        if (self.feature_checkpoint is None) == (self.inception_checkpoint is None):
            yield "judge.interval needs one of judge.feature_checkpoint and judge.inception_checkpoint"
        if self.reference is None and (not data.has_images or data.may_be_stream):
            yield f'judge.reference is required: data.name = "{data.name}" has no images that can be picked'
        if self.reference is not None and self.split is not None:
            yield "judge.split: the reference is that of judge.reference; leave one of them out"

    def files(self) -> Iterator[tuple[str, str, Wanted]]:
        if self.interval:
            yield from super().files()


class Convert(Section):
    """Weights from one layout into another."""

    input: Annotated[str | None, Wanted("weights in any layout")] = None
    """Weights to read: a LlamaGen file, .safetensors, or a checkpoint folder."""
    adapter: Annotated[str | None, Wanted("a LoRA adapter in PEFT's layout, with adapter_config.json")] = None
    """Folder of a LoRA adapter that belongs to the input and is merged into it."""
    output: Annotated[str | None, Written()] = None
    """File or folder to write; it must not exist."""
    format: Literal["auto", "llamagen", "safetensors", "distributed"] = "auto"
    """Layout to write. auto goes by the output's name: .safetensors, .pt or .pth (llamagen), a folder (distributed)."""
