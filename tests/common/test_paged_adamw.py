"""AdamW with its moments elsewhere: the steps of torch's own, and one parameter's moments at a time."""

import copy

import pytest
import torch
from torch import nn

from common.training_state import PagedAdamW


def train(kind, steps: int, after=None, **options) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Tanh(), nn.Conv2d(5, 1, 3)).to(memory_format=torch.channels_last)
    optimizer = kind(model.parameters(), 1e-2, weight_decay=0.1, **options)
    if after:
        optimizer.load_state_dict(copy.deepcopy(after))
    for _ in range(steps):
        model(torch.randn(4, 2, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("fused", [True, False])
def test_it_takes_the_steps_of_adamw(fused):
    ours, ours_optimizer = train(PagedAdamW, 5, fused=fused)
    theirs, theirs_optimizer = train(torch.optim.AdamW, 5, fused=fused)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    for a, b in zip(ours_optimizer.state.values(), theirs_optimizer.state.values()):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert len(ours_optimizer.param_groups[0]["params"]) == 4


def test_it_goes_on_from_a_state_of_adamw():
    _, before = train(torch.optim.AdamW, 2, fused=True)
    ours, theirs = (train(kind, 3, before.state_dict(), fused=True)[0] for kind in (PagedAdamW, torch.optim.AdamW))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_moments_of_one_parameter_at_a_time_are_on_the_device(monkeypatch):
    moves, move = [], PagedAdamW.move

    def watch(optimizer, parameter, device):
        moves.append((id(parameter), str(device)))
        if "exp_avg" in optimizer.state[parameter]:
            # The meta device stands for a GPU on the way there; on the way back the values must still be there.
            moments = [optimizer.state[parameter][name].clone() for name in ("exp_avg", "exp_avg_sq")]
            move(optimizer, parameter, torch.device("meta"))
            assert {optimizer.state[parameter][name].device.type for name in ("exp_avg", "exp_avg_sq")} == {"meta"}
            assert optimizer.state[parameter]["step"].device.type == "cpu"
            optimizer.state[parameter].update(zip(("exp_avg", "exp_avg_sq"), moments))

    monkeypatch.setattr(PagedAdamW, "move", watch)
    model, _ = train(PagedAdamW, 1, fused=True)
    own = [id(parameter) for parameter in model.parameters()]
    assert [key for key, _ in moves] == [key for key in own for _ in range(2)]
    assert {device for _, device in moves} == {"cpu"}
