"""Conditions without images: classes to draw."""

import numpy as np
import torch
from torch import Tensor

from grpo.config import Data
from grpo.data.class_ids import find_class_ids
from grpo.data.dataset import ImageDataset
from grpo.models import numbered


class ClassList(ImageDataset):
    """Each class of `data.classes` once, by class id or by name. Its images are empty, [3, 0, 0].

    An epoch asks for every class once, in an order of its own, so a batch may have more rows than there are classes.

    Raises:
        UserError: a class that the model does not have.
    """

    has_images = False

    def __init__(self, *, data: Data, num_classes: int, learned: tuple[str, ...]) -> None:
        titles = [*learned, *numbered(num_classes)[len(learned) :]]
        class_ids = range(num_classes)
        if data.classes != "all":
            known = {"num_classes": num_classes, "learned": titles, "source": "data.classes"}
            class_ids = [find_class_ids([name], class_map={name: name}, **known)[0] for name in data.classes]
        super().__init__(np.array(class_ids), titles, data=data)

    def pixels(self, index: int) -> Tensor:
        return torch.empty(3, 0, 0, dtype=torch.uint8)

    def describe(self, index: int) -> str:
        return f"class {self.class_ids[index]}"
