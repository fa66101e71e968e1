"""What metrics are called, what they are measured in, and which way is better."""

from typing import Literal, NamedTuple

Better = Literal["higher", "lower", ""]


class Metric(NamedTuple):
    """How a metric is shown."""

    title: str
    unit: str = ""
    better: Better = ""  # empty where neither is by itself


FIRST = {
    "reward_mean": Metric("Reward", better="higher"),
    "judge/fid": Metric("FID by the judge", better="lower"),
    "judge/accuracy": Metric("Accuracy by the judge", better="higher"),
    "loss": Metric("Loss"),
    "accuracy": Metric("Accuracy", better="higher"),
    "reconstruction": Metric("Reconstruction error", better="lower"),
    "kl": Metric("KL to the reference", "nats"),
    "entropy": Metric("Entropy", "nats a token"),
    "aux_ce": Metric("Cross-entropy on real codes", "nats a token", better="lower"),
    "zero_spread": Metric("Share of groups without spread"),
    "clip_fraction": Metric("Share of ratios clipped"),
    "ratio": Metric("Mean probability ratio"),
    "grad_norm": Metric("Gradient norm"),
    "images_per_second": Metric("Speed", "images a second"),
}
"""The metrics that pages show first, in this order; the others follow under their own names."""

_OTHERS = {
    "fid": Metric("FID", better="lower"),
    "sfid": Metric("sFID", better="lower"),
    "kid": Metric("KID", better="lower"),
    "precision": Metric("precision", better="higher"),
    "recall": Metric("recall", better="higher"),
    "inception_score": Metric("inception score", better="higher"),
    "memory/peak_gb": Metric("memory/peak_gb", "GiB"),
    "tokens_per_second": Metric("tokens_per_second", "codes a second"),
}
_SHARES_RIGHT = ("seen", "unseen", "fit")  # what shapes are right, see `grpo.shapes`


def metric(name: str) -> Metric:
    """How a metric is shown, whatever it is."""
    if known := FIRST.get(name) or _OTHERS.get(name):
        return known
    part = name.partition("/")[0]
    return Metric(name, unit="s" if part == "seconds" else "", better="higher" if part in _SHARES_RIGHT else "")
