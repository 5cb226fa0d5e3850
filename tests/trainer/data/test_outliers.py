"""One odd file spoils nothing: lengths, rates and sizes come from training, and what differs is told by name."""

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason='needs the extra of files: pip install -e ".[data]"')
pytest.importorskip("soundfile", reason='needs the extra of files: pip install -e ".[data]"')

from udi_trainer import UserError, load, train
from udi_trainer.data.noise import corrupt
from udi_trainer.models.encoders import cnn1d, fcn

from .files import dataset, stored

PARTS = ("train", "train", "train", "val", "test")


def sequences(folder, count=60, long=None, **length_of):
    """Rows of sequences of 18 to 22 steps; ``long``: the length of sample 9, in training."""
    rows = []
    for i in range(count):
        steps = long if i == 9 and long else 18 + i % 5
        x = folder.random.normal(3, 2, (steps, 4)).astype(np.float32)
        x[:, i % 4] += 2
        path = folder.array(f"seq/{i}.npy", x)
        rows.append({"id": f"s{i}", "feat": path, "x": i % 7, "label": i % 4, "split": PARTS[i // 4 % 5]})
    return rows


def test_mean_and_deviation_are_those_of_real_steps(folder, options):
    rows = sequences(folder)
    data = dataset(folder.manifest(rows), options)
    real = np.concatenate([np.load(folder.path / row["feat"]) for row in rows if row["split"] == "train"])
    make = data.modalities["feat"].make
    np.testing.assert_allclose(make.mean, real.mean(0, np.float64), rtol=1e-6)
    np.testing.assert_allclose(make.std, real.std(0, dtype=np.float64), rtol=1e-6)
    for name, split in data.splits().items():
        inputs = data.modalities["feat"].sample(split, len(split))
        for sample, x in zip(split.ids, inputs.numpy(), strict=True):
            given = np.load(folder.path / f"seq/{sample[1:]}.npy")
            wanted = (given - np.float32(make.mean)) / np.float32(make.std)
            np.testing.assert_allclose(x[: len(given)], wanted, rtol=1e-5, atol=1e-5, err_msg=name)
            assert (x[len(given) :] == 0).all()


def test_one_long_sequence(folder, options, caplog):
    """It is cut, told by name, and kept on demand. The other inputs stay as they are."""
    path = folder.manifest(sequences(folder, long=2000))
    data = dataset(path, options)
    assert data.train.stored["feat"].shape[1:] == (78, 4)
    long = folder.path / "seq/9.npy"
    wanted = f"sequences of up to 2000 steps are cut to 78 (--array-length 2000 keeps all of them): {long} (1 of 60)"
    assert wanted in caplog.text
    np.testing.assert_array_equal(stored(data, "feat", "s9"), np.load(long)[:78])
    caplog.clear()
    whole = dataset(path, options, array_length=2000)
    assert whole.train.stored["feat"].shape[1:] == (2000, 4) and not caplog.text
    assert dataset(path, options, array_length=10).train.stored["feat"].shape[1:] == (10, 4)


def test_a_long_sequence_in_test(folder, options, caplog):
    rows = sequences(folder)
    test = next(i for i, row in enumerate(rows) if row["split"] == "test")
    folder.array(rows[test]["feat"], np.ones((23, 4), np.float32))
    assert dataset(folder.manifest(rows), options).train.stored["feat"].shape[1:] == (22, 4)
    assert (
        f"cut to 22 (--array-length 23 keeps all of them): {folder.path / rows[test]['feat']} (1 of 60)" in caplog.text
    )


@pytest.mark.parametrize("encoder", [cnn1d, fcn])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 21])
def test_padding_does_not_change_features(encoder, length):
    torch.manual_seed(0)
    encoder, x = encoder(torch.Size((40, 3))).double().eval(), torch.randn(5, 40, 3, dtype=torch.float64)
    padded = x.clone()
    padded[:, length:] = 0
    torch.testing.assert_close(encoder(padded), encoder(x[:, :length]))


@pytest.mark.parametrize("encoder", [cnn1d, fcn])
def test_whole_sequences_as_by_plain_layers(encoder):
    """Without padding, the encoder is its layers one after the other, bit for bit."""
    encoder, x = encoder(torch.Size((21, 3))), torch.randn(6, 21, 3)
    plain = x
    for layer in encoder:
        plain = layer(plain)
    assert torch.equal(encoder(x), plain)


@pytest.mark.parametrize("encoder", [cnn1d, fcn])
def test_zeros_within_a_sequence_are_real(encoder):
    encoder, x = encoder(torch.Size((40, 2))).eval(), torch.randn(2, 40, 2)
    x[:, 5:30] = 0
    without = x.clone()
    without[:, 30:] = 0
    assert not torch.allclose(encoder(x), encoder(without))
    assert encoder(torch.zeros(2, 40, 2)).isfinite().all()


def test_training_with_a_long_sequence(folder, options):
    path = folder.manifest(sequences(folder, 200, long=900))
    result = train("manifest", "ensemble", manifest=path, epochs=15, batch_size=16, **options)
    assert result.metrics["unimodal"]["feat"]["test_acc"] > 0.9


def test_new_files_are_read_by_what_training_settled(folder, options, tmp_path):
    """The range of deep pictures, lengths and rates of the run count, whatever the new files would suggest."""
    rows = sequences(folder, 40)
    for i, row in enumerate(rows):
        pixels = np.linspace(0, 1000 + i, 64).reshape(8, 8).astype(np.uint16)
        row["image"] = folder.save_picture(f"deep/{i}.png", pixels)
        row["sound"] = folder.sound(f"s/{i}.wav", i % 2, 0.1 + 0.01 * (i % 5))
    path = folder.manifest(rows)
    train("manifest", "ensemble", manifest=path, epochs=1, batch_size=8, baselines=[], out=tmp_path / "run", **options)
    data, predictor = dataset(path, options), load(tmp_path / "run", device="cpu")
    new = [row for row in rows if row["split"] == "test"]
    for row in new[:-1]:  # most are of another kind, the last one stays
        folder.array(row["feat"], np.ones((50, 4), np.float32))
        folder.save_picture(row["image"], np.full((8, 8), 60000, np.uint16))
        folder.sound(row["sound"], 1, 1.0, rate=1000)
    split = predictor.read(folder.manifest(new, "new.csv"), cache_dir=options["cache_dir"])
    for m in ("feat", "image", "sound"):
        assert split.stored[m].shape[1:] == data.test.stored[m].shape[1:]
        np.testing.assert_array_equal(split.stored[m][-1], data.test.stored[m][-1])
    assert (split.stored["image"][:-1] == 255).all() and (split.stored["feat"][:-1] == 1).all()
    assert predictor.predict(split).sum(1) == pytest.approx(1)


def test_padded_sequences_with_noise(folder, options):
    """The noise is relative to the deviation of the values, without padding."""
    data = dataset(folder.manifest(sequences(folder)), options)
    clean, noisy = data.train.stored["feat"], corrupt(data, 0.5, 0.0).train.stored["feat"]
    assert torch.equal(clean.isnan(), noisy.isnan())
    real = ~clean.isnan()
    assert (noisy - clean)[real].std().item() == pytest.approx(0.5 * clean[real].std().item(), rel=0.1)


def test_uint8_arrays_of_another_type_are_refused(folder, options):
    rows = sequences(folder)
    for row in rows:
        dtype = np.float32 if row["split"] == "test" else np.uint8
        folder.array(row["feat"], folder.random.integers(0, 9, (6, 4)).astype(dtype))
    with pytest.raises(UserError, match=r"seq/16.npy: has float32, the training files have uint8"):
        dataset(folder.manifest(rows), options)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_one_low_sample_rate(folder, options, caplog, split):
    rows = folder.split_pairs(60)
    odd = next(i for i, row in enumerate(rows) if row["split"] == split)
    rows[odd]["sound"] = folder.sound("sounds/telephone.wav", 1, rate=1000)
    data = dataset(folder.manifest(rows), options)
    assert data.modalities["sound"].make.window == round(4000 * 23.22 / 1000)
    low = "sample rate below the 4000 Hz used, so high frequencies are missing (--sample-rate)"
    assert f"column sound: {low}: {folder.path / 'sounds/telephone.wav'} (1 of 60)" in caplog.text
    caplog.clear()
    dataset(folder.manifest(rows), options, sample_rate=1000)
    assert "sample rate" not in caplog.text


def test_length_of_sound_comes_from_training(folder, options, caplog):
    rows = folder.split_pairs(60)
    longest = max(0.1 + 0.02 * (i % 7) for i, row in enumerate(rows) if row["split"] == "train")
    odd = next(i for i, row in enumerate(rows) if row["split"] == "test")
    rows[odd]["sound"] = folder.sound("sounds/long.wav", 1, 3.0)
    data = dataset(folder.manifest(rows), options)
    assert data.train.stored["sound"].shape[1] == int(longest * 4000)
    assert f"s read (--audio-length): {folder.path / 'sounds/long.wav'} (1 of 60)" in caplog.text
