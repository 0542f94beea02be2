"""What tests of training share: a kill, what is compared after it, and a look at what a program works on."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch

from common.checkpoint import load_tensors
from common.training import Trainer
from latent_diffusion.base import load_base


def newest(folder):
    """The newest state in a folder: its tensors and facts."""
    return load_tensors(sorted(folder.glob("state_*.safetensors"))[-1])


@contextlib.contextmanager
def killed_at(step):
    """A block in which training must come to so many steps, and is cut off there."""
    whole_step = Trainer.take_step

    def killed(trainer):
        if trainer.step == step:
            raise KeyboardInterrupt
        return whole_step(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "take_step", killed)
        with pytest.raises(KeyboardInterrupt):
            yield


def same_files(one, other):
    """Whether two safetensors files agree in every bit of every tensor, and in all facts."""
    (tensors, about), (others, other_about) = load_tensors(one), load_tensors(other)
    return (
        about == other_about
        and tensors.keys() == others.keys()
        and all(torch.equal(tensors[name], others[name]) for name in tensors)
    )


def same_states(a, b):
    """Whether the newest states of two folders agree in everything."""
    return same_files(*(sorted(folder.glob("state_*.safetensors"))[-1] for folder in (a, b)))


def metrics(folder):
    """The log without its timings."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def spied_on(monkeypatch, module):
    """What a program will have loaded as its `base`, and its `trainer`, once it has run."""
    seen, init = SimpleNamespace(), Trainer.__init__

    def load(*arguments, **options):
        seen.base = load_base(*arguments, **options)
        return seen.base

    def watch(trainer, *arguments, **options):
        init(trainer, *arguments, **options)
        seen.trainer = trainer

    monkeypatch.setattr(module, "load_base", load)
    monkeypatch.setattr(Trainer, "__init__", watch)
    return seen


def touched(base, folder):
    """Names of a base's weights that are no longer those of its folder, or have a gradient."""
    fresh, names = load_base(folder), []
    for part in ("vae", "text_encoder", "unet"):
        model, original = getattr(base, part), getattr(fresh, part).state_dict()
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, original[name])]
        learning = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        names += [f"{part}.{name}" for name in (*changed, *learning)]
    return names
