"""The recipes of most jobs: their sections, and what cannot work together in them."""

from collections.abc import Iterator
from typing import Any, Self, cast

from pydantic import Field

from grpo.config.errors import UserError
from grpo.config.job_sections import (
    Adversary,
    Encode,
    Judge,
    TokenizerLoss,
)
from grpo.config.policy_sections import Objective, Rollout
from grpo.config.recipe import Recipe, TrainingRecipe, data_problems, required
from grpo.config.rewards import Rewards, RewardTable, reward_class
from grpo.config.schedule import Schedule
from grpo.config.sections import ActivationCheckpoint, Compile, Data, Lora, Model, Parallel, Tokenizer
from grpo.config.text_sections import Text, idle_text_keys, text_problems


class GeneratorRecipe(TrainingRecipe):
    """Base of the recipes that train the generator."""

    model: Model = Model()
    text: Text = Text()
    tokenizer: Tokenizer = Tokenizer()
    lora: Lora = Lora()
    compile: Compile = Compile()
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint()
    judge: Judge = Judge()

    memory_is_known = True

    def _beginnings(self) -> set[str]:
        if self.lora.rank:  # the weights are never changed, and not in the checkpoints
            return {"model.adapter"}
        stays = self.model.checkpoint in self.frozen_generators()  # a reference or a teacher too
        return set() if stays else {"model.checkpoint", "model.adapter"}

    def frozen_generators(self) -> set[str | None]:
        """Weights of the generators beside the trained one and its moving average: references and teachers."""
        return set()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from model_problems(self.model)
        if self.lora.rank and self.model.trained != "all":
            yield f'model.trained must be "all" with lora.rank = {self.lora.rank}: only the adapter is trained'
        if self.lora.rank and self.model.new_classes:
            yield "model.new_classes must be 0 with lora.rank: an adapter has no embeddings"
        yield from text_problems(self.text, self.model, self.data, judge=bool(self.judge.interval))
        if self.data.name in ("captions", "prompts") and not self.model.is_text:
            yield f'data.name = "{self.data.name}" needs model.caption_dim: this model takes classes'
        yield from self.judge.problems(self.data, self.checkpoint)
        yield from image_size_problems("data.image_size", self.data.image_size, self.tokenizer)
        if self.tokenizer.checkpoint is None and self.data.name != "synthetic" and self.needs_tokenizer:
            yield 'tokenizer.checkpoint is required (only data.name = "synthetic" runs on random weights)'

    @property
    def needs_tokenizer(self) -> bool:
        """Whether anything is encoded or decoded."""
        return True

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        reason = "all classes of random weights are new (model.checkpoint is none)"
        judge = " ".join(f"judge.{key}" for key in Judge.model_fields if key != "interval")
        return [
            *super()._idle_keys(),
            *idle_text_keys(self.text, self.model),
            (self.model.is_text, "text.path", "features of texts are read, not computed"),
            (self.model.is_text, "data.class_map data.classes", "the model reads texts"),
            (not self.model.is_text, "data.caption_key data.first_list data.last_list", "the model takes classes"),
            (self.model.checkpoint is None, "model.new_classes", reason),
            (not self.lora.rank, "lora.alpha lora.targets", "lora.rank is 0"),
            (not self.judge.interval, judge, "judge.interval is 0"),
            (self.job != "train", "judge.patience judge.stop", "only `train` has a reward to compare with"),
        ]


class PretrainRecipe(GeneratorRecipe):
    """Next-token training of the generator on the codes of real images."""

    job = "pretrain"

    @property
    def needs_tokenizer(self) -> bool:
        return not self.data.has_codes or self.judge.interval > 0

    def image_uses(self) -> Iterator[str]:
        if not self.data.has_codes:
            yield from super().image_uses()


DROPOUT_REMARK = (
    "the update has dropout, the rollout none: old and reference log-probs are under the same masks as new ones, so "
    "that only a changed policy changes the ratio; with teacher forcing the completions of an image share one forward "
    "and its masks. The reference trainer compares with log-probs without dropout, and draws masks for each completion"
)
"""What a run says about its dropout."""

