"""Published ways to evaluate, as values of a recipe's keys."""

from typing import Any

from grpo.config.job_sections import Evaluation, Sampling
from grpo.config.sections import Model

LLAMAGEN_SIZE = 256  # pixels: what every model's images are measured at
LLAMAGEN_GUIDANCE = {"GPT-B": 2.0, "GPT-L": 2.0, "GPT-XL": 1.75, "GPT-XXL": 1.75, "GPT-3B": 1.65}
"""Guidance of LlamaGen's published numbers (GETTING_STARTED.md of its repository)."""


def protocol_values(model: Model, sampling: Sampling, evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """What `evaluation.protocol` sets: section -> key -> value; nothing without a protocol.

    LlamaGen (arXiv 2406.06525) follows ADM (arXiv 2105.05233): 50,000 images of classes drawn at random, at 256 pixels.
    """
    if evaluation.protocol == "none":
        return {}
    measured = {"num_images": 50_000, "num_reference_images": 0, "nearest_k": 3}
    drawn = {"class_ids": "all", "class_order": "random", "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    drawn |= {"cfg_interval": -1, "resize_to": None if sampling.image_size == LLAMAGEN_SIZE else LLAMAGEN_SIZE}
    drawn["resize_filter"] = "bicubic"
    if model.name in LLAMAGEN_GUIDANCE:
        drawn["cfg_scale"] = LLAMAGEN_GUIDANCE[model.name]
    return {"evaluation": measured} if evaluation.images is not None else {"evaluation": measured, "sampling": drawn}
