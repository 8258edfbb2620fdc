"""Ranking metrics as additive float64 states: ranks and batches merge by summing."""
