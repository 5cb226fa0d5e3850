"""A trained method as one predictor, saved in a run folder and loaded in another process."""

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .data import pipelines
from .data.dataset import Dataset, Encoder, Modality, Split, presence
from .data.recipe import samples
from .data.rows import read
from .errors import UserError, choose
from .evaluation.fusion import Rule, combine
from .models.classifiers import FeatureHead, JointClassifier
from .models.encoders import make_encoder
from .options import Options, groups_of
from .registry import check_trusted, classifiers, datasets, fusion_rules, imported
from .run import autocast, choose_device
from .run_folder import RunFolder, load_tensors, read_config
from .training.feed import inference_batch

FILE = Path("checkpoints") / "model.pt"


class Predictor:
    """The models of a method, and the rule that fuses their logits.

    A model named after a modality reads its inputs, a joint model the inputs of all modalities, and a head the features
    of the models before it.
    """

    def __init__(
        self,
        modalities: dict[str, Modality],
        models: dict[str, nn.Module],
        rule: Rule,
        amp: str = "none",
        class_names: Sequence[str] = (),
        recipe: dict[str, Any] | None = None,
    ) -> None:
        """``recipe``: how the run's samples were made from the columns of a manifest, see :class:`Dataset`."""
        self.modalities, self.models, self.rule, self.amp = modalities, models, rule, amp
        self.class_names, self.recipe = list(class_names), recipe

    def read(self, manifest: str | Path, *, skip_bad: bool = False, cache_dir: str | None = None) -> Split:
        """The samples of a manifest, made as those of the run: ``predictor.predict(predictor.read("new.csv"))``.

        The manifest needs the columns of the run's modalities; an empty cell means that a sample lacks one. It needs no
        labels and no splits; labels that are missing or unknown are -1.

        Args:
            skip_bad: leave out samples that cannot be read, and list them; otherwise they raise a UserError.
            cache_dir: where decoded files are kept; by default the user's cache.
        """
        if self.recipe is None:
            raise UserError("this run has not read its data from files by columns, so it cannot read a manifest")
        return samples(read(manifest, labelled=False), self.recipe, self.class_names, skip_bad, cache_dir)

    def predict(self, split: Split | dict[str, torch.Tensor]) -> torch.Tensor:
        """Fused probabilities (N, C), on the CPU, for a split or just its stored tensors.

        For samples that lack a modality, see :class:`Split`, the predictions of the others are fused.
        """
        if not self.models:
            raise UserError("this method keeps no models to predict with")
        return combine(self.rule, torch.stack(list(self.logits(split).values())))

    @torch.no_grad()
    def logits(self, split: Split | dict[str, torch.Tensor], shares: bool = False) -> dict[str, torch.Tensor]:
        """The logits (N, C) of each model before fusion, on the CPU; NaN for samples that lack its modality.

        ``shares``: for a single joint model, the share of each modality instead.
        """
        stored = split.stored if isinstance(split, Split) else split
        for m, modality in self.modalities.items():
            if missing := [name for name in modality.reads if name not in stored]:
                raise UserError(f"{m} reads {', '.join(missing)}, which is missing: got {', '.join(stored)}")
        sizes = {name: len(stored[name]) for modality in self.modalities.values() for name in modality.reads}
        if len(set(sizes.values())) != 1:
            raise UserError(f"stored tensors differ in their number of samples: {sizes}")
        (count,) = set(sizes.values())
        logits: dict[str, torch.Tensor] = {}
        features: dict[str, torch.Tensor] = {}
        for name, model in self.models.items():
            if isinstance(model, FeatureHead):
                device = model.head.weight.device
                with autocast(device, self.amp):
                    logits[name] = model(torch.cat(list(features.values()), dim=1).to(device)).float().cpu()
                continue
            split_up = shares and isinstance(model, JointClassifier) and len(self.models) == 1
            for m in self.modalities if split_up else [name]:
                features[m], logits[m] = self._outputs(name, model, stored, count, m if split_up else None)
                if presence(m) in stored:
                    lacks = ~stored[presence(m)].cpu()[:, None]
                    features[m], logits[m] = features[m].masked_fill(lacks, 0), logits[m].masked_fill(lacks, torch.nan)
        return logits

    def _outputs(
        self, name: str, model: nn.Module, stored: dict[str, torch.Tensor], count: int, share: str | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(features, logits), on the CPU; for a model of all modalities the logits twice."""
        device, joint = next(model.parameters()).device, name not in self.modalities
        views = self.modalities if joint else {name: self.modalities[name]}
        names = {stored_name for view in views.values() for stored_name in view.reads}
        names |= {presence(m) for m in views} & set(stored)
        parts = []
        model.eval()
        size = inference_batch(device)
        for start in range(0, max(count, 1), size):  # no samples: no rows
            batch = {n: stored[n][start : start + size].to(device) for n in names}
            inputs = {m: view.input(batch) for m, view in views.items()}
            with autocast(device, self.amp):
                if isinstance(model, JointClassifier):
                    features, logits = model(inputs, {m: batch[presence(m)] for m in views if presence(m) in batch})
                    logits = model.shares(features)[share] if share else logits
                else:
                    features, logits = model(inputs if joint else inputs[name])
                parts.append((logits if joint else features, logits))
        features, logits = (torch.cat(tensors).float().cpu() for tensors in zip(*parts, strict=True))
        return features, logits

    def save(self, folder: RunFolder, data: Dataset) -> None:
        """Saves what :func:`load` needs: encoders and functions by name, and two samples for their shapes."""
        rules = {rule: name for name, rule in fusion_rules.items()}
        folder.save(
            "model",
            classes=data.classes,
            class_names=self.class_names,
            recipe=self.recipe,
            modalities={
                m: {
                    "encoder": view.encoder if isinstance(view.encoder, str) else address(view.encoder),
                    "reads": list(view.reads),
                    "make": None if view.make is torch.Tensor.float else described(view.make),
                    "width": view.width,
                    "sample": {name: data.test.stored[name][:2].cpu().clone() for name in view.reads},
                }
                for m, view in self.modalities.items()
            },
            models={
                name: {
                    "kind": getattr(model, "kind", None),
                    "arguments": getattr(model, "arguments", {}),
                    "state": model.state_dict(),
                }
                for name, model in self.models.items()
            },
            rule=rules.get(type(self.rule)),
            parameters=asdict(self.rule),
            amp=self.amp,
        )


def load(
    folder: str | Path,
    dataset: Dataset | None = None,
    encoders: dict[str, Encoder] | None = None,
    device: str = "auto",
    trust: Sequence[str] = (),
) -> Predictor:
    """The predictor of a finished run, in any process: ``load(folder).predict(split)``.

    The folder holds tensors and names. The trainer's own encoders, pipelines and data sets are found by name; those of
    your own are given again, or imported from the modules that you trust.

    Args:
        folder: the run folder.
        dataset: the modalities as in training, if their inputs are made by functions of your own.
        encoders: as for :func:`train`.
        device: where to compute.
        trust: modules that may be imported because the folder names them.
    """
    folder, given = Path(folder), encoders or {}
    if not (folder / FILE).exists():
        raise UserError(
            f"{folder} has no {FILE}: no run has finished there; an unfinished one continues with --resume {folder}"
        )
    remedy = f"delete it, then --resume {folder} makes it again"
    saved = load_tensors(folder / FILE, remedy)
    if missing := {"classes", "modalities", "models", "rule", "parameters", "amp"} - saved.keys():
        raise UserError(f"{folder / FILE} lacks {', '.join(sorted(missing))}: {remedy}")
    views = modalities_of(saved["modalities"], folder, dataset, given, trust)
    samples = {m: Split(torch.zeros(len(spec["sample"])), spec["sample"]) for m, spec in saved["modalities"].items()}
    models, place = {}, choose_device(device)
    for name, part in saved["models"].items():
        if part["kind"] is None:
            raise UserError(
                f"model {name} is of a class of your own: build it, and load its state from {folder / FILE}"
            )
        alone = part["kind"] == "unimodal"
        named = [name] if alone else [] if part["kind"] == FeatureHead.kind else views
        made = {m: make_encoder(m, views[m], samples[m]) for m in named}
        networks, widths = ({m: pair[i] for m, pair in made.items()} for i in (0, 1))
        inputs = (networks[name], widths[name]) if alone else (networks, widths) if made else ()
        models[name] = classifiers.find(part["kind"])(*inputs, classes=saved["classes"], **part["arguments"])
        try:
            models[name].load_state_dict(part["state"])
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"the encoders are not those of {folder / FILE}: {reason}") from None
        models[name].to(place)
    rule = fusion_rules.find(saved["rule"])(**saved["parameters"])
    names = saved.get("class_names") or list(map(str, range(saved["classes"])))
    return Predictor(views, models, rule, saved["amp"], names, saved.get("recipe"))


def modalities_of(
    specs: dict, folder: Path, dataset: Dataset | None, given: dict, trust: Sequence[str]
) -> dict[str, Modality]:
    """The modalities of a run: those of the data set given, of a registered one, or rebuilt from their names."""
    for m in given:
        choose("modality", m, specs)
    config = read_config(folder)
    by_name = all(spec["make"] is None or isinstance(spec["make"], dict) for spec in specs.values())
    if dataset is None and config.get("dataset") in datasets and not by_name:
        dataset = saved_dataset(config)
    views = {}
    for m, spec in specs.items():
        if dataset:
            view = dataset.modalities[choose("modality", m, dataset.modalities)]
        else:
            view = Modality(
                spec["encoder"], tuple(spec["reads"]), restored_make(spec["make"], folder, trust), width=spec["width"]
            )
        encoder = given.get(m, view.encoder)
        if isinstance(encoder, str) and ":" in encoder:
            again = f"give it again: load(folder, encoders={{{m!r}: ...}})"
            check_trusted(folder, encoder, trust, again)
            encoder = imported(encoder, again)
        views[m] = replace(view, encoder=encoder, width=spec["width"])
    return views


def saved_dataset(config: dict[str, Any]) -> Dataset:
    """The registered data set that a config.json names, with its options."""
    make = datasets.find(config["dataset"])
    return make(Options.of_flat(config, groups_of([make])))


def described(make: object) -> Any:
    """The function that makes an input, as a run folder keeps it: a dataclass with its fields, or a name."""
    if dataclasses.is_dataclass(make) and not isinstance(make, type):
        fields = {field.name: getattr(make, field.name) for field in dataclasses.fields(make)}
        return {"class": address(type(make)), "fields": fields}
    return address(make)


def restored_make(spec: Any, folder: Path, trust: Sequence[str]) -> Any:
    if spec is None:
        return torch.Tensor.float
    again = "give the data again: load(folder, dataset=...)"
    name = str(spec["class"] if isinstance(spec, dict) else spec)
    make = PIPELINES.get(name)
    if make is None:
        check_trusted(folder, name, trust, again)
        make = imported(name, again)
    return make(**spec["fields"]) if isinstance(spec, dict) else make


def address(thing: object) -> str:
    """module:name of a class or function; for anything else, such as a partial, a name that cannot be imported."""
    return f"{getattr(thing, '__module__', None)}:{getattr(thing, '__qualname__', f'<{type(thing).__qualname__}>')}"


# What a run folder may name without being trusted.
PIPELINES = {
    address(pipeline): pipeline
    for pipeline in (pipelines.Features, pipelines.Pictures, pipelines.Spectrogram, pipelines.Tokens)
}