SHARED_REMARK = "it cannot tell when the reward is deceived; take one that rewards nothing"
ADAPTER_REMARK = "model.adapter is trained further: the frozen reference is model.checkpoint without it"


class GRPORecipe(GeneratorRecipe):
    """Reinforcement learning of the generator: rollout, reward, advantage, update."""

    job = "train"

    rollout: Rollout = Rollout()
    reward: Rewards = Field(default_factory=Rewards)
    objective: Objective = Objective()

    def schedule(self, *, ranks: int) -> Schedule:
        """The sizes of a step on each of so many ranks. Raises a UserError if they cannot share the batches."""
        waits = self._rewards_needing("population") or any(
            table.normalise == "batch" for table in self.reward.active.values()
        )
        return Schedule.of(
            rollout=self.rollout,
            training=self.training,
            objective=self.objective,
            ranks=ranks,
            whole_batch_rewards=bool(waits),
        )

    def frozen_generators(self) -> set[str | None]:
        """Those of the KL term, and of rewards."""
        objective, tables = self.objective, self.reward.active.values()
        named: set[str | None]
        named = {cast(Any, table).checkpoint for table in tables if "generator" in reward_class(table.kind).needs}
        if objective.kl_estimator != "none" and objective.reference == "start":
            named.add(objective.reference_checkpoint)
        return {name or self.model.checkpoint for name in named}

    def explicit(self) -> Self:
        drawn = self.rollout.batch_size * self.rollout.num_generations
        training = self.training.model_copy(update={"batch_size": self.training.batch_size or drawn})
        return self.model_copy(update={"training": training})

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        rollout, training, objective = self.rollout, self.training, self.objective
        if self.model.new_classes:
            yield "model.new_classes must be 0 in GRPO: train their embeddings with `grpo pretrain` first"
        try:
            self.schedule(ranks=1)
        except UserError as error:
            yield from error.problems
        if rollout.num_generations == 1 and objective.advantage != "batch_std":  # the only one without a group's mean
            yield f'rollout.num_generations must be at least 2 with objective.advantage = "{objective.advantage}"'
        if objective.reference == "ema" and training.ema_decay is None:
            yield 'objective.reference = "ema" needs training.ema_decay'
        if objective.reference == "ema" and objective.reference_checkpoint is not None:
            yield 'objective.reference_checkpoint needs objective.reference = "start": the average starts at the policy'
        if objective.entropy_target is not None and objective.entropy_weight <= 0:
            yield "objective.entropy_target needs objective.entropy_weight above 0, where the weight starts"
        for name, table in self.reward.active.items():
            drawn = rollout.batch_size * rollout.num_generations
            for problem in table.size_problems(image_size=self.data.image_size, completions=drawn):
                yield f"reward.{name}: {problem}"
            if rollout.num_generations == 1 and table.normalise == "group":
                yield f'rollout.num_generations must be at least 2 with reward.{name}.normalise = "group"'
            if table.normalise == "batch" and objective.advantage == "gdpo" and not table.separate:
                yield f'reward.{name}.normalise = "batch" contradicts objective.advantage = "gdpo": by group'
        lacking, other = ("classes", "texts") if self.model.is_text else ("prompts", "classes")
        for name in self._rewards_needing(lacking):
            yield f"reward.{name}.weight must be 0: it needs {lacking}, and the model takes {other} (model.caption_dim)"
        if self.data.may_be_stream:
            for name, table in self.reward.active.items():
                uses = (f"reward.{name}.{use}" for use in table.image_uses())
                yield from (f"{use} (images of a stream cannot be picked)" for use in uses)
        if not self.reward.active:
            yield "no reward is on: give a table [reward.NAME] a weight other than 0"
        if rollout.mode == "autoregressive":
            for name in self._rewards_needing("real_images"):
                yield (
                    f'reward.{name}.weight must be 0 with rollout.mode = "autoregressive": '
                    "a free sample has no real image to match"
                )
            if rollout.use_context_noise:
                yield 'rollout.use_context_noise: needs rollout.mode = "teacher_forced"'
        elif rollout.cfg_scale != 1:
            yield 'rollout.cfg_scale: guidance needs rollout.mode = "autoregressive"; set it to 1'
        if rollout.importance_weight_cap and rollout.cfg_scale != rollout.loss_cfg_scale:
            yield (
                'rollout.importance_weight_cap with guidance needs rollout.guidance_in_loss = "guided" '
                "or rollout.cfg_scale = 1"
            )

    def image_uses(self) -> Iterator[str]:
        if self.rollout.mode == "teacher_forced":
            if not self.data.has_codes:
                yield 'rollout.mode must be "autoregressive": a teacher-forced context is the codes of a real image'
            for name in self._rewards_needing("real_images"):
                yield f"reward.{name}.weight must be 0: it compares with the real image"
        if self.objective.aux_ce_weight and not self.data.has_codes:
            yield "objective.aux_ce_weight must be 0: it is the cross-entropy on the codes of real images"
        for name, table in self.reward.active.items():
            yield from (f"reward.{name}.{use}" for use in table.image_uses())

    @property
    def reads_images(self) -> bool:
        """Whether a step needs images besides their codes; a function of the user's may ask for them."""
        is_function = any(table.kind == "python" for table in self.reward.active.values())
        return is_function or bool(self._rewards_needing("real_images"))

    def _rewards_needing(self, need: str) -> list[str]:
        return [name for name, table in self.reward.active.items() if need in reward_class(table.kind).needs]

    def notes(self) -> list[str]:
        off = [name for name in self.reward.tables if name not in self.reward.active]
        return [*super().notes(), *(f"reward.{name} has no effect: its weight is 0" for name in off)]

    def remarks(self) -> list[str]:
        drops = self.training.dropout_mode != "eval" and self.model.drops
        goes_on = self.lora.rank and self.model.adapter is not None
        to_base = goes_on and self.model.checkpoint in self.frozen_generators()
        by_judge = [name for name, table in self.reward.active.items() if self._judged_by(table)]
        shared = (
            f"the network of judge.feature_checkpoint is that of reward.{', reward.'.join(by_judge)}: {SHARED_REMARK}"
        )
        told = ((DROPOUT_REMARK, drops), (ADAPTER_REMARK, to_base), (shared, by_judge))
        return [remark for remark, holds in told if holds]

    def _judged_by(self, table: RewardTable) -> bool:
        """Whether the judge is the network of a reward."""
        file = getattr(table, "checkpoint", None)
        return bool(self.judge.interval) and file is not None and file == self.judge.feature_checkpoint

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        rollout, objective = self.rollout, self.objective
        no_kl = objective.kl_estimator == "none"
        one_reward = objective.advantage == "gdpo" and len(self.reward.active) == 1
        of_kl = ("kl_coef", "kl_level", "reference", "reference_checkpoint")
        steering = "objective.entropy_dead_band objective.entropy_gain"
        is_whole = not rollout.top_k and rollout.top_p == 1
        mode = self.training.dropout_mode
        return [
            *super()._idle_keys(),
            (no_kl, " ".join(f"objective.{key}" for key in of_kl), 'the KL term is off (objective.kl = "none")'),
            (objective.entropy_target is None, steering, "objective.entropy_target is none"),
            (not objective.use_token_dropout, "objective.token_dropout", "objective.use_token_dropout is off"),
            (one_reward, "objective.advantage", "with one reward gdpo is group_std"),
            (not rollout.use_context_noise, "rollout.context_noise", "rollout.use_context_noise is off"),
            (is_whole, "rollout.importance_weight_cap", "neither top_k nor top_p truncates the draw"),
            (rollout.cfg_scale == 1, "rollout.guidance_in_loss", "guidance is off (rollout.cfg_scale = 1)"),
            (
                rollout.mode == "teacher_forced",
                "rollout.max_rows rollout.keep_memory",
                "teacher-forced rollouts have no cache",
            ),
            (
                mode == "eval",
                "model.dropout model.class_dropout model.token_dropout",
                'training.dropout_mode is "eval"',
            ),
            (not self.model.drops, "training.dropout_mode", "model.dropout and model.class_dropout are 0"),
        ]


