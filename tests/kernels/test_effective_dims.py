import pytest
import torch
from losses import resident

from udi_kernels import effective_dims, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def definition(features, labels, num_classes):
    """With all N x C x D distances, in float64."""
    features, present = features.double(), labels.unique()
    means = torch.stack([features[labels == k].mean(0) for k in present])
    nearest = present[(features[:, None] - means).abs().argmin(1)]
    hits = (nearest == labels[:, None]).sum(0)
    return hits * len(hits) > hits.sum()


def draw(n, c, d, dtype=torch.float32, device="cpu"):
    labels = torch.randint(c, (n,), device=device)
    separation = torch.rand(d, device=device) * 3
    return (torch.randn(n, d, device=device) + torch.randn(c, d, device=device)[labels] * separation).to(dtype), labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,c,d", [(1, 1, 3), (5, 2, 1), (300, 10, 33), (1000, 101, 130), (2000, 3, 64)])
def test_equals_the_definition(n, c, d, dtype, device):
    for _ in range(3):
        features, labels = draw(n, c, d, dtype, device)
        want = definition(features, labels, c)
        assert torch.equal(effective_dims(features, labels, c), want)
        assert torch.equal(reference.effective_dims(features, labels, c), want)


def test_ties_go_to_the_lower_class(device):
    """Small integers: means that are equal, and samples in the middle between two."""
    for trial in range(50):
        labels = torch.arange(4, device=device).repeat(4)
        features = torch.randint(-2, 3, (16, 40), device=device).float()
        features = features.view(4, 4, 40).sort(0).values.view(16, 40) if trial % 2 else features
        assert torch.equal(effective_dims(features, labels, 4), definition(features, labels, 4))


def test_example(device):
    labels = torch.tensor([0, 0, 1, 1], device=device)
    features = torch.tensor([[0.0, 0.0, 5.0], [1.0, 9.0, 5.0], [8.0, 1.0, 5.0], [9.0, 8.0, 5.0]], device=device)
    # All samples are nearest to their own mean in the first, two (both sides' tie is none) in the others.
    assert effective_dims(features, labels, 2).tolist() == [True, False, False]


