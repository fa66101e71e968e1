"""The sections that several jobs share: every key, its type, its default, what it means.

The string under a field is its documentation and appears in `--help`. Defaults are those of the reference trainer
(VA-π's `train_c2i_grpo.py`) wherever it has the setting, so that its command lines mean the same here. Checks of one
key live with its field, those across keys in `recipes.py`; sections of one job, of GRPO and of rewards have files of
their own.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import Field, FiniteFloat

from grpo.config.types import (
    LARGEST_FLOAT,
    LARGEST_WORKERS,
    ClassNames,
    Fraction,
    FreeSection,
    ImageSize,
    KernelBackend,
    LayerNames,
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
    Size,
    Tags,
    Wanted,
    Written,
)

PUBLISHED = {"GPT-B": "c2i_B_256.pt", "GPT-L": "c2i_L_256.pt", "GPT-3B": "c2i_3B_384.pt"}
PUBLISHED |= {"GPT-XL": "c2i_XL_384.pt", "GPT-XXL": "c2i_XXL_384.pt"}
"""LlamaGen's released files, by the spec of the generator."""


class Model(Section):
    """The autoregressive image generator."""

    name: str = "GPT-B"
    """Spec of the GPT, a key of `grpo.models.MODEL_SPECS`: GPT-B, GPT-L, GPT-XL, GPT-XXL, ..."""
    checkpoint: Annotated[str | None, Wanted("weights of the generator")] = None
    """Weights to start from: a LlamaGen file, .safetensors, or a checkpoint folder. None starts from random weights."""
    adapter: Annotated[str | None, Wanted("a LoRA adapter in PEFT's layout, with adapter_config.json")] = None
    """Folder of a LoRA adapter in PEFT's layout that belongs to the checkpoint: merged into the weights, or trained
    further where lora.rank is not 0."""
    from_fsdp: bool = False
    """The checkpoint is a bare state dict, as LlamaGen's FSDP trainer writes it (found out by itself when false)."""
    num_classes: Size = 1000
    """Number of classes; class id `num_classes` is the unconditional slot."""
    new_classes: NonNegativeInt = 0
    """Classes that the checkpoint does not have, the last ones of num_classes (pre-training only). Their embeddings
    start as the unconditional one. The checkpoint's own classes are kept if num_classes leaves room for them, or else,
    where all classes are new, left out."""
    trained: Literal["all", "embeddings"] = "all"
    """What is trained: the whole generator, or the embeddings of its classes alone."""
    cls_token_num: PositiveInt = 1
    """Condition rows P before the image: 1 for a class, the most tokens of a text in a text-conditional model, 120 in
    LlamaGen's."""
    caption_dim: Size | None = None
    """Width C of the features of a text, 2048 for flan-t5-xl: makes the model text-conditional. None: it takes
    classes."""
    class_dropout: Fraction = 0.0
    """Share of rows that see the unconditional class: in `pretrain`, and in the update of `train` where
    training.dropout_mode is not eval, which makes the default 0.1."""
    dropout: ProperFraction = 0.0
    """Dropout of embeddings and of the outputs of attention and feed-forward, there too and with the same default."""
    token_dropout: ProperFraction | None = None
    """Dropout of embeddings alone; None is dropout."""

    @property
    def drops(self) -> bool:
        """Whether any dropout is not 0."""
        return any((self.dropout, self.class_dropout, self.token_dropout))

    @property
    def is_text(self) -> bool:
        """Whether it is asked by texts, and not by classes."""
        return self.caption_dim is not None

    def missing_files(self) -> Iterator[str]:
        example = f", such as LlamaGen's {PUBLISHED[self.name]}" if self.name in PUBLISHED else ""
        return (f"{line} {self.name}{example}" for line in super().missing_files())


