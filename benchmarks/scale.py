"""Count what training and drawing ask of a machine, and say what that comes to on one GPU, on 8 and on 64.

    python benchmarks/scale.py                       # counted and projected; nothing is computed, no weights needed
    python benchmarks/scale.py --write               # puts these tables into docs/scale.md
    python benchmarks/scale.py --measure --write     # times the small models here too; wants a quiet machine

Counts are of the repository's own losses and networks on torch's meta device. Projections are arithmetic on the counts,
the published figures and the assumptions that stand beside them: nothing of them was measured.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.pages import write_blocks
from benchmarks.projection import Assumptions, Machine, projected, training_rates
from benchmarks.scale_tables import counted_text, measured_text
from benchmarks.timing import median_seconds
from benchmarks.workloads import MEASURED, WORK
from common.cli import Parser, UserError, add_json_argument, check_json, progress, run, say, write_json
from common.runtime import PRECISIONS, cpu_has_bf16, pick_precision

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scale.md"


def figures_of(key: str, machine: Machine, assumed: Assumptions) -> dict[str, Any]:
    """Everything counted and projected of one kind of work."""
    with torch.device("meta"):
        work = WORK[key]("fp32")
        step, picture, cached = work.training_step(), work.one_picture(), work.cached()
    precisions = ("fp32", "bf16")
    return {
        "name": work.name,
        "batch": work.batch,
        "steps": work.steps,
        "passes": work.passes,
        "trained": work.trained_count,
        "frozen": work.frozen_count,
        "states": work.states,
        "step": asdict(step),
        "picture": asdict(picture),
        "cached": asdict(cached) if cached else None,
        "host_bytes": work.host_bytes,
        "mapped": work.mapped,
        "step_seconds": {p: projected(step, machine, assumed, p) for p in precisions},
        "picture_seconds": {p: projected(picture, machine, assumed, p) for p in precisions},
        "training_rates": {
            p: training_rates(work.batch, 4 * work.trained_count, step, machine, assumed, p) for p in precisions
        },
    }


def measured(key: str, precision: str, pictures: int, repeats: int) -> dict[str, float]:
    """Seconds of a training step, update included, and of drawing so many pictures at once, on this processor."""
    work = WORK[key](precision)
    for model in work.models:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(work.trained, fused=True)
    average = [parameter.detach().clone() for parameter in work.trained]

    def step() -> None:
        work.step().backward()
        torch.nn.utils.clip_grad_norm_(work.trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [parameter.detach() for parameter in work.trained], 0.001)

    @torch.no_grad()
    def draw() -> None:
        for _ in range(work.steps):
            work.predict(pictures)
        work.encode(pictures)

    step_seconds = median_seconds(step, repeats)
    for model in work.models:
        model.to(memory_format=work.drawn_in)
    return {"step": step_seconds, "pictures": pictures, "drawing": median_seconds(draw, repeats)}


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="scale.py", description=__doc__)
    counting = parser.add_argument_group("counting")
    counting.add_argument("--only", nargs="+", choices=WORK, default=list(WORK), help="kinds of work")
    counting.add_argument("--write", action="store_true", help="put the tables into the page, instead of printing them")
    counting.add_argument("--page", type=Path, default=PAGE, help="the page")
    add_json_argument(parser)
    counting.add_argument("--utilisation", type=float, default=0.4, help="share of the published arithmetic, assumed")
    group = parser.add_argument_group("measuring")
    group.add_argument("--measure", action="store_true", help="time the small models on this processor")
    group.add_argument("--pictures", type=int, default=8, help="drawn at once")
    group.add_argument("--repeats", type=int, default=3, help="runs of which the median is told")
    group.add_argument("--precision", choices=PRECISIONS, default="auto", help="of what is timed")
    return parser.parse_args(argv)


def main(args) -> dict[str, Any]:
    """Count, project, perhaps measure; prints or writes the tables and returns the figures.

    Raises:
        UserError: bad arguments, or a page without the blocks that the tables go to.
    """
    if not 0 < args.utilisation <= 1 or min(args.pictures, args.repeats) < 1:
        raise UserError(
            f"--utilisation {args.utilisation} --pictures {args.pictures} --repeats {args.repeats}: above 0 to 1, and"
            " at least 1"
        )
    if args.write and set(args.only) != set(WORK):
        raise UserError("--only: the page has tables of all kinds of work; leave --only or --write out")
    check_json(args.json)
    machine, assumed = Machine(), Assumptions(utilisation=args.utilisation)
    figures = {key: figures_of(key, machine, assumed) for key in progress(args.only, "counting", "kind")}
    blocks = {"counted": counted_text(figures, machine, assumed)}
    result = {"machine": asdict(machine), "assumed": asdict(assumed), "counted": figures}
    if args.measure:
        precision = pick_precision(args.precision, torch.device("cpu"))
        keys = [key for key in MEASURED if key in args.only]
        result["measured"] = {
            key: measured(key, precision, args.pictures, args.repeats) for key in progress(keys, "measuring", "kind")
        }
        bf16 = "with" if cpu_has_bf16() else "without"
        facts = (
            f"{torch.get_num_threads()} threads of a processor {bf16} bf16, in {precision}; {args.pictures} pictures at"
            f" a time, medians of {args.repeats}."
        )
        blocks["measured"] = measured_text(result["measured"], figures, facts)
    if args.write:
        write_blocks(args.page, blocks)
        say(f"{', '.join(blocks)}: in {args.page}")
    else:
        print("\n\n".join(blocks.values()))
        if not args.measure:
            say("\nNot measured: add --measure on a quiet machine")
    write_json(args.json, result)
    return result


if __name__ == "__main__":
    run(main, parse_arguments())
