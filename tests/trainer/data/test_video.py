"""Videos: their frames in time and upright, their sound track, and whole data sets of them."""

import numpy as np
import pytest
import torch

pytest.importorskip("av", reason='needs PyAV: pip install -e ".[video]"')
pytest.importorskip("soundfile", reason='needs the extra of files: pip install -e ".[data]"')

from udi_trainer import UserError, load, train
from udi_trainer.data.cache import Unreadable
from udi_trainer.data.layouts import in_videos
from udi_trainer.data.video import VideoSound, frame_times
from udi_trainer.options import Options
from udi_trainer.registry import datasets

from .files import dataset, stored, turn, write_video

RATE = 16000
RAMP = [20 + 10 * i for i in range(20)]
FORMATS = [
    ("mp4", "mpeg4", "aac"), ("avi", "mpeg4", "pcm_s16le"), ("flv", "flv", "aac"), ("mkv", "mpeg4", "flac"),
    ("webm", "libvpx", "libopus"), ("mov", "mpeg4", "aac"),
]  # fmt: skip


def tone(seconds=2.0, rate=RATE):
    return 0.4 * np.sin(2 * np.pi * 500 * np.arange(int(seconds * rate)) / rate)


def clips(folder, count=30):
    """Rows with a video as both modalities. The frames and the sound reveal half of the label each."""
    rows, parts = [], ("train", "train", "train", "val", "test")
    t = np.arange(RATE // 2) / RATE
    for i in range(count):
        name = f"clips/{i}.{('mp4', 'flv')[i % 2]}"
        noise = folder.random.normal(0, 10, 5)
        levels = (60 + 100 * (i % 4 // 2) + noise).clip(0, 255)
        sound = 0.4 * np.sin(2 * np.pi * (500 + 1500 * (i % 2)) * t) + folder.random.normal(0, 0.02, len(t))
        write_video(folder.path / name, levels, sound=sound, codec=("mpeg4", "flv")[i % 2])
        rows.append({"id": f"s{i}", "film": name, "track": name, "label": "abcd"[i % 4], "split": parts[i // 4 % 5]})
    return rows


KINDS = {"film": "video", "track": "videosound"}


@pytest.mark.parametrize("ending, codec, sound_codec", FORMATS)
def test_frames_are_evenly_spaced(folder, options, ending, codec, sound_codec):
    """Frames 2, 7, 12 and 17 of 20 are the middles of four equal parts."""
    rows = clips(folder, 20)
    rows[2]["film"] = f"x.{ending}"
    rate = 48000 if ending == "webm" else RATE
    write_video(folder.path / f"x.{ending}", RAMP, sound=tone(2, rate), rate=rate, codec=codec, sound_codec=sound_codec)
    data = dataset(folder.manifest(rows), options, kinds=KINDS, frames=1)
    x = stored(data, "film", "s2")
    assert x.shape == (4, 3, 32, 32)
    np.testing.assert_allclose(x.float().mean((1, 2, 3)), [RAMP[i] for i in (2, 7, 12, 17)], atol=6)


@pytest.mark.parametrize("ending, codec, sound_codec", FORMATS)
def test_sound_track(tmp_path, ending, codec, sound_codec):
    path, rate = tmp_path / f"x.{ending}", 48000 if ending == "webm" else RATE
    write_video(path, RAMP, sound=tone(2, rate), rate=rate, codec=codec, sound_codec=sound_codec)
    x, got, cut = VideoSound.recording(None, path)
    assert got == rate and not cut and x.shape[1] == 1 and abs(len(x) - 2 * rate) < 0.15 * rate
    second = x[rate // 2 : 3 * rate // 2, 0]
    assert np.abs(np.fft.rfft(second)).argmax() == 500
    assert np.sqrt(2 * np.square(second).mean()) == pytest.approx(0.4, rel=0.03)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_variable_rate(folder, options, ending):
    """Eight frames in the first 0.8 s; the ninth is shown until the last one, at 6 s."""
    rows = clips(folder, 20)
    rows[2]["film"] = f"x.{ending}"
    write_video(folder.path / f"x.{ending}", RAMP[:10], times=[*range(9), 60])
    data = dataset(folder.manifest(rows), options, kinds=KINDS, frames=1)
    levels = stored(data, "film", "s2").float().mean((1, 2, 3))
    np.testing.assert_allclose(levels, [RAMP[7], *[RAMP[8]] * 3], atol=6)


@pytest.mark.parametrize("matrix, quarters", [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_rotation(folder, options, matrix, quarters):
    """A phone that is held upright stores lying frames. The bright left half comes to another side."""
    import av

    rows = clips(folder, 20)
    rows[2]["film"] = "x.mp4"
    lying = np.zeros((32, 32, 3), np.uint8)
    lying[:, :16] = 220
    with av.open(str(folder.path / "x.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(lying, format="rgb24")))
        container.mux(stream.encode())
    turn(folder.path / "x.mp4", matrix)
    bright = stored(dataset(folder.manifest(rows), options, kinds=KINDS), "film", "s2")[0, 0] > 110
    np.testing.assert_array_equal(bright, np.rot90(lying[..., 0] > 0, quarters))


def test_a_cut_video_is_told(folder, options, caplog):
    rows = clips(folder, 20)
    for name, codec in (("x.flv", "flv"), ("y.mkv", "mpeg4")):
        write_video(folder.path / name, RAMP * 3, sound=tone(6), codec=codec)
        raw = (folder.path / name).read_bytes()
        (folder.path / name).write_bytes(raw[: len(raw) // 2])
        caplog.clear()
        rows[2] |= {"film": name, "track": name}
        dataset(folder.manifest(rows), options, kinds=KINDS)
        for m in KINDS:
            line = f"column {m}: ends early, so the file is probably cut: {folder.path / name} (1 of 20)"
            assert line in caplog.messages


@pytest.mark.parametrize("content, wanted", [
    (b"hello", "not readable as a video .Invalid data found when processing input"),
    (b"", "not readable as a video"),
])  # fmt: skip
def test_no_video(folder, options, content, wanted):
    rows = clips(folder, 20)
    (folder.path / "clips/2.mp4").write_bytes(content)
    for kinds, m in ((KINDS, "film"), ({"film": "videosound", "track": "video"}, "film")):
        with pytest.raises(UserError, match=f"line 4: column {m}: .*clips/2.mp4: {wanted}"):
            dataset(folder.manifest(rows), options, kinds=kinds)
    data = dataset(folder.manifest(rows), options, kinds=KINDS, skip_bad=True)
    assert {name for split in data.splits().values() for name in split.ids} == {f"s{i}" for i in range(20)} - {"s2"}


def test_tracks_that_are_missing(folder, options, caplog):
    """In training they are refused unless --allow-missing is given; elsewhere the sample lacks the modality."""
    rows = clips(folder, 20)
    path = folder.manifest(rows)
    write_video(folder.path / "clips/16.mp4", RAMP)
    data = dataset(path, options, kinds=KINDS)
    assert data.test.present("track").tolist() == [False, True, True, True] and data.train.present("track") is None
    assert f"column track is empty in 1 of 20 rows: {folder.path}/clips/16.mp4: no sound track" in caplog.text
    write_video(folder.path / "clips/2.mp4", RAMP)
    with pytest.raises(UserError, match="line 4: column track: .*clips/2.mp4: no sound track .--allow-missing trains"):
        dataset(path, options, kinds=KINDS)
    data = dataset(path, options, kinds=KINDS, allow_missing=True)
    assert [i for i, has in zip(data.train.ids, data.train.present("track"), strict=True) if not has] == ["s2"]
    skipped = dataset(path, options, kinds=KINDS, skip_bad=True)
    assert set(data.train.ids) - set(skipped.train.ids) == {"s2"} and len(skipped.test) == 4
    for row in rows:
        row["film"] = folder.image(f"{row['id']}.png", 1) if row["id"] != "s2" else ""
    with pytest.raises(UserError, match="line 4: all modalities are empty"):
        dataset(folder.manifest(rows), options, kinds="track=videosound", allow_missing=True)
    folder.write_sound("x.wav", tone())
    with pytest.raises(Unreadable, match="no pictures"):
        frame_times(folder.path / "x.wav")


def test_a_folder_of_clips_trains(folder, options):
    """mp4 and flv by a manifest, both modalities from the same files; the kind of the frames is guessed."""
    path = folder.manifest(clips(folder, 80))
    result = train("manifest", "ensemble", manifest=path, kinds="track=videosound", frames=1, epochs=12, batch_size=16,
                   **options)  # fmt: skip
    alone = [figures["test_acc"] for figures in result.metrics["unimodal"].values()]
    assert result.metrics["fused"]["test_acc"] > max(alone) + 0.2


def test_new_videos_are_read_as_in_training(folder, options, tmp_path):
    rows = clips(folder, 20)
    path = folder.manifest(rows)
    train("manifest", "ensemble", manifest=path, kinds=KINDS, epochs=1, batch_size=4, baselines=[],
          out=tmp_path / "run", **options)  # fmt: skip
    data = dataset(path, options, kinds=KINDS)
    new = [row for row in rows if row["split"] == "test"]
    predictor = load(tmp_path / "run", device="cpu")
    split = predictor.read(folder.manifest(new, "new.csv"), cache_dir=options["cache_dir"])
    assert all(torch.equal(split.stored[m], data.test.stored[m]) for m in KINDS)
    assert torch.equal(predictor.predict(split), predictor.predict(data.test))
    for row in new:
        row["track"] = "longer.mkv"
    write_video(folder.path / "longer.mkv", RAMP, sound=tone(2, 44100), rate=44100, sound_codec="flac")
    write_video(folder.path / new[0]["film"], RAMP, size=(64, 48))
    split = predictor.read(folder.manifest(new, "new.csv"), cache_dir=options["cache_dir"])
    assert [t.shape[1:] for t in split.stored.values()] == [t.shape[1:] for t in data.test.stored.values()]


def reader(name, folder, options, **more):
    given = {k: v for k, v in options.items() if k != "progress"} | {"image_size": 16, "audio_length": 0.2} | more
    return datasets.find(name)(Options.make(dataset=name, data_root=folder.path, **given))


def clip(folder, path, level):
    sound = 0.4 * np.sin(2 * np.pi * (500 + 1000 * level) * np.arange(4000) / RATE)
    write_video(folder.path / path, [60 + 100 * level] * 5, sound=sound, codec="flv" if path[-3:] == "flv" else "mpeg4")


def cremad(folder, sound="VideoFlash"):
    names = [f"{1001 + i % 14}_TAKE{i}_{'ANG HAP'.split()[i % 2]}_XX" for i in range(48)]
    for i, name in enumerate(names):
        clip(folder, f"VideoFlash/{name}.flv", i % 2)
        if sound == "AudioWAV":
            folder.sound(f"AudioWAV/{name}.wav", i % 2)
    for split, part in (("train", names[:36]), ("test", names[36:])):
        (folder.path / f"{split}.csv").write_text("".join(f"{name},{name.split('_')[2]}\r\n" for name in part))


@pytest.mark.parametrize("sound", ["VideoFlash", "AudioWAV"])
def test_videos_of_cremad(folder, options, sound):
    """As its repository holds them: nothing is extracted, or the sound alone."""
    cremad(folder, sound)
    result = train("cremad", "ensemble", data_root=folder.path, image_size=16, sample_rate=4000, audio_length=0.2,
                   epochs=8, batch_size=8, encoder={"frames": "cnn", "sound": "cnn"}, **options)  # fmt: skip
    assert result.metrics["fused"]["test_acc"] == 1


def test_videos_of_ave(folder, options):
    for split, count in (("train", 16), ("val", 8), ("test", 8)):
        lines = []
        for i in range(count):
            clip(folder, f"AVE/{split}_{i}.mp4", i % 2)
            lines.append(f"{('Church bell', 'Bark')[i % 2]}&{split}_{i}&good&0&10\n")
        (folder.path / f"{split}Set.txt").write_text("".join(lines))
    data = reader("ave", folder, options)
    assert [len(split) for split in data.splits().values()] == [16, 8, 8]
    assert data.train.stored["frames"].shape[2:] == (3, 16, 16) and data.train.stored["sound"].abs().max() > 10000


def test_videos_of_kinetics_sounds(folder, options):
    for split, count in (("train", 24), ("test", 8)):
        for i in range(count):
            clip(folder, f"{split}/{split}{i}_000001_000011.mp4", i % 2)
        lines = [f"{split}{i}_000001_000011,10,{i % 2}\n" for i in range(count)]
        (folder.path / f"my_{split}.txt").write_text("".join(lines))
    data = reader("kinetics-sounds", folder, options)
    assert len(data.test) == 8 and data.train.stored["frames"].shape[2:] == (3, 16, 16)


@pytest.mark.parametrize("gone", ["AudioWAV", "VideoFlash"])
def test_readers_with_missing_modalities(folder, options, gone, caplog):
    cremad(folder, "AudioWAV")
    missing = sorted(path.stem for path in (folder.path / gone).iterdir())[::5]
    for name in missing:
        (folder.path / gone / (name + {"AudioWAV": ".wav", "VideoFlash": ".flv"}[gone])).unlink()
    with pytest.raises(UserError, match=f"{missing[0][:4]}.*No such file"):
        reader("cremad", folder, options)
    data = reader("cremad", folder, options, allow_missing=True)
    m = {"AudioWAV": "sound", "VideoFlash": "frames"}[gone]
    for split in data.splits().values():
        assert [i for i, has in zip(split.ids, split.present(m), strict=True) if not has] == [
            i for i in split.ids if i in missing
        ]
    assert f"{len(missing)} of 48 samples have no file of {m}, such as" in caplog.text


def test_names_of_videos():
    assert in_videos("x")[:3] == ["x.mp4", "x.avi", "x.flv"]
