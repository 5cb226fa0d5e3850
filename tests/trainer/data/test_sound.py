"""Recordings as the field's programs write them: whole ones are read to the last sample, odd ones are told by name."""

import struct

import numpy as np
import pytest

pytest.importorskip("PIL", reason='needs the extra of files: pip install -e ".[data]"')
pytest.importorskip("soundfile", reason='needs the extra of files: pip install -e ".[data]"')

import soundfile

from udi_trainer import UserError
from udi_trainer.data.cache import Unreadable
from udi_trainer.data.sound import read_sound

from .files import dataset, stored

RATE = 8000
TONE = (0.4 * np.sin(2 * np.pi * 500 * np.arange(2400) / RATE)).astype(np.float32)


def with_sizes(wav, riff, data):
    """A WAV whose header announces these sizes."""
    sizes = (struct.pack("<I", size) for size in (riff, data))
    return wav[:4] + next(sizes) + wav[8:40] + next(sizes) + wav[44:]


@pytest.fixture
def wav(tmp_path):
    soundfile.write(tmp_path / "good.wav", TONE, RATE)
    return (tmp_path / "good.wav").read_bytes()


@pytest.mark.parametrize("riff, data", [
    (0x7FFFF024, 0x7FFFF000), (0xFFFFFFFF, 0xFFFFFFFF), (0x7FFFFFFF, 0x7FFFFFDB), (0x80000024, 0x80000000),
    (4844, 4800), (4844 + 8, 4800), (4836, 4844),
])  # fmt: skip
def test_whole_wavs_whatever_the_header_says(tmp_path, wav, riff, data):
    """SoX and ffmpeg write to pipes without knowing the size; others count the header."""
    path = tmp_path / "x.wav"
    path.write_bytes(with_sizes(wav, riff, data))
    x, rate, cut = read_sound(path)
    assert rate == RATE and not cut
    np.testing.assert_allclose(x[:, 0], TONE, atol=2**-15)


def test_a_missing_pad_byte(tmp_path):
    path = tmp_path / "x.wav"
    soundfile.write(path, TONE[:2399], RATE, subtype="PCM_U8")
    raw = path.read_bytes()
    path.write_bytes(raw[: 44 + 2399])
    assert len(read_sound(path)[0]) == 2399


def test_truncated_wavs(tmp_path, wav):
    path = tmp_path / "x.wav"
    for chunk in (b"", b"JUNK" + struct.pack("<I", 27) + bytes(28)):
        whole = wav[:12] + chunk + wav[12:]
        path.write_bytes(whole[:3000])
        with pytest.raises(Unreadable, match=f"truncated, 3000 bytes of {len(whole)}"):
            read_sound(path)


ENCODINGS = [
    ("wav", {"subtype": subtype})
    for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM")
] + [
    ("wav", {"subtype": "GSM610"}), ("wav", {"format": "WAVEX", "subtype": "PCM_24"}), ("wav", {"format": "RF64"}),
    ("w64", {}), ("flac", {}), ("ogg", {}), ("mp3", {}), ("opus", {"format": "OGG", "subtype": "OPUS"}),
]  # fmt: skip


@pytest.mark.parametrize("ending, form", ENCODINGS)
def test_encodings(tmp_path, ending, form):
    path = tmp_path / f"x.{ending}"
    soundfile.write(path, TONE, RATE, **form)
    x, rate, cut = read_sound(path)
    assert rate == RATE and not cut and 2400 <= len(x) < 2400 + 200
    assert np.abs(x[:2400, 0]).max() == pytest.approx(0.4, abs=0.15)
    spectrum = np.abs(np.fft.rfft(x[:2400, 0]))
    assert abs(spectrum.argmax() * RATE / 2400 - 500) < 5 and spectrum.max() > 0.35 * 1200


def test_flac_of_unknown_length(tmp_path):
    """Streamed: the header has 0 samples and no checksum."""
    path = tmp_path / "x.flac"
    soundfile.write(path, np.tile(TONE, 200), RATE)
    raw = bytearray(path.read_bytes())
    raw[21] &= 0xF0
    raw[22:42] = bytes(20)
    path.write_bytes(raw)
    x, _, cut = read_sound(path)
    assert not cut
    np.testing.assert_allclose(x[:, 0], np.tile(TONE, 200), atol=2**-15)
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(Unreadable, match="damaged sound"):
        read_sound(path)


