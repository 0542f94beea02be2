"""From counts to seconds: arithmetic on what was counted, what is published, and what is assumed."""

from dataclasses import dataclass

from benchmarks.counting import Count

GPUS = (1, 8, 64)
GPUS_A_NODE = 8


@dataclass(frozen=True)
class Machine:
    """What the maker publishes of a GPU and its place among others, bytes and operations a second.

    The defaults are NVIDIA's for the H100 SXM (data sheet; the matrix figures without sparsity) and the DGX H100 (eight
    400 Gb/s network cards, which eight rings use side by side).
    """

    fp32: float = 67e12
    bf16: float = 989e12
    bandwidth: float = 3.35e12
    memory: float = 80e9
    inside: float = 450e9
    between: float = 8 * 400e9 / 8


@dataclass(frozen=True)
class Assumptions:
    """What is assumed, not known: shares of the published figures, and seconds to launch one kernel."""

    utilisation: float = 0.4
    bandwidth_share: float = 0.8
    launch: float = 5e-6


def projected(count: Count, machine: Machine, assumed: Assumptions, precision: str) -> dict[str, float]:
    """Seconds that one GPU needs at least for its arithmetic, its memory traffic and its launches, and the slowest.

    Traffic in bf16 is taken as half of that in fp32.
    """
    peak, size = (machine.bf16, 0.5) if precision == "bf16" else (machine.fp32, 1.0)
    seconds = {
        "arithmetic": count.flops / (peak * assumed.utilisation),
        "traffic": count.bytes * size / (machine.bandwidth * assumed.bandwidth_share),
        "launches": count.kernels * assumed.launch,
    }
    return seconds | {"slowest": max(seconds.values())}


def exchange_seconds(gradient_bytes: int, gpus: int, machine: Machine) -> float:
    """Seconds of one ring all-reduce of the gradients (Patarasuk and Yuan 2009), not hidden by the backward pass.

    Each GPU sends and receives 2 (gpus - 1) / gpus times the gradients, over the slower of the links in its way.
    """
    link = machine.inside if gpus <= GPUS_A_NODE else min(machine.inside, machine.between)
    return 2 * (gpus - 1) / gpus * gradient_bytes / link


def divided(count: Count, parts: int) -> Count:
    """A share of the work, which needs as many kernels as the whole."""
    return Count(count.flops // parts, count.bytes // parts, count.kernels, count.peak // parts)


def training_rates(
    batch: int, gradient_bytes: int, step: Count, machine: Machine, assumed: Assumptions, precision: str
) -> dict[int, dict[str, float]]:
    """Pictures a second by number of GPUs: each with the batch of one ("grown"), or sharing that batch ("shared")."""
    rates = {}
    for gpus in GPUS:
        exchange = exchange_seconds(gradient_bytes, gpus, machine)
        whole = projected(step, machine, assumed, precision)["slowest"]
        shared = projected(divided(step, gpus), machine, assumed, precision)["slowest"]
        rates[gpus] = {
            "grown": gpus * batch / (whole + exchange),
            "shared": batch / (shared + exchange) if batch >= gpus else float("nan"),
            "exchange_share": exchange / (whole + exchange),
        }
    return rates
