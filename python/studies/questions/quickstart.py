from ..registry import studies
from ..study import RESPLIT, Study, Variant
from ..summary import collect, format_difference

STATIC = "static 1,0"  # the default of version 0.2, with log-linear fusion
OTHERS = ("left alone", "right alone", "joint", "ensemble", "sklearn-late", "sklearn-concat", STATIC)


@studies.register("quickstart")
class Quickstart(Study):
    """What does train.py report without any options?"""

    seeds, seeding = range(100, 110), RESPLIT
    variants = [
        Variant("udi", ""),
        Variant(STATIC, "--controller static --alpha 1,0 --fusion loglinear --baselines none"),
    ]

    def notes(self, records):
        table = collect(self, records).get(("", "prediction"), {})
        gains = [(theirs, format_difference(table["udi"], table[theirs])) for theirs in OTHERS if theirs in table]
        return [f"udi against {theirs}: {gain} points." for theirs, gain in gains if gain]
