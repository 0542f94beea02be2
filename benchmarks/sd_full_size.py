"""Problem 3 at the size of the real Stable Diffusion v1: what the grader's command and a training step cost here.

    python benchmarks/make_sd_like.py /tmp/sd-v1-4-like.ckpt
    python benchmarks/sd_full_size.py /tmp/sd-v1-4-like.ckpt

Draws one picture with `hw2_3.sh` twice, the second time from the converted copy that the first one left, and takes one
training step, with checkpointing and without. Each is a process of its own, whose time and peak memory are told.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import make_sd_like
from common.cli import Parser, UserError, add_json_argument, check_json, run, say, write_json
from common.runtime import PRECISIONS
from p3_controlnet import fill50k

ROOT = Path(__file__).resolve().parent.parent
PAIRS = 11  # train.py holds one of so many out


def peak_resident(pid: int) -> int:
    """The most memory a running process has had so far, in bytes; 0 when it has just ended.

    What wait4 tells is no use: a new process starts with its parent's peak.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def measured(command: Sequence[object]) -> tuple[dict[str, float], str]:
    """Run a command; its seconds and peak memory (GB, resident), and what it printed.

    Raises:
        UserError: it failed.
    """
    say(shlex.join(map(str, command)))
    environment = os.environ | {"PYTHON": sys.executable}
    with tempfile.TemporaryFile("w+") as output:
        started = perf_counter()
        process = subprocess.Popen([str(word) for word in command], stdout=output, stderr=output, env=environment)
        peak = 0
        while process.poll() is None:
            peak = max(peak, peak_resident(process.pid))
            sleep(0.02)
        seconds = perf_counter() - started
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise UserError(f"{command[1]}: exit code {process.returncode}: {' '.join(text.split())[-400:]}")
    return {"seconds": round(seconds, 1), "peak_resident_gb": round(peak / 1e9, 2)}, text


def drawing(args, work: Path, controlnet: Path) -> dict[str, Any]:
    """The grader's command for one picture: the first start, and one that finds the converted copy."""
    table, data = work / "one.json", work / "data"
    table.write_text((data / "prompt.json").read_text().splitlines()[0] + "\n")
    command = ["bash", ROOT / "hw2_3.sh", table, data, work / "drawn", args.checkpoint, "--controlnet", controlnet]
    command += ["--size", args.size, "--steps", args.steps, "--precision", args.precision, "--device", args.device]
    command += ["--cache-dir", work / "converted"]
    return {name: measured(command)[0] for name in ("first_start", "second_start")}


def training(args, work: Path, *flags: str) -> dict[str, Any]:
    """One step of train.py, as its dry run tells it, and the whole process beside it."""
    command = [sys.executable, ROOT / "p3_controlnet" / "train.py", "--base", args.checkpoint, "--data", work / "data"]
    command += ["--out", work / "run", "--cache-dir", work / "converted", "--image-size", args.size]
    command += ["--batch-size", args.batch_size, "--precision", args.precision, "--device", args.device]
    process, text = measured([*command, "--dry-run", *flags])
    return {"step": json.loads(text[text.index("{") :]), "process": process}


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="sd_full_size.py", description=__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="SD_CKPT", help="from make_sd_like.py, or a published one")
    files = parser.add_argument_group("files")
    files.add_argument("--work", type=Path, help="folder for 6 GB of files, kept (default: a temporary one)")
    files.add_argument("--keys", type=Path, default=make_sd_like.KEYS, help="as make_sd_like.py takes it")
    work = parser.add_argument_group("work")
    work.add_argument("--size", type=int, default=256, help="side of the pictures, pixels")
    work.add_argument("--steps", type=int, default=2, help="of the reverse process")
    work.add_argument("--batch-size", type=int, default=1, help="pairs the training step")
    work.add_argument("--precision", choices=PRECISIONS, default="auto", help="of everything")
    work.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(args) -> dict[str, Any]:
    """Run everything; prints and returns the figures.

    Raises:
        UserError: a command failed; with the end of what it said.
    """
    check_json(args.json)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        controlnet = work / "control-like.safetensors"
        if not controlnet.exists():
            arguments = [str(controlnet), "--kind", "controlnet", "--keys", str(args.keys)]
            make_sd_like.main(make_sd_like.parse_arguments(arguments))
        fill50k.main(fill50k.parse_arguments([str(work / "data"), "--count", str(PAIRS), "--size", str(args.size)]))
        figures = {
            "checkpoint_gb": round(args.checkpoint.stat().st_size / 1e9, 2),
            "size": args.size,
            "drawing": {"pictures": 1, "steps": args.steps} | drawing(args, work, controlnet),
            "training": training(args, work),
            "training_with_gradient_checkpointing": training(args, work, "--gradient-checkpointing"),
        }
    print(json.dumps(figures, indent=2))
    write_json(args.json, figures)
    return figures


if __name__ == "__main__":
    run(main, parse_arguments())
