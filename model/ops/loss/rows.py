"""Loss of each row of logits, and its gradient in their place, in plain torch."""

import torch
from torch import Tensor


def torch_rows(logits: Tensor, labels: Tensor, *, ignore: int, gradients: bool) -> Tensor:
    """Cross-entropies `[n]` of logits `[n, V]` and labels int64 `[n]`, fp32 at least; 0 where the label is `ignore`.

    With `gradients` the logits become the gradient of the sum of these losses, softmax minus one-hot, else they are as before.
    """
    ignored = labels == ignore
    at = labels.masked_fill(ignored, 0)[:, None]
    scores = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    losses = -scores.gather(1, at)
    if gradients:
        torch.exp(scores, out=logits)
        # p - 1 in full precision: of a p that was rounded first nothing might be left.
        logits.scatter_(1, at, torch.expm1(-losses).to(logits.dtype)).masked_fill_(ignored[:, None], 0)
    return losses[:, 0].masked_fill_(ignored, 0)
