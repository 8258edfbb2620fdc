"""What a model is trained on: the ranking loss, or retrieval's."""

from __future__ import annotations

from torch import Tensor, nn

from roo_ray.ingest.batch import RequestBatch
from roo_ray.models.architectures.retrieval import RetrievalTowers
from roo_ray.models.losses import ranking_loss
from roo_ray.models.managed import managed_ids
from roo_ray.models.retrieval import retrieval_loss


def retrieval_towers(model: nn.Module) -> RetrievalTowers | None:
    """The retrieval towers within a model, wrapped or not; None for a ranking model."""
    return next((module for module in model.modules() if isinstance(module, RetrievalTowers)), None)


def logits_of(model: nn.Module, outputs: Tensor, tasks: int) -> Tensor:
    """(B_NRO, K) for metrics: a ranking model's outputs; a retrieval model's scores, the same for every task."""
    towers = retrieval_towers(model)
    return outputs if towers is None else towers.scores(outputs).unsqueeze(1).expand(-1, tasks)


def item_rows(model: nn.Module, towers: RetrievalTowers, batch: RequestBatch) -> Tensor | None:
    """(B_NRO,) int64 rows of the items' table; None where they are the batch's ids."""
    managed = managed_ids(model)
    if managed is None or towers.table not in managed.features:
        return None
    return managed.table(towers.table).rows(batch.impression_ids[towers.item].values)


def training_loss(
    model: nn.Module, batch: RequestBatch, task_weights: Tensor, global_weights: Tensor, world_size: int
) -> tuple[Tensor, Tensor]:
    """(logits (B_NRO, K) for metrics, the loss whose mean over ranks is that of the global batch).

    ``batch`` in either form; task_weights (K,) the schema's; global_weights (K,) known labels on all ranks.
    """
    outputs = model(batch)
    towers = retrieval_towers(model)
    if towers is None:
        return outputs, ranking_loss(outputs, batch.labels, batch.weights, task_weights, global_weights, world_size)
    loss = retrieval_loss(towers, outputs, batch, world_size, item_rows(model, towers, batch))
    return logits_of(model, outputs, len(task_weights)), loss
