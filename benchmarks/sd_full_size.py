"""Time and peak memory of problem 3 at the size of the real Stable Diffusion v1.

    python benchmarks/sd_full_size.py /tmp/sd-v1-4-like.ckpt

Draws one picture with `hw2_3.sh` twice, the second time from the converted copy that the first one left, and takes one
training step, with gradient checkpointing and without. Each runs in a process of its own. If the checkpoint is not
there, it is written first: 4.3 GB of random weights with the names and sizes of the published sd-v1-4.ckpt, which load
and draw in the same time and memory.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

import torch
from torch import Tensor

from common.checkpoint import save_tensors
from common.cli import Parser, UserError, progress, run, say
from common.output import add_json_argument, check_json, write_atomically, write_json
from common.runtime import PRECISIONS
from common.schedule import NoiseSchedule
from latent_diffusion.files import PUBLISHED
from p3_controlnet import fill50k

ROOT = Path(__file__).resolve().parent.parent
STEPS = 2  # of the reverse process
PAIRS = 11  # train.py holds one of so many out


def random_weights(shapes: Mapping[str, Sequence[int]], seed: int = 6) -> dict[str, Tensor]:
    """Weights of these names and shapes under which activations neither vanish nor overflow; float32.

    A matrix or convolution keeps the variance of its input, a norm's weights are near 1, and biases near 0.
    """
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in progress(list(shapes.items()), "weights", "tensor"):
        if name.endswith("position_ids"):
            state[name] = torch.arange(shape[-1])[None]
            continue
        tensor = torch.randn(tuple(shape), generator=generator)
        if len(shape) == 1:
            state[name] = tensor.mul_(0.1).add_(float(name.endswith(".weight")))  # only norms have such weights
        else:
            state[name] = tensor.div_(tensor[0].numel() ** 0.5)
    return state


def write_like(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Write random weights in the form of the published file, with what else its training left there."""
    schedule = NoiseSchedule("scaled-linear", beta_start=0.00085, beta_end=0.012)
    buffers = {"betas": schedule.betas.float(), "alphas_cumprod": schedule.alphas_cumprod.float()}
    content = {"epoch": 13, "global_step": 470_000, "state_dict": buffers | random_weights(shapes)}
    write_atomically(path, lambda temporary: torch.save(content, temporary))
    say(f"{path}: {path.stat().st_size / 1e9:.2f} GB of random weights")


def measure(command: Sequence[object]) -> tuple[dict[str, float], str]:
    """Run a command; its seconds and peak memory (resident, GB), and its output. A `UserError` if it fails."""
    with tempfile.TemporaryFile("w+") as output:
        started, peak = perf_counter(), 0
        process = subprocess.Popen(
            [str(word) for word in command], stdout=output, stderr=output, env=os.environ | {"PYTHON": sys.executable}
        )
        while process.poll() is None:
            # The maximum that wait4 knows would start at this process's own.
            found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
            peak = max(peak, int(found[1]) * 1024 if found else 0)
            sleep(0.02)
        seconds = perf_counter() - started
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise UserError(f"{command[1]}: exit code {process.returncode}: {' '.join(text.split())[-400:]}")
    return {"seconds": round(seconds, 1), "peak_resident_gb": round(peak / 1e9, 2)}, text


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="sd_full_size.py", description=__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="SD_CKPT", help="a .ckpt file")
    work = parser.add_argument_group("work")
    work.add_argument("--size", type=int, default=256, help="side of the pictures, pixels")
    work.add_argument("--precision", choices=PRECISIONS, default="auto", help="precision of the networks")
    work.add_argument("--device", default="auto", help="where to compute: auto, cpu, cuda, ...")
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(args) -> dict[str, Any]:
    """Run everything; prints and returns the figures."""
    check_json(args.json)
    shapes = json.loads(PUBLISHED.read_text())
    if not args.checkpoint.exists():
        write_like(args.checkpoint, shapes["sd_v1"])
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        data, controlnet, table = work / "data", work / "control-like.safetensors", work / "one.json"
        save_tensors(controlnet, random_weights(shapes["controlnet"]), {})
        fill50k.main(fill50k.parse_arguments([str(data), "--count", str(PAIRS), "--size", str(args.size)]))
        table.write_text((data / "prompt.json").read_text().splitlines()[0] + "\n")
        shared = ["--precision", args.precision, "--device", args.device, "--cache-dir", work / "converted"]
        draw = ["bash", ROOT / "hw2_3.sh", table, data, work / "drawn", args.checkpoint, "--controlnet", controlnet]
        draw += ["--size", args.size, "--steps", STEPS, *shared]
        train = [sys.executable, ROOT / "p3_controlnet" / "train.py", "--base", args.checkpoint, "--data", data]
        train += ["--out", work / "run", "--image-size", args.size, "--batch-size", 1, *shared]
        commands = {
            "first_start": draw,
            "second_start": draw,
            "training": [*train, "--dry-run"],
            "training_with_gradient_checkpointing": [*train, "--dry-run", "--gradient-checkpointing"],
        }
        figures: dict[str, Any] = {"size": args.size, "steps": STEPS, "batch_size": 1}
        for name in progress(list(commands), "full size", "process"):
            figures[name], output = measure(commands[name])
            if "--dry-run" in commands[name]:
                figures[name]["step"] = json.loads(output[output.index("{") :])
    print(json.dumps(figures, indent=1))
    write_json(args.json, figures)
    return figures


if __name__ == "__main__":
    run(main, parse_arguments())