class Lora(Section):
    """A low-rank adapter (LoRA) that is trained in place of the generator's weights."""

    rank: Annotated[int, Ge(0), Le(4096)] = 0
    """Rank of the adapter's matrices; 0 trains the weights themselves."""
    alpha: PositiveFloat | None = None
    """The adapter's product is multiplied by alpha / rank; None is twice the rank."""
    targets: LayerNames = Field(default_factory=lambda: ["wqkv", "wo", "w1", "w2", "w3"])
    """Linear layers of every block that have an adapter, by their names in the model."""


class Tokenizer(Section):
    """The frozen VQ tokenizer between images and codes."""

    name: str = "VQ-16"
    """Spec of the tokenizer, a key of `grpo.models.TOKENIZER_SPECS`: VQ-16, VQ-8 or a small one."""
    checkpoint: Annotated[str | None, Wanted("weights of the tokenizer, such as LlamaGen's vq_ds16_c2i.pt")] = None
    """Weights of the tokenizer. Required by every job but its own training."""
    codebook_size: Size = 16384
    """Number of codes, the GPT's vocabulary."""
    codebook_embed_dim: Size = 8
    """Dimensions of one code."""
    downsample_size: PositiveInt = 16
    """Pixels of the image along each side of one code."""


class Data(Section):
    """The images."""

    name: Literal[
        "imagenet", "huggingface", "folder", "captions", "webdataset", "parquet", "stream", "codes", "classes",
        "prompts", "digits", "shapes", "synthetic",
    ] = "imagenet"  # fmt: skip
    """imagenet: whichever of the next five `path` is. huggingface: what `save_to_disk` wrote; folder: a folder a class;
    captions: images with captions; webdataset: tar files; parquet: Parquet files. stream: such files read from front to
    back, here or behind an address (hf://, https://). codes: what `grpo encode`, or LlamaGen, has written, without
    images; classes, prompts: no images, for autoregressive GRPO; digits: MNIST digits, which come along; shapes:
    drawings with captions and exact ground truth; synthetic: random images, to try the machinery."""
    path: Annotated[str | None, Wanted("the data set")] = None
    """Folder of the data set; tar and Parquet files also as a file or a pattern, `a-{000..123}.tar`. Required but with
    classes, digits, shapes and synthetic."""
    class_map: Annotated[str | None, Wanted("which class each class of the data is")] = None
    """File that says which class of the model each class of the data is, by id or by name: .json, .toml, or lines of
    two columns. None compares names."""
    caption_key: str | None = None
    """Column, or key of a JSON object, that holds the captions. None takes the first of text, caption, captions and
    prompt that is there, and in the jobs that need neither (tokenizer, encode) looks for classes first."""
    first_list: NonNegativeInt = 0
    """Number of the first of LlamaGen's lists of images that is read, of those in `path` in the order of names."""
    last_list: MinusOneOrMore = -1
    """Number of the last one; -1 reads all that follow."""
    classes: ClassNames = "all"
    """The classes to draw with the name classes: all of the model, or a list of class ids or names."""
    split: str = "train"
    """Split to read: a key of the saved dataset, a subfolder, a word in the names of tar or Parquet files, or a part
    of the digits (train, its halves train_a and train_b, validation, test, heldout, all) or of the shapes (train,
    reader, validation, test)."""
    image_size: ImageSize = 256
    """Side of the square centre crop, pixels."""
    codes: Annotated[str | None, Wanted("the codes that `grpo encode` wrote")] = None
    """Folder of the images' codes, as `grpo encode` writes it: nothing is encoded any more, and images are read only
    where something besides their codes is needed. It must be of the same images and tokenizer."""
    num_workers: Annotated[int, Ge(0), Le(LARGEST_WORKERS), MayChange] = 8
    """Loader processes of each rank."""
    cache_codes: Annotated[bool, MayChange] = False
    """Keep the codes of every image in memory after its first encoding, so that the tokenizer encodes it once."""
    shuffle_window: PositiveInt = 2048
    """Rows of a stream that are kept in memory and shuffled among themselves; files are shuffled besides."""
    index_cache: Annotated[str, MayChange] = "auto"
    """Where what a scan of the data set finds is kept for the next start: auto is `.grpo-cache` beside the data if that
    can be written, else in the user's cache folder; none; or a folder."""
    max_bad_images: Annotated[NonNegativeInt, MayChange] = 100
    """Unreadable images to name, count and skip before the run is stopped."""

    @property
    def place(self) -> str:
        """`path`, of a data set that needs one."""
        assert self.path is not None, "a recipe without is refused"
        return self.path

    @property
    def has_images(self) -> bool:
        """Whether there are images in this data set."""
        return self.name not in ("classes", "codes", "prompts")

    @property
    def may_be_stream(self) -> bool:
        """Whether rows are read from front to back only."""
        return self.name == "stream" or (self.name == "imagenet" and "://" in (self.path or ""))

    @property
    def has_codes(self) -> bool:
        """Whether the codes are on disk."""
        return self.name == "codes" or self.codes is not None

    def files(self) -> Iterator[tuple[str, str, Wanted]]:
        if self.name not in ("digits", "shapes", "synthetic"):  # which read no folder
            yield from super().files()

    def missing_files(self) -> Iterator[str]:
        is_pattern = self.path is not None and any(sign in self.path for sign in ("://", "{", "*", "?", "["))
        yield from (line for line in super().missing_files() if not (is_pattern and line.startswith("path:")))


