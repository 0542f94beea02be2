"""The U-Net in two halves against diffusers' in one, and what a training step touches."""

import pytest
import torch
from diffusers import ControlNetModel

from common.schedule import NoiseSchedule
from common.training import diffusion_loss
from p3_controlnet.unet import (
    ControlledUNet,
    Encoded,
    add_residuals,
    checkpoint_gradients,
    combine,
    decode,
    encode,
    guess_scales,
)


def inputs(batch):
    return batch["xt"], batch["t"], batch["context"]


def trained_step(unet, controlnet, batch):
    """One step of SGD on the diffusion loss; gradients stay."""
    network = ControlledUNet(unet, [controlnet])
    facts = {"x0": batch["xt"], "eps": torch.randn(batch["xt"].shape), "t": batch["t"]}
    facts |= {name: batch[name] for name in ("context", "hint")}
    diffusion_loss(network, facts, NoiseSchedule("cosine"), "v", gamma=5.0).backward()
    torch.optim.SGD(controlnet.parameters(), lr=1.0).step()


def zero_convolutions(controlnet):
    return [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (7, 9)], ids=str)
def test_two_halves_are_bit_equal_to_the_whole(unet, batch, size):
    _, t, context = inputs(batch)
    xt = torch.randn(2, 4, *size)
    assert torch.equal(decode(unet, encode(unet, xt, t, context), context), unet(xt, t, context).sample)


@torch.no_grad()
def test_residuals_are_added_where_diffusers_adds_them(unet, batch):
    xt, t, context = inputs(batch)
    encoded = encode(unet, xt, t, context)
    residuals = [torch.randn_like(h) for h in (*encoded.skips, encoded.middle)]
    theirs = unet(
        xt, t, context, down_block_additional_residuals=residuals[:-1], mid_block_additional_residual=residuals[-1]
    ).sample
    assert torch.equal(decode(unet, add_residuals(encoded, residuals), context), theirs)
    assert not torch.equal(decode(unet, encoded, context), theirs)


def test_a_missing_residual_is_an_error():
    encoded = Encoded([torch.zeros(1)] * 3, torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="shorter"):
        add_residuals(encoded, [torch.zeros(1)] * 3)


@torch.no_grad()
def test_an_untrained_controlnet_changes_nothing(unet, untrained, batch):
    xt, t, context = inputs(batch)
    assert torch.equal(ControlledUNet(unet, [untrained])(**batch), unet(xt, t, context).sample)


@torch.no_grad()
def test_control_is_that_of_diffusers(unet, controlnet, batch, tmp_path):
    xt, t, context = inputs(batch)
    controlnet.save(tmp_path, {}, fp16=False)
    skips, middle = ControlNetModel.from_pretrained(tmp_path)(
        xt, t, context, batch["hint"], conditioning_scale=0.7, return_dict=False
    )
    theirs = unet(xt, t, context, down_block_additional_residuals=skips, mid_block_additional_residual=middle).sample
    ours = ControlledUNet(unet, [controlnet], [0.7])(**batch)
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - unet(xt, t, context).sample).abs().max() > 0.1


@torch.no_grad()
def test_hints_encoded_beforehand_give_the_same(unet, controlnet, batch):
    network = ControlledUNet(unet, [controlnet, controlnet])
    features = network.encode_hint(batch["hint"])
    assert features.shape == (2, 2, 16, 8, 8)
    assert torch.equal(network(*inputs(batch), features=features), network(**batch))


@torch.no_grad()
def test_several_controlnets_are_summed(unet, controlnet, batch):
    parts = [controlnet(**batch, scale=scale) for scale in (0.3, 0.6)]
    both = combine(parts)
    whole = controlnet(**batch, scale=0.9)
    assert max((a - b).abs().max() for a, b in zip(both, whole)) < 1e-5
    apart = ControlledUNet(unet, [controlnet, controlnet], [0.3, 0.6])(**batch)
    assert (apart - ControlledUNet(unet, [controlnet], [0.9])(**batch)).abs().max() < 1e-5


@torch.no_grad()
def test_rows_without_control_are_the_bases(unet, controlnet, batch):
    xt, t, context = inputs(batch)
    network = ControlledUNet(unet, [controlnet])
    mixed = network(**batch, controlled=torch.tensor([False, True]))
    assert (mixed[0] - unet(xt, t, context).sample[0]).abs().max() < 1e-6
    assert (mixed[1] - network(**batch)[1]).abs().max() < 1e-6


