"""Conditions without images: classes to draw."""

from collections.abc import Iterable

import numpy as np

from grpo.config import Data, UserError
from grpo.data.class_ids import class_id_of
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
        names = [*learned, *numbered(num_classes)[len(learned) :]]
        asked = numbered(num_classes) if data.classes == "all" else data.classes
        try:
            class_ids = [class_id_of(name, num_classes=num_classes, learned=learned) for name in asked]
        except UserError as error:
            raise UserError(f"data.classes: {error}") from error
        if not class_ids:
            raise UserError('data.classes is empty: give ids or names, or "all"')
        super().__init__(np.array(class_ids), names, data=data)

    def identify(self) -> Iterable[bytes]:
        return ()

    def describe(self, index: int) -> str:
        return f"class {self.class_ids[index]}"