class Optimizer(Section):
    """AdamW; norms and biases are not decayed."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw: its two moments in fp32; adamw_8bit: torchao's, with moments of 8 bits in blocks of 256, a quarter of the
    memory (pip install 'autoregressive-grpo[low-bit]')."""
    lr: LearningRate = 1e-5
    """Learning rate (peak)."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""
    beta1: ProperFraction = 0.9
    """Decay of the first moment."""
    beta2: ProperFraction = 0.95
    """Decay of the second moment."""
    eps: Annotated[FiniteFloat, Ge(1e-30), Le(LARGEST_FLOAT)] = 1e-8
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
    batch_size: Size | None = None
    """Completions (in `train`) or images (elsewhere) of one optimizer step, over all ranks. None is a whole rollout
    (exactly on-policy, and the fastest), and 64 images."""
    epochs_per_rollout: PositiveInt = 1
    """Times that the optimizer steps of one rollout go through it, in `train`; beyond 1 they are not on-policy."""
    micro_batch_size: Annotated[NonNegativeInt, MayChange] = 8
    """Rows in one forward and backward on each rank, at most; it bounds memory and, but for rounding, changes nothing.
    With teacher forcing a row is an image with all its completions, elsewhere one completion or image. 0 is the largest
    divisor of a rank's batch that is expected to fit into a GPU's memory, and all on a CPU; for generators only."""
    mixed_precision: Precision = "bf16"
    """Precision of forward and backward; weights and optimizer stay fp32. fp16 uses loss scaling. auto: bf16 where the
    device multiplies it (a GPU, a CPU with AMX or AVX512-BF16), else fp32."""
    grad_precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Precision in which gradients are reduced across ranks; None is fp32."""
    dropout_mode: Literal["eval", "train", "twice"] = "eval"
    """Dropout in the update of `train`; a rollout has none. eval: none either; train: with model.dropout and
    model.class_dropout; twice: each batch once without and once with them, the mean of both losses. Old and reference
    log-probs are those under the update's masks."""
    ema_decay: ProperFraction | None = None
    """Decay of a moving average of the weights, per optimizer step, which is written beside them at the end as
    `model_ema.safetensors`. None keeps no average."""
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
    """Free a block's gathered parameters after its forward and its backward. always saves memory; never gathers once an
    optimizer step; auto: never in sdp and on one rank."""
    defer_gradient_sync: bool = True
    """Reduce gradients over ranks once an optimizer step; until its last micro-batch each rank holds the gradient of
    the whole model. false: every micro-batch reduces, and ranks hold their shards only."""
    shard_blocks: bool = True
    """Gather and reduce each block apart; false, and on one rank: the whole model, where latency counts more than
    bytes."""
    timeout: PositiveInt = 600
    """Seconds after which a collective or checkpoint that a rank does not join ends the run. A start waits as long for
    another process that still writes into the run's folder."""


