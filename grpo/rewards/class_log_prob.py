"""How sure a classifier is that the image shows what was asked for."""

from torch import Tensor
from torch.nn import functional as F

from grpo.config import RewardTable, UserError
from grpo.models import load_classifier
from grpo.rewards.base import DecodedBatch, Reward, RewardContext


class ClassLogProb(Reward):
    """log p(class | image) under a frozen classifier."""

    class Settings(RewardTable):
        """log p(class | image) under a classifier."""

        checkpoint: str
        """Weights of the classifier, as `grpo classifier` writes them."""

    needs = frozenset({"classes"})

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        self.classifier = context.prepare(load_classifier(settings.checkpoint))
        self.networks = [self.classifier]
        known, wanted = self.classifier.config.num_classes, len(context.class_names)
        if known != wanted:
            differ = f"{settings.checkpoint} knows {known} classes, model.num_classes is {wanted}"
            raise UserError(f"checkpoint: {differ}; give a classifier of the same classes")
        pairs = zip(self.classifier.config.class_names or (), context.class_names, strict=False)
        for class_id, names in enumerate(pairs):
            if names[0] != names[1] and str(class_id) not in names:  # a number is no name
                differ = f"class {class_id} of {settings.checkpoint} is {names[0]!r}, that of the model {names[1]!r}"
                raise UserError(f"checkpoint: {differ}; give a classifier of the same classes")

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32, at most 0."""
        logits = self.classifier(batch.images.clamp(-1, 1)).float()
        return -F.cross_entropy(logits, batch.condition.class_ids, reduction="none")
