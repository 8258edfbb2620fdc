"""Request-only models in plain PyTorch over TorchRec's embeddings. Knows no Ray."""
