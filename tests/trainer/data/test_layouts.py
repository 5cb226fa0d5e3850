"""Small copies of the public datasets: each layout is found and trained on, and missing files are named."""

import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason='needs the extra of files: pip install -e ".[data]"')
pytest.importorskip("soundfile", reason='needs the extra of files: pip install -e ".[data]"')

from udi_trainer import UserError, train
from udi_trainer.data import kinds
from udi_trainer.data.manifest import build
from udi_trainer.data.recipe import samples
from udi_trainer.data.rows import Rows, read, write
from udi_trainer.data.scan import scan
from udi_trainer.options import Options, fields_of
from udi_trainer.registry import datasets

SMALL = {"image_size": 16, "sample_rate": 4000, "audio_length": 0.2}


def cremad(folder, count=48):
    names = [f"{1001 + i % 14}_TAKE{i}_{'ANG HAP'.split()[i % 2]}_XX" for i in range(count)]
    for i, name in enumerate(names):
        folder.clip(f"Image-01-FPS/{name}", i % 2, 1 + i % 3)
        folder.sound(f"AudioWAV/{name}.wav", i % 2, 0.1)
    for split, part in (("train", names[:36]), ("test", names[36:])):
        (folder.path / f"{split}.csv").write_text("".join(f"{name},{name.split('_')[2]}\n" for name in part))


def kinetics_sounds(folder):
    for split, count in (("train", 24), ("test", 8)):
        names = [f"{split}{i}_000001_000011" for i in range(count)]
        for i, name in enumerate(names):
            folder.clip(f"visual/{split}_img/Image-01-FPS/{name}", i % 2, 3)
            folder.sound(f"audio/{split}/{name}.wav", i % 2, 0.2)
        text = "".join(f"{name},10,{i % 2}\n" for i, name in enumerate(names))
        (folder.path / f"my_{split}.txt").write_text(text)


def ave(folder):
    for split, count in (("train", 16), ("val", 8), ("test", 8)):
        names = [f"{split}_{i}" for i in range(count)]
        for i, name in enumerate(names):
            folder.clip(f"Image-01-FPS-SE/{name}", i % 2, 2)
            folder.sound(f"AudioWAV/{name}.wav", i % 2, 0.1)
        text = "".join(f"{('Church bell', 'Bark')[i % 2]}&{name}&good&0&10\n" for i, name in enumerate(names))
        (folder.path / f"{split}Set.txt").write_text(text + text.splitlines()[0] + "\n")


def ucf101(folder):
    lists = {"train": [], "test": []}
    for i in range(32):
        label = ("HandstandPushups", "YoYo")[i % 2]
        name = f"v_{label}_g{i // 4:02d}_c{i % 4:02d}"
        folder.clip(f"jpegs_256/{name}", i % 2, 5)
        for half, level in (("u", 100 + 40 * (i % 2)), ("v", 128)):
            for k in range(4):
                folder.gray(f"tvl1_flow/{half}/{name}/frame{k + 1:06d}.jpg", level)
        split = "test" if i // 4 < 2 else "train"
        number = f" {1 + i % 2}" if split == "train" else ""
        lists[split].append(f"{label}/{name.replace('Handstand', 'HandStand')}.avi{number}\n")
    (folder.path / "ucfTrainTestlist").mkdir()
    for split, content in lists.items():
        (folder.path / f"ucfTrainTestlist/{split}list01.txt").write_text("".join(content))


def modelnet40(folder):
    for split, count in (("train", 12), ("test", 4)):
        for i in range(count):
            for view in range(12):
                folder.image(f"{('chair', 'tv_stand')[i % 2]}/{split}/object_{i:04d}.{view + 1:03d}.png", i % 2)


def avmnist(folder):
    for split, count in (("train", 48), ("test", 8)):
        labels = np.arange(count) % 2
        noise = folder.random.uniform(0, 50, (count, 784))
        (folder.path / "image").mkdir(exist_ok=True)
        (folder.path / "audio").mkdir(exist_ok=True)
        np.save(folder.path / f"image/{split}_data.npy", noise + 100 * labels[:, None])
        np.save(folder.path / f"audio/{split}_data.npy", folder.random.uniform(0, 255, (count, 112, 112)))
        np.save(folder.path / f"{split}_labels.npy", labels)


LAYOUTS = {
    "cremad": (cremad, {"frames": (3, 3, 16, 16), "sound": (1, 47, 13)}, (None, None, 12)),
    "kinetics-sounds": (kinetics_sounds, {"frames": (3, 3, 16, 16), "sound": (1, 47, 13)}, (None, None, 8)),
    "ave": (ave, {"frames": (3, 3, 16, 16), "sound": (1, 47, 13)}, (16, 8, 8)),
    "ucf101": (ucf101, {"frames": (3, 3, 16, 16), "flow": (3, 2, 16, 16)}, (None, None, 8)),
    "modelnet40": (modelnet40, {"view1": (3, 16, 16), "view7": (3, 16, 16)}, (None, None, 4)),
    "avmnist": (avmnist, {"image": (1, 28, 28), "audio": (1, 112, 112)}, (44, 4, 8)),
}


