"""The cache: each sample is decoded once, across restarts, interruptions and parallel runs."""

import multiprocessing
import os

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason='needs the extra of files: pip install -e ".[data]"')
pytest.importorskip("soundfile", reason='needs the extra of files: pip install -e ".[data]"')

from udi_trainer import UserError
from udi_trainer.data import kinds
from udi_trainer.data.cache import Cache, Unreadable, digest
from udi_trainer.data.manifest import build, read
from udi_trainer.options import Options


def column(cache, values, decoded, names=None):
    """A column of vectors with the given values; ``decoded`` collects the samples that were not cached."""

    def decode(i):
        decoded.append(values[i])
        if values[i] < 0:
            raise Unreadable(f"value {values[i]}")
        return np.full(3, values[i])

    keys = [digest(name) for name in names or values]
    return cache.column("numbers", (), keys, decode, (3,), torch.float32)


def test_only_new_samples_are_decoded(tmp_path):
    cache, decoded = Cache(tmp_path), []
    x, errors = column(cache, [5, 6, 7], decoded)
    assert x.tolist() == [[5] * 3, [6] * 3, [7] * 3] and not errors and sorted(decoded) == [5, 6, 7]
    x, _ = column(cache, [5, 6, 7], decoded)
    assert x.tolist() == [[5] * 3, [6] * 3, [7] * 3] and len(decoded) == 3
    x, _ = column(cache, [7, 8, 5], decoded)  # another order, a row less, a row more
    assert x.tolist() == [[7] * 3, [8] * 3, [5] * 3] and decoded[3:] == [8]
    x.zero_()  # changes only the private copy
    assert column(cache, [7, 8, 5], decoded)[0].tolist() == [[7] * 3, [8] * 3, [5] * 3]


def test_unreadable_samples_are_named_and_the_others_kept(tmp_path):
    cache, decoded = Cache(tmp_path), []
    assert column(cache, [1, -2, 3, -4], decoded) == (None, {1: "value -2", 3: "value -4"})
    x, errors = column(cache, [1, 3], decoded)
    assert x.tolist() == [[1] * 3, [3] * 3] and not errors and len(decoded) == 4


def test_an_interrupted_column_goes_on(tmp_path):
    cache, decoded = Cache(tmp_path), []

    def decode(i):
        if len(decoded) > 30:
            raise KeyboardInterrupt
        decoded.append(i)
        return np.full(3, i)

    keys = [digest(i) for i in range(100)]
    with pytest.raises(KeyboardInterrupt):
        cache.column("numbers", (), keys, decode, (3,), torch.float32)
    again = []
    x, _ = column(cache, list(range(100)), again)
    assert len(set(again) & set(decoded)) <= 2 * os.cpu_count()  # those in progress at the interruption
    assert x[:, 0].tolist() == list(range(100))


def test_data_deleted_by_hand_is_decoded_anew(tmp_path):
    cache, decoded = Cache(tmp_path), []
    column(cache, [1, 2], decoded)
    for path in tmp_path.rglob("*.bin"):
        path.unlink()
    with pytest.raises(ZeroDivisionError):
        cache.column("numbers", (), [digest(1), digest(2)], lambda i: 1 / 0, (3,), torch.float32)
    assert column(cache, [1, 2], decoded)[0].tolist() == [[1] * 3, [2] * 3]


def test_a_disk_that_fills_up(tmp_path, monkeypatch):
    """On a full disk a sample is written partially. It must not count as complete once there is space again."""
    cache, write = Cache(tmp_path), os.pwrite

    def full(file, raw, place):
        return write(file, raw[:5], place) if place == 12 else write(file, raw, place)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr(os, "pwrite", full)
        column(cache, [1, 2, 3], [])
    assert column(cache, [1, 2, 3], [])[0].tolist() == [[1] * 3, [2] * 3, [3] * 3]


def race(folder, results):
    decoded = []
    x, _ = column(Cache(folder), list(range(200)), decoded)
    results.put((len(decoded), x[:, 0].tolist()))


