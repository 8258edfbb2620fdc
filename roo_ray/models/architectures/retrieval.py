"""Retrieval: user and item vectors of length 1, whose dot product ranks the whole catalogue (``retrieval.py``)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from roo_ray.config import Model
from roo_ray.models.architectures.two_tower import ItemTower, UserTower
from roo_ray.models.contract import ModelInputs, RequestOnlyModel, UserState
from roo_ray.schema import Schema


class RetrievalTowers(RequestOnlyModel):
    """The score of a pair is its cosine over the temperature: one column, whatever the number of labels."""

    def __init__(self, schema: Schema, settings: Model) -> None:
        super().__init__()
        self.temperature = settings.temperature
        self.user_tower = UserTower(settings.user_dim, schema, settings)
        self.item_tower = ItemTower(settings.user_dim, schema, settings)

    def user_side(self, inputs: ModelInputs) -> UserState:
        """``user`` (B_RO, user_dim), of length 1."""
        return UserState({"user": functional.normalize(self.user_tower(inputs).float(), dim=1)})

    def items(self, inputs: ModelInputs) -> Tensor:
        """(B_NRO, user_dim), of length 1; a function of the candidate alone."""
        return functional.normalize(self.item_tower(inputs).float(), dim=1)

    def impression_side(self, user: UserState, inputs: ModelInputs) -> Tensor:
        """Scores (B_NRO, 1)."""
        return (user.vectors["user"] * self.items(inputs)).sum(1, keepdim=True) / self.temperature