class TokenizerRecipe(TrainingRecipe):
    """Training of the VQ tokenizer."""

    job = "tokenizer"

    tokenizer: Tokenizer = Tokenizer()
    tokenizer_loss: TokenizerLoss = TokenizerLoss()
    adversary: Adversary = Adversary()
    compile: Compile = Compile()

    def _beginnings(self) -> set[str]:
        return {"tokenizer.checkpoint", "adversary.checkpoint"}

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        side, adversary = self.data.image_size, self.adversary
        yield from image_size_problems("data.image_size", side, self.tokenizer)
        if self.tokenizer_loss.perceptual_weight and side < 16:
            yield f"tokenizer_loss.perceptual_weight: LPIPS needs data.image_size of at least 16, not {side}"
        if adversary.weight and side < (smallest := 3 * 2**adversary.num_layers):
            yield f"adversary.num_layers = {adversary.num_layers} needs data.image_size of at least {smallest}"

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        loss, adversary = self.tokenizer_loss, self.adversary
        codebook = "tokenizer_loss.codebook_ema tokenizer_loss.restart_threshold"
        others = " ".join(f"adversary.{key}" for key in type(adversary).model_fields if key != "weight")
        late = adversary.start > self.training.steps
        return [
            *super()._idle_keys(),
            (loss.codebook_update == "gradient", codebook, 'codebook_update is "gradient"'),
            (not loss.perceptual_weight, "tokenizer_loss.perceptual_backbone", "its weight is 0"),
            (not adversary.weight, others, "adversary.weight is 0"),
            (late, "adversary.weight", f"adversary.start = {adversary.start} is after the last step"),
            (True, "data.class_map", "a tokenizer is trained without classes"),
            (True, "data.codes data.cache_codes", "a tokenizer is trained on images"),
        ]


