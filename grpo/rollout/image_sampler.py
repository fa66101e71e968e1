"""From conditions to images: what generating, evaluating and the quickstart draw with."""

import torch
from torch import Tensor
from torch.nn import functional as F

from grpo.config import Model, Sampling
from grpo.config import Tokenizer as TokenizerConfig
from grpo.models import Condition, Generator, VQModel, build_tokenizer, generator_sizes, load_generator, to_uint8
from grpo.parallel import MetricSums, compute_dtype, require_backend, set_matmul_precision
from grpo.rollout.autoregressive import CodeSampler
from grpo.rollout.modes import build_draw


class ImageSampler:
    """Draws images with a generator, parallelized or not, and the tokenizer that decodes its codes.

    An image depends on its condition, its row id and the seed only.
    """

    def __init__(self, model: Generator, tokenizer: VQModel, sampling: Sampling, *, device: torch.device) -> None:
        self.model, self.tokenizer, self.sampling, self.device = model, tokenizer, sampling, device
        draw = build_draw(sampling, seed=sampling.seed, impl=sampling.kernels)
        self.draw_codes = CodeSampler(
            model, draw=draw, cfg_scale=sampling.cfg_scale, cfg_interval=sampling.cfg_interval
        )
        self._drawn = MetricSums()

    @torch.no_grad()
    def __call__(self, condition: Condition, row_ids: Tensor) -> Tensor:
        """B rows and row_ids [B] int64 -> images [B, 3, H, W] uint8."""
        condition, row_ids, size = condition.to(self.device), row_ids.to(self.device), self.sampling.batch_size
        parts = [slice(start, start + size) for start in range(0, condition.rows, size)]
        return torch.cat([self._draw(condition.select(part), row_ids[part]) for part in parts])

    def entropy(self) -> float:
        """Estimate of the policy's entropy, nats a token: the mean of -log p of what all ranks have drawn. Collective.

        Starts anew with each call. Where top-k or top-p truncate the draw it is too low.
        """
        self._drawn.add("entropy", 0.0, 0)  # the name, on a rank that drew nothing
        return self._drawn.means()["entropy"]

    def _draw(self, condition: Condition, row_ids: Tensor) -> Tensor:
        drawn = self.draw_codes(condition, row_ids=row_ids)
        self._drawn.add("entropy", -drawn.log_probs.sum(), drawn.log_probs.numel())
        return to_uint8(_resized(self.tokenizer.decode(drawn.tokens).float(), self.sampling))


def _resized(images: Tensor, sampling: Sampling) -> Tensor:
    """Decoded images [B, 3, H, W] at the side that is wanted, as LlamaGen does it or with antialiasing."""
    if sampling.resize_to is None:
        return images
    size = (sampling.resize_to, sampling.resize_to)
    if sampling.resize_filter == "bicubic":  # LlamaGen clamps after it, not before
        return F.interpolate(images, size=size, mode="bicubic")
    return F.interpolate(images.clamp(-1, 1), size=size, mode="bicubic", antialias=True)


def load_sampler(model: Model, tokenizer: TokenizerConfig, sampling: Sampling, *, device: torch.device) -> ImageSampler:
    """The sampler of a recipe's checkpoints, whole on this rank, in the recipe's precision."""
    sizes = generator_sizes(model, tokenizer, image_size=sampling.image_size)
    return place_sampler(
        load_generator(model, sizes), build_tokenizer(tokenizer, device=device), sampling, device=device
    )


def place_sampler(model: Generator, tokenizer: VQModel, sampling: Sampling, *, device: torch.device) -> ImageSampler:
    """The sampler of a generator and its tokenizer, which are brought to this device, in this precision, frozen."""
    require_backend(sampling.kernels, device, key="sampling.kernels")
    dtype = compute_dtype(sampling.mixed_precision)
    set_matmul_precision(sampling.mixed_precision)
    for part in (model, tokenizer):
        part.to(device, dtype).eval().requires_grad_(False)
    return ImageSampler(model, tokenizer, sampling, device=device)
