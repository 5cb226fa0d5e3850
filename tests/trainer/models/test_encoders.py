"""Encoders: the trainer's own, the requirements for others, and which may draw random numbers."""

import pytest
import torch
from torch import nn

from udi_trainer import Modality, Split, UserError, train
from udi_trainer.data.pipelines import Tokens
from udi_trainer.models.encoders import is_stochastic, make_encoder
from udi_trainer.registry import encoders


@pytest.mark.parametrize("name, shape", [("mlp", (7,)), ("mlp", (2, 3)), ("cnn", (3, 8, 8)), ("cnn", (1, 28, 14)),
                                         ("resnet18", (1, 32, 40))])  # fmt: skip
def test_features(name, shape):
    split = Split(torch.zeros(3), {"x": torch.rand(3, *shape)})
    encoder, width = make_encoder("x", Modality(name, ("x",)), split)
    assert width == 64 and encoder(split.stored["x"]).shape == (3, 64)
    assert encoder.training and not is_stochastic(encoder)


@pytest.mark.parametrize(
    "encoder, wanted",
    [
        (lambda shape: nn.Linear(9, 4), r"the encoder of x fails on inputs of shape \(3, 5\): .*15|.*mat1"),
        (lambda shape: nn.Linear(5, 4), r"must return \(N, width\) for 2 samples, got \(2, 3, 4\)"),
        (lambda shape: nn.LSTM(5, 4, batch_first=True), r"must return \(N, width\) for 2 samples, got tuple"),
        (nn.Flatten(), "the encoder of x is a module: give a class or a function"),
        (lambda shape: 7, r"the encoder of x fails on inputs of shape \(3, 5\)"),
        ("transformer", "unknown encoder 'transformer': choose from .*cnn"),
    ],
)
def test_what_an_encoder_must_be(encoder, wanted):
    split = Split(torch.zeros(4), {"x": torch.rand(4, 3, 5)})
    with pytest.raises(UserError, match=wanted):
        make_encoder("x", Modality(encoder, ("x",)), split)


class Silent(nn.Module):
    """Draws random numbers, which its layers do not reveal."""

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
def test_is_stochastic(encoder, random):
    assert is_stochastic(encoder) is random


@pytest.mark.parametrize("name, shape", [
    ("cnn", (1, 94, 143)), ("cnn", (3, 64, 64)), ("cnn", (2, 9, 40)), ("resnet18", (2, 32, 32)), ("cnn1d", (11, 3)),
    ("fcn", (11, 3)), ("fcn", (1, 1)),
    ("cnn1d", (1, 1)), ("cnn", (4, 3, 12, 12)), ("resnet18", (2, 1, 32, 32)), ("mlp", (3, 4)),
])  # fmt: skip
def test_encoders_of_other_shapes_and_widths(name, shape):
    split = Split(torch.zeros(3), {"x": torch.randn(3, *shape)})
    encoder, width = make_encoder("x", Modality(name, ("x",), width=24), split)
    assert width == 24
    x = split.stored["x"]
    if len(shape) == 4:  # clips: the mean over their frames
        frames = torch.stack([encoder.eval().encoder(x[:, i]) for i in range(shape[0])], 1)
        torch.testing.assert_close(encoder(x), frames.mean(1))


def test_words_count_whatever_their_number():
    words = torch.tensor([[5, 9, 0, 0], [9, 5, 5, 9], [0, 0, 0, 0]], dtype=torch.int32)
    split = Split(torch.zeros(3), {"text": words})
    encoder, _ = make_encoder("text", Modality("words", ("text",), Tokens()), split)
    features = encoder(words)
    torch.testing.assert_close(features[0], features[1])
    assert features.isfinite().all()


def test_encoder_of_ones_own_by_option(mixed):
    result = train(mixed, "ensemble", epochs=1, progress=False, device="cpu", features=16,
                   encoder={"audio": "udi_trainer.models.encoders:cnn1d", "sensor": "mlp"})  # fmt: skip
    assert {m: model.head.in_features for m, model in result.models.items()}["sensor"] == 16


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_features_of_another_dtype(mixed, dtype):
    class Other(torch.nn.Flatten):
        def __init__(self, shape):
            super().__init__()

        def forward(self, x):
            return super().forward(x).to(dtype)

    with pytest.raises(UserError, match=f"encoder of sensor returns {dtype}, but features must be torch.float32"):
        train(mixed, "joint", {"sensor": Other}, epochs=1, progress=False)


def test_batch_norm_of_one_sample(mixed):
    def normalised(shape):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(shape.numel()))

    with pytest.raises(UserError, match="BatchNorm needs two samples or more, and a batch has one: raise --batch-size"):
        train(mixed, "joint", {"sensor": normalised}, epochs=1, batch_size=1, progress=False)


def test_fcn_sees_the_mean_and_the_maximum_of_full_length_sequences():
    """A shift in time moves the features of the last convolution, and leaves what is pooled of them."""
    torch.manual_seed(0)
    encoder = encoders["fcn"](torch.Size((40, 2))).eval()
    lengths = []
    encoder[-3].register_forward_hook(lambda module, x, y: lengths.append((x[0].shape[-1], y.shape[-1])))
    x = torch.zeros(2, 40, 2)
    x[0, 10:14] = torch.randn(4, 2)
    x[1, 20:24] = x[0, 10:14]
    x[:, -1] = 1  # zeros at the end would be padding
    features = encoder(x)
    torch.testing.assert_close(features[0], features[1])
    assert lengths == [(40, 128)]
    z = torch.randn(2, 3, 5)
    torch.testing.assert_close(encoder[-3](z), torch.cat((z.mean(-1), z.max(-1).values), 1))