class EncodeRecipe(Recipe):
    """Codes of a whole data set, encoded once."""

    job = "encode"

    tokenizer: Tokenizer = Tokenizer()
    data: Data = Data()
    encode: Encode = Encode()
    parallel: Parallel = Parallel()

    def problems(self) -> Iterator[str]:
        yield from required("encode", self.encode, "output")
        yield from data_problems(self.data)
        yield from image_size_problems("data.image_size", self.data.image_size, self.tokenizer)
        if not self.data.has_images:
            yield f'data.name = "{self.data.name}" has no images to encode'
        if self.data.may_be_stream:
            yield "data.path must be of files here, of a stream's rows the number is not known"
        if self.tokenizer.checkpoint is None and self.data.name != "synthetic":
            yield 'tokenizer.checkpoint is required (only data.name = "synthetic" runs on random weights)'

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        only_crops = self.encode.augmentation != "ten_crop"
        return [
            (only_crops, "encode.crop_ranges", f'encode.augmentation is "{self.encode.augmentation}"'),
            (True, "data.class_map data.classes data.codes data.cache_codes", "images are encoded as they are"),
        ]


def model_problems(model: Model) -> Iterator[str]:
    """Numbers of classes that do not fit together, or an adapter without a base."""
    if model.adapter is not None and model.checkpoint is None:
        yield "model.adapter needs model.checkpoint: the weights that it belongs to"
    if model.new_classes > model.num_classes:
        yield f"model.new_classes = {model.new_classes} must be at most model.num_classes = {model.num_classes}"


def image_size_problems(key: str, image_size: int, tokenizer: Tokenizer) -> Iterator[str]:
    """Images are cut into whole codes."""
    if image_size % tokenizer.downsample_size:
        yield f"{key} = {image_size} must be a multiple of tokenizer.downsample_size = {tokenizer.downsample_size}"
