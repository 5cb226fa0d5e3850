"""A straightforward implementation of UDI in plain PyTorch: the trainer's baseline, with the same results.

It computes CLUB over all N x N pairs, concatenates gradients, runs the anchor in every step, and calls loss.item().
"""

import copy
import math
import time

import torch
import torch.nn.functional as F

from peers import club_mi_pairs, js_div_eager
from udi_trainer.methods.follower import FollowerOptions, q_warmup
from udi_trainer.models.classifiers import Classifier, ConditionalGaussian
from udi_trainer.models.encoders import FEATURES
from udi_trainer.registry import encoders


class EagerUDI:
    """Both phases with a run's data, seeds and options; followers start from scratch, and the controller is dynamic.

    ``history``: {stage: [one row per epoch]}, like the trainer's log.
    """

    def __init__(self, run):
        self.run, self.options, self.train = run, run.options, run.data.train
        self.steps = len(self.train) // self.options.batch_size
        self.warmup, self.history = q_warmup(run), {}

    def fit(self):
        alone = {m: self.fit_stage(f"anchor-{m}", m, self.alone_step) for m in self.run.data.modalities}
        anchor = max(alone, key=lambda m: max(row["val_acc"] for row in self.history[f"anchor-{m}"]))
        self.anchor_view, self.anchor = anchor, alone[anchor].eval()
        for modality in alone:
            if modality != anchor:
                self.alpha_con, self.alpha_com = 0.0, 0.0
                self.fit_stage(f"follower-{modality}", modality, self.follower_step)

    def fit_stage(self, name, modality, step):
        options, run = self.options, self.run
        torch.manual_seed(run.seed(name))
        view = run.data.modalities[modality]
        encoder = encoders.find(view.encoder)(view.sample(self.train).shape[1:])
        self.model = Classifier(encoder, FEATURES, run.data.classes).to(run.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.q = ConditionalGaussian(FEATURES, FEATURES, hidden=128).to(run.device)
        self.q_optimizer = torch.optim.AdamW(self.q.parameters())
        best, rows = (-1,), self.history.setdefault(name, [])
        for epoch in range(options.epochs):
            began, total = time.perf_counter(), 0
            for optimizer in (self.optimizer, self.q_optimizer):
                for group in optimizer.param_groups:
                    group["lr"] = options.lr * (1 + math.cos(math.pi * epoch / options.epochs)) / 2
            shuffle = torch.Generator().manual_seed(run.seed(name, epoch))
            order = torch.randperm(len(self.train), generator=shuffle).to(run.device)
            self.model.train()
            for number, index in enumerate(order.split(options.batch_size)[: self.steps], start=epoch * self.steps):
                total += step(modality, index, number).item()
            accuracy, loss = self.validate(modality)
            if (accuracy, -loss) > best:
                best, state = (accuracy, -loss), copy.deepcopy(self.model.state_dict())
            row = {"loss": total / self.steps, "val_acc": accuracy, "val_loss": loss}
            rows.append(row | {"seconds": time.perf_counter() - began})
        self.model.load_state_dict(state)
        return self.model

    def inputs(self, modality, split, index):
        view = self.run.data.modalities[modality]
        return view.make(*(split.stored[name][index] for name in view.reads))

    def alone_step(self, modality, index, number):
        _, logits = self.model(self.inputs(modality, self.train, index))
        loss = F.cross_entropy(logits, self.train.labels[index])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss

    def follower_step(self, modality, index, number):
        with torch.no_grad():
            anchor_features, anchor_logits = self.anchor(self.inputs(self.anchor_view, self.train, index))
        features, logits = self.model(self.inputs(modality, self.train, index))
        x, y = F.layer_norm(anchor_features, (FEATURES,)), F.layer_norm(features, (FEATURES,))

        cls = F.cross_entropy(logits, self.train.labels[index])
        con = js_div_eager(logits, anchor_logits)
        mu, logvar = self.q(x)
        com = (club_mi_pairs(mu.detach(), logvar.detach(), y) / FEATURES).relu()
        if number < self.warmup:
            com = 0 * com

        align_every = self.options.of(FollowerOptions).align_every
        every = self.steps if align_every == "epoch" else align_every
        if number % every == 0:
            g_cls, g_con, g_com = (self.flat_gradient(loss) for loss in (cls, con, com))
            con_gain, com_gain = max(0, (g_cls @ g_con).item()), max(0, (g_cls @ g_com).item())
            total = con_gain + com_gain
            self.alpha_con, self.alpha_com = (con_gain / total, com_gain / total) if total > 0 else (0.0, 0.0)
        loss = cls + self.alpha_con * con + self.alpha_com * com
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

        q_loss = ((y.detach() - mu) ** 2 / logvar.exp() + logvar).sum(1).mean()
        self.q_optimizer.zero_grad()
        q_loss.backward()
        self.q_optimizer.step()
        return loss

    def flat_gradient(self, loss):
        parameters = list(self.model.parameters())
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(parameters, grads, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])

    @torch.no_grad()
    def validate(self, modality):
        self.model.eval()
        split = self.run.data.val
        indices = torch.arange(len(split), device=split.labels.device).split(1000)
        logits = torch.cat([self.model(self.inputs(modality, split, index))[1] for index in indices])
        accuracy = (logits.argmax(1) == split.labels).float().mean().item()
        return accuracy, F.cross_entropy(logits, split.labels).item()
