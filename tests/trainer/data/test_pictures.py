"""Pictures of other depths, with transparency, and of several pages: none becomes black or flat unnoticed."""

import struct
import zlib

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason='needs the extra of files: pip install -e ".[data]"')
pytest.importorskip("soundfile", reason='needs the extra of files: pip install -e ".[data]"')

from PIL import Image

from udi_trainer import UserError

from .files import dataset, stored

RAMP = np.add.outer(np.arange(12), np.arange(12)) / 22  # 0 to 1


def read(folder, options, name, picture, form=None, **more):
    """What is stored of this picture, one of a training sample."""
    rows = folder.split_pairs()
    rows[2]["image"] = folder.save_picture(f"images/{name}", picture, **(form or {}))
    return stored(dataset(folder.manifest(rows), options, **more), "image", "s2")


@pytest.mark.parametrize("name, low, high, dtype", [
    ("full.png", 0, 65535, np.uint16), ("depth.png", 500, 4500, np.uint16), ("medical.png", 0, 4095, np.uint16),
    ("small.png", 0, 255, np.uint16), ("medical.tif", 0, 4095, np.uint16), ("integers.tif", -3000, 100_000, np.int32),
    ("unit.tif", 0, 1, np.float32), ("metres.tif", 0, 10, np.float32),
])  # fmt: skip
def test_deep_pictures_keep_their_range(folder, options, caplog, name, low, high, dtype):
    x = read(folder, options, name, (low + RAMP * (high - low)).astype(dtype))
    np.testing.assert_allclose(x.numpy(), np.broadcast_to(RAMP * 255, (3, 12, 12)), atol=2)
    assert f"more than 8 bits a pixel, of which {low:g} to {high:g} become 0 to 255" in caplog.text


def test_colors_of_16_bits_are_told(folder, options, caplog):
    """Pillow reads their upper halves, so dark ones become black."""
    rows = folder.split_pairs()
    size, parts = struct.pack(">IIBBBBB", 12, 12, 16, 2, 0, 0, 0), b"\0" + b"\x10\x00" * 36
    chunks = (b"IHDR", size), (b"IDAT", zlib.compress(parts * 12)), (b"IEND", b"")
    raw = b"".join(struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x)) for name, x in chunks)
    (folder.path / "images/2.png").write_bytes(b"\x89PNG\r\n\x1a\n" + raw)
    assert (stored(dataset(folder.manifest(rows), options), "image", "s2") == 16).all()
    assert f"16 bits a color, of which the upper 8 are read: {folder.path}/images/2.png (1 of 30)" in caplog.text


def test_the_range_is_that_of_training(folder, options):
    rows = folder.split_pairs()
    for i, row in enumerate(rows):
        scale = 60000 if row["split"] == "test" else 1000 if i % 2 else 500
        row["image"] = folder.save_picture(f"images/{i}.png", (RAMP * scale).astype(np.uint16))
    data = dataset(folder.manifest(rows), options)
    assert int(stored(data, "image", "s1").max()) == 255 and int(stored(data, "image", "s2").max()) in (127, 128)
    assert (data.test.stored["image"][:, 0, 1, 1:] == 255).all()


def test_nan_in_a_picture(folder, options):
    with pytest.raises(UserError, match="line 4: column image: .*x.tif: a damaged image .NaN or inf"):
        read(folder, options, "x.tif", np.full((12, 12), np.nan, np.float32))


def drawing(mode, ink):
    """A square of ink on a transparent picture."""
    picture = Image.new(mode, (12, 12), (0,) * len(Image.new(mode, (1, 1)).getbands()))
    picture.paste(ink, (3, 3, 9, 9))
    return picture


@pytest.mark.parametrize("picture, ink", [
    (drawing("RGBA", (0, 0, 0, 255)), 0), (drawing("LA", (0, 255)), 0), (drawing("LA", (255, 255)), 255),
    (drawing("RGBA", (0, 0, 0, 255)).quantize(4), 0), (drawing("RGBA", (255, 255, 255, 255)), 255),
    (drawing("RGBA", (255, 255, 255, 128)), 192),
])  # fmt: skip
def test_transparency_is_on_gray(folder, options, picture, ink):
    wanted = np.full((3, 12, 12), 128)
    wanted[:, 3:9, 3:9] = ink
    np.testing.assert_allclose(read(folder, options, "x.png", picture).numpy(), wanted, atol=1)


def test_opaque_pictures_are_as_they_are(folder, options):
    x = folder.random.integers(0, 256, (12, 12, 4), dtype=np.uint8)
    x[..., 3] = 255
    wanted = x[..., :3].transpose(2, 0, 1)
    assert (read(folder, options, "x.png", x).numpy() == wanted).all()
    assert (read(folder, options, "y.png", x[..., :3].copy()).numpy() == wanted).all()


@pytest.mark.parametrize("name", ["x.gif", "x.tif"])
def test_several_pictures_in_a_file(folder, options, caplog, name):
    stills = [Image.new("L", (12, 12), 80 * i) for i in range(3)]
    form = {"save_all": True, "append_images": stills[1:]}
    x = read(folder, options, name, stills[0], form)
    assert x.shape == (3, 12, 12) and (x == 0).all()
    wanted = f"the first of several pictures is read (--kinds image=frames reads them all): {folder.path}/images/{name}"
    assert wanted in caplog.text
    caplog.clear()
    x = read(folder, options, name, stills[0], form, kinds="image=frames")
    assert x[:, 0, 5, 5].tolist() == [0, 80, 160] and "several pictures" not in caplog.text


def test_size_comes_from_training(folder, options):
    rows = folder.split_pairs()
    for i, row in enumerate(rows):
        if row["split"] != "train":
            row["image"] = folder.image(f"large/{i}.png", 1, size=(50, 40))
    assert dataset(folder.manifest(rows), options).train.stored["image"].shape[1:] == (3, 12, 12)


def test_upright(folder, options):
    """A camera stores the picture as the sensor saw it, and says how to turn it."""
    x = np.zeros((12, 12, 3), np.uint8)
    x[:4] = 255
    exif = Image.new("RGB", (1, 1)).getexif()
    exif[274] = 6  # turn by 90 degrees clockwise
    bright = read(folder, options, "x.png", x, {"exif": exif})[0] > 127
    assert torch.equal(bright, torch.from_numpy(np.rot90(x[..., 0] > 127, -1).copy()))
