"""The images of statistics: shared out, always the same, without those that cannot be read."""

import torch

from grpo.config import Data
from grpo.data import build_dataset, sample_images
from grpo.models import to_uint8
from grpo.parallel import World


def test_ranks_share_images_that_do_not_depend_on_their_number(class_folders):
    folder = class_folders(["a", "b"], 10)
    (folder / "b" / "003.png").write_bytes(b"damaged")
    dataset = build_dataset(Data(name="folder", path=str(folder), image_size=16, num_workers=2), num_classes=2)

    def reds(count, ranks):
        """The number of each image, which is the red value of its pixels."""
        worlds = [World(rank, ranks, rank, ranks, torch.device("cpu")) for rank in range(ranks)]
        batches = [batch for world in worlds for batch in sample_images(dataset, count, world=world)]
        return sorted(to_uint8(torch.cat(batches))[:, 0, 0, 0].tolist())

    assert reds(100, 1) == [number for number in range(20) if number != 13]
    assert reds(8, 1) == reds(8, 3)
    assert len(reds(8, 1)) in (7, 8)
    assert dataset.unreadable == {13}
