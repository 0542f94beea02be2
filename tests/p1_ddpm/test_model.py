"""The Context-UNet: shapes, what it reacts to, and that nothing of it stays on the CPU."""

import json
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.schedule import PREDICTIONS, NoiseSchedule
from common.training import diffusion_loss
from p1_ddpm.model import ContextUNet, ContextUNetConfig, ResidualBlock, timestep_embedding
from tests.stable_diffusion import randomised

SMALL = ContextUNetConfig(widths=(16, 32), blocks=(1, 2), embedding=24)


def inputs(count=3, size=28, channels=3):
    generator = torch.Generator().manual_seed(1)
    xt = torch.randn(count, channels, size, size, generator=generator)
    return xt, torch.arange(count) * 300, torch.arange(count)


@pytest.mark.parametrize(
    "config",
    [
        ContextUNetConfig(widths=(8,), blocks=(1,), attention=(True,), patch_size=1, heads=4, num_labels=5),
        ContextUNetConfig(widths=(8, 12, 16), blocks=(2, 1, 1), attention=(False, True, False), image_channels=1),
        ContextUNetConfig(widths=(8, 8), blocks=(1, 1), middle_blocks=0, middle_attention=False, patch_size=4),
    ],
)
def test_every_size_by_config(config):
    model = randomised(ContextUNet(config), seed=0)
    assert model.null_label == config.num_labels
    for size in (config.stride, 7 * config.stride):
        xt, t, _ = inputs(size=size, channels=config.image_channels)
        assert model(xt, t, torch.full_like(t, model.null_label)).shape == xt.shape
    assert ContextUNetConfig(**json.loads(json.dumps(asdict(config)))) == config  # as it comes back from a file


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"widths": (8, 8), "blocks": (1,)}, "one entry a level"),
        ({"widths": (15, 16)}, "even"),
        ({"widths": (8, 0)}, "above 0"),
        ({"blocks": (0, 1)}, "above 0"),
        ({"widths": (8, 9), "heads": 2}, "divisible by 2 attention heads"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, complaint):
    with pytest.raises(ValueError, match=complaint):
        ContextUNetConfig(**sizes)


def test_time_and_context_change_the_output():
    model = randomised(ContextUNet(SMALL), seed=0)
    xt, t, labels = inputs(count=1)
    xt, t = xt.expand(21, -1, -1, -1), t.expand(21)
    by_label = model(xt, t, torch.arange(21))  # twenty classes and null
    by_time = model(xt, torch.arange(21) * 45, labels.expand(21))
    for outputs in (by_label, by_time):
        distances = torch.cdist(outputs.flatten(1), outputs.flatten(1)) + 1e9 * torch.eye(21)
        assert distances.min() > 1e-2


def test_the_embedding_scales_and_shifts_normalised_features():
    """A scale of -1 (on top of 1) and a shift of 0.7 leave 0.7 everywhere, whatever the image."""
    block = ResidualBlock(8, 8, embedding=5, dropout=0.0)
    nn.init.normal_(block.conv2.weight)
    with torch.no_grad():
        block.modulation.bias.copy_(torch.cat([torch.full((8,), -1.0), torch.full((8,), 0.7)]))
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = x + block.conv2(F.silu(torch.full_like(x, 0.7)))
    assert (block(x, torch.ones(2, 5)) - expected).abs().max() < 1e-5


def test_timestep_embedding_is_diffusers():
    t = torch.arange(1000)
    theirs = get_timestep_embedding(t, 96, flip_sin_to_cos=False, downscale_freq_shift=0)
    assert (timestep_embedding(t, 96) - theirs).abs().max() < 1e-4


class NoFloat64OffTheCPU(TorchDispatchMode):
    """Refuses operations that make a float64 tensor on a device other than the CPU; Apple's GPUs have none."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                assert tensor.device.type == "cpu", function
        return result


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_training_step_leaves_nothing_on_the_cpu(prediction):
    """PyTorch refuses to mix the CPU with `meta`; and every parameter gets a gradient, as several processes need."""
    with torch.device("meta"):
        model = ContextUNet(SMALL)
        images, indices = torch.empty(4, 3, 28, 28), torch.empty(4, dtype=torch.int64)
    batch = {"x0": images, "eps": images, "t": indices, "labels": indices}
    optimizer = torch.optim.AdamW(model.parameters())
    with NoFloat64OffTheCPU():
        loss = diffusion_loss(model, batch, NoiseSchedule("cosine"), prediction, gamma=5.0)
        loss.backward()
        optimizer.step()
    assert loss.device.type == "meta"
    assert {p.grad.device.type for p in model.parameters()} == {"meta"}
    assert {state["exp_avg"].device.type for state in optimizer.state.values()} == {"meta"}
