"""The weight decay that is chosen on validation."""

import torch

from udi_trainer import train
from udi_trainer.command import main
from udi_trainer.methods.follower import Follower
from udi_trainer.methods.frozen import Frozen
from udi_trainer.methods.joint import Joint, joint
from udi_trainer.methods.unimodal import train_alone
from udi_trainer.options import DECAYS
from udi_trainer.training.loop import best_epoch

from ..helpers import make_run, read_metrics, without_times


def test_each_modality_has_the_decay_that_is_best_on_validation(mixed):
    run = make_run(mixed, weight_decay="auto", epochs=2)
    tasks = train_alone(run)
    for m, task in tasks.items():
        names = {d: f"anchor-{m}" + (f"-decay-{d:g}" if d != DECAYS[0] else "") for d in DECAYS}
        rows = {d: best_epoch(run.history[name]) for d, name in names.items()}
        chosen = min(rows, key=lambda d: (-rows[d]["val_acc"], rows[d]["val_loss"]))
        assert run.decay[m] == task.decay == chosen and task.name == names[chosen]
        assert task.optimizer.param_groups[0]["weight_decay"] == chosen
    run.decay["picture"] = 0.3
    follower = run.make(Follower, modality="picture", teacher=Frozen(run, "audio", tasks["audio"].model, 64))
    assert {group["weight_decay"] for group in follower.optimizer.param_groups} == {0.3}
    (model,) = joint(run).models.values()
    names = ["joint", "joint-decay-0.3", "joint-decay-3"]
    rows = [best_epoch(run.history[name]) for name in names]
    kept = names[rows.index(min(rows, key=lambda row: (-row["val_acc"], row["val_loss"])))]
    states = run.folder.checkpoint(kept)["best"], model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_all_start_from_the_same_weights(mixed):
    run = make_run(mixed, weight_decay="auto")
    first, second = (run.make(Joint, decay=decay).model.state_dict() for decay in DECAYS[:2])
    assert all((first[name] == second[name]).all() for name in first)


def test_a_run_with_it_is_resumed_and_one_decay_changes_nothing(mixed):
    options = "--dataset splitdigits --labels 60 --epochs 2 --baselines joint".split()
    assert main([*options, "--weight-decay", "auto", "--out", "run"]) == 0
    metrics = read_metrics("run")
    assert main(["--resume", "run"]) == 0 and without_times(read_metrics("run")) == without_times(metrics)
    plain = train(mixed, "ensemble", epochs=1, baselines=[])
    assert set(plain.history) == {"anchor-audio", "anchor-picture", "anchor-sensor"}
    assert {row["phase"] for rows in plain.history.values() for row in rows} == {"unimodal"}
