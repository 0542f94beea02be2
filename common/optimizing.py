"""What follows the gradients: AdamW for small GPUs, and the averaged weights."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def average_model(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights, in eval mode; buffers are copied.

    The decay warms up as (1 + n) / (10 + n), so that short runs do not remember their first weights.
    """

    def update(averaged: list[Tensor], current: list[Tensor], updates: Tensor) -> None:
        n = updates.item()
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    averaged = AveragedModel(model, multi_avg_fn=update, use_buffers=False)
    return averaged.requires_grad_(False).eval()


class PagedAdamW(torch.optim.AdamW):
    """AdamW whose moments lie in main memory, and come to the parameters' device one parameter at a time.

    It takes the very steps of AdamW. A GPU needs two numbers less for each one that is trained, and each step takes
    longer by the time in which the moments go there and back.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            every = group["params"]
            try:
                for parameter in every:
                    group["params"] = [parameter]
                    self.move(parameter, parameter.device)
                    super().step(closure)
                    self.move(parameter, torch.device("cpu"))
            finally:
                group["params"] = every

    def move(self, parameter: Tensor, device: torch.device) -> None:
        """Take one parameter's moments to a device."""
        state = self.state[parameter]
        state.update({name: moment.to(device) for name, moment in state.items() if name != "step"})
