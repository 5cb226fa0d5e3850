"""Similarity of two modalities' features of the same samples, (N, D) and (N, E), CPU tensors."""

import torch

RIDGE = 1e-2  # relative to the features' mean variance


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear centered kernel alignment |x'y|^2 / (|x'x| |y'y|) with Frobenius norms of centered features; 0 to 1.

    Kornblith et al. 2019, arXiv 1905.00414. Invariant to rotation and scale of either side; 0 for constant features.
    """
    x, y = centered(x), centered(y)
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    return ((x.T @ y).square().sum() / scale).item() if scale > 0 else 0.0


def cross_prediction(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> float:
    """R2 of predicting y's test features from x's by ridge regression, fitted on validation.

    1: y is a linear function of x. 0 or less: x does not predict y linearly, or one of them is constant. Dimensions are
    weighted by their variance. ``x``, ``y``: {"val": features, "test": features}.
    """
    mean_x, mean_y = (z["val"].double().mean(0) for z in (x, y))
    a, b = x["val"] - mean_x, y["val"] - mean_y
    gram, total = a.T @ a, centered(y["test"]).square().sum()
    if not (gram.any() and total > 0):
        return 0.0
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weights = torch.linalg.solve(gram, a.T @ b)  # lstsq is not bitwise reproducible
    error = (y["test"] - mean_y - (x["test"] - mean_x) @ weights).square().sum()
    return (1 - error / total).item()


def centered(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x - x.mean(0)
