"""TurboQuant vector quantization and the compressed KV cache built on it."""

from turboquant_core.block_quantizer import BlockQuantizer, QuantizedBlocks
from turboquant_core.cache import MemoryFootprint, TurboQuantCache
from turboquant_core.config import KVCacheConfig
from turboquant_core.quantizer import ProdCodes, TurboQuantMSE, TurboQuantProd

__all__ = [
    "BlockQuantizer",
    "KVCacheConfig",
    "MemoryFootprint",
    "ProdCodes",
    "QuantizedBlocks",
    "TurboQuantCache",
    "TurboQuantMSE",
    "TurboQuantProd",
]
