"""Impressions to request rows: grouping, checks, shards, manifest, ledger. Knows no torch."""