@pytest.mark.parametrize("form", [{"format": "MP3"}, {"format": "OGG"}, {"format": "OGG", "subtype": "OPUS"}])
def test_cut_files_are_told(folder, options, caplog, form):
    rows, noise = folder.split_pairs(), folder.random.normal(0, 0.1, 20 * RATE)
    rows[2]["sound"] = folder.write_sound("sounds/x.mp3", noise, RATE, **form)
    dataset(folder.manifest(rows), options, kinds="sound=audio")
    assert "ends early" not in caplog.text
    path = folder.path / "sounds/x.mp3"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    dataset(folder.manifest(rows), options, kinds="sound=audio")
    assert f"column sound: ends early, so the file is probably cut: {path} (1 of 30)" in caplog.text


@pytest.mark.parametrize("scale, bits", [(2**15 - 1, 15), (2**22, 23), (2**30, 31)])
def test_floats_in_the_range_of_integers(folder, options, caplog, scale, bits):
    rows = folder.split_pairs()
    rows[2]["sound"] = folder.write_sound("sounds/x.wav", TONE * scale, subtype="FLOAT")
    x = stored(dataset(folder.manifest(rows), options), "sound", "s2")
    wanted = TONE[: len(x)] * (scale / 2**bits) * 32767
    np.testing.assert_allclose(x.numpy()[: len(wanted)], wanted, atol=1)
    assert f"in the range of integers: scaled to -1 to 1: {folder.path / 'sounds/x.wav'} (1 of 30)" in caplog.text


def test_floats_above_one_are_not_clipped(folder, options):
    rows = folder.split_pairs()
    rows[2]["sound"] = folder.write_sound("sounds/x.wav", TONE * 4, subtype="FLOAT")
    x = stored(dataset(folder.manifest(rows), options), "sound", "s2")
    np.testing.assert_allclose(x.numpy(), TONE[: len(x)] / TONE.max() * 32767, atol=1)


def test_opposite_phase(folder, options, caplog):
    rows = folder.split_pairs()
    rows[2]["sound"] = folder.write_sound("sounds/x.wav", np.c_[TONE, -TONE * 0.999])
    rows[3]["sound"] = folder.write_sound("sounds/y.wav", np.c_[TONE, 0 * TONE])
    data = dataset(folder.manifest(rows), options)
    x, y = (stored(data, "sound", name).numpy() for name in ("s2", "s3"))
    np.testing.assert_allclose(x, TONE[: len(x)] * 32767, atol=2)
    np.testing.assert_allclose(y, TONE[: len(y)] / 2 * 32767, atol=2)
    told = [line for line in caplog.messages if "cancel each other out: the first is used" in line]
    assert len(told) == 1 and told[0].endswith(f"{folder.path / 'sounds/x.wav'} (1 of 30)")


def test_silence_is_told_and_skipped(folder, options, caplog):
    """With --skip-bad exactly the silent recordings go."""
    rows = folder.split_pairs(60)
    rows[2]["sound"] = folder.write_sound("sounds/a.wav", np.zeros(800))
    rows[17]["sound"] = folder.write_sound("sounds/b.wav", np.full((800, 2), 0.25))
    rows[18]["sound"] = folder.write_sound("sounds/quiet.wav", TONE / 1000)
    path = folder.manifest(rows)
    assert sum(map(len, dataset(path, options).splits().values())) == 60
    assert "column sound: silent (--skip-bad leaves it out)" in caplog.text and "(2 of 60)" in caplog.text
    caplog.clear()
    data = dataset(path, options, skip_bad=True)
    left = {name for split in data.splits().values() for name in split.ids}
    assert left == {f"s{i}" for i in range(60)} - {"s2", "s17"}
    assert f"line 4: column sound: {folder.path / 'sounds/a.wav'}: silent" in caplog.text
    assert "silent (--skip-bad" not in caplog.text


def test_no_sound_at_all(folder, options):
    rows = folder.split_pairs()
    rows[2]["sound"] = folder.write_sound("sounds/x.wav", np.r_[TONE, np.nan], subtype="FLOAT")
    with pytest.raises(UserError, match="line 4: column sound: .*x.wav: NaN or inf in sound"):
        dataset(folder.manifest(rows), options)
    folder.write_sound("sounds/x.wav", TONE[:0])
    with pytest.raises(UserError, match="line 4: column sound: .*x.wav: sound without samples"):
        dataset(folder.manifest(rows), options)


def test_mp3_and_opus_need_no_kind(folder, options):
    rows = folder.split_pairs()
    for i, row in enumerate(rows):
        name, form = (f"sounds/{i}.mp3", {}) if i % 2 else (f"sounds/{i}.opus", {"format": "OGG", "subtype": "OPUS"})
        row["sound"] = folder.write_sound(name, TONE, RATE, **form)
    assert dataset(folder.manifest(rows), options).modalities["sound"].encoder == "cnn"
