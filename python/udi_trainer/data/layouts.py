"""The data sets of this field, as their authors and OGM-GE (github.com/GeWu-Lab/OGM-GE_CVPR2022) lay them out on disk.

Each reader makes a manifest's rows of a folder. Pictures are 224 pixels wide, in three frames at most, sound is 22,050
Hz, encoders are ResNet-18, unless options say otherwise. A validation split that the protocol lacks is drawn from
training samples: nothing is selected on test.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..options import Options, reads
from ..registry import datasets
from .cache import CacheOptions
from .dataset import DataRoot, Dataset, Fold
from .kinds import Augmentation, Pictures, Sound
from .manifest import Columns, Rows, build
from .pipelines import Features

FILES = (DataRoot, Columns, CacheOptions)  # options of all readers here
FOLDS = 7  # of cremad's actors: one for validation, the next for test


def found(root: Path, what: str, *places: str) -> Path:
    """The first of these files or folders that is there."""
    for place in places:
        if (root / place).exists():
            return root / place
    raise UserError(f"--data-root {root} lacks {what}: looked for {', '.join(str(root / place) for place in places)}")


def lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise UserError(f"{file} cannot be read ({error})") from None


def fields(file: Path, separator: str, count: int) -> list[list[str]]:
    """The lines of a list, each of so many fields at least."""
    rows = [line.split(separator) for line in lines(file)]
    for number, row in enumerate(rows, 1):
        if len(row) < count:
            raise UserError(f"{file}, line {number}: {separator.join(row)!r} has fewer than {count} fields")
    return rows


def one_of(folders: Sequence[Path], *names: str) -> str:
    """The first of these names that a folder has; else the first of all, which the manifest's check will miss."""
    places = [folder / name for folder in folders for name in names]
    return str(next((place for place in places if place.exists()), places[0]))


def need_root(name: str, options: Options) -> Path:
    root = options.of(DataRoot).data_root
    if root is None or not Path(root).is_dir():
        raise UserError(f"dataset {name} needs --data-root DIR, the folder of its files (got {root})")
    return Path(root)


def assembled(root: Path, rows: list[dict[str, str]], options: Options, **defaults) -> Dataset:
    """The data set of these rows, with the field's options where the run has none of its own."""
    kinds = {"frames": "frames", "flow": "flow", "sound": "audio", "view1": "image", "view7": "image"}
    usual = {
        "image_size": 224,
        "sample_rate": 22050,
        "kinds": {m: k for m, k in kinds.items() if m in rows[0]},
    } | defaults
    values = options.flat()
    options = options.replace(**{n: value for n, value in usual.items() if values.get(n) is None})
    data = build(Rows(str(root), root, rows), options)
    return replace(data, modalities={m: replace(view, encoder="resnet18") for m, view in data.modalities.items()})


@datasets.register("cremad", needs=("PIL", "soundfile"), extra="data")
@reads(*FILES, Fold, Pictures, Sound, Augmentation)
def cremad(options: Options) -> Dataset:
    """CREMA-D: faces and voices of 91 actors, six emotions.

    Protocol of OGM-GE: train.csv and test.csv (id,LABEL), frames at one a second, sound repeated to 3 seconds. All
    actors are in both. With ``fold`` the actors of validation and test are in no other split.
    """
    root = need_root("cremad", options)
    frames = [found(root, "frames", "Image-01-FPS", "visual/Image-01-FPS", "visual")]
    sounds = [found(root, "sound", "AudioWAV", "Audio-01-FPS", "audio", "wav", "Audio")]
    rows = []
    for split in ("train", "test"):
        for name, label, *_ in fields(
            found(root, f"its {split} list", f"{split}.csv", f"annotations/{split}.csv"), ",", 2
        ):
            files = {"frames": one_of(frames, name), "sound": one_of(sounds, f"{name}.wav")}
            rows.append({"id": name, "label": label, "split": split} | files)
    fold = options.of(Fold).fold
    if fold is not None:
        actors = sorted({row["id"].split("_")[0] for row in rows})
        place = {actor: (i - fold) % FOLDS for i, actor in enumerate(actors)}
        for row in rows:
            row["group"] = row["id"].split("_")[0]
            row["split"] = ("val", "test")[place[row["group"]]] if place[row["group"]] < 2 else "train"
    return assembled(root, rows, options, audio_length=3.0)


@datasets.register("kinetics-sounds", needs=("PIL", "soundfile"), extra="data")
@reads(*FILES, Pictures, Sound, Augmentation)
def kinetics_sounds(options: Options) -> Dataset:
    """Kinetics-Sounds: 31 actions that are seen and heard.

    Lists as in OGM-GE's repository: my_train.txt and my_test.txt, lines ``id,10,label``; clips of 10 seconds.
    """
    root = need_root("kinetics-sounds", options)
    rows = []
    for split in ("train", "test"):
        places = [f"{split}-videos/{split}-set-img", f"visual/{split}_img", f"{split}_img", "visual", "."]
        frames = found(root, f"frames of {split}", *(f"{place}/Image-01-FPS" for place in places), split)
        sounds = found(
            root, f"sound of {split}", f"{split}-audios/{split}-set", f"audio/{split}", f"{split}_audio", "audio", split
        )
        for name, _, label, *_ in fields(found(root, f"its {split} list", f"my_{split}.txt"), ",", 3):
            sound = one_of([sounds], f"{name}.wav", f"{name}/{name}.wav")
            files = {"frames": one_of([frames], name, f"{name}.mp4"), "sound": sound}
            rows.append({"id": name, "label": label, "split": split} | files)
    return assembled(root, rows, options)


