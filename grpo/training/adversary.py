"""A discriminator that a tokenizer is trained against (VQGAN, arXiv 2012.09841), by LlamaGen's schedule."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.checkpoint import model_tensors, optimizer_tensors
from grpo.config import TokenizerRecipe
from grpo.models import Discriminator, DiscriminatorConfig, VQModel, load_discriminator, save_weights
from grpo.parallel import World, grad_scaler
from grpo.training.build import autocast
from grpo.training.optimizer import GuardedOptimizer

ADVERSARY_NAME = "discriminator.safetensors"  # in the run's folder, for the reward of kind patchgan
_EPS, _HIGHEST = 1e-4, 1e4  # of the adaptive weight, as in VQGAN


class Adversary:
    """The discriminator, its optimizer, and both sides of the game.

    In every step from `adversary.start` on, the tokenizer is drawn to images that look real to the discriminator, and
    the discriminator learns to tell the step's images from their reconstructions, by an AdamW of its own.

    Every rank has the whole discriminator. Gradients are the mean over all images of the step, on any number of ranks
    and micro-batches; batch normalisation however sees one micro-batch of one rank at a time, real and reconstructed
    images apart, as LlamaGen's does. Its running statistics, which only a reward by the discriminator uses, are
    averaged over ranks after every step, so that they stay the same on all.

    Args:
        tokenizer: parallelized; the input of the last layer of its decoder is watched if the weight adapts to it.
        optimizer: the tokenizer's; counts its steps, also those before a resumption.
    """

    def __init__(
        self, recipe: TokenizerRecipe, tokenizer: VQModel, optimizer: GuardedOptimizer, *, world: World
    ) -> None:
        self.config, self.training, self.world, self._generator = recipe.adversary, recipe.training, world, optimizer
        sizes = DiscriminatorConfig(width=self.config.dim, num_layers=self.config.num_layers)
        torch.manual_seed(self.training.seed)  # the same weights on every rank
        made = load_discriminator(self.config.checkpoint, sizes) if self.config.checkpoint else Discriminator(sizes)
        self.discriminator = made.to(world.device).train()
        self.optimizer = GuardedOptimizer(
            self.discriminator,
            recipe.optimizer.model_copy(
                update={"lr": recipe.optimizer.lr if self.config.lr is None else self.config.lr}
            ),
            total_steps=max(1, self.training.steps - self.config.start + 1),
            max_skipped_steps=self.training.max_skipped_steps,
            scaler=grad_scaler(self.training.mixed_precision, world.device),
        )
        self._patch_size, self._last = tokenizer.config.patch_size, tokenizer.decoder.conv_out
        self._last_input: Tensor | None = None
        if self.config.adaptive:
            self._last.register_forward_pre_hook(self._watch)
        self._statistics = [buffer for buffer in self.discriminator.buffers() if buffer.is_floating_point()]
        self._before: list[Tensor] = []  # the running statistics before this step
        self._seen: list[tuple[int, dict[str, Tensor]]] = []  # images and metrics of its micro-batches

    def loss(self, likeness: Tensor, reconstruction: Tensor, images: Tensor) -> Tensor | float:
        """The tokenizer's loss of a micro-batch, weighted; the discriminator's gradient is added up on the way.

        Args:
            likeness: 0-dim, the rest of the loss of the reconstruction, for the adaptive weight.
            reconstruction: [n, 3, H, W] fp32, that `likeness` was computed from; not a module's output itself, since
                FSDP2 watches that for the backward.
            images: [n, 3, H, W] in [-1, 1].
        """
        if self._generator.steps + 1 < self.config.start:
            return 0.0
        if not self._seen:
            self._before = [buffer.clone() for buffer in self._statistics]
        self.discriminator.requires_grad_(False)
        value = generator_loss(self._judge(reconstruction), kind=self.config.loss)
        weight = torch.tensor(self.config.weight, device=value.device)
        if self.config.adaptive:
            weight = weight * self._balance(likeness, value, reconstruction)
        self.discriminator.requires_grad_(True)
        real, fake = self._judge(images), self._judge(reconstruction.detach())
        own = discriminator_loss(real, fake, kind=self.config.loss)
        self.optimizer.backward(own * len(images))
        metrics = {"adversarial": value, "adversarial_weight": weight, "discriminator_loss": own}
        metrics |= {"logits_real": real.mean(), "logits_fake": fake.mean()}
        self._seen.append((len(images), {name: number.detach() for name, number in metrics.items()}))
        return weight * value

    def update(self) -> dict[str, float]:
        """Train the discriminator on what it has seen since the last update; its metrics. Collective."""
        if not self._seen:
            return {}
        seen, self._seen = self._seen, []
        rows = sum(count for count, _ in seen)
        metrics = torch.stack([sum(count * values[name] for count, values in seen) for name in seen[0][1]])
        gradients = [parameter.grad for parameter in self.discriminator.parameters()]
        sums = iter(_sum_over_ranks([metrics.new_tensor(rows), metrics, *gradients, *self._statistics]))
        count, means = next(sums), next(sums)
        for gradient in gradients:
            gradient.copy_(next(sums) / count)
        stepped = self.optimizer.step()
        skipped = self.optimizer.skipped_in_a_row > 0  # what was not finite shall not stay
        for buffer, before in zip(self._statistics, self._before, strict=True):
            summed = next(sums)
            buffer.copy_(before if skipped else summed / self.world.size)
        own = {"discriminator_grad_norm": stepped["grad_norm"], "discriminator_skipped": stepped["skipped_steps"]}
        return {**dict(zip(seen[0][1], (means / count).tolist(), strict=True)), **own}

    def save(self, folder: Path) -> None:
        """Write the discriminator with its sizes, for `load_discriminator`. On the main rank only."""
        if self.world.is_main:
            weights, sizes = self.discriminator.state_dict(), self.discriminator.config
            save_weights(folder / ADVERSARY_NAME, weights, config=sizes)

    def state_tensors(self) -> dict[str, Tensor]:
        """The live weights, running statistics and moments."""
        moments = optimizer_tensors(self.discriminator, self.optimizer.adamw)
        return {f"model.{name}": tensor for name, tensor in model_tensors(self.discriminator).items()} | {
            f"optimizer.{name}": tensor for name, tensor in moments.items()
        }

    def state_dict(self) -> dict:
        """The optimizer's counters."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self.optimizer.load_state_dict(state)

    def _judge(self, images: Tensor) -> Tensor:
        with autocast(self.training, self.world.device):
            return self.discriminator(images).float()

    @torch.no_grad()
    def _balance(self, likeness: Tensor, adversarial: Tensor, reconstruction: Tensor) -> Tensor:
        """The ratio of the two losses' gradients at the decoder's last layer, over all ranks: λ of VQGAN, equation 7.

        The layer's weight itself may be sharded, so its gradient is computed from what goes into the layer and from
        the gradient of what comes out.
        """
        gradients = []
        for part in (likeness, adversarial):
            (outer,) = torch.autograd.grad(part, reconstruction, retain_graph=True)
            outer = F.pixel_unshuffle(outer, self._patch_size)
            shape = (outer.shape[1], self._last_input.shape[1], *self._last.kernel_size)
            gradients.append(nn.grad.conv2d_weight(self._last_input, shape, outer, padding=self._last.padding))
        rest, own = _sum_over_ranks(gradients)
        ratio = rest.norm() / (own.norm() + _EPS * self.world.size)
        return ratio.clamp(0.0, _HIGHEST)

    def _watch(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self._last_input = inputs[0].detach().float()


def discriminator_loss(real: Tensor, fake: Tensor, *, kind: str) -> Tensor:
    """How badly images [n, ...] are told apart by their logits, 0-dim: hinge, or the cross-entropy of both others."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor, *, kind: str) -> Tensor:
    """How unreal images look by their logits, 0-dim: minus their mean, or -log p(real) where it is non_saturating."""
    return F.softplus(-fake).mean() if kind == "non_saturating" else -fake.mean()


def _sum_over_ranks(tensors: list[Tensor]) -> list[Tensor]:
    """All of them in one message."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
