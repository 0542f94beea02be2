import threading

import pytest
import torch

from common.cli import UserError
from common.training import DrawnAhead
from tests.toy_training import make_trainer


def test_the_next_batch_is_drawn_in_a_thread_while_this_one_is_worked_on():
    drawn, ready = {}, threading.Event()

    def draw(step):
        drawn[step] = threading.current_thread()
        if step == 6:
            ready.set()
        return {"x": torch.full((2,), step)}

    batches = DrawnAhead(draw, 41)
    assert batches(5)["x"].tolist() == [5, 5]
    assert ready.wait(10)
    assert drawn[5] is threading.main_thread() is not drawn[6]
    before = drawn[6]
    assert batches(6)["x"].tolist() == [6, 6]
    assert drawn[6] is before
    assert batches(40)["x"].tolist() == [40, 40]  # a run that goes on elsewhere, up to its last step
    assert batches.waiting == {}


def test_an_error_comes_with_its_own_step():
    def draw(step):
        if step == 1:
            raise UserError("row 7: no such image")
        return {"x": torch.zeros(1)}

    batches = DrawnAhead(draw, 9)
    batches(0)
    with pytest.raises(UserError, match="row 7"):
        batches(1)
    assert batches(2)["x"].tolist() == [0]


def test_training_on_batches_drawn_ahead_is_the_same(tmp_path):
    plain, ahead = make_trainer(tmp_path / "plain"), make_trainer(tmp_path / "ahead")
    ahead.batch_of = DrawnAhead(ahead.draw_batch, ahead.options.steps)
    for trainer in (plain, ahead):
        trainer.run()
    weights = zip(plain.model.state_dict().values(), ahead.model.state_dict().values())
    assert all(torch.equal(ours, theirs) for ours, theirs in weights)
