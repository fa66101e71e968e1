"""How sure a classifier is that the image shows what was asked for."""

from torch import Tensor
from torch.nn import functional as F

from grpo.config import UserError
from grpo.rewards.base import DecodedBatch, Reward, RewardContext
from grpo.rewards.image_network import ImageNetwork, NetworkTable


class ClassLogProb(Reward):
    """log p(class | image) under a frozen classifier, whose classes are those of the model in the same order."""

    class Settings(NetworkTable):
        """log p(class | image) under a classifier."""

    needs = frozenset({"classes"})

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        self.classifier = ImageNetwork(settings, context, output="logits")
        self.networks = [self.classifier.network]
        known, wanted = self.classifier.num_classes, len(context.class_names)
        if known != wanted:
            differ = f"{settings.checkpoint} knows {known} classes, model.num_classes is {wanted}"
            raise UserError(f"checkpoint: {differ}; give a classifier of the same classes")
        pairs = zip(self.classifier.class_names, context.class_names, strict=False)
        for class_id, names in enumerate(pairs):
            if names[0] != names[1] and str(class_id) not in names:  # a number is no name
                differ = f"class {class_id} of {settings.checkpoint} is {names[0]!r}, that of the model {names[1]!r}"
                raise UserError(f"checkpoint: {differ}; give a classifier of the same classes")

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32, at most 0."""
        return -F.cross_entropy(self.classifier(batch.images), batch.class_ids, reduction="none")
