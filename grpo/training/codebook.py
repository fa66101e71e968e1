"""How a tokenizer's codebook is set, moved and kept in use while the networks around it are trained."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from grpo.config import TokenizerLoss
from grpo.models.vq import VectorQuantizer
from grpo.training.optimizer import GuardedOptimizer


class Codebook:
    """The codebook's part of training; all ranks hold the same codes.

    1. During the first `unquantised_steps` optimizer steps the quantizer passes unit latents on as they are. Then
       every code becomes an encoded image patch.
    2. With `codebook_update = "ema"` each code follows the running sum of the unit latents assigned to it, over all
       ranks (van den Oord et al., arXiv 1711.00937, appendix A.1). The quantizer compares directions only, so this sum
       is itself the code: the whole state is `embedding.weight`, which checkpoints hold anyway. Its length is about
       the running count of uses, as the latents of one code point the same way.
    3. A code whose sum gets shorter than `restart_threshold` is moved to a latent, drawn in proportion to its error
       (after jukebox, arXiv 2005.00341, appendix, which draws uniformly).

    Args:
        quantizer: of the parallelized tokenizer; its forward passes in train mode are watched.
        optimizer: counts its steps, also those before a resumption.
    """

    def __init__(self, quantizer: VectorQuantizer, config: TokenizerLoss, optimizer: GuardedOptimizer) -> None:
        self.quantizer, self.config, self.optimizer = quantizer, config, optimizer
        weight = quantizer.embedding.weight
        # [K, C + 1]: sums of unit latents and their counts since the last update
        self._statistics = torch.zeros(len(weight), weight.shape[1] + 1, device=weight.device)
        quantizer.register_forward_hook(self._watch)

    @torch.no_grad()
    def update(self) -> dict[str, float]:
        """Move the codes after an optimizer step. Collective.

        Returns:
            {"perplexity": exp of the entropy of the codes of this step's images, "codes_restarted": codes moved}.
        """
        statistics, self._statistics = self._statistics, torch.zeros_like(self._statistics)
        dist.all_reduce(statistics)
        sums, counts, moved = statistics[:, :-1], statistics[:, -1], 0
        if self.optimizer.skipped_in_a_row == 0:  # the latents of a skipped step may not be finite
            if self.optimizer.steps == self.config.unquantised_steps:
                drawn = self._draw_latents(len(sums), weights=torch.ones_like(self._errors))
                self._assign(drawn * (counts.sum() / len(sums)))
            elif self.optimizer.steps > self.config.unquantised_steps and self.config.codebook_update == "ema":
                moved = self._follow(sums)
        shares = counts / counts.sum()
        perplexity = torch.exp(-torch.xlogy(shares, shares).sum())
        return {"perplexity": perplexity.item(), "codes_restarted": float(moved)}

    def _follow(self, sums: Tensor) -> int:
        """Average the running sums, restart codes out of use; how many."""
        weight = self.quantizer.embedding.weight
        codes = weight.full_tensor() if isinstance(weight, DTensor) else weight
        codes = codes.lerp(sums, 1 - self.config.codebook_ema)
        unused = codes.norm(dim=1) < self.config.restart_threshold
        moved = int(unused.sum())
        if moved:
            codes[unused] = self._draw_latents(moved, weights=self._errors.clamp_min(1e-9))
        self._assign(codes)
        return moved

    def _draw_latents(self, count: int, *, weights: Tensor) -> Tensor:
        """`count` unit latents [count, C] of rank 0's last micro-batch, on every rank; without repeats if it can."""
        drawn = self._latents[weights.multinomial(count, replacement=count > len(weights))]
        dist.broadcast(drawn, src=0)
        return drawn

    def _assign(self, codes: Tensor) -> None:
        weight = self.quantizer.embedding.weight
        if isinstance(weight, DTensor):
            codes = distribute_tensor(codes, weight.device_mesh, weight.placements, src_data_rank=None)
        weight.copy_(codes)

    def _watch(self, quantizer: nn.Module, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> tuple | None:
        """Forward hook of the quantizer: collect statistics; in the beginning undo the quantisation."""
        if not quantizer.training:
            return None
        unit = F.normalize(inputs[0].float(), dim=1)  # [B, C, h, w]
        quantized, vq_loss, commit_loss, codes = output
        with torch.no_grad():
            self._latents = unit.permute(0, 2, 3, 1).flatten(0, 2)  # [N, C], the last micro-batch's
            self._errors = 1 - (unit * quantized.float()).sum(dim=1).flatten()  # [N], 1 - cosine to their codes
            self._statistics.index_add_(0, codes.flatten(), F.pad(self._latents, (0, 1), value=1.0))
        quantised = self.optimizer.steps >= self.config.unquantised_steps
        return None if quantised else (unit, torch.zeros_like(vq_loss), torch.zeros_like(commit_loss), codes)
