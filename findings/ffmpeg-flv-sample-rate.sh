#!/usr/bin/env bash
# FFmpeg writes sound of 8 or 16 kHz into FLV as 5512 Hz, without a word: it plays slower and lower.
#
# Version:   PyAV 18.1.0, with its own FFmpeg 8 (libavformat 62.12).
# Input:     one second of silence, mono, 16 bits, as pcm_s16le in FLV, at rates of 8000 to 44100 Hz; MOV beside it.
# Behaviour: FLV has room for four rates (5512, 11025, 22050 and 44100 Hz). FFmpeg refuses others, but 8000 and 16000 Hz,
#            which some of FLV's codecs imply, pass with PCM too. The file then says 5512 Hz: all samples are there, and a
#            second lasts 1.45 or 2.9 s. A speech set that was converted so has sound that no longer fits its frames.
# Expected:  a refusal, as for other rates.
# Here:      videosound reads the rate that the file states; the tests write the sound of FLV as AAC, which states its own.
#
# Output seen:
#
#     PyAV 18.1.0, libavformat 62.12
#     flv  8000 Hz: read as  5512 Hz, 8000 samples, 1.45 s
#     flv 16000 Hz: read as  5512 Hz, 16000 samples, 2.90 s
#     flv 22050 Hz: read as 22050 Hz, 22050 samples, 1.00 s
#     mov 16000 Hz: read as 16000 Hz, 16000 samples, 1.00 s
#     flv 32000 Hz: refused
#     as described
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==18.1.0 numpy
cat > "$folder/show.py" <<'PYTHON'
import io

import av
import numpy as np


def read_back(container, rate):
    """The rate that a file states, and its number of samples; None if it cannot be written."""
    file = io.BytesIO()
    try:
        with av.open(file, "w", format=container) as output:
            stream = output.add_stream("pcm_s16le", rate=rate, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, rate), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = rate, 0
            output.mux([*stream.encode(frame), *stream.encode(None)])
    except (av.FFmpegError, ValueError):
        return None
    file.seek(0)
    with av.open(file) as source:
        stream = source.streams.audio[0]
        return stream.rate, sum(frame.samples for frame in source.decode(stream))


major, minor, _ = av.library_versions["libavformat"]
print(f"PyAV {av.__version__}, libavformat {major}.{minor}")
as_described = True
wanted = {("flv", 8000): 5512, ("flv", 16000): 5512, ("flv", 22050): 22050, ("mov", 16000): 16000, ("flv", 32000): None}
for (container, rate), stated in wanted.items():
    found = read_back(container, rate)
    if found:
        print(f"{container} {rate:5} Hz: read as {found[0]:5} Hz, {found[1]} samples, {found[1] / found[0]:.2f} s")
    else:
        print(f"{container} {rate} Hz: refused")
    as_described &= found == (stated and (stated, rate))
print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
raise SystemExit(not as_described)
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
