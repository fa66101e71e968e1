"""How sure a classifier is that the image shows what was asked for."""

from torch import Tensor, nn
from torch.nn import functional as F

from grpo.rewards.base import Completions


class ClassLogProb:
    """log p(class | image) under a frozen classifier."""

    name = "class_log_prob"

    def __init__(self, classifier: nn.Module) -> None:
        self.classifier = classifier

    def __call__(self, completions: Completions) -> Tensor:
        """-> [n] fp32, at most 0."""
        logits = self.classifier(completions.images.clamp(-1, 1)).float()
        return -F.cross_entropy(logits, completions.class_ids, reduction="none")
