"""What a classifier's pooled features are worth without its head: nearest neighbours and a linear probe."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from hcnet_cli import dist
from hcnet_cli.console import UserError, notice
from hcnet_cli.data.loader import SampleRequest
from hcnet_cli.tasks.classification.image_folder import ImageFolder
from hcnet_cli.tasks.classification.metric import Accuracy

NEIGHBOURS, TEMPERATURE = 20, 0.07  # as in DINO (Caron et al. 2021)
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # C of the probe: the inverse of its weight decay
HELD_OUT = 5  # every so manieth training image chooses among them
CHUNK = 2**27  # similarities at a time
Scores = tuple[Tensor, list[str]]  # [M, K], and lines for people


def nearest_neighbours(bank: Tensor, labels: Tensor, queries: Tensor, num_classes: int) -> Scores:
    """Votes [M, K] of queries [M, D] for the classes of the NEIGHBOURS most similar features of a bank [N, D].

    Similarity is the cosine s; a neighbour's vote is exp(s / TEMPERATURE). Votes of a query sum to 1.
    """
    known = F.normalize(bank)
    made = []
    for part in F.normalize(queries).split(max(1, CHUNK // len(bank))):
        similar, places = (part @ known.T).topk(min(NEIGHBOURS, len(bank)), dim=1)
        votes = ((similar - similar[:, :1]) / TEMPERATURE).exp()
        made.append(torch.zeros(len(part), num_classes).scatter_add_(1, labels[places], votes))
    votes = torch.cat(made)
    return votes / votes.sum(dim=1, keepdim=True), []


def linear_probe(bank: Tensor, labels: Tensor, queries: Tensor, num_classes: int) -> Scores:
    """Log-probabilities [M, K] of queries [M, D] by multinomial logistic regression (scikit-learn, L-BFGS) on a bank
    [N, D], standardised by its mean and deviation.

    Every fifth sample of the bank is held out to choose C among STRENGTHS, of equal ones the smallest; then all train.
    UserError where the others are of one class alone.
    """
    from sklearn.exceptions import ConvergenceWarning  # a second to load, which nothing else needs
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y, held_out = bank.double().numpy(), labels.numpy(), np.arange(len(bank)) % HELD_OUT == HELD_OUT - 1
    if not held_out.any() or len(np.unique(y[~held_out])) < 2:
        raise UserError("The training images are too few for a probe: it needs five, and two classes among them.")

    def fitted(strength: float, rows: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the figures below say what it is worth
            return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(x[rows], y[rows])

    found = {c: float(fitted(c, ~held_out).score(x[held_out], y[held_out])) for c in STRENGTHS}
    best = max(found, key=lambda c: found[c])
    probe = fitted(best, slice(None))
    scores = np.full((len(queries), num_classes), math.log(1e-12))  # of classes without a training image
    scores[:, probe.classes_] = np.maximum(probe.predict_log_proba(queries.double().numpy()), math.log(1e-12))
    lines = [
        f"C = {c:g}: {100 * share:.2f} % of the held-out fifth of the training images" for c, share in found.items()
    ]
    return torch.from_numpy(scores), [*lines, f"The probe has C = {best:g}."]


class BankAndQueries(Dataset[dict[str, Any]]):
    """The training images as evaluation sees them, then the validation images."""

    def __init__(self, train: ImageFolder, val: ImageFolder) -> None:
        self.parts = train.with_transform(val.transform), val
        self.parts[0].train = False  # an image that cannot be read is named, not replaced

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, request: SampleRequest) -> dict[str, Any]:
        bank = len(self.parts[0])
        part, index = (self.parts[1], request.index - bank) if request.index >= bank else (self.parts[0], request.index)
        return {**part[SampleRequest(index, request.key, request.step_key)], "sample": request.index}


class OnFeatures(Accuracy):
    """Takes features [B, D] of BankAndQueries, and counts how a classifier on the bank of `bank` samples scores the
    others. Every process holds the whole bank and scores its own share.
    """

    def __init__(self, *arguments: Any, bank: int, classify: Callable[..., Scores], **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.bank, self.classify = bank, classify
        self.found: list[tuple[Tensor, Tensor]] = []  # features [B, D]; [B, 2] sample, target
        self.scored = False

    def update(self, predictions: Tensor, batch: dict[str, Any]) -> None:
        facts = torch.stack([batch["sample"], batch["target"]], dim=1)
        self.found.append((predictions.cpu(), facts.cpu()))

    def compute(self) -> dict[str, float]:
        everything = [rows for part in dist.gather(self.found) for rows in part]
        if self.found:
            features, facts = (torch.cat(parts) for parts in zip(*everything, strict=True))
            order = facts[:, 0].argsort()
            order = order[facts[order, 0] < self.bank]  # the bank, in the order of the data set
            mine, own = (torch.cat(parts) for parts in zip(*self.found, strict=True))
            asked = own[:, 0] >= self.bank
            if self.partial and not (len(order) and asked.any()):  # a rehearsal sees a few samples
                return {"top1": math.nan}
            scores, lines = self.classify(features[order], facts[order, 1], mine[asked], len(self.class_names))
            if dist.is_main():
                for line in lines:
                    notice(line)
            super().update(scores, {"sample": own[asked, 0] - self.bank, "target": own[asked, 1]})
            self.found, self.scored = [], True
        return super().compute()

    def save(self, folder: Path) -> None:
        if self.scored:
            super().save(folder)
