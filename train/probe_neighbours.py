"""What lies near what: classes by the vote of neighbours, and how well images of like content find each other.

Features have unit rows, so that products are cosines. Exact duplicates are found by their features: images whose
cosine is within 1e-6 of 1, which is what rounding leaves of the same picture in another batch.

Legend: N images of the training split or of the gallery, M images that are asked about, C classes, D width, k
neighbours, R images that share a label with the one asked about.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TEMPERATURE = 0.07
DUPLICATE_COSINE = 1 - 1e-6
BLOCK = 512  # images asked about at a time


@dataclass(frozen=True, eq=False)
class Votes:
    """What the neighbours say.

    Attributes:
        scores: k to float32 [M, C] in 0..1, the weighted share of the k nearest that show each class.
        duplicates: how many of the M images are also among the training images.
    """

    scores: Mapping[int, np.ndarray]
    duplicates: int


def neighbour_votes(
    features_ND: np.ndarray,
    truth_NC: np.ndarray,
    asked_MD: np.ndarray,
    counts: Sequence[int],
    *,
    temperature: float = TEMPERATURE,
    device: str = "cpu",
) -> Votes:
    """Scores of the asked images' classes by their nearest training images, for several k.

    score_c = sum over the k nearest of w_i y_ic / sum of w_i, with w_i = exp(cosine_i / temperature): the weights of
    Wu et al. 2018 (Instance Discrimination), which DINO uses with the same temperature. Duplicates vote, too.

    Args:
        features_ND, asked_MD: float, unit rows.
        truth_NC: bool.
        counts: each k, at most N.
    """
    assert counts and max(counts) <= len(features_ND)
    labels_NC = torch.from_numpy(truth_NC).to(device, torch.float32)
    found: dict[int, list[np.ndarray]] = {k: [] for k in counts}
    duplicates = 0
    for _, cosines_BN in _cosines(asked_MD, features_ND, device):
        near_Bk, index_Bk = cosines_BN.topk(max(counts), dim=1)
        duplicates += int((near_Bk[:, 0] >= DUPLICATE_COSINE).sum())
        # Relative to the nearest, which changes no share and cannot overflow.
        weight_Bk = ((near_Bk - near_Bk[:, :1]) / temperature).exp()
        votes_BkC = labels_NC[index_Bk] * weight_Bk.unsqueeze(2)
        for k in found:
            shares_BC = votes_BkC[:, :k].sum(1) / weight_Bk[:, :k].sum(1, keepdim=True)
            found[k].append(shares_BC.cpu().numpy())
    return Votes({k: np.concatenate(parts) for k, parts in found.items()}, duplicates)


@dataclass(frozen=True)
class Retrieval:
    """How well images find others that share a label with them; shares 0..1.

    Attributes:
        recall_at: K to the share of images with at least one hit among their K nearest.
        map_at_r: the mean of (1 / R) * sum over the R nearest of precision so far, counted at hits only.
        queries: images that were asked about, each against all others.
        without_match: of those that were to be asked, how many share no label with any other; they are left out.
        duplicates: pairs that were left out because the two are duplicates.
    """

    recall_at: Mapping[int, float]
    map_at_r: float
    queries: int
    without_match: int
    duplicates: int


def retrieval(
    features_ND: np.ndarray,
    truth_NC: np.ndarray,
    counts: Sequence[int] = (1, 5, 10),
    *,
    queries: np.ndarray | None = None,
    device: str = "cpu",
) -> Retrieval:
    """Recall@K and mAP@R of images that look for each other.

    An image is a hit if it has a label in common with the one asked about. The image itself and its exact duplicates
    are in nobody's way: they are neither hits nor ranked. MAP@R is that of Musgrave et al. 2020 (A Metric Learning
    Reality Check), R being counted without duplicates.

    Args:
        features_ND: float, unit rows.
        truth_NC: bool.
        queries: indices of the images to ask about, by default all.

    Returns:
        Shares of 0 where no image has a match.
    """
    rows = np.arange(len(features_ND)) if queries is None else queries
    labels_NC = torch.from_numpy(truth_NC).to(device, torch.float32)
    hits = dict.fromkeys(counts, 0)
    asked, precision, duplicates = 0, 0.0, 0
    for begin, cosines_BN in _cosines(features_ND[rows], features_ND, device):
        rows_B = torch.from_numpy(rows[begin : begin + BLOCK]).to(device)
        left_out_BN = cosines_BN >= DUPLICATE_COSINE
        left_out_BN[torch.arange(len(rows_B), device=device), rows_B] = True
        duplicates += int(left_out_BN.sum()) - len(rows_B)
        relevant_BN = (labels_NC[rows_B] @ labels_NC.T > 0) & ~left_out_BN
        order_BN = cosines_BN.masked_fill(left_out_BN, -torch.inf).argsort(
            dim=1, descending=True, stable=True
        )
        ranked_BN = relevant_BN.gather(1, order_BN)
        count_B = relevant_BN.sum(1)
        matched_B = count_B > 0
        asked += int(matched_B.sum())
        for k in counts:
            hits[k] += int(ranked_BN[:, :k].any(1).sum())
        precision += float(_precision_at_r(ranked_BN[matched_B], count_B[matched_B]).sum())
    share = max(asked, 1)
    return Retrieval(
        {k: count / share for k, count in hits.items()},
        precision / share,
        asked,
        len(rows) - asked,
        duplicates,
    )


def _precision_at_r(ranked_BN: Tensor, count_B: Tensor) -> Tensor:
    """MAP@R of each row, float64 [B]."""
    rank_N = torch.arange(1, ranked_BN.shape[1] + 1, device=ranked_BN.device)
    precision_BN = ranked_BN.cumsum(1, dtype=torch.float64) / rank_N
    counted_BN = ranked_BN & (rank_N <= count_B.unsqueeze(1))
    return (precision_BN * counted_BN).sum(1) / count_B


def _cosines(asked_MD: np.ndarray, features_ND: np.ndarray, device: str) -> Iterator[tuple[int, Tensor]]:
    """Where a block of the asked images begins, and its cosines float32 [B, N]."""
    gallery_DN = torch.from_numpy(np.ascontiguousarray(features_ND, np.float32)).to(device).T
    for begin in range(0, len(asked_MD), BLOCK):
        block = np.ascontiguousarray(asked_MD[begin : begin + BLOCK], np.float32)
        yield begin, torch.from_numpy(block).to(device) @ gallery_DN
