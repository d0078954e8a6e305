"""ZeroQuant (Yao et al., 2022; arXiv:2206.01861, section 4.1) and its fine grain (ZeroQuant-V2; arXiv:2303.08302).

Weights: group-wise.  The columns of a row are cut into groups, each with its own scale; here groups run along the
input dimension, as the second paper has them, and never cross rows.  W ≈ s · (code − zero), s searched.

Activations: token-wise.  Every token gets its own scale when the layer runs, max|x| / 127, so nothing has to be
calibrated and an outlier in one token costs no other.  The second paper's finer variant is `activations: a8g64`.

Which numbers, the recipe says: `w8a8`, `w4w8a8` (feed-forward 4 bit, attention 8 bit; the paper's W4/8), embeddings
8 bit.  Without distillation the weights are rounded to nearest: the method is this rounding, done hardware-friendly.
"""

from typing import Any, ClassVar

from . import rtn


class Method(rtn.Method):
    """Options of ZeroQuant's rounding of weights; those of the activations are the recipe's."""

    # section 4.1: token-wise 8 bit at every matrix product; section 5.1: the embedding table too
    defaults: ClassVar[dict[str, Any]] = {"activations": {"bits": 8}, "embeddings": {"bits": 8, "group_size": -1}}
