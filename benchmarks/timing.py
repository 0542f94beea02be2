"""How long a piece of work takes."""

import statistics
from collections.abc import Callable
from time import perf_counter

import torch

from common.cli import Progress, silenced


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of `work` after one run that is not counted."""
    times = []
    with Progress(1 + repeats, "timing", "run") as phase:
        for _ in range(1 + repeats):
            with silenced():  # the work's own progress would cost it time
                start = perf_counter()
                work()
                times.append(perf_counter() - start)
            phase.update()
    del times[0]
    return statistics.median(times)


def matrix_product_rate(precision: str, device: torch.device) -> float:
    """Floating-point operations a second of a 2048-cubed matrix product, the machine's practical ceiling."""
    a, b = torch.randn(2, 2048, 2048).to(device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision))
    return 2 * 2048**3 / median_seconds(lambda: (a @ b)[0, 0].item(), 9)  # a value is there once the work is done