@datasets.register("ave", needs=("PIL", "soundfile"), extra="data")
@reads(*FILES, Pictures, Sound, Augmentation)
def ave(options: Options) -> Dataset:
    """AVE: 28 events that are seen and heard (Tian et al. 2018, arXiv 1803.08842).

    The authors' trainSet.txt, valSet.txt and testSet.txt, lines ``category&id&quality&start&end``. A clip that is
    listed more than once counts once.
    """
    root = need_root("ave", options)
    frames = [found(root, "frames", "Image-01-FPS-SE", "Image-01-FPS", "visual")]
    sounds = [found(root, "sound (wav)", "Audio-01-FPS-SE", "AudioWAV", "Audios", "audio", "wav", "Audio")]
    rows = {}
    for split in ("test", "val", "train"):
        for label, name, *_ in fields(
            found(root, f"its {split} list", f"{split}Set.txt", f"data/{split}Set.txt"), "&", 2
        ):
            files = {"frames": one_of(frames, name), "sound": one_of(sounds, f"{name}.wav")}
            rows.setdefault(name, {"id": name, "label": label, "split": split} | files)
    return assembled(root, list(rows.values()), options)


@datasets.register("ucf101", needs=("PIL",), extra="data")
@reads(*FILES, Fold, Pictures, Augmentation)
def ucf101(options: Options) -> Dataset:
    """UCF101: actions as pictures and optical flow, as feichtenhofer/twostreamfusion gives them away.

    jpegs_256/<clip>, tvl1_flow/u/<clip> and v, and trainlist01.txt and testlist01.txt; ``fold`` 1 and 2 are the other
    two lists. Clips of one group come from one film; validation takes whole groups.
    """
    root = need_root("ucf101", options)
    number = (options.of(Fold).fold or 0) + 1
    frames = found(root, "frames", "jpegs_256", "ucf101_jpegs_256/jpegs_256")
    flow = found(root, "flow", "tvl1_flow", "ucf101_tvl1_flow/tvl1_flow")
    rows = []
    for split in ("train", "test"):
        name = f"{split}list{number:02d}.txt"
        for line in lines(found(root, f"its {split} list", name, f"ucfTrainTestlist/{name}")):
            label, _, clip = line.split()[0].partition("/")
            clip = clip.removesuffix(".avi")
            spelled = clip.replace("HandStandPushups", "HandstandPushups")  # lists and folders disagree
            u, v = (one_of([flow / half], clip, spelled) for half in "uv")
            files = {"frames": one_of([frames], clip, spelled), "flow": f"{u};{v}"}
            rows.append({"id": clip, "label": label, "split": split, "group": clip.rsplit("_", 1)[0]} | files)
    return assembled(root, rows, options)


@datasets.register("modelnet40", needs=("PIL",), extra="data")
@reads(*FILES, Pictures, Augmentation)
def modelnet40(options: Options) -> Dataset:
    """ModelNet40 as 12 pictures of each object (MVCNN's <class>/{train,test}/<object>_001.png): views 1 and 7."""
    root = need_root("modelnet40", options)
    objects = {}
    for split in ("train", "test"):
        for file in sorted(root.glob(f"*/{split}/*.png")):
            view = re.fullmatch(r"(.+?)[._](?:shaded_v)?(\d{3})", file.stem)
            if view:
                objects.setdefault((file.parent.parent.name, split, view[1]), file.relative_to(root))
    if not objects:
        raise UserError(
            f"--data-root {root} lacks pictures: looked for {root}/<class>/train/<object>_001.png to _012.png"
        )
    rows = []
    for (label, split, name), file in objects.items():
        files = {f"view{n}": str(file.with_name(f"{file.stem[:-3]}{n:03d}.png")) for n in (1, 7)}
        rows.append({"id": f"{label}/{split}/{name}", "label": label, "split": split} | files)
    return assembled(root, rows, options)


@datasets.register("avmnist")
@reads(*FILES)
def avmnist(options: Options) -> Dataset:
    """AV-MNIST as MultiBench has it: image/ and audio/{train,test}_data.npy, {train,test}_labels.npy.

    Its protocol: the last twelfth of training is validation (5,000 of 60,000), values are divided by 255.
    """
    root = need_root("avmnist", options)
    rows = []
    for split in ("train", "test"):
        images, sounds = (found(root, "its arrays", f"{name}/{split}_data.npy") for name in ("image", "audio"))
        file = found(root, "its labels", f"{split}_labels.npy")
        try:
            sizes = [len(np.load(path, mmap_mode="r", allow_pickle=False)) for path in (images, sounds)]
            labels = np.load(file, allow_pickle=False).astype(int).tolist()
        except (OSError, ValueError) as error:
            raise UserError(f"{root}: the arrays of {split} cannot be read ({error})") from None
        if set(sizes) != {len(labels)}:
            raise UserError(f"{root}: {sizes[0]} images, {sizes[1]} sounds and {len(labels)} labels of {split}")
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
