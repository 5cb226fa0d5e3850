"""Checks of a dataset before training."""

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import nn

from ..console import log
from ..errors import UserError
from ..registry import methods
from .dataset import Dataset, Split

SCALES = (0.1, 10.0)  # root mean squares of inputs that need no warning
SCALE_SAMPLES = 2000  # training samples, evenly spaced, that it is computed from


def check(data: Dataset) -> None:
    """Raises a UserError for the first problem, which names the split and the tensor."""
    if not isinstance(data.classes, Integral) or data.classes < 2:
        raise UserError(f"{data.name} has {data.classes!r} classes: two or more are needed")
    if len(data.modalities) < 2:
        raise UserError(f"{data.name} has modalities {list(data.modalities)}: two or more are needed")
    for name in data.modalities:
        reserved = name in methods or hasattr(nn.ModuleDict(), name)
        if reserved or not name or not set(name).isdisjoint("./\\"):
            raise UserError(f"a modality cannot be named {name!r}: choose another name, without dots and slashes")
    check_names("class_names", data.class_names, data.classes, "classes")
    for name, split in data.splits().items():
        check_split(name, split, data)
    counts = torch.bincount(data.train.labels[data.train.labels >= 0].cpu(), minlength=data.classes)
    if absent := (counts == 0).nonzero().flatten().tolist():
        raise UserError(f"no training sample has label {', '.join(map(str, absent))}, of {data.classes} classes")
    check_presence(data)
    for m, modality in data.modalities.items():
        shapes = {name: tuple(modality.sample(split).shape[1:]) for name, split in data.splits().items()}
        if len(set(shapes.values())) > 1:
            raise UserError(f"inputs of {m} differ in shape: {', '.join(f'{n} {s}' for n, s in shapes.items())}")
    warn_about_scale(data)


def warn_about_scale(data: Dataset) -> None:
    """Warns of inputs that are taken as they are and are far from the scale that encoders learn well at.

    Integers that an encoder of the user's own reads may be names, and are no warning.
    """
    for m, view in data.modalities.items():
        x = data.train.stored[view.reads[0]]
        names = view.encoder == "words" or (callable(view.encoder) and not x.is_floating_point())
        if view.make is not torch.Tensor.float or names:
            continue
        has = data.train.present(m)
        x = x if has is None else x[has.to(x.device)]
        scale = x[:: math.ceil(len(x) / SCALE_SAMPLES)].double().square().mean().sqrt().item()
        if not SCALES[0] <= scale <= SCALES[1] and scale:
            log.warning(
                "%s is not standardised, its values are of size %.2g (root mean square in training), and most encoders"
                " learn best near 1: make=udi_trainer.data.pipelines.Features.of(training samples) standardises it",
                m, scale,
            )  # fmt: skip


def check_names(what: str, names: object, count: int, of: str) -> None:
    """Checks that there are as many names as things, if any."""
    if names is None:
        return
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
        raise UserError(f"{what} must be a list of str, got {type(names).__name__}")
    if len(names) != count:
        raise UserError(f"{what} has {len(names)} names for {count} {of}")


def check_presence(data: Dataset) -> None:
    """Checks that each split has a labelled sample of each modality."""
    for m in data.modalities:
        for name, split in data.splits().items():
            if (has := split.present(m)) is not None and not (has & (split.labels.cpu() >= 0)).any():
                raise UserError(f"no labelled {name} sample has {m}: leave the modality out")


def check_split(name: str, split: Split, data: Dataset) -> None:
    labels = split.labels
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64 or labels.dim() != 1:
        got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise UserError(f"{name} labels must be int64 (N,), got {got}")
    if not len(labels):
        raise UserError(f"the {name} split is empty")
    check_names(f"{name} ids", split.ids, len(labels), "samples")
    minimum = -1 if name == "train" else 0
    wrong = ((labels < minimum) | (labels >= data.classes)).nonzero().flatten()
    if len(wrong):
        i = int(wrong[0])
        unlabelled = ", or -1 for unlabelled" if name == "train" else ""
        raise UserError(
            f"{name} label {i} is {int(labels[i])}: labels are 0 to {data.classes - 1}{unlabelled}"
            f" ({len(wrong)} of {len(labels)} are not)"
        )
    for m, modality in data.modalities.items():
        if isinstance(modality.reads, str):
            raise UserError(f"{m} reads {modality.reads!r}: give a tuple of names, ({modality.reads!r},)")
        for stored in modality.reads:
            if stored not in split.stored:
                has = ", ".join(split.stored) or "nothing"
                raise UserError(f"{m} reads {stored!r}, which {name} lacks: it has {has}")
    for stored, t in split.stored.items():
        if stored in ("labels", "index"):
            raise UserError(f"a stored tensor cannot be named {stored!r}: batches use this name")
        if not isinstance(t, torch.Tensor) or not (t.is_nested or t.dim()):
            raise UserError(f"{name} {stored} must be a tensor (N, ...), got {type(t).__name__}")
        if unusable := unusable_kind(t):
            raise UserError(f"{name} {stored} is {unusable}: give a dense tensor of numbers that torch computes with")
        if len(t) != len(labels):
            raise UserError(f"{name} {stored} has {len(t)} samples, but there are {len(labels)} labels")
        if t.is_floating_point() and stored not in data.checked:
            for start in range(0, len(t), 4096):  # in chunks: one mask for all samples would take too much memory
                chunk = t[start : start + 4096]
                bad = ~chunk.isfinite().reshape(len(chunk), -1).all(1)
                if bad.any():
                    raise UserError(f"{name} {stored} has NaN or inf in sample {start + int(bad.nonzero()[0])}")


def unusable_kind(t: torch.Tensor) -> str | None:
    """Why a stored tensor cannot be trained on, or None."""
    if t.is_nested:
        return "nested"
    if t.layout is not torch.strided:
        return f"sparse ({t.layout})"
    if t.is_quantized:
        return f"quantized ({t.dtype})"
    if t.is_meta:
        return "on the device meta, without values"
    if t.is_complex() or (t.is_floating_point() and t.dtype.itemsize < 2):
        return f"of {t.dtype}"
    return None
