"""The architectures, one file each: plain PyTorch from user side to logits (docs/models.md)."""

from roo_ray.models.architectures.cross_attention import CrossAttentionRanking
from roo_ray.models.architectures.dcn import DCNRanking
from roo_ray.models.architectures.hstu import HSTURanking
from roo_ray.models.architectures.hstu_targets import HSTUTargetsRanking
from roo_ray.models.architectures.retrieval import RetrievalTowers
from roo_ray.models.architectures.two_tower import TwoTowerRanking
from roo_ray.models.contract import RequestOnlyModel

ARCHITECTURES: dict[str, type[RequestOnlyModel]] = {
    "dcn": DCNRanking,
    "hstu": HSTURanking,
    "hstu_targets": HSTUTargetsRanking,
    "cross_attention": CrossAttentionRanking,
    "two_tower": TwoTowerRanking,
    "retrieval": RetrievalTowers,
}
