"""The loop: tasks side by side, schedules, patience, and what a stage leaves alone."""

import contextlib
import signal
from pathlib import Path

import pytest
import torch

from udi_trainer import Options, Run
from udi_trainer.command import main
from udi_trainer.data.labels import hide
from udi_trainer.methods.unimodal import Alone, train_alone
from udi_trainer.registry import datasets
from udi_trainer.run_folder import RunFolder
from udi_trainer.stop import Stopped
from udi_trainer.training.loop import Stage, best_epoch, fit, learning_rate

from ..helpers import log_by_stage, make_run, read_log, read_metrics, without_times


def test_batches_of_few_labels():
    """All steps of an epoch have labelled samples, each as often; before them any, for tasks that want these."""
    run = make_run(hide(datasets["splitdigits"](Options()), 50, 0), batch_size=64)
    task, seen = Alone(run, "left"), []
    task.step = lambda batch: seen.append(batch) or {"loss": torch.zeros(())}
    for semi in (False, True):
        task.semi_supervised = semi
        stage = Stage(task, run)
        stage.restore()
        seen.clear()
        assert sum(stage.epoch_steps()) == 16 == len(seen)
        assert all(len(batch["labels"]) == 64 * (1 + semi) for batch in seen)
        rows = [task.rows(batch) for batch in seen]
        labelled = torch.cat([b["index"][r] for b, (_, r) in zip(seen, rows, strict=True)]).bincount(minlength=1077)
        assert (
            torch.equal(labelled > 0, run.data.train.labels >= 0) and labelled.max() - labelled[labelled > 0].min() <= 1
        )
        anyone = torch.cat([b["index"][r] for b, (r, _) in zip(seen, rows, strict=True)])
        assert len(anyone.unique()) == (1024 if semi else 50)


@pytest.mark.parametrize("random", [False, True])
def test_side_by_side_in_threads(three_views, random):
    """Modalities trained at the same time train as they do one by one, also if they draw random numbers."""
    augment = torch.nn.functional.dropout if random else None

    def losses(threads, *groups):
        dataset = datasets[three_views](Options())
        dataset.modalities["clean"].augment = dataset.modalities["worse"].augment = augment
        run = make_run(dataset, epochs=3, batch_size=8)
        torch.set_num_threads(threads)
        for modalities in groups:
            tasks = train_alone(run, modalities)
            assert all(task.random == (random and m != "noisy") for m, task in tasks.items())
        return {(stage, row["epoch"]): row["loss"] for stage, rows in run.history.items() for row in rows}

    together = losses(6, ["clean", "noisy", "worse"])
    assert len(together) == 9
    assert together == losses(6, ["clean", "noisy", "worse"])
    assert together == pytest.approx(losses(1, ["worse"], ["clean"], ["noisy"]), rel=1e-5)


class Late(torch.nn.Module):
    """Draws from its third step on: a guess by the first step would be wrong."""

    def __init__(self, shape):
        super().__init__()
        self.linear, self.steps = torch.nn.Linear(shape.numel(), 16), 0

    def forward(self, x):
        self.steps += self.training
        return torch.nn.functional.dropout(self.linear(x), training=self.training and self.steps > 2)


def test_encoders_that_draw_later_take_turns(three_views):
    """What they draw depends on their steps alone, whoever trains beside them."""

    def losses(threads, *groups):
        dataset = datasets[three_views](Options())
        for modality in dataset.modalities.values():
            modality.encoder = Late
        run = make_run(dataset, epochs=2, batch_size=8)
        torch.set_num_threads(threads)
        for modalities in groups:
            assert all(task.random for task in train_alone(run, modalities).values())
        return {(stage, row["epoch"]): row["loss"] for stage, rows in run.history.items() for row in rows}

    together = losses(3, ["clean", "noisy", "worse"])
    assert together == pytest.approx(losses(1, ["worse"], ["clean"], ["noisy"]), rel=1e-5)


def test_threads_do_not_depend_on_who_else_is_left(three_views, monkeypatch):
    """A stage that lags behind after a resume is trained with the threads that it has beside others."""
    seen = []
    step = Alone.step
    monkeypatch.setattr(Alone, "step", lambda *args: seen.append(torch.get_num_threads()) or step(*args))
    Path("run").mkdir()
    run = Run(Options(epochs=2), datasets[three_views](Options()), torch.device("cpu"), RunFolder(Path("run")))
    torch.set_num_threads(4)
    train_alone(run, ["clean"], epochs=1)
    assert seen == [4] * run.steps
    seen.clear()
    train_alone(run, ["clean", "noisy"])
    assert len(seen) == 3 * run.steps and set(seen[1 : run.steps]) == {2}


