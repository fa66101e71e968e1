"""AdamW whose moments live in the memory of the host."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


class OffloadedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with both moments in host memory, 8 bytes a parameter that the GPU has for other things.

    A step goes through the parameters one by one: their moments are copied to the parameter's device, the usual update
    runs there, and the moments are copied back. The arithmetic is AdamW's own on the same device, so the result is the
    same bit for bit; only one parameter's moments are on the device at a time. Weights and gradients stay where they
    are, so forward, rollouts and gradient clipping know nothing of it. Sharded parameters have sharded moments.

    The arguments are those of `torch.optim.AdamW`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_post_hook(lambda optimizer: optimizer._to_host())  # loading moves them to the GPU

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self.param_groups = [{**group, "params": [parameter]}]
                        self._step_one(parameter)
        finally:
            self.param_groups = groups
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # copies into pinned memory do not wait for themselves
        return loss

    def _step_one(self, parameter: nn.Parameter) -> None:
        state = self.state[parameter]
        on_host = {name: state[name] for name in _MOMENTS if name in state}
        for name, moment in on_host.items():
            state[name] = torch.empty_like(parameter)
            _local(state[name]).copy_(_local(moment), non_blocking=True)
        super().step()
        if not on_host:  # the first step has just made them
            self._offload(state)
            return
        for name, moment in on_host.items():
            _local(moment).copy_(_local(state[name]), non_blocking=True)
            state[name] = moment

    def _to_host(self) -> None:
        for state in self.state.values():
            self._offload(state)

    @staticmethod
    def _offload(state: dict[str, Any]) -> None:
        for name in _MOMENTS:
            if name in state:
                state[name] = _on_host(state[name])


def _on_host(moment: Tensor) -> Tensor:
    """A copy in host memory, pinned where there is a GPU; of a sharded tensor, of this rank's shard."""
    local = _local(moment)
    host = torch.empty_like(local, device="cpu", pin_memory=torch.cuda.is_available())
    host.copy_(local)
    if isinstance(moment, DTensor):  # `DTensor.from_local` would move the shard to the device of the mesh
        return DTensor(host, moment._spec, requires_grad=False)
    return host


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
