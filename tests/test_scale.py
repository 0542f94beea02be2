"""The table of docs/scale.md against the repository's own networks and losses, and its arithmetic."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.schedule import NoiseSchedule
from common.training import diffusion_loss
from latent_diffusion.files import SD_V1
from latent_diffusion.miniature import BASE
from p1_ddpm.model import ContextUNet
from p2_ddim.model import FaceUNet, FaceUNetConfig
from p2_ddim.train import FaceTraining
from p3_controlnet.model import ControlNet
from p3_controlnet.unet import ControlledUNet

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
ROWS = {
    cells[0]: [float(cell.strip("%").replace(",", "")) for cell in cells[1:]]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if re.match(r"\| P\d", line)
    for cells in [line.strip("| ").split(" | ")]
}


def alone(model: nn.Module, size: int, **condition):
    """A network that is trained whole, that network, and a batch of two."""
    return model, model, torch.zeros(2, 3, size, size), condition


def controlled(base: Path, hint_channels: tuple[int, ...]):
    """A frozen U-Net with a ControlNet, the ControlNet, and a batch of two."""
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base / "unet")).requires_grad_(False)
    controlnet, side = ControlNet.from_unet(unet, hint_channels), unet.config.sample_size
    hint = torch.zeros(2, 3, *[side * controlnet.config.hint_factor] * 2)
    condition = {"hint": hint, "context": torch.zeros(2, 77, unet.config.cross_attention_dim)}
    return ControlledUNet(unet, [controlnet]), controlnet, torch.zeros(2, 4, side, side), condition


NETWORKS = {
    "P1: Context-UNet, 28x28": lambda: alone(ContextUNet(), 28, labels=torch.zeros(2, dtype=torch.long)),
    "P2: own face U-Net, 64x64": lambda: alone(FaceUNet(FaceTraining().network()), 64),
    "P2: the course's U-Net, 256x256": lambda: alone(FaceUNet(FaceUNetConfig()), 256),
    "P3: ControlNet, miniature, 128x128": lambda: controlled(BASE, (16, 32, 48, 64)),
    "P3: ControlNet, Stable Diffusion v1, 512x512": lambda: controlled(SD_V1, (16, 32, 96, 256)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_counts_are_those_of_the_networks(name, monkeypatch):
    batch, trained, one_pass, step = ROWS[name][:4]
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it does not know the meta device
    with torch.device("meta"):
        network, model, x0, condition = NETWORKS[name]()
        t = torch.zeros(2, dtype=torch.long)
        with torch.no_grad(), FlopCounterMode(display=False) as forward:
            network(x0, t, **condition)
        with FlopCounterMode(display=False) as both:
            examples = {"x0": x0, "eps": x0, "t": t, **condition}
            diffusion_loss(network, examples, NoiseSchedule("cosine"), "v", 5.0).backward()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    counted = parameters / 1e6, forward.get_total_flops() / 2e9, both.get_total_flops() / 2e12 * batch
    assert [f"{number:.3g}" for number in (trained, one_pass, step)] == [f"{number:.3g}" for number in counted]


@pytest.mark.parametrize("name", NETWORKS)
def test_rates_follow_from_the_counts(name):
    """By the formula that the page gives."""
    batch, trained, _, step, kernels, _, *rates, lost = ROWS[name]
    seconds = max(step * 1e12 / (0.4 * 989e12), kernels * 5e-6)
    waits = [2 * (n - 1) / n * 4 * trained * 1e6 / link for n, link in ((1, 450e9), (8, 450e9), (64, 400e9))]
    assert rates == pytest.approx([n * batch / (seconds + wait) for n, wait in zip((1, 8, 64), waits)], rel=0.01)
    assert lost == pytest.approx(100 * waits[-1] / (seconds + waits[-1]), abs=0.1)
