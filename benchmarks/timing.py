"""How long a piece of work takes."""

import statistics
from collections.abc import Callable
from time import perf_counter

from common.progress import Progress, silenced


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
