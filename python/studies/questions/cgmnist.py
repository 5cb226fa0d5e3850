from ..registry import studies
from ..study import Study, Variant


@studies.register("cgmnist")
class CGMNIST(Study):
    """What do all methods reach on the colored-and-gray MNIST (give --data-root), where UDI's paper reports 99.11%?"""

    variants = [
        Variant("udi", "--dataset cgmnist --epochs 8 --controller static --baselines joint,joint-sum,ogm-ge,gramian"),
        Variant("udi, dynamic", "--dataset cgmnist --epochs 8 --baselines none --controller dynamic"),
        Variant("dimml", "--dataset cgmnist --epochs 8 --method dimml --baselines none"),
    ]
