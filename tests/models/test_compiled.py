"""Towers under ``torch.compile``: traced without an error, and the same model. Its code is run as it is, uncompiled."""

from __future__ import annotations

import torch

from tests.models.batches import random_batch
from tests.models.test_parity import SCHEMA, build, logits_loss_gradients


def test_compiled_towers_are_the_same_model() -> None:
    torch.compiler.reset()
    plain, compiled = build(kind="hstu"), build(kind="hstu")
    compiled.dense = torch.compile(compiled.dense, backend="eager", dynamic=True)  # type: ignore[assignment]
    for seed, sizes in enumerate([[3, 1, 4], [2, 2]]):
        batch = random_batch(SCHEMA, sizes, seed)
        logits, loss, gradients = logits_loss_gradients(plain, batch)
        its_logits, its_loss, its_gradients = logits_loss_gradients(compiled, batch)
        torch.testing.assert_close((its_logits, its_loss), (logits, loss), rtol=1e-5, atol=1e-6)
        its_gradients = {name.replace("_orig_mod.", ""): value for name, value in its_gradients.items()}
        torch.testing.assert_close(its_gradients, gradients, rtol=1e-5, atol=1e-6)
