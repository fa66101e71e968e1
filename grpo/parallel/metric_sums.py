"""Metrics of a step: sums and counts that add up over micro-batches and ranks."""

import torch
from torch import Tensor

from grpo.parallel.distributed import all_reduce_sums


class MetricSums:
    """Sums of values with their counts; read as means over all ranks by one collective.

    Tensors stay on their device until `means`, so that adding never waits for it.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1) -> None:
        """Add `count` values that sum to `total`."""
        for key, value in ((f"{name}:sum", total), (f"{name}:count", count)):
            value = value.detach().double() if isinstance(value, Tensor) else float(value)
            self._sums[key] = self._sums.get(key, 0.0) + value

    def add_values(self, name: str, values: Tensor, *, where: Tensor | None = None) -> None:
        """Add the entries of `values`, or those that the mask `where` holds; `name_mean`, `name_std` (population)."""
        values = values.detach().double()
        count: Tensor | int = values.numel()
        if where is not None:
            values, count = torch.where(where, values, 0.0), where.sum()
        self.add(f"{name}_mean", values.sum(), count)
        self.add(f"{name}_square", values.square().sum(), count)

    def merge(self, *others: "MetricSums") -> None:
        """Add everything that was added to the others, which stay as they are."""
        for key, value in (item for other in others for item in other._sums.items()):
            self._sums[key] = self._sums.get(key, 0.0) + value

    def means(self) -> dict[str, float]:
        """Means over everything added on every rank; starts anew. Collective: all ranks add the same names."""
        totals, self._sums = all_reduce_sums(self._sums), {}
        names = [key.removesuffix(":sum") for key in totals if key.endswith(":sum")]
        means = {name: totals[f"{name}:sum"] / max(totals[f"{name}:count"], 1e-30) for name in names}
        for name in [name.removesuffix("_square") for name in names if name.endswith("_square")]:
            variance = means.pop(f"{name}_square") - means[f"{name}_mean"] ** 2
            means[f"{name}_std"] = max(variance, 0.0) ** 0.5 if variance == variance else variance
        return means
