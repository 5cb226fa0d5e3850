"""Few labels: how many remain, and of which samples."""

import pytest
import torch

from udi_trainer import Options, UserError
from udi_trainer.data.digits import splitdigits
from udi_trainer.data.labels import hide, stratified


@pytest.mark.parametrize("sizes, count", [((500, 300, 200), 100), ((10, 10, 10), 7), ((97, 2, 1), 5)])
def test_stratified(sizes, count):
    """Proportional to within one sample, and at least one of each class."""
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    drawn = stratified(labels, count, torch.Generator().manual_seed(0))
    assert len(drawn) == len(drawn.unique()) == count and drawn.equal(drawn.sort().values)
    for size, found in zip(sizes, labels[drawn].bincount(minlength=3).tolist(), strict=True):
        assert abs(found - count * size / sum(sizes)) <= 2 and found >= 1
    other = stratified(labels, count, torch.Generator().manual_seed(1))
    assert not torch.equal(drawn, other) or count == sum(sizes)


def test_labels_are_hidden():
    data = splitdigits(Options())
    few = hide(data, 100, seed=0).train.labels
    kept = few >= 0
    assert kept.sum() == 100 and few[kept].bincount().min() >= 9
    assert torch.equal(few[kept], data.train.labels[kept]) and (few[~kept] == -1).all()
    assert torch.equal(hide(data, 0.5, 3).train.labels, hide(data, 538, 3).train.labels)  # of 1077
    assert not torch.equal(hide(data, 100, 1).train.labels, few)
    assert torch.equal(hide(data, 1.0, 0).train.labels, data.train.labels)


def test_what_has_no_label_stays_so(mixed):
    mixed.train.labels[::5] = -1
    few = hide(mixed, 20, 0).train.labels
    assert (few >= 0).sum() == 20 and (few[::5] == -1).all()
    with pytest.raises(UserError, match="--labels 90: 2 classes need at least as many labels, and only 80 of 101"):
        hide(mixed, 90, 0)


def test_too_few():
    with pytest.raises(UserError, match="--labels 9: 10 classes need at least as many"):
        hide(splitdigits(Options()), 9, 0)