def test_error_beside_another_stage(three_views, monkeypatch):
    """What goes wrong in one thread ends the others too, and the run."""
    torch.set_num_threads(2)
    step, steps = Alone.step, []

    def failing(self, batch):
        steps.append(self.modality)
        if self.modality == "noisy" and steps.count("noisy") == 3:
            raise RuntimeError("lost")
        return step(self, batch)

    monkeypatch.setattr(Alone, "step", failing)
    with pytest.raises(RuntimeError, match="lost"):
        train_alone(make_run(three_views, batch_size=1), ["noisy", "clean"])
    assert steps.count("clean") < 400


def test_stages_wait_for_what_they_start_from_and_checkpoints_for_steps(three_views, monkeypatch):
    """By their streams, on a GPU: that which a stage trains on waits for what restores it, and what saves is on it."""
    seen, inside = [], []

    class Stream:
        def wait_stream(self, other):
            seen.append(self)

    @contextlib.contextmanager
    def on_stream(self):
        inside.append(self.stream)
        yield
        inside.pop()

    def save(self):
        assert inside == [self.stream]
        seen.append("saved")

    made = Stage.__init__
    monkeypatch.setattr(Stage, "__init__", lambda self, *args: made(self, *args) or setattr(self, "stream", Stream()))
    monkeypatch.setattr(Stage, "on_stream", on_stream)
    monkeypatch.setattr(Stage, "save", save)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    run, step = make_run(three_views, epochs=2), Alone.step
    monkeypatch.setattr(Alone, "step", lambda *args: setattr(run.stop, "signal_number", signal.SIGINT) or step(*args))
    for view in run.data.modalities.values():
        view.augment = torch.nn.functional.dropout  # so they share a stream
    with pytest.raises(Stopped):
        train_alone(run, ["clean", "noisy"])
    assert seen == [seen[0], seen[0], "saved", "saved"]


def test_making_a_stage_changes_nothing(three_views):
    """Neither the log of an earlier run, nor torch's generator; nor does making a task."""
    assert main(["--dataset", three_views, "--method", "ensemble", "--epochs", "1", "--out", "run"]) == 0
    before = Path("run/metrics.jsonl").read_bytes()
    run = Run(Options(epochs=1), datasets[three_views](Options()), torch.device("cpu"), RunFolder(Path("run")))
    state = torch.get_rng_state()
    stage = Stage(run.make(Alone, modality="clean"), run)
    assert torch.equal(torch.get_rng_state(), state)
    assert Path("run/metrics.jsonl").read_bytes() == before and run.history == {} and stage.epoch == 0


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({"schedule": "cosine", "epochs": 4}, [1, 0.853553, 0.5, 0.146447]),
        ({"schedule": "constant", "epochs": 4}, [1, 1, 1, 1]),
        ({"schedule": "step", "lr_step": (2, 0.1), "epochs": 5}, [1, 1, 0.1, 0.1, 0.01]),
        ({"schedule": "step", "epochs": 3}, [1, 1, 1]),  # by default the first step is at epoch 70
    ],
)
def test_schedules(options, wanted, mixed):
    """Of the formula, and of a training: the learning rate that each epoch's steps see."""
    options = Options.make(lr=1.0, **options)
    rates = [learning_rate(options, epoch) for epoch in range(options.epochs)]
    assert rates == pytest.approx(wanted, rel=1e-5)
    assert [learning_rate(options, epoch, 3) for epoch in range(options.epochs)] == pytest.approx(
        [3 * x for x in rates]
    )

    run = make_run(mixed, lr=0.01, epochs=options.epochs, schedule=options.schedule, lr_step=options.lr_step)
    task, seen = run.make(Alone, modality="sensor"), []
    step = task.step
    task.step = lambda batch: seen.append(task.optimizer.param_groups[0]["lr"].item()) or step(batch)
    fit([task], run)
    assert seen == pytest.approx([0.01 * x for x in wanted for _ in range(run.steps)], rel=1e-5)


