from ..registry import studies
from ..study import Study, Variant


@studies.register("cgdigits")
class CGDigits(Study):
    """What do all methods reach on small digits whose color is a shortcut in training?"""

    variants = [
        Variant("udi", "--dataset cgdigits --controller static --baselines joint,joint-sum,ogm-ge,gramian"),
        Variant("udi, dynamic", "--dataset cgdigits --baselines none --controller dynamic"),
    ]
