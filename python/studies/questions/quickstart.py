from ..registry import studies
from ..study import RESPLIT, Study, Variant
from ..summary import gather, paired

OTHERS = ("left alone", "right alone", "joint", "ensemble")


@studies.register("quickstart")
class Quickstart(Study):
    """What does train.py say without any options?"""

    seeding = RESPLIT
    variants = [Variant("udi", "")]

    def notes(self, records):
        found = gather(self, records).get(("", "prediction"), {})
        gains = [(theirs, paired(found["udi"], found[theirs])) for theirs in OTHERS if theirs in found]
        return [f"udi against {theirs}: {gain} points." for theirs, gain in gains if gain]
