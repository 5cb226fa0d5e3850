"""A small spokendigits: speakers are separated, pairs agree in their label and are reproducible."""

import pytest
import torch

pytest.importorskip("soundfile", reason='needs the extra of files: pip install -e ".[data]"')

from udi_trainer import Options, UserError, train
from udi_trainer.registry import datasets

SPEAKERS = ("anna", "bert", "carl", "dora", "emil", "fred")


@pytest.fixture
def spoken(folder, little_mnist):
    for digit in range(10):
        for s, speaker in enumerate(SPEAKERS):
            for take in range(2):
                folder.sound(f"recordings/{digit}_{speaker}_{take}.wav", digit / 4, 0.1 + 0.02 * s, rate=8000)
    little_mnist.rename(folder.path / "mnist")
    return folder.path


def dataset(root, options, **more):
    chosen = Options.make(dataset="spokendigits", data_root=root, cache_dir=options["cache_dir"], **more)
    return datasets.find("spokendigits")(chosen)


def test_unseen_speakers(spoken, options):
    tested = set()
    for fold in range(6):
        data = dataset(spoken, options, fold=fold)
        heard = {name: {i.split("_")[1] for i in split.ids} for name, split in data.splits().items()}
        assert [len(heard[name]) for name in ("train", "val", "test")] == [3, 1, 2]
        assert not heard["train"] & heard["val"] and not heard["train"] & heard["test"]
        assert not heard["val"] & heard["test"]
        tested |= heard["test"]
        for split in data.splits().values():
            assert [int(i[0]) for i in split.ids] == split.labels.tolist()
    assert tested == set(SPEAKERS)


def test_pairs_are_the_same_again_and_noise_is_an_option(spoken, options):
    a, b, clean = dataset(spoken, options), dataset(spoken, options), dataset(spoken, options, image_noise=0)
    assert torch.equal(a.train.stored["image"], b.train.stored["image"])
    assert not torch.equal(a.train.stored["image"], clean.train.stored["image"])
    assert a.modalities["speech"].sample(a.train).shape[1] == 1


def test_speakers_without_labels(spoken, options):
    whole, few = dataset(spoken, options, fold=1), dataset(spoken, options, fold=1, labelled_speakers=1)
    hidden = few.train.labels < 0
    speakers = [i.split("_")[1] for i in few.train.ids]
    assert {s for s, is_hidden in zip(speakers, hidden.tolist(), strict=True) if not is_hidden} == {"emil"}
    assert torch.equal(few.train.labels[~hidden], whole.train.labels[~hidden]) and hidden.sum() == 40
    assert torch.equal(few.train.stored["image"], whole.train.stored["image"])
    assert torch.equal(few.val.labels, whole.val.labels)
    with pytest.raises(UserError, match="--labelled-speakers 4: only 3 speakers are for training"):
        dataset(spoken, options, labelled_speakers=4)


def test_it_trains(spoken, options, tmp_path):
    result = train("spokendigits", data_root=spoken, epochs=1, batch_size=20, out=tmp_path / "run", **options)
    assert result.metrics["modalities"].keys() == {"image", "speech"}
    assert (tmp_path / "run" / "predictions.csv").read_text().count("\n") == 41


def test_what_is_missing(tmp_path, little_mnist, options):
    with pytest.raises(UserError, match="contain no recordings such as 7_jackson_32.wav"):
        dataset(little_mnist, options)
    with pytest.raises(UserError, match="needs --data-root"):
        dataset(None, options)


def test_damaged_recordings_are_left_out_on_demand(spoken, options, caplog):
    """In training, validation and test; the other recordings stay as they are."""
    whole = dataset(spoken, options)
    damaged = [f"3_{speaker}_1" for speaker in ("anna", "bert", "emil")]
    for name in damaged:
        (spoken / f"recordings/{name}.wav").write_bytes(b"RIFF")
    with pytest.raises(UserError, match="3_anna_1.wav: not readable as sound .*; and 2 more .--skip-bad"):
        dataset(spoken, options)
    data = dataset(spoken, options, skip_bad=True)
    assert [line.split("/")[-1].split(".wav")[0] for line in caplog.messages if "left out" in line] == damaged
    for name, split in data.splits().items():
        before = whole.splits()[name]
        kept = [i for i in before.ids if i not in damaged]
        assert list(split.ids) == kept
        rows = torch.tensor([list(before.ids).index(i) for i in kept])
        assert torch.equal(split.stored["speech"], before.stored["speech"][rows])
