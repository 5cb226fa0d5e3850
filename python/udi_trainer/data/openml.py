"""Public data sets from OpenML, downloaded by scikit-learn into its own folder, with columns grouped into modalities.

Each is a table at UCI with columns of several sources. Columns are taken in the order of the original files.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..options import Group, Options, one_of, option, reads
from ..registry import datasets
from .dataset import Dataset
from .digits import Resplit
from .multiview import Views, build


@dataclass(frozen=True)
class Source:
    """A data set of OpenML: its number there, its licence, and the modality of each column, in order."""

    number: int
    licence: str
    columns: tuple[str, ...]


SOURCES = {
    "har": Source(  # activities by smartphone
        1478, "UCI, CC BY 4.0", ("time",) * 265 + ("frequency",) * 289 + ("angle",) * 7
    ),
    "gas-drift": Source(  # six gases, 16 sensors: two steady values and six of the transients of each
        1476, "UCI, CC BY 4.0", (("steady",) * 2 + ("transient",) * 6) * 16
    ),
    "satimage": Source(  # soil from space: nine pixels in two visible and two infrared bands
        182, "UCI, CC BY 4.0", (("visible",) * 2 + ("infrared",) * 2) * 9
    ),
}


@dataclass(frozen=True, kw_only=True)
class OpenMLOptions(Group, title="data"):
    openml: str = option(
        "har",
        one_of(*SOURCES),
        f"data set of OpenML, which scikit-learn downloads once: {', '.join(SOURCES)} (all {SOURCES['har'].licence})",
    )


@datasets.register("openml", needs=("sklearn",), extra="train")
@reads(OpenMLOptions, Resplit)
def openml(options: Options) -> Dataset:
    """A public data set from OpenML, see --openml."""
    from sklearn.datasets import fetch_openml

    name = options.of(OpenMLOptions).openml
    source = SOURCES[name]
    try:
        found = fetch_openml(data_id=source.number, as_frame=False, parser="liac-arff")
    except Exception as error:  # of the network, or of a damaged file in the cache
        raise UserError(f"data set {name} cannot be had from OpenML ({type(error).__name__}: {error})") from None
    x, of = np.asarray(found.data, np.float64), np.array(source.columns)
    if x.shape[1:] != of.shape:
        raise UserError(f"OpenML's data {source.number} has {x.shape[1]} columns, but {name} has {len(of)}")
    return build(Views({m: x[:, of == m] for m in dict.fromkeys(source.columns)}, list(found.target)), name, options)


def downloaded(name: str) -> bool:
    """Whether scikit-learn has the data set in its folder."""
    from sklearn.datasets import get_data_home

    return (Path(get_data_home()) / "openml/openml.org/api/v1/json/data" / f"{SOURCES[name].number}.gz").exists()