def test_runs_at_the_same_time_decode_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    racers = [context.Process(target=race, args=(tmp_path, results)) for _ in range(2)]
    for racer in racers:
        racer.start()
    (a, x), (b, y) = results.get(timeout=200), results.get(timeout=200)
    for racer in racers:
        racer.join()
    assert a + b == 200 and x == y == list(range(200))


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache-dir"):
        column(Cache(tmp_path / "file"), [1], [])


def test_a_second_start_opens_no_file(folder, options, monkeypatch):
    path = folder.manifest(folder.pairs(24))
    given = Options.make(dataset="manifest", cache_dir=options["cache_dir"])
    first = build(read(path), given)

    def refuse(*args):
        raise AssertionError("decoded again")

    for kind in (kinds.Image, kinds.Audio):
        monkeypatch.setattr(kind, "decode", refuse)
        monkeypatch.setattr(kind, "probe", refuse)
    second = build(read(path), given)
    for name, split in first.splits().items():
        for stored, t in split.stored.items():
            assert torch.equal(t, second.splits()[name].stored[stored])
    assert first.modalities["image"].make == second.modalities["image"].make


def test_a_changed_file_is_decoded_again(folder, options, monkeypatch):
    rows = folder.pairs(24)
    path = folder.manifest(rows)
    given = Options.make(dataset="manifest", cache_dir=options["cache_dir"])
    build(read(path), given)
    decoded, decode = [], kinds.Image.decode
    monkeypatch.setattr(kinds.Image, "decode", lambda self, cell: decoded.append(cell[0].name) or decode(self, cell))
    folder.image(rows[4]["image"], 1)
    data = build(read(path), given)
    assert decoded == ["4.png"]
    fresh = build(read(path), Options.make(dataset="manifest", cache_dir=options["cache_dir"] / "new"))
    for name in data.splits():
        assert torch.equal(data.splits()[name].stored["image"], fresh.splits()[name].stored["image"])


@pytest.mark.parametrize("damage", ["cut", "longer", "flipped", "index", "no index"])
def test_damaged_columns_are_decoded_again(tmp_path, damage, caplog):
    """Only the samples that were damaged, and with a line."""
    cache, decoded = Cache(tmp_path), []
    column(cache, [5, 6, 7], decoded)
    (path,) = tmp_path.rglob("*.bin")
    raw = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(raw[:-5])
    elif damage == "longer":
        path.write_bytes(raw + b"more")
    elif damage == "flipped":
        raw[14] ^= 1
        path.write_bytes(raw)
    elif damage == "index":
        index = path.with_suffix(".keys")
        index.write_bytes(index.read_bytes()[:-1])
    else:
        path.with_suffix(".keys").unlink()
    again = []
    x, errors = column(cache, [5, 6, 7], again)
    assert x.tolist() == [[5] * 3, [6] * 3, [7] * 3] and not errors
    assert again == {"cut": [7], "longer": [], "flipped": [6], "index": [7], "no index": [5, 6, 7]}[damage]
    assert caplog.text.count("the cached column numbers is damaged") == 1
    assert column(cache, [5, 6, 7], again)[0].tolist() == x.tolist() and caplog.text.count("is damaged (") == 1


def test_damaged_samples_are_not_copied(tmp_path):
    cache, decoded = Cache(tmp_path), []
    column(cache, [5, 6], decoded)
    (path,) = tmp_path.rglob("*.bin")
    path.write_bytes(b"\1" * path.stat().st_size)
    assert column(cache, [6, 7], decoded)[0].tolist() == [[6] * 3, [7] * 3] and sorted(decoded) == [5, 6, 6, 7]


@pytest.mark.parametrize(
    "text", ['{"value": {"mean": [9]}}', "[]", '{"value": {"mean": [9]}, "digest": "00"}', "{", ""]
)
def test_damaged_statistics_are_computed_again(tmp_path, text):
    cache = Cache(tmp_path)
    key, value = digest("x"), {"mean": [1.5, 2.0]}
    assert cache.memoize(key, lambda: value) == value
    (path,) = tmp_path.rglob("*.json")
    path.write_text(text)
    assert cache.memoize(key, lambda: value) == value
    assert cache.memoize(key, lambda: {}["not called"]) == value
