"""Oracle and yardstick: the reference in float64, and the same formula in plain torch of the same dtype."""

import torch

EPS = {torch.float64: 2.2e-16, torch.float32: 1.2e-7, torch.bfloat16: 7.8e-3, torch.float16: 9.8e-4}


def run(f, tensors, needs=None, grad=None):
    """Value and gradients of f in leaves made from `tensors`."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format) for t in tensors]
    for leaf, need in zip(leaves, needs or [True] * len(leaves), strict=True):
        leaf.requires_grad_(need)
    value = f(*leaves)
    value.backward(torch.ones_like(value) if grad is None else grad.to(value.dtype))
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def distance(a, b):
    return (a.double() - b.double()).norm().item()


def assert_as_good_as_torch(ours, reference, draw, trials=3):
    """Our error against float64 is no worse than that of the same formula in plain torch of the same dtype.

    `draw()` gives the inputs; errors are root mean squares over some draws. The allowance on top is one rounding of the
    result and of the terms that cancel in it (a tenth of the incoming gradient); 200 of them for float64, where
    plain torch is the oracle too, and by long double the less exact of the two at 1271 classes (1.5e-15 to our 5e-16).
    """
    errors, bounds = [], []
    for _ in range(trials):
        tensors = draw()
        truth = run(reference, [t.double() for t in tensors])
        grad = torch.rand_like(truth[0])
        truth, results, yardstick = (
            run(f, ts, grad=grad)
            for f, ts in ((reference, [t.double() for t in tensors]), (ours, tensors), (reference, tensors))
        )
        value_dtype = results[0].dtype
        for x, t, y in zip(results, truth, yardstick, strict=True):
            assert torch.equal(x.isnan(), t.isnan()), "NaN in other places than in float64"
            x, t, y = x.nan_to_num(), t.nan_to_num(), y.nan_to_num()
            errors.append(distance(x, t))
            own = EPS[x.dtype] * t.norm().item() + EPS[value_dtype] * 0.1 * grad.norm().item()
            bounds.append(1.1 * distance(y, t) + own * (200 if x.dtype == torch.float64 else 1))
    errors, bounds = (torch.tensor(e).reshape(trials, -1).square().mean(0).sqrt() for e in (errors, bounds))
    assert (errors <= bounds).all(), f"errors {errors.tolist()}, allowed {bounds.tolist()} (value, gradients)"


def resident(what="VmRSS"):
    """Bytes of memory now, or (VmHWM) at the peak, which starts anew here."""
    if what == "VmRSS":
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(what))
