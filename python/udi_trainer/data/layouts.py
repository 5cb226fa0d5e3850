"""Readers of public multimodal datasets, in the folder layouts of their authors and of OGM-GE.

OGM-GE: github.com/GeWu-Lab/OGM-GE_CVPR2022. Each reader turns a folder into the rows of a manifest. By default, images
are 224 pixels wide, clips have three frames, sound has 22,050 Hz, and encoders are ResNet-18. If a protocol has no
validation split, one is drawn from the training samples, so that nothing is selected on test.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..console import log
from ..errors import UserError
from ..options import Options, reads
from ..registry import datasets
from .cache import CacheOptions
from .dataset import DataRoot, Dataset, Fold
from .kinds import VIDEOS, AugmentationOptions, Damage, PictureOptions, SoundOptions, is_hidden
from .manifest import Columns, build
from .pipelines import Features
from .rows import Rows

FILES = (DataRoot, Columns, Damage, CacheOptions)  # options of all readers here
FOLDS = 7  # of cremad's actors: one fold for validation, the next for test


def find_path(root: Path, what: str, *candidates: str) -> Path:
    """The first of these files or folders that exists."""
    for name in candidates:
        if (root / name).exists():
            return root / name
    raise UserError(f"--data-root {root} lacks {what}: looked for {', '.join(str(root / name) for name in candidates)}")


def read_lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise UserError(f"{file} cannot be read ({error})") from None


def read_fields(file: Path, separator: str, count: int) -> list[list[str]]:
    """The lines of a list, split into fields; each line must have at least ``count``."""
    rows = [line.split(separator) for line in read_lines(file)]
    for line, row in enumerate(rows, 1):
        if len(row) < count:
            raise UserError(f"{file}, line {line}: {separator.join(row)!r} has fewer than {count} fields")
    return rows


def first_existing(folders: Sequence[Path], *names: str) -> str:
    """The first existing path among these names; else the first candidate, which is then reported as missing."""
    paths = [folder / name for folder in folders for name in names]
    return str(next((path for path in paths if path.exists()), paths[0]))


def need_root(name: str, options: Options) -> Path:
    root = options.of(DataRoot).data_root
    if root is None or not Path(root).is_dir():
        raise UserError(f"dataset {name} needs --data-root DIR, the folder with its files (got {root})")
    return Path(root).absolute()  # rows hold paths below it, which are not relative to it


def in_videos(name: str) -> list[str]:
    """The names that the video of a clip may have, which holds its frames and its sound."""
    return [name + ending for ending in VIDEOS]


def kind_of(paths: Sequence[Path], kind: str) -> str:
    """The kind of frames or sound, which may be extracted already or within the videos."""
    path = next((path for path in paths if path.exists()), paths[0])
    in_video = path.suffix.lower() in VIDEOS and not path.is_dir()
    return {"frames": "video", "audio": "videosound"}.get(kind, kind) if in_video else kind


def build_dataset(root: Path, rows: list[dict[str, str]], options: Options, **defaults: float) -> Dataset:
    """The dataset of these rows. Options that the run does not set take the usual values of the field.

    With ``allow_missing``, files that do not exist are modalities that their samples lack.
    """
    kinds = {"frames": "frames", "flow": "flow", "sound": "audio", "view1": "image", "view7": "image"}
    kinds = {m: kind_of([root / row[m] for row in rows], kind) for m, kind in kinds.items() if m in rows[0]}
    for m in kinds if options.of(Columns).allow_missing else ():
        lacking = [row for row in rows if not all((root / path).exists() for path in row[m].split(";"))]
        for row in lacking:
            row[m] = ""
        if lacking:
            count = f"{len(lacking)} of {len(rows)}"
            log.warning("%s: %s samples have no file of %s, such as %s", root, count, m, lacking[0]["id"])
    usual: dict[str, Any] = {
        "image_size": 224,
        "sample_rate": 22050,
        "kinds": kinds,
    } | defaults
    values = options.flat()
    options = options.replace(**{n: value for n, value in usual.items() if values.get(n) is None})
    data = build(Rows(str(root), root, rows), options)
    return replace(data, modalities={m: replace(view, encoder="resnet18") for m, view in data.modalities.items()})


@datasets.register("cremad", needs=("PIL", "soundfile"), extra="data")
@reads(*FILES, Fold, PictureOptions, SoundOptions, AugmentationOptions)
def cremad(options: Options) -> Dataset:
    """CREMA-D: faces and voices of 91 actors, six emotions.

    Protocol of OGM-GE: train.csv and test.csv (id,LABEL), one frame per second, sound repeated to 3 seconds. Training
    and test contain all actors. With ``fold``, validation and test contain only actors that training does not. Frames
    and sound that are not extracted are read from VideoFlash.
    """
    root = need_root("cremad", options)
    frames = [find_path(root, "frames", "Image-01-FPS", "visual/Image-01-FPS", "visual", "VideoFlash")]
    sounds = [find_path(root, "sound", "AudioWAV", "Audio-01-FPS", "audio", "wav", "Audio", "VideoFlash")]
    rows = []
    for split in ("train", "test"):
        for name, label, *_ in read_fields(
            find_path(root, f"its {split} list", f"{split}.csv", f"annotations/{split}.csv"), ",", 2
        ):
            files = {
                "frames": first_existing(frames, name, *in_videos(name)),
                "sound": first_existing(sounds, f"{name}.wav", *in_videos(name)),
            }
            rows.append({"id": name, "label": label, "split": split} | files)
    fold = options.of(Fold).fold
    if fold is not None:
        actors = sorted({row["id"].split("_")[0] for row in rows})
        place = {actor: (i - fold) % FOLDS for i, actor in enumerate(actors)}
        for row in rows:
            row["group"] = row["id"].split("_")[0]
            row["split"] = ("val", "test")[place[row["group"]]] if place[row["group"]] < 2 else "train"
    return build_dataset(root, rows, options, audio_length=3.0)


@datasets.register("kinetics-sounds", needs=("PIL", "soundfile"), extra="data")
@reads(*FILES, PictureOptions, SoundOptions, AugmentationOptions)
def kinetics_sounds(options: Options) -> Dataset:
    """Kinetics-Sounds: 31 actions that can be seen and heard.

    Lists as in OGM-GE's repository: my_train.txt and my_test.txt with lines ``id,10,label``; clips of 10 seconds, as
    frames and sound or as videos.
    """
    root = need_root("kinetics-sounds", options)
    rows = []
    for split in ("train", "test"):
        parents = [f"{split}-videos/{split}-set-img", f"visual/{split}_img", f"{split}_img", "visual", "."]
        frames = find_path(root, f"frames of {split}", *(f"{parent}/Image-01-FPS" for parent in parents), split)
        sounds = find_path(
            root, f"sound of {split}", f"{split}-audios/{split}-set", f"audio/{split}", f"{split}_audio", "audio", split
        )
        for name, _, label, *_ in read_fields(find_path(root, f"its {split} list", f"my_{split}.txt"), ",", 3):
            sound = first_existing([sounds], f"{name}.wav", f"{name}/{name}.wav", *in_videos(name))
            files = {"frames": first_existing([frames], name, *in_videos(name)), "sound": sound}
            rows.append({"id": name, "label": label, "split": split} | files)
    return build_dataset(root, rows, options)


@datasets.register("ave", needs=("PIL", "soundfile"), extra="data")
@reads(*FILES, PictureOptions, SoundOptions, AugmentationOptions)
def ave(options: Options) -> Dataset:
    """AVE: 28 events that can be seen and heard (Tian et al. 2018, arXiv 1803.08842).

    The authors' trainSet.txt, valSet.txt and testSet.txt with lines ``category&id&quality&start&end``. A clip that is
    listed several times is used once. Frames and sound that are not extracted are read from the videos.
    """
    root = need_root("ave", options)
    videos = ("AVE", "AVE_Dataset/AVE")
    frames = [find_path(root, "frames", "Image-01-FPS-SE", "Image-01-FPS", "visual", *videos)]
    sounds = [find_path(root, "sound (wav)", "Audio-01-FPS-SE", "AudioWAV", "Audios", "audio", "wav", "Audio", *videos)]
    rows: dict[str, dict[str, str]] = {}
    for split in ("test", "val", "train"):
        for label, name, *_ in read_fields(
            find_path(root, f"its {split} list", f"{split}Set.txt", f"data/{split}Set.txt"), "&", 2
        ):
            files = {
                "frames": first_existing(frames, name, *in_videos(name)),
                "sound": first_existing(sounds, f"{name}.wav", *in_videos(name)),
            }
            rows.setdefault(name, {"id": name, "label": label, "split": split} | files)
    return build_dataset(root, list(rows.values()), options)


@datasets.register("ucf101", needs=("PIL",), extra="data")
@reads(*FILES, Fold, PictureOptions, AugmentationOptions)
def ucf101(options: Options) -> Dataset:
    """UCF101: actions as images and optical flow, as distributed by feichtenhofer/twostreamfusion.

    Files: jpegs_256/<clip>, tvl1_flow/u/<clip>, tvl1_flow/v/<clip>, trainlist01.txt and testlist01.txt. ``fold`` 1 and
    2 select the other two lists. The clips of a group come from one video; validation takes whole groups.
    """
    root = need_root("ucf101", options)
    list_number = (options.of(Fold).fold or 0) + 1
    frames = find_path(root, "frames", "jpegs_256", "ucf101_jpegs_256/jpegs_256")
    flow = find_path(root, "flow", "tvl1_flow", "ucf101_tvl1_flow/tvl1_flow")
    rows = []
    for split in ("train", "test"):
        name = f"{split}list{list_number:02d}.txt"
        for line in read_lines(find_path(root, f"its {split} list", name, f"ucfTrainTestlist/{name}")):
            label, _, clip = line.split()[0].partition("/")
            clip = clip.removesuffix(".avi")
            alternative = clip.replace("HandStandPushups", "HandstandPushups")  # lists and folders spell it differently
            u, v = (first_existing([flow / component], clip, alternative) for component in "uv")
            files = {"frames": first_existing([frames], clip, alternative), "flow": f"{u};{v}"}
            rows.append({"id": clip, "label": label, "split": split, "group": clip.rsplit("_", 1)[0]} | files)
    return build_dataset(root, rows, options)


@datasets.register("modelnet40", needs=("PIL",), extra="data")
@reads(*FILES, PictureOptions, AugmentationOptions)
def modelnet40(options: Options) -> Dataset:
    """ModelNet40: views 1 and 7 of MVCNN's 12 images per object (<class>/{train,test}/<object>_001.png)."""
    root = need_root("modelnet40", options)
    objects: dict[tuple[str, str, str], Path] = {}
    for split in ("train", "test"):
        for file in sorted(root.glob(f"*/{split}/*.png")):
            view = re.fullmatch(r"(.+?)[._](?:shaded_v)?(\d{3})", file.stem)
            if view and not is_hidden(file.name):
                objects.setdefault((file.parent.parent.name, split, view[1]), file.relative_to(root))
    if not objects:
        raise UserError(
            f"--data-root {root} lacks images: looked for {root}/<class>/train/<object>_001.png to _012.png"
        )
    rows = []
    for (label, split, name), file in objects.items():
        files = {f"view{n}": str(file.with_name(f"{file.stem[:-3]}{n:03d}.png")) for n in (1, 7)}
        rows.append({"id": f"{label}/{split}/{name}", "label": label, "split": split} | files)
    return build_dataset(root, rows, options)


