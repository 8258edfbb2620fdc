"""Request shards to batches on a rank: plan, reading, streams, tensors."""
