"""What a training run tells of itself: numbers and pictures, in files and in TensorBoard."""

import json
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from common.checkpoint import write_atomically
from common.images import save_png

METRICS = "metrics.jsonl"


class RunLog:
    """The log of one run, in its folder; a run that goes on appends to what it logged before.

    Args:
        folder: of the run; it is there already.
        step: steps taken so far; lines of later ones, which a kill undid, are dropped.
    """

    def __init__(self, folder: Path, step: int):
        self.folder = folder
        self.forget_after(step)
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def forget_after(self, step: int) -> None:
        """Drop the lines of later steps from metrics.jsonl, and one that was not finished."""
        path = self.folder / METRICS
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step)
            write_atomically(path, lambda temporary: temporary.write_text(kept))

    def numbers(self, step: int, **numbers: float) -> None:
        """Append to metrics.jsonl and TensorBoard."""
        with open(self.folder / METRICS, "a") as file:
            file.write(json.dumps({"step": step} | numbers) + "\n")
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)

    def picture(self, step: int, picture: Tensor) -> None:
        """Write samples, uint8 (3, H, W), as a PNG and to TensorBoard."""
        save_png(self.folder / f"samples_{step:08d}.png", picture)
        self.writer.add_image("samples", picture, step)

    def close(self) -> None:
        """Finish the files."""
        self.writer.close()
