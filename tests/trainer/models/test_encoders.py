"""Encoders: those that come with the trainer, what is asked of others, and which may draw random numbers."""

import pytest
import torch
from torch import nn

from udi_trainer import Modality, Split, UserError
from udi_trainer.models.encoders import make_encoder, may_draw
from udi_trainer.registry import encoders


@pytest.mark.parametrize("name, shape", [("mlp", (7,)), ("mlp", (2, 3)), ("cnn", (3, 8, 8)), ("cnn", (1, 28, 14)),
                                         ("resnet18", (1, 32, 40))])  # fmt: skip
def test_features(name, shape):
    split = Split(torch.zeros(3), {"x": torch.rand(3, *shape)})
    encoder, width = make_encoder("x", Modality(name, ("x",)), split)
    assert width == 64 and encoder(split.stored["x"]).shape == (3, 64)
    assert encoder.training and not may_draw(encoder)


@pytest.mark.parametrize(
    "encoder, wanted",
    [
        (lambda shape: nn.Linear(9, 4), r"the encoder of x fails on inputs of shape \(3, 5\): .*15|.*mat1"),
        (lambda shape: nn.Linear(5, 4), r"must make \(N, width\) of 2 samples, got \(2, 3, 4\)"),
        (lambda shape: nn.LSTM(5, 4, batch_first=True), r"must make \(N, width\) of 2 samples, got tuple"),
        (nn.Flatten(), "the encoder of x is a module: .* a class, or a function"),
        (lambda shape: 7, r"the encoder of x fails on inputs of shape \(3, 5\)"),
        ("transformer", "unknown encoder 'transformer': choose from .*cnn"),
    ],
)
def test_what_an_encoder_must_be(encoder, wanted):
    split = Split(torch.zeros(4), {"x": torch.rand(4, 3, 5)})
    with pytest.raises(UserError, match=wanted):
        make_encoder("x", Modality(encoder, ("x",)), split)


class Silent(nn.Module):
    """Draws where no layer would tell: nobody can know."""

    def forward(self, x):
        return nn.functional.dropout(x, training=self.training)


@pytest.mark.parametrize(
    "encoder, random",
    [
        (encoders["cnn"](torch.Size((3, 8, 8))), False),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.GELU()), False),
        (nn.LSTM(4, 4, 2), False),
        (nn.LSTM(4, 4, 2, dropout=0.5), True),
        (nn.MultiheadAttention(4, 2), False),
        (nn.MultiheadAttention(4, 2, dropout=0.1), True),
        (nn.TransformerEncoderLayer(4, 2), True),
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout()), True),
        (nn.Sequential(nn.Dropout1d()), True),
        (nn.RReLU(), True),
        (nn.Sequential(nn.Linear(4, 4), Silent()), True),
    ],
)
def test_may_draw(encoder, random):
    assert may_draw(encoder) is random
