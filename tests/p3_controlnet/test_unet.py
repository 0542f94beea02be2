"""The controlled U-Net against diffusers', what a training step keeps and touches, and the U-Net in patches."""

import pytest
import torch
from diffusers import ControlNetModel

from common.schedule import NoiseSchedule
from common.training import diffusion_loss
from p3_controlnet.unet import ControlledUNet, checkpoint_gradients, in_patches


@torch.no_grad()
def test_an_untrained_controlnet_changes_nothing(unet, untrained, batch):
    expected = unet(batch["xt"], batch["t"], batch["context"]).sample
    assert torch.equal(ControlledUNet(unet, [untrained])(**batch), expected)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (7, 9)], ids=str)
def test_control_is_that_of_diffusers(unet, controlnet, batch, tmp_path, size):
    batch |= {"xt": torch.randn(2, 4, *size), "hint": torch.rand(2, 3, *(8 * side for side in size))}
    xt, t, context = batch["xt"], batch["t"], batch["context"]
    controlnet.save(tmp_path, {}, fp16=False)
    skips, middle = ControlNetModel.from_pretrained(tmp_path)(
        xt, t, context, batch["hint"], conditioning_scale=0.7, return_dict=False
    )
    theirs = unet(xt, t, context, down_block_additional_residuals=skips, mid_block_additional_residual=middle).sample
    network = ControlledUNet(unet, [controlnet], [[0.7] * 7])
    ours = network(**batch)
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - unet(xt, t, context).sample).abs().max() > 0.1
    # Hints encoded beforehand give the same.
    assert torch.equal(network(xt, t, context, features=network.encode_hint(batch["hint"])), ours)


def test_everything_learns_and_the_zero_convolutions_from_the_first_step(unet, untrained, batch):
    """The hint encoder's last convolution starts at zero too, and lets nothing through to those before it."""
    eps, network = torch.randn(batch["xt"].shape), ControlledUNet(unet, [untrained])
    facts = {"x0": batch["xt"], "eps": eps} | {name: batch[name] for name in ("t", "context", "hint")}
    optimizer = torch.optim.SGD(untrained.parameters(), lr=1.0)
    for step in range(3):
        optimizer.zero_grad()
        diffusion_loss(network, facts, NoiseSchedule("cosine"), "v", gamma=5.0).backward()
        optimizer.step()
        idle = [name for name, p in untrained.named_parameters() if p.grad is None or not p.grad.any()]
        if step == 0:
            assert not any(name.startswith(("controlnet_down", "controlnet_mid")) for name in idle)
    assert idle == []
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_the_frozen_encoder_keeps_no_graph(unet, untrained, batch):
    made = []
    for block in (unet.conv_in, *unet.down_blocks, unet.mid_block):
        block.register_forward_hook(lambda *call: made.append(call[-1]))
    assert ControlledUNet(unet, [untrained])(**batch).requires_grad
    assert len(made) == 4
    for output in made:
        hidden, skips = (output, ()) if torch.is_tensor(output) else output
        assert not any(tensor.requires_grad for tensor in (hidden, *skips))


def test_checkpointing_changes_what_is_kept_and_not_the_gradients(unet, controlnet, batch):
    controlnet.train()
    weights = {p.untyped_storage().data_ptr() for p in (*unet.parameters(), *controlnet.parameters())}
    network = ControlledUNet(unet, [controlnet])

    def kept() -> int:
        """Bytes kept from the forward pass for the backward pass, weights aside."""
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = network(**batch).square().mean()
        loss.backward()
        return sum(size for place, size in sizes.items() if place not in weights)

    whole = kept()
    expected = {name: parameter.grad.clone() for name, parameter in controlnet.named_parameters()}
    controlnet.zero_grad()
    checkpoint_gradients(unet.up_blocks)
    checkpoint_gradients(controlnet)
    assert kept() < 0.4 * whole
    for name, parameter in controlnet.named_parameters():
        assert (parameter.grad - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


def pointwise(xt, t, features, context):
    """A network in which no position sees another, so that patches must not matter."""
    return xt.sin() * t[:, None, None, None] + features[:, 0] * context[:, :1, None, None]


@pytest.mark.parametrize("stride", [1, 5, 8])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (19, 8), (24, 21), (5, 30)])
def test_a_pointwise_network_gives_what_it_gives_without_patches(height, width, stride):
    """Which holds only if the patches are cut alike, laid back in place, and weighed so that they sum to one."""
    xt, t, features = torch.randn(2, 4, height, width), torch.tensor([3, 5]), torch.randn(2, 1, 4, height, width)
    condition = {"features": features, "context": torch.tensor([[2.0, 3.0], [4.0, 5.0]])}
    ours = in_patches(pointwise, patch=8, stride=stride, cut=("features",))(xt, t, **condition)
    assert (ours - pointwise(xt, t, **condition)).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("patch", [8, 12])
def test_one_patch_is_the_plain_call(unet, controlnet, batch, patch):
    network = ControlledUNet(unet, [controlnet])
    features = network.encode_hint(batch["hint"])
    plain = network(batch["xt"], batch["t"], batch["context"], features=features)
    patched = in_patches(network, patch, stride=4, cut=("features",))
    assert torch.equal(patched(batch["xt"], batch["t"], context=batch["context"], features=features), plain)


def test_no_seams():
    """Each patch answers with a level of its own; from one to the next it changes gradually."""
    levels = iter([0.0, 1.0])
    patched = in_patches(lambda xt, t: torch.full_like(xt, next(levels)), 16, 8, cut=())
    result = patched(torch.zeros(1, 1, 16, 24), torch.zeros(1))[0, 0, 0]
    assert result[:8].eq(0).all()
    assert result[16:].eq(1).all()
    assert (result.diff() >= 0).all()
    assert result.diff().max() < 0.25
