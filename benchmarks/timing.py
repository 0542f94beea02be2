"""How long a piece of work takes."""

import statistics
from collections.abc import Callable
from time import perf_counter


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of `work` after one run that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return statistics.median(times)
