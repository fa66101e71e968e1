"""Counter-based random numbers: Philox4x32-10, and the Gumbel noise of one draw.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Words are the low 32 bits of int64.

Packing. The key is the 64-bit seed, low word first. The counter's words are

    c0 = sample << 20 | group      c1 = step, low 32 bits      c2, c3 = row id, low word first

A draw needs BLOCK numbers for the columns of one block, then one number for each block of the row. Numbers 0 .. BLOCK-1
come from groups 0 .. BLOCK/4-1, the numbers of the blocks from the groups after them. Within either list of n numbers
with q = ceil(n / 4) groups, number i is word i // q of group i % q.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy
import torch
from torch import Tensor

BLOCK = 128
MAX_SAMPLES = 1 << 12
MAX_GROUPS = 1 << 20
MAX_VOCABULARY = 4 * BLOCK * (MAX_GROUPS - BLOCK // 4)

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


class RandomStream(IntEnum):
    """The purposes of a run's counter-based random numbers: the `step` word c1 of the counter.

    Purposes that use the same row ids must have streams of their own, or their numbers would be the same. Changing one
    changes the results of every recipe that uses it.
    """

    SAMPLING = 0  # draws of tokens; rows are numbered sample * T + position
    CONTEXT_NOISE = 1  # codes of a teacher-forced context that are replaced; rows are samples
    TOKEN_DROPOUT = 2  # tokens left out of the policy loss; rows are completions
    DROPOUT = 3  # features and conditions dropped in a forward, see `dropout.py`; rows are those of forwards


def philox(counter: Sequence[Any], key: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """Four int64 tensors that hold the 32-bit words of Philox4x32-10. Counter words are broadcast; all are int64.

    Words are tensors, arrays of NumPy, or numbers.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # c1 and c3 keep the whole product: the mask clears its high half before it is multiplied again.
        product0, product2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product2 >> 32) ^ c1 ^ k0) & _MASK
        c2 = ((product0 >> 32) ^ c3 ^ k1) & _MASK
        c1, c3 = product2, product0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def philox_stack(counter: Sequence[Any], seed: Tensor | int, *, dim: int) -> Tensor:
    """The four words of `philox` as one tensor, stacked along `dim`."""
    key = split_words(seed)
    if counter[-1].device.type == "cpu":  # NumPy does this arithmetic about twice as fast as torch there
        arrays = philox(tuple(word.numpy() for word in counter), tuple(int(word) for word in key))
        return torch.from_numpy(numpy.stack(arrays, axis=dim))
    return torch.stack(philox(counter, key), dim=dim)


def split_words(number: Tensor | int) -> tuple[Tensor | int, Tensor | int]:
    """The low and the high 32 bits."""
    return number & _MASK, number >> 32 & _MASK


def gumbel(bits: Tensor) -> Tensor:
    """Standard Gumbel noise, fp32, of 32-bit words. Fine in the upper tail, the one that decides a maximum."""
    uniform = bits.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def draw_noise(seed: Tensor, step: Tensor, row_ids: Tensor, num_samples: int, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Gumbel noise of the columns of a block [N, num_samples, BLOCK] and of the blocks [N, num_samples, num_blocks].

    Whichever block a draw chooses, it reads the same BLOCK numbers for its columns: they are independent of those that
    chose the block, so the draw has the exact distribution and the noise does not depend on the logits.
    """
    column_groups, block_groups = BLOCK // 4, -(-num_blocks // 4)
    groups = torch.arange(column_groups + block_groups, device=row_ids.device)
    samples = torch.arange(num_samples, device=row_ids.device)[:, None]
    row_ids = row_ids[:, None, None]
    counter = ((samples << 20 | groups)[None], (step & _MASK).expand_as(row_ids), *split_words(row_ids))
    words = philox_stack(counter, seed, dim=2)
    columns, blocks = gumbel(words).split([column_groups, block_groups], dim=-1)  # [N, num_samples, 4, groups]
    return columns.flatten(2), blocks.flatten(2)[..., :num_blocks]
