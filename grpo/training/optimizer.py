"""AdamW, its learning rate, and the step that refuses non-finite gradients."""

import math

import torch
from torch import nn

from grpo.config import Optimizer, TrainingRecipe
from grpo.parallel import World, adamw_8bit, clip_grad_norm, grad_scaler
from grpo.training.moving_average import MovingAverage


def learning_rate(config: Optimizer, *, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total_steps`.

    constant and cosine start with `warmup_steps` of linear warm-up; one_cycle rises over 30 % of the steps and falls
    to zero, both along a half cosine (Smith & Topin, arXiv 1708.07120).
    """
    if config.schedule == "one_cycle":
        peak = 0.3 * total_steps
        if step < peak:
            return config.lr * (0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * (step + 1) / (peak + 1))))
        return config.lr * 0.5 * (1 + math.cos(math.pi * (step - peak) / (total_steps - peak)))
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "constant":
        return config.lr * warmup
    progress = max(0, step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class GuardedOptimizer:
    """AdamW that clips and steps, or skips a step whose gradient is not finite. Norms and biases are not decayed.

    Args:
        model: its parameters' gradients are clipped together, over all ranks.
        total_steps: optimizer steps of the whole run, for the schedule.
        max_skipped_steps: skipped steps in a row after which the run is stopped.
        scaler: loss scaler of fp16, or None.
        average: of the model's weights, updated with each step that is taken, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Optimizer,
        *,
        total_steps: int,
        max_skipped_steps: int,
        scaler: torch.amp.GradScaler | None = None,
        average: MovingAverage | None = None,
    ) -> None:
        self.model, self.config, self.average = model, config, average
        self.total_steps, self.max_skipped_steps = total_steps, max_skipped_steps
        self.scaler = scaler or torch.amp.GradScaler(enabled=False)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices, others = [p for p in trainable if p.ndim >= 2], [p for p in trainable if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        betas = (config.beta1, config.beta2)
        groups = [group for group in groups if group["params"]]  # a checkpoint has no room for an empty one
        settings = {"lr": config.lr, "betas": betas, "eps": config.eps}
        if config.name == "adamw_8bit":
            self.adamw = adamw_8bit(groups, **settings)
        else:
            self.adamw = torch.optim.AdamW(groups, **settings, fused=True)
        self.steps = self.skipped = self.skipped_in_a_row = 0

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`. A loss that is not finite makes the gradient so too, on all ranks."""
        loss = loss * (1 + 0 * loss.detach())  # times exactly 1, or NaN: its gradient alone may well be finite
        self.scaler.scale(loss).backward()

    def step(self) -> dict[str, float]:
        """Take the step with the gradients there are.

        Returns:
            {"grad_norm", "lr", "skipped_steps"}: the norm before clipping, the same on all ranks; the rate that was
            used; how many steps the run has skipped.
        """
        self.scaler.unscale_(self.adamw)
        rate = learning_rate(self.config, step=self.steps, total_steps=self.total_steps)
        for group in self.adamw.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)  # of a compiled step
            else:
                group["lr"] = rate
        norm = float(clip_grad_norm(self.model, self.config.max_grad_norm))
        if math.isfinite(norm):
            self.adamw.step()
            self.skipped_in_a_row = 0
            if self.average is not None:
                self.average.update()
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.scaler.update()
        self.adamw.zero_grad(set_to_none=True)
        self.steps += 1
        return {"grad_norm": norm, "lr": rate, "skipped_steps": float(self.skipped)}

    @property
    def stuck(self) -> bool:
        """Whether so many steps in a row were skipped that the run should stop; the same on all ranks."""
        return self.skipped_in_a_row >= self.max_skipped_steps

    def state_dict(self) -> dict:
        """Counters and loss scale; the optimizer's tensors are saved with the model's."""
        counters = {"steps": self.steps, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        return {**counters, "scaler": self.scaler.state_dict() or None}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self.steps, self.skipped, self.skipped_in_a_row = state["steps"], state["skipped"], state["skipped_in_a_row"]
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


def build_optimizer(
    model: nn.Module,
    recipe: TrainingRecipe,
    world: World,
    *,
    steps_per_training_step: int = 1,
    average_into: nn.Module | None = None,
) -> GuardedOptimizer:
    """The optimizer of a recipe, with a moving average of the weights if it wants one; see `MovingAverage.into`."""
    training, average = recipe.training, None
    if training.ema_decay is not None:
        average = MovingAverage(model, training.ema_decay, into=average_into)
    return GuardedOptimizer(
        model,
        recipe.optimizer,
        total_steps=training.steps * steps_per_training_step,
        max_skipped_steps=training.max_skipped_steps,
        scaler=grad_scaler(training.mixed_precision, world.device),
        average=average,
    )
