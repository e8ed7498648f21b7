"""What the sampler does to logits: pure functions of tensors, one row a sequence, none of them changes its input.

Settings come as columns [m, 1] float32, so that rows with different settings share every operation.
Must not hold: state, requests, values read back from a device other than the CPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_FIRST_WIDTH = 128  # how many of the likeliest tokens the CPU looks at first (and twice top_k at least)
_WIDEN = 16  # how many times more it looks at where those fall short


def penalise_repetition(logits: Tensor, seen: Tensor, repetition: Tensor) -> Tensor:
    """Logits [m, vocab] float32: x * repetition if x < 0 else x / repetition where `seen` [m, vocab] bool.

    Source: transformers' RepetitionPenaltyLogitsProcessor (CTRL, arXiv 1909.05858).
    """
    x = logits.float()
    return torch.where(seen, torch.where(x < 0, x * repetition, x / repetition), x)


def penalise_counts(logits: Tensor, counts: Tensor, frequency: Tensor, presence: Tensor) -> Tensor:
    """Logits [m, vocab] float32: x - frequency * c - presence * (c > 0), with c from `counts` [m, vocab] int32.

    Source: the OpenAI API reference, frequency_penalty and presence_penalty.
    """
    return logits.float().sub(frequency * counts).sub_(presence * (counts > 0))


def scale(logits: Tensor, largest: Tensor, temperature: Tensor) -> Tensor:
    """(logits - largest) / temperature, [m, n] float32: at most 0, softmax's exponents. `largest` [m, 1].

    The shift comes first, so that a tiny temperature sends what is not the largest to -inf and nothing to NaN.
    """
    return logits.float().sub(largest.float()).div_(temperature)


def weights_above(scaled: Tensor, least: Tensor) -> Tensor:
    """exp(scaled) where it is at least `least`, else 0: what tokens are drawn in proportion to. `least` [m, 1]."""
    return torch.where(scaled < least, 0.0, scaled.exp())


def draw(weights: Tensor, ids: Tensor | None, uniforms: Tensor, likeliest: Tensor) -> Tensor:
    """Token ids [m] int64: the first whose cumulative weight exceeds uniforms · (the weights' sum).

    `weights` [m, n], at least 0; `ids` [m, n] the tokens they belong to, rising (None: 0 to n - 1). The order of the
    vocabulary and not of the weights, so that a small difference in the logits (another batch shape) moves the
    borders between tokens by as little. `uniforms` [m, 1] float64 in [0, 1). Sums are float64. A token of weight 0
    is never returned: where rounding in a parallel sum, or a NaN, would choose it, `likeliest` [m] stands in.
    """
    cumulative = weights.double().cumsum_(dim=-1)
    target = uniforms * cumulative[:, -1:]
    at = torch.searchsorted(cumulative, target, right=True).clamp_(max=weights.shape[1] - 1)  # [m, 1]
    picked = at if ids is None else ids.gather(1, at)
    return torch.where(weights.gather(1, at) > 0, picked, likeliest[:, None]).squeeze(1)


@dataclass(frozen=True, slots=True)
class Filters:
    """Top-k, then top-p, then min-p, a row: transformers' TopKLogitsWarper, TopPLogitsWarper and MinPLogitsWarper.

    `top_k` 0, `top_p` 1 and `log_min_p` -inf keep all; all are [m, 1] float32. Semantics:
        top-k: keep what is at least the top_k-th largest
        top-p: of the softmax of what is kept, keep t if what is likelier than t sums to less than top_p
        min-p: keep t if its probability is at least min_p times the largest's
    Tokens that tie with a kept one are kept, so that the outcome does not hang on the order of a sort.

    `max_top_k` is the largest of top_k; `has_free_top_p`, whether a row has top-p without top-k.
    """

    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor
    max_top_k: int
    has_free_top_p: bool

    def rows(self, at: Tensor) -> "Filters":
        return Filters(self.top_k[at], self.top_p[at], self.log_min_p[at], self.max_top_k, self.has_free_top_p)


def draw_filtered(
    logits: Tensor, temperature: Tensor, filters: Filters, uniforms: Tensor, likeliest: Tensor, width: int | None = None
) -> Tensor:
    """Token ids [m] int64 drawn from what `filters` leave of softmax(logits / temperature); the rest as in `draw`.

    The CPU looks at a few of the likeliest tokens first and at more only for rows that these do not decide; other
    devices, whose values must not be waited for, sort the whole vocabulary.
    """
    vocab = logits.shape[1]
    if width is None:
        is_cpu = logits.device.type == "cpu"
        width = max(_FIRST_WIDTH, 2 * filters.max_top_k) if is_cpu else vocab
    width = min(width, vocab)
    weights, ids, is_short = keep_likeliest(logits, temperature, filters, width)
    tokens = draw(weights, ids, uniforms, likeliest)
    if width < vocab and bool(is_short.any()):
        at = is_short.nonzero().squeeze(1)
        tokens[at] = draw_filtered(
            logits[at], temperature[at], filters.rows(at), uniforms[at], likeliest[at], width * _WIDEN
        )
    return tokens


def keep_likeliest(
    logits: Tensor, temperature: Tensor, filters: Filters, width: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What `filters` leave of the `width` likeliest tokens of each row of `logits` [m, vocab].

    Returns weights [m, width] float32, proportional to the probabilities and 0 for what is filtered out; the
    tokens' ids [m, width] int64, rising (None: all of the vocabulary); and [m] bool, whether `width` tokens do not
    decide the row, in which case its weights mean nothing. All of the vocabulary decides every row.
    """
    top = logits.topk(width, dim=-1)
    largest = top.values[:, :1]
    scaled = scale(top.values, largest, temperature)  # [m, width], falling
    has_k, has_p = filters.top_k > 0, filters.top_p < 1
    kth = scaled.gather(1, (filters.top_k.long() - 1).clamp_(0, width - 1))
    least_k = torch.where(has_k, kth, -torch.inf)  # [m, 1]: the least value that top-k keeps
    kept = weights_above(scaled, least_k).double()
    total = kept.sum(dim=-1, keepdim=True)
    if filters.has_free_top_p and width < logits.shape[1]:
        total_of_all = scale(logits, largest, temperature).exp_().sum(dim=-1, keepdim=True, dtype=torch.float64)
        total = torch.where(has_k, total, total_of_all)
    likelier = kept.cumsum(dim=-1) - kept  # [m, width]: the weight of what comes before each
    num_kept = (likelier < filters.top_p * total).sum(dim=-1, keepdim=True).clamp_(min=1)
    least_p = torch.where(has_p, scaled.gather(1, num_kept - 1), -torch.inf)
    least = torch.maximum(torch.maximum(least_k, least_p), filters.log_min_p)
    # Not decided while the last token is kept: the next one may be kept, too, or tie with it.
    is_short = (scaled[:, -1:] >= torch.where(has_k, least_k, least)).squeeze(1)
    weights = weights_above(scaled, least)
    if width == logits.shape[1]:
        return torch.empty_like(weights).scatter_(1, top.indices, weights), None, is_short
    ids, order = top.indices.sort(dim=-1)
    return weights.gather(1, order), ids, is_short
