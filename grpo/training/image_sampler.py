"""From classes to images: what generate.py, evaluate.py and the quickstart draw with."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grpo.config import Model, Sampling
from grpo.config import Tokenizer as TokenizerConfig
from grpo.models import VQModel, get_model_spec, load_gpt
from grpo.observe import to_uint8
from grpo.parallel import compute_dtype, set_matmul_precision
from grpo.rollout import decode
from grpo.training.build import build_tokenizer
from grpo.training.metrics import MetricSums


class ImageSampler:
    """Draws images with a GPT and its tokenizer; an image depends on its class, its row id and the seed only.

    Args:
        model: the GPT, parallelized or not.
        tokenizer: decodes its codes.
        sampling: temperature, truncation, guidance, seed, batch and size.
        device: of both.
    """

    def __init__(self, model: nn.Module, tokenizer: VQModel, sampling: Sampling, *, device: torch.device) -> None:
        self.model, self.tokenizer, self.sampling, self.device = model, tokenizer, sampling, device
        self._drawn = MetricSums()

    @torch.no_grad()
    def __call__(self, class_ids: Tensor, row_ids: Tensor) -> Tensor:
        """class_ids [B] and row_ids [B], both int64 -> images [B, 3, H, W] uint8."""
        size = self.sampling.batch_size
        batches = zip(class_ids.to(self.device).split(size), row_ids.to(self.device).split(size), strict=True)
        return torch.cat([self._draw(*batch) for batch in batches])

    def entropy(self) -> float:
        """Estimate of the policy's entropy, nats a token: the mean of -log p of what all ranks have drawn. Collective.

        Starts anew with each call. Where top-k or top-p truncate the draw it is too low.
        """
        return self._drawn.means()["entropy"]

    def _draw(self, class_ids: Tensor, row_ids: Tensor) -> Tensor:
        sampling = self.sampling
        drawn = decode(
            self.model,
            class_ids,
            row_ids=row_ids,
            cfg_scale=sampling.cfg_scale,
            cfg_interval=sampling.cfg_interval,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
            impl=sampling.kernels,
        )
        self._drawn.add("entropy", -drawn.log_probs.sum(), drawn.log_probs.numel())
        images = self.tokenizer.decode(drawn.tokens).float().clamp(-1, 1)
        if sampling.resize_to is not None:
            images = F.interpolate(images, size=(sampling.resize_to,) * 2, mode="bicubic", antialias=True)
        return to_uint8(images)


def load_sampler(model: Model, tokenizer: TokenizerConfig, sampling: Sampling, *, device: torch.device) -> ImageSampler:
    """The sampler of a recipe's checkpoints, whole on this rank, in the recipe's precision."""
    config = get_model_spec(model.name).config(
        image_size=sampling.image_size,
        downsample_size=tokenizer.downsample_size,
        vocab_size=tokenizer.codebook_size,
        num_classes=model.num_classes,
        cls_token_num=model.cls_token_num,
    )
    dtype = compute_dtype(sampling.mixed_precision)
    set_matmul_precision(sampling.mixed_precision)
    gpt = load_gpt(model.checkpoint, config, bare=model.from_fsdp).to(device, dtype).requires_grad_(False)
    return ImageSampler(gpt, build_tokenizer(tokenizer, device=device).to(dtype), sampling, device=device)
