"""The model of a job, sharded over its ranks."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from roo_ray.config import Config, Training
from roo_ray.models.ranking import RankingModel
from roo_ray.training.job import WorkerJob
from roo_ray.training.sharding import ShardedModel, shard


def choose_algorithms(settings: Training) -> None:
    """Allows this process deterministic algorithms alone where ``settings.deterministic``. Before CUDA starts: cuBLAS
    reads then how it may share its workspace, and without ":4096:8" (or ":16:8") torch refuses its products."""
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(settings.deterministic)


def build_model(config: Config, job: WorkerJob, device: torch.device) -> ShardedModel:
    """The sharded model with its initial weights, a function of the seed alone."""
    torch.manual_seed(config.training.seed)
    autocast = config.training.autocast == "bf16"
    model = RankingModel(config.request_schema, config.model, torch.device("meta"), autocast, device)
    model.dense.to(device)
    return shard(
        model,
        config.training,
        device,
        batch_requests=max(1, round(job.requests_per_step / dist.get_world_size())),
        batch_impressions=max(1, round(job.impressions_per_step / dist.get_world_size())),
        ids_per_request=job.ids.per_request,
        embeddings=config.model.embeddings,
    )
