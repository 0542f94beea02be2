"""One optimizer step, for what it costs."""

import json
import resource
from time import perf_counter
from typing import Any

import torch

from common.training import Trainer


def one_step(trainer: Trainer) -> dict[str, Any]:
    """Take one optimizer step, with the memory that every later one needs; returns time and memory, and prints them."""
    device = trainer.accelerator.device
    parameters = [p for group in trainer.raw_optimizer.param_groups for p in group["params"]]
    if not trainer.options.offload:
        # Else the first step would make room for the moments only when the activations are gone.
        for parameter in parameters:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            trainer.raw_optimizer.state[parameter] = {"step": torch.zeros((), device=device)} | moments
    trainer.runnable.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = perf_counter()
    loss, _ = trainer.take_step()
    seconds = perf_counter() - started
    if device.type == "cuda":
        peak, what = torch.cuda.max_memory_allocated(device), "allocated on the GPU in the step"
    else:
        peak, what = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "resident, since the start"
    figures = {
        "batch_size": trainer.options.batch_size,
        "accumulate": trainer.options.accumulate,
        "precision": trainer.accelerator.mixed_precision,
        "parameters_in_the_optimizer": sum(parameter.numel() for parameter in parameters),
        "parameters_of_the_controlnet": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "loss": loss,
        "seconds": round(seconds, 2),
        "peak_memory_gb": round(peak / 1e9, 2),
        "peak_memory": what,
    }
    trainer.accelerator.print(json.dumps(figures, indent=2))
    return figures
