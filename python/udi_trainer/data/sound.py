"""Reads recordings to their last sample, whatever their headers announce, and says what is odd about them."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, first_line
from .cache import Unreadable

BLOCK = 2**18  # samples read at a time
STREAM = 0x7FFF0000  # sizes from here on in a WAV header stand for an unknown one
SLACK = 64  # bytes that a WAV may lack: some writers count the header as data
MP3_FRAME = 1152  # samples
CANCELLING = 1e-4  # energy of the mean of the channels, relative to theirs: 40 dB less
FULL_SCALE = 8.0  # no recording of floating-point samples is so far above 1
SILENCE = 2**-14  # range of a silent recording: two steps of 16 bits


def import_soundfile() -> Any:
    try:
        import soundfile
    except (ModuleNotFoundError, OSError):
        raise UserError('sound needs soundfile: pip install -e ".[data]"') from None
    return soundfile


def read_sound(path: Path) -> tuple[np.ndarray, int, bool]:
    """The samples, float32 (N, channels), the sample rate, and whether the file ends early.

    Raises Unreadable for a WAV without all the samples that its header announces. Ogg and MP3 files do not announce
    them reliably.
    """

    class Stream(import_soundfile().SoundFile):  # type: ignore[misc]
        def seekable(self) -> bool:  # soundfile seeks after each read, which fails in a FLAC of unknown length
            return False

    try:
        file = Stream(path)
    except Exception as error:
        raise Unreadable(f"{path}: not readable as sound ({first_line(error)})") from None
    with file:
        refuse_truncated_wav(path)
        blocks = []
        try:
            while len(block := file.read(BLOCK, "float32", always_2d=True)):
                blocks.append(block)
        except Exception as error:
            raise Unreadable(f"{path}: damaged sound ({first_line(error)})") from None
        if not blocks:
            raise Unreadable(f"{path}: sound without samples")
        x = np.concatenate(blocks)
        cut = last_page_missing(path) if file.format == "OGG" else False
        if file.format in ("MP3", "MPEG"):
            cut = len(x) + 2 * MP3_FRAME < file.frames
        return x, file.samplerate, cut


def refuse_truncated_wav(path: Path) -> None:
    """Compares the sound that the header announces with what there is; the size of the whole file is often wrong."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if file.read(4) != b"RIFF":
            return
        file.seek(12)
        while len(chunk := file.read(8)) == 8:
            announced, start = int.from_bytes(chunk[4:], "little"), file.tell()
            if chunk[:4] == b"data":
                if size + SLACK < start + announced and announced < STREAM:
                    raise Unreadable(f"{path}: truncated, {size} bytes of {start + announced}")
                return
            file.seek(start + announced + announced % 2)


def last_page_missing(path: Path) -> bool:
    """Whether an Ogg file does not end with the last page of a stream."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 2**17))  # a page has at most 65,307 bytes
        data = file.read()
    page = data[data.rfind(b"OggS") :]
    return len(page) < 27 or not page[5] & 4 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])


def cancelling(x: np.ndarray) -> bool:
    """Whether the channels (N, channels) have opposite phases, so that their mean is silent."""
    return energy(x.mean(1)) < CANCELLING * energy(x)


def energy(x: np.ndarray) -> float:
    return float(np.square(x, dtype=np.float64).mean())


def integer_bits(x: np.ndarray) -> int:
    """The bits of the integers, without sign, that floating-point samples hold; 0 for samples between -1 and 1."""
    peak = np.abs(x).max()
    return 0 if peak <= FULL_SCALE else next((bits for bits in (15, 23) if peak <= 2**bits), 31)


def mono(x: np.ndarray) -> np.ndarray:
    """The mean of the channels (N, channels), or the first one if they cancel each other out, between -1 and 1."""
    sound = x[:, 0] if cancelling(x) else x.mean(1)
    scale = 2 ** integer_bits(x)
    return sound / np.float32(scale if scale > 1 else max(1, np.abs(sound).max()))
