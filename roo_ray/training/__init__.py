"""Training and evaluation on Ray Train: launch, worker loop, sharding, checkpoints, MLflow."""
