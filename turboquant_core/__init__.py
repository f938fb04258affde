"""TurboQuant vector quantization and the compressed KV cache built on it."""

from turboquant_core.bit_plan import BitPlan, plan_bits
from turboquant_core.block_quantizer import BlockQuantizer, QuantizedBlocks
from turboquant_core.cache import TurboQuantCache, cache_argument
from turboquant_core.config import KVCacheConfig
from turboquant_core.memory_footprint import MemoryFootprint
from turboquant_core.moments import measure_transforms
from turboquant_core.quantizer import ProdCodes, TurboQuantMSE, TurboQuantProd
from turboquant_core.transform import LayerTransforms, Transform

__all__ = [
    "BitPlan",
    "BlockQuantizer",
    "KVCacheConfig",
    "LayerTransforms",
    "MemoryFootprint",
    "ProdCodes",
    "QuantizedBlocks",
    "Transform",
    "TurboQuantCache",
    "TurboQuantMSE",
    "TurboQuantProd",
    "cache_argument",
    "measure_transforms",
    "plan_bits",
]