@datasets.register("avmnist")
@reads(*FILES)
def avmnist(options: Options) -> Dataset:
    """AV-MNIST as in MultiBench: image/ and audio/{train,test}_data.npy, {train,test}_labels.npy.

    Protocol: the last twelfth of training is validation (5,000 of 60,000), and values are divided by 255.
    """
    root = need_root("avmnist", options)
    rows = []
    for split in ("train", "test"):
        images, sounds = (find_path(root, "its arrays", f"{name}/{split}_data.npy") for name in ("image", "audio"))
        file = find_path(root, "its labels", f"{split}_labels.npy")
        try:
            sizes = [len(np.load(path, mmap_mode="r", allow_pickle=False)) for path in (images, sounds)]
            labels = np.load(file, allow_pickle=False).astype(int).tolist()
        except (OSError, ValueError) as error:
            raise UserError(f"{root}: the {split} arrays cannot be read ({error})") from None
        if set(sizes) != {len(labels)}:
            raise UserError(f"{root}: {sizes[0]} images, {sizes[1]} sounds and {len(labels)} labels in {split}")
        cut = len(labels) - len(labels) // 12 if split == "train" else len(labels)
        for i, label in enumerate(labels):
            part = split if i < cut else "val"
            rows.append({"label": str(label), "split": part, "image": f"{images}#{i}", "audio": f"{sounds}#{i}"})
    data = build(Rows(str(root), root, rows), options)
    views = {}
    for m, view in data.modalities.items():
        shape = data.train.stored[m].shape[1:]
        side = round(shape.numel() ** 0.5)
        views[m] = replace(view, encoder="cnn", make=Features((0.0,), (255.0,), (1, side, shape.numel() // side)))
    return replace(data, modalities=views)
