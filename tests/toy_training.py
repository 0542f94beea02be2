"""A small regression to train, in fractions of a second."""

import torch
from torch import nn

from common.training import Trainer
from common.training_options import TrainingOptions

WIDTH = 24


class Toy(nn.Module):
    """A regression network with convolution, dropout and a buffer that counts forward passes."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.convolution = nn.Conv2d(2, WIDTH, 3, padding=1)
        self.frozen = nn.Parameter(torch.full((WIDTH, 1, 1), 0.5), requires_grad=False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(WIDTH, 1, 3, padding=1)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.passes += 1
        return self.head(self.dropout(torch.tanh(self.convolution(x) + self.frozen)))


def make_batch(step, generator):
    x = torch.randn(8, 2, 4, 4, generator=generator)
    return {"x": x, "y": x[:, :1] * x[:, 1:]}


def squared_error(model, batch):
    return (model(batch["x"]).float() - batch["y"]).square().mean()


def make_trainer(
    folder, dropout=0.0, batches=make_batch, loss=squared_error, validate=None, about=None, measure=None, **options
):
    settings = {"steps": 6, "batch_size": 8, "lr": 1e-2, "warmup": 2, "precision": "fp32", "device": "cpu"}
    settings |= {"save_every": 1, "log_every": 1, "validate_every": 1} | options
    torch.manual_seed(7)
    facts = {"kind": "Toy", "config": {"width": WIDTH}} if about is None else about
    return Trainer(
        model=Toy(dropout),
        options=TrainingOptions(**settings),
        folder=folder,
        about=facts,
        make_batch=batches,
        loss_fn=loss,
        validate=validate,
        measure=measure,
    )


def train(folder, **options):
    trainer = make_trainer(folder, **options)
    trainer.run()
    return trainer
