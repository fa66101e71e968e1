"""Uniform numbers of counters: which words they are, and what they do not depend on."""

import pytest
import torch

from grpo.kernels import philox_uniform
from grpo.kernels.philox import philox

IDS = torch.tensor([0, 7, 2**32 + 1, -1])


def test_numbers_are_the_words_of_their_counters():
    drawn, seed, step = philox_uniform(IDS, 6, seed=2**33 + 5, step=2**31), 2**33 + 5, 2**31
    for row, number in ((0, 0), (1, 3), (2, 4), (3, 5)):
        row_id = IDS[row].item() % 2**64
        words = philox((number // 4, step, row_id % 2**32, row_id >> 32), (seed % 2**32, seed >> 32))
        assert drawn[row, number].item() == (words[number % 4] >> 8) / 2**24


def test_a_row_depends_on_nothing_else():
    whole = philox_uniform(IDS, 6, seed=1)
    assert torch.equal(philox_uniform(IDS[[2, 0]], 5, seed=1), whole[[2, 0], :5])
    assert not torch.equal(philox_uniform(IDS, 6, seed=2), whole)
    assert not torch.equal(philox_uniform(IDS, 6, seed=1, step=1), whole)


def test_the_op_is_well_formed():
    torch.library.opcheck(torch.ops.grpo.uniform, (IDS, 6, 1, 0, "auto"))


@pytest.mark.parametrize(("ids", "step"), [(IDS[None], 0), (IDS.int(), 0), (IDS, 2**32), (IDS, -1)])
def test_mistakes_are_refused(ids, step):
    with pytest.raises(ValueError, match=r"row_ids|step"):
        philox_uniform(ids, 2, seed=0, step=step)