class Compile(FreeSection):
    """torch.compile over the GPT blocks and, in `train`, the tokenizer and the networks of the rewards."""

    enabled: bool = False
    """Compile each block, where identical blocks share one compilation, the tokenizer and each network of the
    rewards."""


class ActivationCheckpoint(FreeSection):
    """Recompute activations in the backward to save memory."""

    mode: Literal["none", "selective", "full"] = "none"
    """none; selective: keep matrix products and attention, recompute the rest; full: keep block inputs only."""


class Checkpoint(FreeSection):
    """Saving and resuming."""

    interval: NonNegativeInt = 0
    """Steps between checkpoints; 0 saves only at the end."""
    dir: Annotated[str, Written(folder=True)] = "checkpoints"
    """Folder of the checkpoints. The default is inside the run's folder; any other value is a path of its own, or the
    URL of a folder in object storage that fsspec knows, such as s3://bucket/run."""
    sharded: bool = False
    """Write shards only; otherwise also `consolidated.pth`, the weights in one file that LlamaGen loads."""
    safetensors: bool = False
    """Write `consolidated.safetensors` too, the weights in one file that everyone can read without risk."""
    resume: str = "auto"
    """auto: the newest complete checkpoint of this run, if any; none: start anew; or path or URL of a checkpoint."""
    keep_last: NonNegativeInt = 0
    """Checkpoints to keep, the newest ones; 0 keeps all."""
    keep_best: NonNegativeInt = 0
    """Checkpoints to keep besides those: the best ones by best_metric."""
    best_metric: str = "reward_mean"
    """Metric of metrics.jsonl that keep_best ranks by, as its mean over the steps since the checkpoint before. Of
    judge/ metrics it is the newest since then."""
    best_is: Literal["highest", "lowest"] = "highest"
    """Which values of best_metric are good."""
    save_final: bool = True
    """Write a checkpoint after the last step."""
    async_save: bool = True
    """Write in the background while training goes on."""


class Metrics(FreeSection):
    """What a run writes down and shows."""

    run_dir: Annotated[str | None, Written(folder=True)] = None
    """The run's folder; None is runs/<name of the recipe file>."""
    interval: PositiveInt = 10
    """Steps between lines of the log, of Weights & Biases and of TensorBoard; metrics.jsonl has every step."""
    image_interval: NonNegativeInt = 100
    """Steps between image grids; 0 draws none."""
    keep_grids: NonNegativeInt = 200
    """Grids to keep at most, spread over the run: beyond that number the one nearest to its neighbours is removed. 0
    keeps all."""
    image_groups: PositiveInt = 4
    """Images of one grid, each with its completions."""
    wandb: bool = False
    """Log to Weights & Biases, offline unless WANDB_API_KEY or WANDB_MODE says otherwise."""
    wandb_project: str = "autoreg-grpo"
    """Project in Weights & Biases."""
    wandb_entity: str | None = None
    """Team or user in Weights & Biases."""
    wandb_run_name: str | None = None
    """Name of the run in Weights & Biases; None is the name of the run's folder."""
    wandb_group: str | None = None
    """Group in Weights & Biases, under which runs are gathered; `grpo sweep` gives its runs one."""
    wandb_tags: Tags | None = None
    """Tags in Weights & Biases, by which runs are found."""
    tensorboard: bool = False
    """Write event files for TensorBoard into the run's folder."""


class Debug(FreeSection):
    """For finding faults."""

    deterministic: bool = False
    """Deterministic algorithms only."""
    profile: NonNegativeInt = 0
    """Step of which each rank writes a trace, for Perfetto, and a table of times into the run's folder; 0 is none."""
