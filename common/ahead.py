"""The next batch, drawn while a GPU works on this one."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Batch = dict[str, Tensor]


class DrawnAhead:
    """Batches by step; while one is worked on, a thread draws the next, in memory that a GPU copies from by itself.

    An error comes when the step does that it belongs to.

    Args:
        draw: from a step to its batch, on the CPU; it must depend on nothing but the step.
        steps: how many there are; after the last one nothing is drawn ahead.
    """

    def __init__(self, draw: Callable[[int], Batch], steps: int):
        self.draw, self.steps = draw, steps
        self.pool = ThreadPoolExecutor(1, "batches")
        self.waiting: dict[int, Future[Batch]] = {}

    def prepare(self, step: int) -> Batch:
        """Draw a step's batch."""
        batch = self.draw(step)
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if torch.cuda.is_available() else batch

    def __call__(self, step: int) -> Batch:
        future = self.waiting.pop(step, None)
        batch = future.result() if future else self.prepare(step)
        following = step + 1
        self.waiting = {following: self.pool.submit(self.prepare, following)} if following < self.steps else {}
        return batch
