"""DAPE, the degradation-aware prompt extractor: tags and soft prompt of a photo."""

from .efficientnet import LiteConfig
from .encoder import SwinConfig
from .grounding import ground
from .head import HeadConfig
from .lora import merge_published_lora
from .model import DAPE, DAPEConfig, DAPEOutput
from .preprocess import tagger_input
from .vocabulary import Tag, Vocabulary

__all__ = [
    "DAPE",
    "DAPEConfig",
    "DAPEOutput",
    "HeadConfig",
    "LiteConfig",
    "SwinConfig",
    "Tag",
    "Vocabulary",
    "ground",
    "merge_published_lora",
    "tagger_input",
]
