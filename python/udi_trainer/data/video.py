"""The kinds ``video`` and ``videosound``: the frames and the sound track of a video file.

PyAV reads them: its wheels bring FFmpeg and serve every version of torch. torchcodec's wheels need FFmpeg on the
machine and a torch of the same release.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, first_line
from .cache import Unreadable
from .kinds import Audio, Cell, Frames, kinds, single_path

CUT = 0.9  # a file that ends before this fraction of its announced duration is probably cut


class NoTrack(Unreadable):
    """The file has no sound, or no pictures."""


def import_av() -> Any:
    try:
        import av
    except (ModuleNotFoundError, OSError):
        raise UserError('videos need PyAV: pip install -e ".[video]"') from None
    return av


@contextlib.contextmanager
def open_track(path: Path, kind: str) -> Iterator[tuple[Any, Any]]:
    """The container and its best stream of a kind, ``video`` or ``audio``. Errors of FFmpeg name the file."""
    av = import_av()
    try:
        with av.open(str(path)) as container:
            stream = container.streams.best(kind)
            if stream is None:
                raise NoTrack(f"{path}: no {'sound track' if kind == 'audio' else 'pictures'}")
            stream.thread_type = "NONE"  # other threads decode other files
            yield container, stream
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise Unreadable(f"{path}: not readable as a video ({reason})") from None


def decoded(path: Path, container: Any, stream: Any) -> Iterator[Any]:
    """The frames of a stream in the order of presentation. Only the end of a file may be damaged: it may be cut."""
    damage = None
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except import_av().error.InvalidDataError as error:
            damage = error
            continue
        if damage and packet.size:
            raise Unreadable(f"{path}: a damaged video ({first_line(damage)})")
        yield from frames


def frame_times(path: Path) -> tuple[np.ndarray, bool]:
    """When each frame is shown, and at last when the video ends, in seconds, and whether the file is cut.

    Read from the packets, without decoding. Where these give no times, frames last equally long.
    """
    with open_track(path, "video") as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size]
        if not packets:
            raise Unreadable(f"{path}: a video without frames")
        times = sorted(packet.pts for packet in packets if packet.pts is not None)
        unit = float(stream.time_base)
        if len(times) < len(packets):
            times, unit = [*range(len(packets))], float(1 / (stream.average_rate or 25))
        last = max(packets, key=lambda packet: packet.pts or 0).duration
        last = last or (times[-1] - times[0]) / max(1, len(times) - 1) or 1
        seconds = unit * np.array([*times, times[-1] + last])
        cut = len(packets) < CUT * stream.frames or seconds[-1] < CUT * (container.duration or 0) / 1e6
        return seconds, cut


@kinds.register("video", needs=("av", "PIL"), extra="video")
class Video(Frames):
    """The frames of a video per cell, upright.

    Stored frames are evenly spaced in time, so those of a variable rate count for as long as they are shown.
    """

    header_size = Frames.header_size + 1  # and whether the file is cut

    def paths(self, cell: Cell) -> list[Path]:
        return [single_path(cell)]

    def probe(self, cell: Cell) -> list[int]:
        path = single_path(cell)
        times, cut = frame_times(path)
        with open_track(path, "video") as (_, stream):
            return [3, stream.width, stream.height, len(times) - 1, *[0] * 4, cut]

    def review(self, headers: np.ndarray, rows: Sequence[int]) -> None:
        self.note("ends early, so the file is probably cut", headers[:, -1] > 0, rows)

    def decode(self, cell: Cell) -> np.ndarray:
        path, count = single_path(cell), self.shape[0]
        times, _ = frame_times(path)
        wanted = times[0] + (np.arange(count) + 0.5) / count * (times[-1] - times[0])
        chosen: list[np.ndarray] = []
        with open_track(path, "video") as (container, stream):
            shown = None
            for i, frame in enumerate(decoded(path, container, stream)):
                time = times[min(i, len(times) - 1)] if frame.time is None else frame.time
                if shown is not None and wanted[len(chosen)] < time:
                    due = int((wanted < time).sum()) - len(chosen)
                    chosen += [self.square(upright(shown))] * due
                if len(chosen) == count:
                    break
                shown = frame
            if shown is None:
                raise Unreadable(f"{path}: a video without frames")
            return np.stack(chosen + [self.square(upright(shown))] * (count - len(chosen)))


def upright(frame: Any) -> Any:
    """The frame as an RGB image, turned as the file demands."""
    return frame.to_image().rotate(frame.rotation, expand=True)


@kinds.register("videosound", needs=("av", "scipy"), extra="video")
class VideoSound(Audio):
    """The sound track of a video per cell, otherwise as :class:`Audio`. Videos may lack it."""

    def probe(self, cell: Cell) -> list[int]:
        try:
            return super().probe(cell)
        except NoTrack:
            return [0] * self.header_size

    def configure(self, headers: np.ndarray) -> None:
        has = headers[:, 0] > 0
        if not has.any():
            raise UserError(f"column {self.column.name}: no video has a sound track")
        super().configure(headers[has])

    def review(self, headers: np.ndarray, rows: Sequence[int]) -> None:
        has = headers[:, 0] > 0
        for row in np.array(rows)[~has].tolist():
            self.column.lacking[row] = f"{self.column.cells[row][0]}: no sound track"
        super().review(headers[has], np.array(rows)[has].tolist())

    def recording(self, path: Path) -> tuple[np.ndarray, int, bool]:
        with open_track(path, "audio") as (container, stream):
            as_floats = import_av().AudioResampler(format="fltp")
            frames = [*decoded(path, container, stream), None]
            blocks = [part.to_ndarray() for frame in frames for part in as_floats.resample(frame)]
            if not blocks:
                raise Unreadable(f"{path}: sound without samples")
            x = np.concatenate(blocks, axis=1).T
            cut = len(x) / stream.rate < CUT * (container.duration or 0) / 1e6
            return x, stream.rate, cut
