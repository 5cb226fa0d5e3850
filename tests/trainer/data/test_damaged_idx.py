"""MNIST's files after a broken download, or crafted maliciously."""

import gzip

import pytest
import torch

from udi_trainer.command import main

from ..helpers import one_line, start, write_idx


def refused(capsys, root):
    """The command's error message of one line."""
    assert main(["--dataset", "cgmnist", "--data-root", str(root)]) == 2
    return one_line(capsys.readouterr().err)


def idx(*sizes, data=b"", dims=None):
    head = bytes((0, 0, 8, dims or len(sizes))) + b"".join(size.to_bytes(4, "big") for size in sizes)
    return gzip.compress(head + data, mtime=0)


@pytest.mark.parametrize(
    "raw, wanted",
    [
        (idx(0, 28, 28), "has no samples"),
        (idx(5, 28, 28), "is truncated (0 bytes of 3920)"),
        (idx(5, 28, 28, data=bytes(3919)), "is truncated (3919 bytes of 3920)"),
        (idx(5, 28, 28, data=bytes(3921)), "more than the 3920 bytes"),
        (idx(2**32 - 1, 28, 28), "claims to have 4294967295 x 28 x 28"),
        (idx(2**32 - 1, 2**32 - 1, 2**32 - 1), "claims to have"),
        (idx(5, dims=1, data=bytes(5)), "is not an idx file"),
        (gzip.compress(b""), "is not an idx file"),
        (b"", "is not an idx file"),
        (b"<html>", "cannot be read"),
        (idx(5, 28, 28, data=bytes(3920))[:-9], "cannot be read"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_damaged_idx(little_mnist, capsys, raw, wanted):
    path = little_mnist / "train-images-idx3-ubyte.gz"
    path.write_bytes(raw)
    message = refused(capsys, little_mnist)
    assert wanted in message and str(path) in message and "-4294967296" not in message


def test_label_that_is_no_digit(little_mnist, capsys):
    labels = torch.arange(240, dtype=torch.uint8) % 10
    labels[17] = 37
    write_idx(little_mnist / "train-labels-idx1-ubyte.gz", labels)
    message = refused(capsys, little_mnist)
    assert "label 17 is 37" in message and "train-labels" in message


def test_gzip_of_too_much(tmp_path):
    """Refused without more memory than the header announces."""
    path = tmp_path / "bomb.gz"
    path.write_bytes(idx(60000, 28, 28, data=bytes(47_040_000)) + gzip.compress(bytes(2**24)) * 32)
    code = (
        "import pathlib, resource, sys\nfrom udi_trainer.data.digits import read_idx\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_idx(pathlib.Path(sys.argv[1]), 3)\n"
        "except ValueError as error: print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    process = start("-c", code, path)
    out, err = process.communicate()
    message, grown = out.splitlines()
    assert "more than the 47040000 bytes" in message and int(grown) < 200
