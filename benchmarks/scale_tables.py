"""What was counted, projected and measured, as the tables of docs/scale.md."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.pages import number, table
from benchmarks.projection import GPUS, GPUS_A_NODE, Assumptions, Machine

# Rows in the course's training data; the other workloads have no fixed data set.
COURSE_PICTURES = {"p1": 56_000 + 79_431, "p3-sd": 50_000}


def counted_text(figures: Mapping[str, Mapping[str, Any]], machine: Machine, assumed: Assumptions) -> str:
    """The tables of what was counted and projected."""
    all_works = list(figures.values())

    def rows(cells: Callable[[Mapping[str, Any]], Sequence[float]]) -> list[list[str]]:
        return [[f["name"], *(number(cell) for cell in cells(f))] for f in all_works]

    def memory(f: Mapping[str, Any]) -> float:
        return (f["states"] + f["step"]["peak"]) / 1e9

    def step_seconds(f: Mapping[str, Any]) -> float:
        return f["step_seconds"]["bf16"]["slowest"]

    def held(f: Mapping[str, Any], pictures: int) -> tuple[float, float]:
        process = pictures * f["host_bytes"] / 1e9
        return process, process * (1 if f["mapped"] else GPUS_A_NODE)

    parts = [
        "### One training step\n",
        table(
            ["", "batch", "trained, millions", "frozen, millions", "TFLOP", "GB moved", "kernels", "GB held"],
            rows(lambda f: [
                f["batch"], f["trained"] / 1e6, f["frozen"] / 1e6, f["step"]["flops"] / 1e12, f["step"]["bytes"] / 1e9,
                f["step"]["kernels"], memory(f),
            ]),
        ),
        "\n### One picture\n",
        table(
            ["", "steps", "passes a step", "TFLOP", "GB moved", "kernels", "GB beside the weights"],
            rows(lambda f: [
                f["steps"], f["passes"], f["picture"]["flops"] / 1e12, f["picture"]["bytes"] / 1e9,
                f["picture"]["kernels"], f["picture"]["peak"] / 1e9,
            ]),
        ),
        "\n### What the cache of latents and contexts saves each time a picture is trained on\n",
        table(
            ["", "GFLOP saved", "GFLOP left"],
            [
                [f["name"], number(f["cached"]["flops"] / 1e9), number(f["step"]["flops"] / f["batch"] / 1e9)]
                for f in all_works
                if f["cached"]
            ],
        ),
        "\n### One H100, projected\n",
        f"Published: {machine.fp32 / 1e12:g} TFLOP/s in fp32, {machine.bf16 / 1e12:g} in bf16,"
        f" {machine.bandwidth / 1e12:g} TB/s, {machine.memory / 1e9:g} GB. Assumed: {assumed.utilisation:.0%} of the"
        f" arithmetic, {assumed.bandwidth_share:.0%} of the bandwidth, {assumed.launch * 1e6:g} µs a kernel.\n",
        "Milliseconds of a training step, the slowest of which rules:\n",
        table(
            ["", "fp32 arithmetic", "fp32 traffic", "bf16 arithmetic", "bf16 traffic", "launches"],
            rows(lambda f: [
                1e3 * f["step_seconds"][precision][what]
                for precision, what in (
                    ("fp32", "arithmetic"), ("fp32", "traffic"), ("bf16", "arithmetic"), ("bf16", "traffic"),
                    ("bf16", "launches"),
                )
            ]),
        ),
        "\nSeconds of one picture drawn alone:\n",
        table(
            ["", "fp32", "bf16", "launches"],
            rows(lambda f: [
                f["picture_seconds"]["fp32"]["slowest"], f["picture_seconds"]["bf16"]["slowest"],
                f["picture_seconds"]["bf16"]["launches"],
            ]),
        ),
    ]  # fmt: skip
    head = [f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS]
    parts += [
        "\n### 8 and 64 H100s, projected\n",
        f"Published: {machine.inside / 1e9:g} GB/s each way inside a node, {machine.between / 1e9:g} GB/s between nodes"
        f" of {GPUS_A_NODE}. Pictures a second in bf16; every GPU has the batch above:\n",
        table(
            ["", *head, f"lost to gradients, {GPUS[1]}", f"lost to gradients, {GPUS[2]}"],
            [
                [
                    f["name"],
                    *(number(f["training_rates"]["bf16"][gpus]["grown"]) for gpus in GPUS),
                    *(f"{f['training_rates']['bf16'][gpus]['exchange_share']:.1%}" for gpus in GPUS[1:]),
                ]
                for f in all_works
            ],
        ),
        "\nThe same, but all GPUs share the batch above, as `--batch-size` has it (a dash where there are more GPUs"
        " than pictures):\n",
        table(["", *head], rows(lambda f: [f["training_rates"]["bf16"][gpus]["shared"] for gpus in GPUS])),
        "\n### What is left to the host\n",
        "Every process prepares the whole batch and takes its part. Microseconds that it has for each picture before"
        " the GPUs wait, if they take bf16 steps as projected:\n",
        table(["", *head], rows(lambda f: [1e6 * step_seconds(f) / (gpus * f["batch"]) for gpus in GPUS])),
        f"\nThe course's pictures while training: in every process, and in the {GPUS_A_NODE} processes of a node:\n",
        table(
            ["", "pictures", "GB a process", "GB a node"],
            [
                [figures[key]["name"], f"{count:,}", *map(number, held(figures[key], count))]
                for key, count in COURSE_PICTURES.items()
                if key in figures
            ],
        ),
    ]
    return "\n".join(parts)


def measured_text(results: Mapping[str, Mapping[str, float]], figures: Mapping[str, Any], facts: str) -> str:
    """The table of what was measured, beside the counts."""
    rows = []
    for key, result in results.items():
        f = figures[key]
        drawn = f["picture"]["flops"] * result["pictures"]
        values = [
            result["step"], f["step"]["flops"] / result["step"] / 1e9, result["drawing"] / result["pictures"],
            drawn / result["drawing"] / 1e9,
        ]  # fmt: skip
        rows.append([f["name"], *map(number, values)])
    head = ["", "training step, s", "GFLOP/s", "a picture, s", "GFLOP/s"]
    return f"{facts}\n\n{table(head, rows)}"
