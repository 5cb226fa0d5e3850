import pytest
import torch

pytest.importorskip("sklearn", reason='needs the trainer\'s extra: pip install -e ".[train]"')
pytest.importorskip("matplotlib", reason='needs the trainer\'s extra: pip install -e ".[train]"')

from udi_trainer import Dataset, Modality, Split
from udi_trainer.registry import datasets

from .helpers import write_idx


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, request):
    """Every test has a working directory of its own, runs on the CPU unless it is for a GPU, and leaves torch's
    threads as they were.
    """
    monkeypatch.chdir(tmp_path)
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def register(monkeypatch):
    """Adds to a registry for the length of a test: ``register(datasets, "name", thing)``."""

    def add(registry, name, thing):
        monkeypatch.setitem(registry._needs, name, ((), None))
        monkeypatch.setitem(registry, name, thing)

    return add


@pytest.fixture
def three_views(register):
    """The name of a dataset of three modalities, the first the cleanest."""

    def three(options):
        generator = torch.Generator().manual_seed(0)
        centers = torch.randn(4, 6, generator=generator)
        noise = {"clean": 0.3, "noisy": 1.0, "worse": 2.0}

        def split(size):
            labels = torch.randint(4, (size,), generator=generator)
            views = {m: centers[labels] + s * torch.randn(size, 6, generator=generator) for m, s in noise.items()}
            return Split(labels, views)

        modalities = {name: Modality("mlp", (name,)) for name in noise}
        return Dataset(4, modalities, split(400), split(200), split(200), "three")

    register(datasets, "three", three)
    return "three"


@pytest.fixture
def double_views(three_views, register):
    """The name of the same dataset in float64, which is torch's default dtype for the length of the test.

    Some samples lack the third modality.
    """

    def double(options):
        data = datasets[three_views](options)
        for modality in data.modalities.values():
            modality.make = torch.Tensor.double
        for split in data.splits().values():
            split.stored["worse present"] = torch.arange(len(split)) % 5 > 0
        return data

    register(datasets, "double", double)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield "double"
    torch.set_default_dtype(usual)


@pytest.fixture
def mixed():
    """A small dataset of sequences of floats, images and vectors; two classes; sizes that no batch divides."""
    generator = torch.Generator().manual_seed(0)

    def split(size):
        labels = torch.arange(size) % 2
        signal = labels.float() * 2 - 1
        sound = torch.randn(size, 50, 3, generator=generator) + signal[:, None, None]
        image = torch.randint(100, (size, 3, 8, 8), generator=generator) + 100 * labels[:, None, None, None]
        vector = torch.randn(size, 5, generator=generator) + 0.3 * signal[:, None]
        return Split(labels, {"sound": sound, "image": image.to(torch.uint8), "vector": vector})

    modalities = {
        "audio": Modality("mlp", ("sound",)),
        "picture": Modality("cnn", ("image",), pixels),
        "sensor": Modality("mlp", ("vector",)),
    }
    return Dataset(2, modalities, split(101), split(37), split(41), "mixed")


def pixels(image):
    return image / 255


@pytest.fixture
def little_mnist(tmp_path):
    generator = torch.Generator().manual_seed(0)
    root = tmp_path / "mnist"
    root.mkdir()
    for part, size in (("train", 240), ("t10k", 40)):
        images = torch.randint(256, (size, 28, 28), generator=generator, dtype=torch.uint8)
        write_idx(root / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(root / f"{part}-labels-idx1-ubyte.gz", torch.arange(size, dtype=torch.uint8) % 10)
    return root


@pytest.fixture
def folder(tmp_path):
    """Writes files, see files.py."""
    from .data.files import Folder

    (tmp_path / "files").mkdir()
    return Folder(tmp_path / "files")


@pytest.fixture
def options(tmp_path):
    """The options of all runs in these tests."""
    return {"cache_dir": tmp_path / "cache", "device": "cpu", "progress": False}
