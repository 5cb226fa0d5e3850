from ..registry import studies
from ..study import RESPLIT, Study, Variant
from ..summary import collect, format_difference

OTHERS = ("left alone", "right alone", "joint", "ensemble", "sklearn-late", "sklearn-concat")


@studies.register("quickstart")
class Quickstart(Study):
    """What does train.py report without any options?"""

    seeding = RESPLIT
    variants = [Variant("udi", "")]

    def notes(self, records):
        table = collect(self, records).get(("", "prediction"), {})
        gains = [(theirs, format_difference(table["udi"], table[theirs])) for theirs in OTHERS if theirs in table]
        return [f"udi against {theirs}: {gain} points." for theirs, gain in gains if gain]
