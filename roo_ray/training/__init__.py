"""Training and evaluation on Ray Train: launch, worker loop, sharding, checkpoints, MLflow."""

from roo_ray.allocator import use_huge_pages

use_huge_pages()  # already here: torch looks before its first tensor, and TorchRec makes one when it is imported
