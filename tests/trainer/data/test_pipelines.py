"""Input pipelines: evaluation inputs are deterministic, training inputs vary within bounds."""

import pytest
import torch

from udi_trainer.data.pipelines import Features, Pictures, Spectrogram


def test_pictures_are_normalised_and_cut_from_the_middle():
    x = torch.randint(256, (5, 3, 10, 10), dtype=torch.uint8)
    make = Pictures((0.1, 0.2, 0.3), (0.5, 0.6, 0.7), 8, flip=True)
    wanted = (x[:, :, 1:9, 1:9] / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor(
        [0.5, 0.6, 0.7]
    )[:, None, None]  # fmt: skip
    torch.testing.assert_close(make(x), wanted)
    corner = torch.tensor([[0.0, 0.999999, 0.0, 0.0]]).expand(5, 4)
    torch.testing.assert_close(make.vary(x, corner)[:, 0], (x[:, 0, :8, 2:] / 255 - 0.1) / 0.5)


def test_frames_are_one_of_each_part():
    x = torch.arange(10, dtype=torch.uint8)[None, :, None, None, None].expand(200, 10, 1, 2, 2)
    make = Pictures((0.0,), (1 / 255,), 2, frames=3)
    assert make(x)[0, :, 0, 0, 0].round().tolist() == [1, 5, 8]
    picked = make.vary(x, torch.rand(200, 4))[:, :, 0, 0, 0].round()
    assert [sorted(set(column.tolist())) for column in picked.T] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]


def test_spectrogram_of_a_tone():
    """The loudest row is that of the sound's frequency, for every crop."""
    rate, window, hop = 8000, 200, 100
    t = torch.arange(rate) / rate
    x = (20000 * torch.sin(2 * torch.pi * 1000 * t)).to(torch.int16)[None].repeat(4, 1)
    make = Spectrogram(0.0, 1.0, window, hop, 4000)
    z = make(x)
    assert z.shape == (4, 1, 101, 41) and (z[:, 0].mean(-1).argmax(1) == 25).all()
    varied = make.vary(x, torch.tensor([[0, 0, 0, 0.999999]]).repeat(4, 1))
    assert varied.shape == z.shape and (varied[:, 0].mean(-1).argmax(1) == 25).all()


@pytest.mark.parametrize("seed", range(3))
def test_masks_hide_an_eighth_at_most(seed):
    torch.manual_seed(seed)
    x = torch.randint(-20000, 20000, (6, 8000), dtype=torch.int16)
    make = Spectrogram(-5.0, 1.0, 200, 100, 8000, mask=True)
    plain, masked = make(x), make.vary(x, torch.rand(6, 4))
    hidden = masked != plain
    assert (masked[hidden] == 0).all() and hidden.any()
    rows, columns = hidden.all(3)[:, 0].sum(1), hidden.all(2)[:, 0].sum(1)
    assert (rows <= 2 * 101 / 8 + 2).all() and (columns <= 2 * 81 / 8 + 2).all()
    torch.manual_seed(seed)
    torch.randint(-20000, 20000, (6, 8000), dtype=torch.int16)
    assert torch.equal(make.vary(x, torch.rand(6, 4)), masked)


def test_features():
    x = torch.tensor([[1.0, 10], [3, 30]])
    torch.testing.assert_close(Features((2.0, 20.0), (1.0, 10.0))(x), torch.tensor([[-1.0, -1], [1, 1]]))
    assert Features((0.0,), (255.0,), (1, 2, 2))(torch.arange(8).view(2, 4)).shape == (2, 1, 2, 2)