@pytest.mark.parametrize("name, moves", [
    ("cremad", {"Image-01-FPS": "visual", "AudioWAV": "audio"}),
    ("ave", {"AudioWAV": "Audios"}),
])  # fmt: skip
def test_other_places(name, folder, options, moves):
    """The layouts of CREMA-D in OGM-GE's readme and of AVE in DI-MML's scripts."""
    LAYOUTS[name][0](folder)
    for old, new in moves.items():
        (folder.path / old).rename(folder.path / new)
    assert len(dataset(name, folder, options).test) == LAYOUTS[name][2][2]


def test_kinetics_sounds_in_a_folder_a_clip(folder, options):
    """As in OGM-GE's readme."""
    kinetics_sounds(folder)
    for split in ("train", "test"):
        (folder.path / f"visual/{split}_img/Image-01-FPS").rename(folder.path / split)
        for sound in (folder.path / f"audio/{split}").iterdir():
            sound.rename(folder.path / split / sound.stem / sound.name)
    shutil.rmtree(folder.path / "audio")
    assert len(dataset("kinetics-sounds", folder, options).test) == 8


def small(name):
    """Those of SMALL that the data set reads."""
    read = {option for group in datasets[name].reads for option in fields_of(group)}
    return {option: value for option, value in SMALL.items() if option in read}


def dataset(name, folder, options, **more):
    given = {k: v for k, v in options.items() if k != "progress"} | small(name) | more
    chosen = Options.make(dataset=name, data_root=folder.path, **given)
    return datasets.find(name)(chosen)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("written", ["relative", "./relative", "elsewhere/../relative", "~/relative"])
def test_a_root_however_it_is_written(name, written, folder, options, monkeypatch):
    LAYOUTS[name][0](folder)
    home = folder.path.parent
    (home / "elsewhere").mkdir()
    folder.path.rename(home / "relative")
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    folder.path = written
    assert len(dataset(name, folder, options).train)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name, folder, options):
    make, shapes, sizes = LAYOUTS[name]
    make(folder)
    data = dataset(name, folder, options)
    assert {m: tuple(view.sample(data.train).shape[1:]) for m, view in data.modalities.items()} == shapes
    for split, size in zip(data.splits().values(), sizes, strict=True):
        assert len(split) == size or (size is None and len(split))
    encoder = {} if name == "avmnist" else {"encoder": dict.fromkeys(shapes, "cnn")}
    result = train(name, "ensemble", data_root=folder.path, epochs=2, batch_size=8, **small(name), **options, **encoder)
    assert result.metrics["modalities"].keys() == shapes.keys()
    resnet = name != "avmnist"
    assert all((view.encoder == "resnet18") == resnet for view in data.modalities.values())


@pytest.mark.parametrize("name, gone, wanted", [
    ("cremad", "Image-01-FPS", "lacks frames: looked for .*Image-01-FPS, .*visual/Image-01-FPS"),
    ("cremad", "train.csv", "lacks its train list: looked for .*train.csv, .*annotations/train.csv"),
    ("cremad", "AudioWAV/1001_TAKE0_ANG_XX.wav", "column sound: .*1001_TAKE0_ANG_XX.wav: No such file"),
    ("ucf101", "tvl1_flow/u", "column flow: .*tvl1_flow/u/v_"),
    ("modelnet40", "chair/train/object_0000.005.png", None),
    ("modelnet40", "chair/train/object_0000.007.png", "column view7: .*object_0000.007.png: No such file"),
    ("avmnist", "audio/test_data.npy", "lacks its arrays: looked for .*audio/test_data.npy"),
])  # fmt: skip
def test_layout_says_what_it_misses(folder, options, name, gone, wanted):
    LAYOUTS[name][0](folder)
    path = folder.path / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if wanted is None:
        assert len(dataset(name, folder, options).test) == 4
        return
    with pytest.raises(UserError, match=wanted):
        dataset(name, folder, options)


def test_actors_of_a_fold_are_apart(folder, options):
    cremad(folder)
    heard = {}
    for name, split in dataset("cremad", folder, options, fold=2).splits().items():
        for clip in split.ids:
            assert heard.setdefault(clip[:4], name) == name
    assert sorted(set(heard.values())) == ["test", "train", "val"]


