"""Predictions for new files: ``predict RUN manifest.csv --out predictions.csv``."""

import argparse
from pathlib import Path

from .console import console, log
from .errors import UserError, memory_errors
from .evaluation.predictions import as_csv
from .options import names
from .predictor import load


def main(argv: list[str], prog: str) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{prog} predict",
        description="Predicts the samples of a manifest by a finished run, which has read its own data from files. The"
        " manifest has the columns of the run's modalities and needs no labels and no splits. The CSV written is like"
        " the run's predictions.csv, with the probability of each class (p_<class>).",
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("manifest", type=Path, help="CSV with one row per sample")
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="CSV to write")
    parser.add_argument("--skip-bad", action="store_true", help="leave out samples that cannot be read, and list them")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:i")
    parser.add_argument("--cache-dir", metavar="DIR", help="where decoded data is kept (default: the user's cache)")
    parser.add_argument(
        "--trust", type=names, default=(), metavar="MODULE,...", help="modules of your own that may be imported"
    )
    given = parser.parse_args(argv)
    with console(), memory_errors("while predicting: give fewer rows at a time"):
        predictor = load(given.run, device=given.device, trust=given.trust)
        split = predictor.read(given.manifest, skip_bad=given.skip_bad, cache_dir=given.cache_dir)
        fused = predictor.predict(split)
        content = as_csv(split, predictor.class_names, predictor.logits(split, shares=True), fused, every=True)
        try:
            given.out.write_bytes(content)
        except OSError as error:
            raise UserError(f"{given.out} cannot be written ({error.strerror}): choose another --out FILE") from None
        log.info("%s: %d samples, %d classes", given.out, len(split), len(predictor.class_names))
    return 0
