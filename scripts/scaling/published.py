"""The lines that the MoBA paper prints (arXiv 2502.13189, section 3.1): L = a·C^b, C in PFLOP/s-days of 6ND, blocks of 512, topk 3."""

from scripts.scaling.laws import Law

# Both arms of 0.5B to 2B parameters, on other data and another tokenizer: slopes compare, heights do not.
_ARMS = {"full": 0, "moba(512, 3)": 1}
_AT_8K = ((2.622, -0.063), (2.625, -0.063))
# At 32K, by the range of 2K positions; full, MoBA.
_AT_32K = (
    ((3.068, -0.078), (3.075, -0.078)),
    ((2.411, -0.083), (2.415, -0.084)),
    ((2.077, -0.081), (2.085, -0.081)),
    ((1.894, -0.092), (1.899, -0.092)),
    ((1.774, -0.089), (1.789, -0.091)),
    ((1.697, -0.087), (1.721, -0.092)),
    ((1.645, -0.088), (1.670, -0.089)),
    ((1.600, -0.087), (1.630, -0.089)),
    ((1.567, -0.087), (1.607, -0.090)),
    ((1.542, -0.087), (1.586, -0.091)),
    ((1.519, -0.086), (1.571, -0.093)),
    ((1.513, -0.085), (1.566, -0.089)),
    ((1.502, -0.085), (1.565, -0.091)),
    ((1.493, -0.088), (1.562, -0.095)),
    ((1.471, -0.091), (1.547, -0.097)),
    ((1.464, -0.097), (1.546, -0.108)),
)  # fmt: skip
_RANGE = 2048


def published(arm: str, *, context: int, low: int | None, bucket: int) -> Law | None:
    """The paper's line of an arm over positions from `low` on (None: all) in rows of `context`; None where it has none."""
    if arm not in _ARMS:
        return None
    if context == 8192 and low is None:
        a, b = _AT_8K[_ARMS[arm]]
    elif context == 32768 and low is not None and bucket == _RANGE:
        a, b = _AT_32K[low // _RANGE][_ARMS[arm]]
    else:
        return None
    return Law(a=a, b=b)
