"""The losses of a classifier, for classes that are skewed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ClassLoss(nn.Module):
    """Mean over samples of  sum_c w_c t_c (1 - p_c)^gamma (-log p_c),  p = softmax(logits + log n).

    t [K] is the target: one class, smoothed, or mixed from two samples. With gamma = 0 and equal n it is cross-entropy.

    gamma: The focal loss (Lin et al. 2017, https://arxiv.org/abs/1708.02002, equations 4 and 5 with softmax in place of
        the sigmoid); linear in t, so that mixed targets mix the losses of both classes, as mixup does.
    weights [K]: w; the sum is divided by the number of samples, not of weights: a batch and its micro-batches agree.
    counts [K]: n, the training images of each class: balanced softmax (Ren et al. 2020,
        https://arxiv.org/abs/2007.10740, equation 4). Evaluation uses the logits alone.
    """

    weights: Tensor | None
    log_counts: Tensor | None

    def __init__(
        self,
        smoothing: float = 0.0,
        gamma: float = 0.0,
        weights: Sequence[float] = (),
        counts: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.gamma = gamma
        self.register_buffer("weights", torch.tensor(weights) if len(weights) else None)
        self.register_buffer("log_counts", torch.tensor(counts).log() if len(counts) else None)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits [B, K], target [B] or [B, K] -> a number. Class numbers are smoothed here, soft targets are not."""
        if target.ndim == 1:
            target = F.one_hot(target, logits.shape[1]).to(logits.dtype)
            target = target * (1 - self.smoothing) + self.smoothing / logits.shape[1]
        if self.log_counts is not None:
            logits = logits + self.log_counts
        log_p = logits.log_softmax(dim=1)
        loss = -target * log_p
        if self.gamma:
            loss = loss * (1 - log_p.exp()).clamp(min=0) ** self.gamma
        if self.weights is not None:
            loss = loss * self.weights
        return loss.sum(dim=1).mean()
