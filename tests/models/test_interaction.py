"""Cross layers against their formula, and the compression of dense features."""

import torch
from torch.nn import functional

from roo_ray.models.interaction import LowRankCross, Tower, symmetric_log


def test_cross_layers_are_dcnv2() -> None:
    torch.manual_seed(0)
    cross, x0 = LowRankCross(5, layers=3, rank=2), torch.randn(4, 5)
    x = x0
    for down, up in zip(cross.down, cross.up, strict=True):
        x = x0 * (x @ down.weight.T @ up.weight.T + up.bias) + x
    torch.testing.assert_close(cross(x0), x)
    assert torch.equal(LowRankCross(5, layers=0, rank=2)(x0), x0)


def test_tower_of_no_layers_is_the_identity() -> None:
    x = torch.randn(3, 5)
    ones = torch.ones(3)
    assert torch.equal(Tower(5, [])(x, ones), x)
    tower = Tower(5, [4, 2])
    assert tower.width == 2
    assert tower(x, ones).shape == (3, 2)
    plain = Tower(5, [4], "none")
    linear = plain.linears[0]
    torch.testing.assert_close(plain(x, ones), functional.silu(x @ linear.weight.T + linear.bias))


def test_symmetric_log_is_odd_monotone_and_finite() -> None:
    x = torch.tensor([-1e30, -5.0, 0.0, 1e-9, 5.0, 1e30])
    y = symmetric_log(x)
    assert torch.isfinite(y).all()
    assert torch.equal(symmetric_log(-x), -y)
    assert (y.diff() > 0).all()
