"""The loss and its gradient by their formulas, in float64, without cancellation: what random problems are measured against.

For a row x = softcap tanh(logit_scale y / softcap) of logits y, with target coefficients a_c, of an index t
(1 - eps) w_t [c = t] + eps/C w_c, of probabilities q (of two labels q_c = lam [c = t] + (1 - lam) [c = u])
w_c ((1 - eps) q_c + eps/C):

    nll_c = (m - x_c) + log1p(sum_{j != argmax} exp(x_j - m))        loss = sum_c a_c nll_c
    dloss/dx_c = (A - a_c) p_c - a_c (1 - p_c)                        A = sum_c a_c

of an index with focal_gamma g, u = 1 - p_t, the loss times u^g, the gradient times u^g + g u^(g - 1) p_t nll_t;
with z_loss z lse^2 and 2 z lse p_c on top; dx_c/dy_c = logit_scale / cosh^2(logit_scale y_c / softcap).

autograd of float64's log_softmax would lose what lies below 1e-16: the loss of logits [40, 0], the gradient of a sure row.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Exact(NamedTuple):
    loss: Tensor
    gradient: Tensor  # of the logits' shape
    unknown: Tensor  # elements of the gradient that are 0 times NaN
    # The largest term where the gradient is a difference of some: A p_c - a_c, though not for an index without smoothing; with
    # softcap 1 - tanh^2, of the factor 1 / cosh^2. Where logits are transformed, what the rounding of x_c makes of it, too.
    terms: float
    # The same of the loss: with z_loss, which class weights below 0 make a difference; and how far it follows a transformed
    # logit, times the largest of these.
    loss_terms: float
    ambiguous: bool  # rounding decides which rows "max" or "topk" selects


def exact_loss_and_gradient(
    logits: Tensor,
    target: Any,  # a tensor, or (target_a, target_b, lam)
    weight: Tensor | None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    top_k: int | float | None = None,
    scale: float = 1.0,
    sample_weight: Tensor | None = None,  # one per row, or one per example
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    focal_gamma: float = 0.0,
    dloss: Tensor,  # 0-d, or one per row
    resolution: float,  # losses of rows that lie closer, relative to the largest, may be sorted otherwise
) -> Exact:
    """`fusedloss.cross_entropy` and its gradient for the upstream gradient `dloss`."""
    n_classes = logits.shape[min(1, logits.dim() - 1)]
    x = _rows(logits, n_classes) * logit_scale
    slope = torch.full_like(x, logit_scale)
    if softcap is not None:
        slope = logit_scale / (x / softcap).cosh().square()
        x = softcap * (x / softcap).tanh()
    w = weight.double() if weight is not None else torch.ones(n_classes, dtype=torch.float64)
    nll, p, not_p, lse = _statistics(x)
    if isinstance(target, tuple):
        (first, second), lam = (
            (labels.reshape(-1).long() for labels in target[:2]),
            torch.as_tensor(target[2]).double().reshape(-1),
        )
        counted = (first != ignore_index) & (second != ignore_index)
        q, is_label = torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
        for labels, share in ((first, lam), (second, 1 - lam)):
            at = labels.where(counted, 0)[:, None]
            q.scatter_add_(1, at, share.expand(len(x))[:, None])
            is_label.scatter_(1, at, True)
        asked = torch.stack([first, second, lam.expand(len(x))], 1)
        a, _ = _of_probabilities(q, w, nll, label_smoothing)
        # A label whose factor is 0 does not enter, though its logit be -inf; with smoothing every class does.
        of_labels = nll.masked_fill((w * q == 0) & nll.isinf(), 0).where(is_label, 0)
        rows = (1 - label_smoothing) * (w * q * of_labels).sum(1)
        if label_smoothing > 0:
            rows = rows + label_smoothing / n_classes * (w * nll).sum(1)
        row_weights = torch.ones(len(x), dtype=torch.float64)
    elif target.shape == logits.shape:
        counted = torch.ones(len(x), dtype=torch.bool)
        asked = _rows(target, n_classes)
        a, rows = _of_probabilities(asked, w, nll, label_smoothing)
        row_weights = torch.ones(len(x), dtype=torch.float64)
    else:
        flat = target.reshape(-1).long()
        counted = flat != ignore_index
        t = asked = flat.masked_fill(~counted, 0)[:, None]
        a = torch.zeros_like(x).scatter_(1, t, (1 - label_smoothing) * w[t])
        rows = (1 - label_smoothing) * (w[t] * nll.gather(1, t))[:, 0]
        if label_smoothing > 0:
            a = a + label_smoothing / n_classes * w
            rows = rows + label_smoothing / n_classes * (w * nll).sum(1)
        row_weights = w[t[:, 0]]
        if focal_gamma > 0:
            nll_t, p_t, u = (values.gather(1, t)[:, 0] for values in (nll, p, not_p))
            rows = rows * u**focal_gamma
            slope_t = u ** (focal_gamma - 1) * p_t * nll_t
            a = a * (u**focal_gamma + focal_gamma * slope_t.where((u != 0) & (p_t != 0), 0))[:, None]
    gradient = (a.sum(1, keepdim=True) - a) * p - a * not_p
    pieces = rows.abs() + (z_loss * lse.square()).abs()
    if z_loss != 0:
        rows = rows + z_loss * lse.square()
        gradient = gradient + (2 * z_loss * lse)[:, None] * p
    row_factors = torch.ones(len(x), dtype=torch.float64)
    if sample_weight is not None:
        row_factors = sample_weight.double().reshape(-1)
        row_factors = row_factors.repeat_interleave(len(x) // max(1, len(row_factors)))
        rows = rows * row_factors
    rows = rows.where(counted, 0)
    row_weights = row_weights.where(counted, 0)
    identity = torch.cat([x, asked, row_factors[:, None]], 1)
    loss, factors, ambiguous = _reduce(rows, counted, row_weights, identity, reduction, top_k, resolution)
    factors = factors * row_factors * scale
    over_batch = _largest if reduction == "none" else _sum
    terms, loss_terms = [], over_batch(factors * pieces) if z_loss != 0 else 0.0
    if logit_scale != 1 or softcap is not None:
        follows = factors * (a.abs().sum(1) + (2 * z_loss * lse).abs())
        loss_terms += over_batch(follows) * _largest(x)
        terms.append((follows * dloss.double().reshape(-1))[:, None] * p * slope * x)
    factors = factors * (dloss.double().reshape(-1))
    if label_smoothing > 0 or isinstance(target, tuple) or target.shape == logits.shape:
        terms.append(a * factors[:, None] * slope)
    if softcap is not None:
        terms.append(factors[:, None] * gradient * logit_scale)
    unknown = gradient.isnan() & (counted & (factors == 0))[:, None]
    gradient = (factors[:, None] * gradient * slope).where((counted & (factors != 0))[:, None], 0)
    loss = loss * scale
    if reduction == "none":
        loss = loss.reshape((*logits.shape[:1], *logits.shape[2:]) if logits.dim() > 1 else ())
    largest_term = max(map(_largest, terms), default=0.0)
    return Exact(loss, _like(gradient, logits), _like(unknown, logits), largest_term, loss_terms, ambiguous)


def _largest(values: Tensor) -> float:
    values = values[values.isfinite()].abs()
    return float(values.max()) if values.numel() else 0.0


def _rows(tensor: Tensor, n_classes: int) -> Tensor:
    tensor = tensor.detach().double()
    return (tensor.movedim(1, -1) if tensor.dim() > 1 else tensor).reshape(-1, n_classes)


def _like(rows: Tensor, logits: Tensor) -> Tensor:
    """(n_rows, n_cols) as the logits have it."""
    if logits.dim() == 1:
        return rows.reshape(logits.shape)
    return rows.reshape(logits.shape[0], *logits.shape[2:], logits.shape[1]).movedim(-1, 1)


def _of_probabilities(q: Tensor, w: Tensor, nll: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Coefficients a_c and losses."""
    a = w * (q * (1 - label_smoothing) + label_smoothing / q.shape[1])
    return a, (a * nll).sum(1)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-log p, p and 1 - p of every class, (n_rows, n_cols); log-sum-exp, (n_rows,)."""
    m, at = x.max(1, keepdim=True)
    e = (x - m).exp()
    e = e.where(m < torch.inf, torch.nan)  # +inf: NaN, as PyTorch has it
    others = e.scatter(1, at, 0)
    rest = others.sum(1, keepdim=True)
    nll = (m - x) + rest.log1p()
    not_p = ((1 + rest) - e).scatter(1, at, rest) / (1 + rest)
    return nll, e / (1 + rest), not_p, (m + rest.log1p())[:, 0]


def _reduce(
    rows: Tensor,
    counted: Tensor,
    row_weights: Tensor,
    identity: Tensor,  # (n_rows, ...): rows that agree in it are copies of each other
    reduction: str,
    top_k: int | float | None,
    resolution: float,
) -> tuple[Tensor, Tensor, bool]:
    """The loss before scale, the factor of every row's gradient, and whether rounding decides which rows are selected."""
    if reduction == "none":
        return rows, torch.ones_like(rows), False
    if reduction == "sum":
        return rows.sum(), torch.ones_like(rows), False
    if reduction == "mean":
        denominator = row_weights.sum()
        denominator = denominator.where(denominator != 0, torch.nan)
        return rows.sum() / denominator, (1 / denominator).expand(len(rows)), False
    n_counted = int(counted.sum())
    if n_counted == 0:
        return torch.tensor(torch.nan, dtype=torch.float64), torch.zeros_like(rows), False
    k = _selected(n_counted, reduction, top_k)
    order = counted.nonzero()[:, 0]
    last = int(order[rows[order].argsort(descending=True)[k - 1]])  # NaN is the largest, beyond infinity
    if rows[last].isnan():
        tied, above = rows.isnan() & counted, torch.zeros_like(counted)
    else:
        tied, above = counted & (rows == rows[last]), counted & ((rows > rows[last]) | rows.isnan())
    margin = resolution * rows.where(rows.isfinite(), 0).abs().max() + torch.finfo(torch.float32).smallest_normal
    near = tied | (counted & ((rows - rows[last]).abs() <= margin))
    if rows[last].isfinite() and (identity[near] == identity[last]).all():  # copies of one row tie, whatever float64 rounded
        tied, above, ambiguous = near, above & ~near, False
    else:
        ambiguous = bool(rows[last].isfinite()) and int((above | near).sum()) != k
    share = (k - int(above.sum())) / int(tied.sum())  # tensors of integers would divide in float32
    loss = (rows.where(above, 0).sum() + share * rows.where(tied, 0).sum()) / k
    return loss, (above.double() + tied * share) / k, ambiguous


def _selected(n_counted: int, reduction: str, top_k: int | float | None) -> int:
    if reduction == "max":
        return 1
    assert top_k is not None
    return max(1, int(top_k * n_counted + 0.5)) if isinstance(top_k, float) else min(top_k, n_counted)


def _sum(values: Tensor) -> float:
    return float(values[values.isfinite()].abs().sum())