def test_flow_and_frames_are_cropped_and_mirrored_together(folder, options):
    """A bright corner stays in the same place of a clip's images and flow under every augmentation."""
    rows = []
    for i in range(12):
        corner = np.full((20, 20), 60)
        corner[2:6, 3:9] = 220
        for name in (f"rgb/{i}/f1.png", f"flow/{i}/u/f1.png", f"flow/{i}/v/f1.png"):
            folder._picture(name, corner[..., None].repeat(3, 2) if "rgb" in name else corner)
        rows.append({"rgb": f"rgb/{i}", "flow": f"flow/{i}", "label": i % 2})
    given = {k: v for k, v in options.items() if k != "progress"}
    chosen = Options.make(dataset="manifest", **given, augment="crop,flip", image_size=16, frames=1)
    data = build(read(folder.manifest(rows)), chosen)
    batch = data.train.batch(torch.arange(len(data.train)).repeat(8), ("rgb", "flow"))
    batch["chance"] = torch.rand(len(batch["index"]), 4)
    rgb, flow = (data.modalities[m].input(batch, training=True) for m in ("rgb", "flow"))
    make = data.modalities["flow"].make
    u, v = (255 * (flow[:, 0, i] * make.std[i] + make.mean[i]) for i in (0, 1))
    bright = rgb[:, 0, 0] > 0, v > 255 * make.mean[1]
    assert torch.equal(*bright) and len(bright[0].unique(dim=0)) > 4
    mirrored = (batch["chance"][:, 2] > 0.5)[:, None, None]
    torch.testing.assert_close(u, torch.where(mirrored, 255 - v, v), rtol=0, atol=0.01)
    again = data.modalities["rgb"].input(batch, training=True)
    assert torch.equal(rgb, again)


def test_manifest_from_a_folder(folder, options, tmp_path):
    for i in range(24):
        folder.sound(f"rec/{i % 2}_anna{i // 6}_{i}.wav", i % 2, 0.1)
        folder.image(f"pics/{i % 2}/anna{i // 6}-{i}.png", i % 2)
        folder.image(f"pics/{i % 2}/._anna{i // 6}-{i}.png", i % 2)  # what macOS leaves on other disks
        folder.image(f".ipynb_checkpoints/{i % 2}/anna{i // 6}-{i}.png", i % 2)
    patterns = {"sound": "rec/{label}_{speaker}_{take}.wav", "image": "pics/{label}/{speaker}-{take}.png"}
    assert len(scan(folder.path, {"image": "{folder}/{label}/{speaker}-{take}.png"})) == 24
    rows = scan(folder.path, patterns, base=tmp_path)
    assert len(rows) == 24 and rows[0].keys() == {"id", "label", "group", "sound", "image"}
    write(tmp_path / "m.csv", rows)
    given = {k: v for k, v in options.items() if k != "progress"}
    data = build(read(tmp_path / "m.csv"), Options.make(dataset="manifest", **given))
    assert sum(map(len, data.splits().values())) == 24
    with pytest.raises(UserError, match="no path matches"):
        scan(folder.path, {"sound": "{label}.flac"})
    with pytest.raises(UserError, match="are both image of 0: add fields"):
        scan(folder.path, {"sound": "rec/{label}_anna0_{a}.wav", "image": "pics/{label}/{b}.png"})


def test_new_files_for_a_named_dataset(folder, options):
    """Read by the names of its modalities, in the shapes of the run, whose options its reader has chosen."""
    cremad(folder)
    given = Options.make(dataset="cremad", data_root=folder.path, cache_dir=options["cache_dir"], **SMALL)
    data = datasets["cremad"](given)
    new = [
        {"id": name, "frames": f"Image-01-FPS/{name}", "sound": f"AudioWAV/{name}.wav", "label": "HAP"}
        for name in data.test.ids
    ]
    read_again = samples(Rows("new.csv", folder.path, new), data.recipe, data.class_names)
    assert read_again.labels.tolist() == [1] * len(new) and read_again.ids == data.test.ids
    assert read_again.stored.keys() == data.test.stored.keys()
    for name, t in read_again.stored.items():
        assert torch.equal(t, data.test.stored[name])


def test_a_kind_whose_state_is_not_plain(folder, options, register):
    """Its run folder must not hold what only code can load; the run itself is unharmed."""

    class Own(kinds.Array):
        def configure(self, headers):
            super().configure(headers)
            self.limit = np.float64(2)

    register(kinds.kinds, "own", Own)
    rows = [row | {"own": folder.array(f"{i}.npy", np.full(4, i))} for i, row in enumerate(folder.pairs(24))]
    given = {k: v for k, v in options.items() if k != "progress"}
    data = build(read(folder.manifest(rows)), Options.make(dataset="manifest", kinds="own=own", **given))
    assert data.recipe is None and data.train.stored["own"].shape[1] == 4
