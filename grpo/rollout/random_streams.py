"""The counter-based random numbers of a run: which purpose uses which of the generator's streams.

A stream is the `step` word of Philox's counter (`grpo/kernels/philox.py`). Purposes that use the same row ids must have
streams of their own, or their numbers would be the same.
"""

from enum import IntEnum


class RandomStream(IntEnum):
    """One number for each purpose. Changing one changes the results of every recipe that uses it."""

    SAMPLING = 0
    """Draws of tokens; rows are numbered sample * T + position."""
    CONTEXT_NOISE = 1
    """Codes of a teacher-forced context that are replaced; rows are samples."""
    TOKEN_DROPOUT = 2
    """Tokens left out of the policy loss; rows are completions."""