def test_absent_classes_and_unlabelled_rows(device):
    features, labels = draw(200, 5, 20, device=device)
    labels[labels == 2] = 3
    want = definition(features, labels, 5)
    assert torch.equal(effective_dims(features, labels, 5), want)
    assert torch.equal(effective_dims(features, labels, 50), want)
    more = torch.cat([features, torch.full_like(features[:7], float("nan"))])
    unlabelled = torch.cat([labels, torch.full_like(labels[:7], -1)])
    for op in (effective_dims, reference.effective_dims):
        assert torch.equal(op(more, unlabelled, 5), want)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(value, device):
    features, labels = draw(200, 5, 20, device=device)
    features[3, 7] = value
    assert torch.equal(effective_dims(features, labels, 5), reference.effective_dims(features, labels, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_not_finite_anywhere(dtype, device, backend):
    """Sprinkled over labelled and unlabelled rows: nearest to nothing, as written out here."""
    bad = torch.tensor([float("nan"), float("inf"), -float("inf")], device=device)
    for _ in range(10):
        features, labels = draw(60, 4, 30, dtype, device)
        where = torch.rand(60, 30, device=device) < 0.02
        features = torch.where(where, bad[torch.randint(3, (60, 30), device=device)].to(dtype), features)
        labels = labels.masked_fill(torch.rand(60, device=device) < 0.2, -1)
        hits = []
        for column in features.double().T:
            means = torch.stack([column[labels == k].mean() for k in range(4)])
            usable = means.isfinite().nonzero().flatten()
            own = [
                len(usable) > 0 and x.isfinite() and usable[(x - means[usable]).abs().argmin()] == k
                for x, k in zip(column, labels, strict=True)
            ]
            hits.append(sum(map(int, own)))
        hits = torch.tensor(hits, device=device)
        assert torch.equal(effective_dims(features, labels, 4), hits * 30 > hits.sum())


@pytest.mark.parametrize("num_classes", [301, 2**31, 2**62, 2**63 - 1])
def test_more_classes_than_rows(num_classes, device, backend):
    """Only those that have a sample take memory, and ties still go to the lower class."""
    features, labels = draw(300, 7, 20, device=device)
    features = features.round()
    names = torch.tensor([0, 3, 100, 101, 102, 200, 299], device=device)
    names[1:] += num_classes - 300
    want = definition(features, labels, 7)
    before = resident()
    assert torch.equal(effective_dims(features, names[labels], num_classes), want)
    assert resident("VmHWM") - before < 50e6
    labels[:50] = names[:1] = -1
    assert torch.equal(effective_dims(features, labels, num_classes), effective_dims(features, labels, 7))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_integer_labels(dtype, device, backend):
    features, labels = draw(300, 7, 20, device=device)
    for num_classes in (7, 300, 1000):
        assert torch.equal(effective_dims(features, labels.to(dtype), num_classes), effective_dims(features, labels, 7))


@pytest.mark.parametrize("shape", [(0, 5), (4, 0)])
def test_empty(shape, device):
    labels = torch.zeros(shape[0], dtype=torch.int64, device=device)
    got = effective_dims(torch.zeros(shape, device=device), labels, 3)
    assert got.dtype == torch.bool and got.shape == shape[1:] and not got.any()


def test_memory_beyond_the_features():
    features, labels = draw(10_000, 101, 512)
    before = resident()
    effective_dims(features, labels, 101)
    assert resident("VmHWM") - before < 50e6  # all distances take 2 GB


def test_strides_and_int32(device):
    features, labels = draw(300, 7, 120, device=device)
    want = effective_dims(features[:, ::2].contiguous(), labels, 7)
    assert torch.equal(effective_dims(features[:, ::2], labels, 7), want)
    assert torch.equal(effective_dims(features[:, ::2].T.contiguous().T, labels.int(), 7), want)
    assert torch.equal(effective_dims(features[:, ::2], labels.repeat_interleave(2)[::2], 7), want)


def test_threads_change_nothing_and_no_gradient(device):
    features, labels = draw(1000, 7, 300, device=device)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(effective_dims(features.requires_grad_(), labels, 7))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results) and not results[0].requires_grad


def test_opcheck_and_compile(device):
    features, labels = draw(30, 4, 9, device=device)
    want = effective_dims(features, labels, 4)
    for op in (torch.ops.udi_kernels.effective_dims, torch.ops.udi_kernels.effective_dims_fwd):
        torch.library.opcheck(op.default, (features, labels, 4))
    compiled = torch.compile(lambda x, y: effective_dims(x, y, 4), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(features, labels), want)


LABELS = torch.tensor([0, 1, 1])
BAD = {
    "features must be a torch.Tensor, got int": lambda x: effective_dims(1, LABELS, 2),
    "features must be float.*, got torch.int64": lambda x: effective_dims(x.long(), LABELS, 2),
    r"features must have shape \(N, D\), got \(4,\)": lambda x: effective_dims(x[0], LABELS, 2),
    "labels must be of integers, got torch.float32; pass labels.long": lambda x: effective_dims(x, LABELS.float(), 2),
    r"labels must have shape \(3,\), one per row, got \(2,\)": lambda x: effective_dims(x, LABELS[:2], 2),
    "labels must be .*on cpu.*, got .*meta": lambda x: effective_dims(x, LABELS.to("meta"), 2),
    "labels must be dense, got torch.sparse_coo; call .to_dense": lambda x: effective_dims(x, LABELS.to_sparse(), 2),
    "num_classes must be an integer, got bool": lambda x: effective_dims(x, LABELS, True),
    "num_classes must be an integer, got float": lambda x: effective_dims(x, LABELS, 2.0),
    "num_classes must be an integer, got complex": lambda x: effective_dims(x, LABELS, 2j),
    "num_classes must be an integer, got Tensor": lambda x: effective_dims(x, LABELS, torch.tensor(2)),
    r"num_classes must be below 2\*\*63": lambda x: effective_dims(x, LABELS, 10**400),
    "num_classes must be positive, got 0": lambda x: effective_dims(x, LABELS, 0),
    r"labels must be below num_classes \(1\), got 1": lambda x: effective_dims(x, LABELS, 1),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, refused):
    refused(lambda: BAD[message](torch.zeros(3, 4)), f"^effective_dims: {message}")
