"""Retrieval's loss: in-batch sampled softmax over the items of the global batch.

Each positive is told from every other impression's item, on all ranks. Not from those of the same user (request
order would make them false negatives by the dozen) and not from the same item. Logits are corrected by the
logarithm of the items' frequency (logQ; Yi et al., RecSys 2019), so that popular items are not punished for being
drawn often. The loss is normalised by the positives of the global batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from roo_ray.ingest.batch import RequestBatch
from roo_ray.models.architectures.retrieval import RetrievalTowers


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks, equally many of each; every rank's loss sends its gradient back to the rows' owner."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = rows.shape[0]
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.contiguous()
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.rows
        return total[start : start + ctx.rows]


def gather_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The rows of all ranks, in order of ranks, which may have unequally many: each (N_r, ...) -> (sum of N_r, ...).
    Differentiable; collective where there is a process group, forward and backward."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensors
    own = torch.tensor([tensors[0].shape[0]], device=tensors[0].device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    sizes = torch.cat(counts)  # (W,)
    most = int(sizes.max())
    kept = (torch.arange(most, device=own.device) < sizes.unsqueeze(1)).flatten().nonzero().squeeze(1)
    gather: Any = _GatherRows.apply
    result = []
    for tensor in tensors:
        padding = tensor.new_zeros(most - tensor.shape[0], *tensor.shape[1:])
        result.append(gather(torch.cat([tensor, padding])).index_select(0, kept))
    return tuple(result)


def retrieval_loss(
    towers: RetrievalTowers, pairs: Tensor, batch: RequestBatch, world_size: int, item_rows: Tensor | None = None
) -> Tensor:
    """``sum_i -log softmax_i / positives * world_size``, a scalar float32; both sums over the global batch.

    pairs (B_NRO, 2 D) of ``towers``, for the impressions of ``batch`` (in either form). An impression is a
    positive where its label is 1, and its item is in the pool of negatives where any label of it is known, so
    that a dummy request is in neither. Collective. In training the counts behind logQ are updated first.
    ``item_rows`` (B_NRO,) int64: the rows of the items' table, where the batch's ids are not.
    """
    users, items = pairs.chunk(2, dim=1)
    user_keys = batch.user_key[batch.request_of_impression()]  # (B_NRO,)
    item_ids = batch.impression_ids[towers.item].values  # (B_NRO,)
    real = (batch.weights > 0).any(dim=1).nonzero().squeeze(1)
    item_rows = item_ids if item_rows is None else item_rows
    pool_items, pool_keys = gather_rows(items[real], torch.stack([user_keys, item_ids, item_rows], dim=1)[real])
    if towers.training:
        towers.count_items(pool_keys[:, 2])

    chosen = (batch.labels[:, towers.positive] * batch.weights[:, towers.positive] > 0).nonzero().squeeze(1)  # (P,)
    own = towers.scores(pairs[chosen])  # (P,)
    others = users[chosen] @ pool_items.T / towers.temperature  # (P, pool)
    if towers.log_q:
        own = own - towers.log_frequency(item_rows[chosen])
        others = others - towers.log_frequency(pool_keys[:, 2])
    same_user = user_keys[chosen].unsqueeze(1) == pool_keys[:, 0]
    same_item = item_ids[chosen].unsqueeze(1) == pool_keys[:, 1]
    others = others.masked_fill(same_user | same_item, float("-inf"))
    losses = torch.logsumexp(torch.cat([own.unsqueeze(1), others], dim=1), dim=1) - own  # (P,)

    positives = torch.tensor(float(len(chosen)), device=pairs.device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(positives)
    return losses.sum() / positives.clamp(min=1.0) * world_size
