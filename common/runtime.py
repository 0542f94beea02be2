"""Device, precision, and random generators that belong to one image or one training step."""

import contextlib
import os

import numpy as np
import torch

from common.cli import UserError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def pick_device(name: str = "auto") -> torch.device:
    """The named device, or the first CUDA GPU, else the CPU; a `UserError` if the machine has no such device.

    Each process that `accelerate launch` starts has a GPU of its own. On a GPU, TF32 is turned off: fp32 means fp32.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.ones(1, device=device).item()  # which meta, that computes nothing, refuses
        if device.type == "cuda":
            torch.cuda.set_device(device)
            # Not on a CPU, where it changes nothing and torch 2.9 calls these names old on stderr.
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0].split('. ')[0]}; use --device cpu") from None
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """Resolve "auto": fp32 on a GPU; on a CPU bf16 where the processor multiplies it in hardware, else fp32."""
    if name not in PRECISIONS:
        raise UserError(f"--precision {name}: choose from {', '.join(PRECISIONS)}")
    if name != "auto":
        return name
    cpu_has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cpu" and cpu_has_bf16 else "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """A context in which networks compute in the given precision ("fp32", "bf16" or "fp16")."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator that depends only on the key, such as (seed, image) or (seed, step); negative is a `UserError`.

    NumPy's SeedSequence mixes the key, so neighbouring keys give unrelated streams; zeros at a key's end do not count.
    """
    if any(number < 0 for number in key):
        raise UserError(f"seed {key[0]}: seeds are whole numbers from 0")
    state = np.random.SeedSequence(key).generate_state(1, dtype=np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


class Processes:
    """The `count` processes that share a run: one, or those that `accelerate launch` or `torchrun` started.

    This one's number, from 0, is `rank`.
    """

    def __init__(self):
        self.state = None
        self.rank, self.count = 0, int(os.environ.get("WORLD_SIZE", "1"))
        if self.count > 1:
            from accelerate import PartialState  # seconds of import that a single process can do without

            self.state = PartialState(cpu=not torch.cuda.is_available())
            self.rank = self.state.process_index

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.state is not None:
            self.state.wait_for_everyone()
