"""Small data of every kind, written to a folder of the test."""

import csv
import struct
from fractions import Fraction

import numpy as np
import soundfile
from PIL import Image

from udi_trainer.data.manifest import build, read
from udi_trainer.options import Options

RATE = 4000


class Folder:
    """Writes files whose content correlates with the label, and a manifest of them."""

    def __init__(self, path):
        self.path, self.random = path, np.random.default_rng(0)

    def image(self, name, level, size=(12, 12), noise=20.0):
        pixels = 40 + 50 * level + self.random.normal(0, noise, (*size[::-1], 3))
        return self._picture(name, pixels)

    def gray(self, name, level, size=(12, 12)):
        return self._picture(name, np.full(size[::-1], level))

    def _picture(self, name, pixels):
        path = self._path(name)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
        return name

    def sound(self, name, level, seconds=0.2, rate=RATE, noise=0.05):
        t = np.arange(int(seconds * rate)) / rate
        x = 0.4 * np.sin(2 * np.pi * (300 + 400 * level) * t) + noise * self.random.normal(size=t.shape)
        soundfile.write(self._path(name), x, rate)
        return name

    def array(self, name, values):
        np.save(self._path(name), values)
        return name

    def clip(self, name, level, frames=4):
        for i in range(frames):
            self.image(f"{name}/frame{i + 1}.jpg", level)
        return name

    def flow(self, name, level, frames=4):
        for i in range(frames):
            self.gray(f"{name}/u/f{i + 1}.jpg", 100 + 20 * level)
            self.gray(f"{name}/v/f{i + 1}.jpg", 128)
        return name

    def _path(self, name):
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_sound(self, name, x, rate=RATE, **form):
        soundfile.write(self._path(name), x, rate, **form)
        return name

    def save_picture(self, name, picture, **form):
        """``picture``: of Pillow, or its pixels."""
        picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        picture.save(self._path(name), **form)
        return name

    def manifest(self, rows, name="data.csv"):
        path = self.path / name
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return path

    def split_pairs(self, count=30):
        """Rows of image and sound with ids and splits; the sample 2 is in training."""
        parts = ("train", "train", "train", "val", "test")
        return [row | {"id": f"s{i}", "split": parts[i // 4 % 5]} for i, row in enumerate(self.pairs(count))]

    def pairs(self, count=48, classes=4):
        """Rows of image and sound; each of them reveals half of the label."""
        return [
            {
                "image": self.image(f"images/{i}.png", i % classes // 2),
                "sound": self.sound(f"sounds/{i}.wav", i % 2, 0.1 + 0.02 * (i % 7)),
                "label": "abcd"[i % classes],
            }
            for i in range(count)
        ]


def dataset(path, options, **more):
    """The data set of a manifest."""
    given = {name: value for name, value in options.items() if name != "progress"} | more
    return build(read(path), Options.make(dataset="manifest", **given))


def stored(data, m, name):
    """What is stored of a sample, by its id."""
    for split in data.splits().values():
        if name in split.ids:
            return split.stored[m][list(split.ids).index(name)]
    raise AssertionError(f"{name} is in no split")


def write_video(path, levels, times=None, sound=None, rate=16000, codec="mpeg4", sound_codec="aac", size=(32, 16)):
    """A video of uniform gray frames; ``times``: of each frame, in tenths of a second. ``sound``: of its track."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        pictures = container.add_stream(codec, rate=10)
        pictures.width, pictures.height = size
        pictures.pix_fmt = "yuv420p"
        track = None if sound is None else container.add_stream(sound_codec, rate=rate, layout="mono")
        for i, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(np.full((*size[::-1], 3), level, np.uint8), format="rgb24")
            frame.pts, frame.time_base = i if times is None else times[i], Fraction(1, 10)
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode())
        if track is not None:
            fifo = av.AudioFifo()
            block = av.AudioFrame.from_ndarray(np.float32(sound)[None], format="flt", layout="mono")
            block.sample_rate, block.pts, block.time_base = rate, 0, Fraction(1, rate)
            fifo.write(block)
            to_codec = av.AudioResampler(track.format.name, "mono", rate)
            while part := fifo.read(track.codec_context.frame_size or 1024, partial=True):
                for converted in to_codec.resample(part):
                    container.mux(track.encode(converted))
            container.mux(track.encode())


def turn(path, matrix):
    """Writes a rotation into an mp4, as phones do: the first four numbers of the matrix of its track."""
    raw = bytearray(path.read_bytes())
    start = raw.index(b"tkhd") + 4 + 40  # version 0
    a, b, c, d = (struct.pack(">i", x << 16) for x in matrix)
    raw[start : start + 20] = a + b + bytes(4) + c + d
    path.write_bytes(raw)