def test_guess_mode_is_that_of_diffusers(controlnet, batch, tmp_path):
    controlnet.save(tmp_path, {}, fp16=False)
    with torch.no_grad():
        theirs = ControlNetModel.from_pretrained(tmp_path)(
            *inputs(batch), batch["hint"], conditioning_scale=1.5, guess_mode=True, return_dict=False
        )
        ours = controlnet(**batch, scale=[1.5 * scale for scale in guess_scales(controlnet.residual_count)])
    assert max((a - b).abs().max() for a, b in zip(ours, [*theirs[0], theirs[1]])) < 1e-5


def test_every_zero_convolution_learns_from_the_first_step(unet, untrained, batch):
    """Fails, too, if the residuals were added without a graph."""
    trained_step(unet, untrained, batch)
    for convolution in zero_convolutions(untrained):
        assert convolution.weight.grad.abs().max() > 0
        assert convolution.bias.grad.abs().max() > 0


def test_everything_learns_once_the_zero_convolutions_have(unet, untrained, batch):
    for _ in range(2):
        trained_step(unet, untrained, batch)
        untrained.zero_grad()
    # The hint encoder's last convolution began at zero, too, and let nothing through to those before it.
    trained_step(unet, untrained, batch)
    assert [name for name, p in untrained.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_training_leaves_the_base_alone(unet, untrained, batch):
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    trained_step(unet, untrained, batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert (ControlledUNet(unet, [untrained])(**batch) - unet(*inputs(batch)).sample).abs().max() > 1e-4


def test_the_frozen_encoder_keeps_no_graph(unet, untrained, batch, monkeypatch):
    made = []
    monkeypatch.setattr("p3_controlnet.unet.encode", lambda *args: made.append(encode(*args)) or made[-1])
    ControlledUNet(unet, [untrained])(**batch)
    assert not any(h.requires_grad for h in (*made[0].skips, made[0].middle))


def test_checkpointing_changes_what_is_kept_and_not_the_gradients(unet, controlnet, batch):
    controlnet.train()
    frozen = {parameter.data_ptr() for parameter in unet.parameters()}

    def kept(network) -> int:
        """Numbers kept from the forward pass for the backward pass, weights aside; each memory counted once."""
        sizes = {}

        def pack(tensor):
            if tensor.data_ptr() not in frozen:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        own = {parameter.untyped_storage().data_ptr() for parameter in controlnet.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = network(**batch).square().mean()
        loss.backward()
        return sum(size for place, size in sizes.items() if place not in own)

    network = ControlledUNet(unet, [controlnet])
    whole = kept(network)
    expected = {name: parameter.grad.clone() for name, parameter in controlnet.named_parameters()}
    controlnet.zero_grad()
    checkpoint_gradients(unet)
    checkpoint_gradients(controlnet)
    assert kept(network) < 0.4 * whole
    for name, parameter in controlnet.named_parameters():
        assert (parameter.grad - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_checkpointing_computes_the_frozen_encoder_once(unet, controlnet, batch):
    checkpoint_gradients(unet)
    checkpoint_gradients(controlnet.train())
    calls = {"encoder": 0, "decoder": 0, "hint": 0}
    for name, module in {
        "encoder": unet.down_blocks[0].resnets[0],
        "decoder": unet.up_blocks[0].resnets[0],
        "hint": controlnet.controlnet_cond_embedding.conv_in,
    }.items():
        module.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    ControlledUNet(unet, [controlnet])(**batch).square().mean().backward()
    assert calls == {"encoder": 1, "decoder": 2, "hint": 2}
    with torch.no_grad():
        ControlledUNet(unet, [controlnet])(**batch)
    assert calls == {"encoder": 2, "decoder": 3, "hint": 3}


@torch.no_grad()
def test_a_half_precision_base_beside_an_fp32_controlnet(unet, controlnet, batch):
    exact = ControlledUNet(unet, [controlnet])(**batch)
    near = ControlledUNet(unet.to(torch.bfloat16), [controlnet])(**batch)
    assert near.dtype == torch.float32
    assert 0 < (near - exact).abs().max() < 0.05 * exact.abs().max()