def test_patience_ends_a_stage_and_resumes(three_views):
    """So many epochs after the best one; each modality for itself; the same after a resume."""
    options = ["--dataset", three_views, "--method", "ensemble", "--epochs", "40", "--schedule", "constant"]
    options += ["--patience", "3"]
    assert main([*options, "--out", "run"]) == 0
    ends = {}
    for m in ("clean", "noisy", "worse"):
        history = [row | {"seconds": 0} for row in read_log("run") if row["modality"] == m]
        ends[m] = len(history)
        assert ends[m] == 40 or ends[m] == best_epoch(history)["epoch"] + 3
    assert min(ends.values()) < 40 and len(set(ends.values())) > 1
    metrics, log = without_times(read_metrics("run")), log_by_stage("run")
    assert main(["--resume", "run"]) == 0
    assert without_times(read_metrics("run")) == metrics and log_by_stage("run") == log


def test_best_epoch():
    """Of the highest accuracy or whatever --select says, then of the lowest loss, then the first."""
    rows = [{"val_acc": acc, "val_loss": loss} for acc, loss in ((0.5, 0.1), (0.7, 0.9), (0.7, 0.8), (0.7, 0.8))]
    assert best_epoch(rows) is best_epoch(rows, "acc") is rows[2]
    assert best_epoch(rows, "nll") is rows[0]
    for row, f1 in zip(rows, (0.2, 0.4, 0.3, 0.4), strict=True):
        row["val_macro_f1"] = f1
    assert best_epoch(rows, "macro-f1") is rows[3]


@pytest.mark.parametrize("select, epoch", [(None, 1), ("acc", 1), ("macro-f1", 2), ("nll", 3)])
def test_the_model_of_the_selected_epoch_is_kept(mixed, select, epoch):
    figures = [(0.9, 0.6, 0.8), (0.8, 0.7, 0.7), (0.7, 0.5, 0.5), (0.6, 0.4, 0.6)]
    rows, states = [dict(zip(("val_acc", "val_macro_f1", "val_loss"), row, strict=True)) for row in figures], []
    run = make_run(mixed, epochs=4, select=select)
    task = run.make(Alone, modality="sensor")
    task.validate = lambda *_: states.append({n: t.clone() for n, t in task.model.state_dict().items()}) or rows.pop(0)
    fit([task], run)
    assert all(torch.equal(t, states[epoch - 1][name]) for name, t in task.model.state_dict().items())
    assert not torch.equal(states[0]["head.weight"], states[1]["head.weight"])


def test_a_model_of_one_class_is_told(mixed, caplog):
    run = make_run(mixed, epochs=1)
    tasks = [run.make(Alone, modality=m) for m in ("sensor", "picture")]
    tasks[0].logits = lambda batch: torch.tensor([[1.0, 0.0]]).expand(len(batch["index"]), 2)
    tasks[1].logits = lambda batch: torch.nn.functional.one_hot(batch["index"] % 2, 2).float()
    fit(tasks, run)
    (told,) = caplog.records
    assert told.getMessage().startswith("anchor sensor predicts one class for all validation samples: try --class-w")
    assert [run.history[f"anchor-{m}"][0]["val_classes"] for m in ("sensor", "picture")] == [1, 2]


@pytest.mark.parametrize(
    "warmup, factors", [(2, [1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1]), (0.5, [0.5, 1])]
)
@pytest.mark.parametrize("stop", [None, 3, 6])
def test_warmup(warmup, factors, stop, mixed):
    """The learning rate rises by step to that of the schedule; a stage that was interrupted goes on there."""
    Path("run").mkdir()
    options = Options(epochs=3, lr=0.01, batch_size=25, warmup=warmup)
    seen = []

    def attempt(stop):
        run = Run(options, mixed, torch.device("cpu"), RunFolder(Path("run")))
        task = run.make(Alone, modality="sensor")
        step = task.step

        def stopping(batch):
            seen.append(task.optimizer.param_groups[0]["lr"].item())
            if len(seen) == stop:
                run.stop.signal_number = signal.SIGINT
            return step(batch)

        task.step = stopping
        fit([task], run)

    if stop:
        with pytest.raises(Stopped):
            attempt(stop)
    attempt(None)
    schedule = [learning_rate(options, epoch) for epoch in range(3) for _ in range(4)]
    factors = factors + [1] * (12 - len(factors))
    assert seen == pytest.approx([f * lr for f, lr in zip(factors, schedule, strict=True)], rel=1e-6)
