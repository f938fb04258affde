"""TurboQuant vector quantization and the compressed KV cache built on it."""

from turboquant_core.block_quantizer import BlockQuantizer
from turboquant_core.cache import TurboQuantCache
from turboquant_core.config import KVCacheConfig
from turboquant_core.quantizer import TurboQuantMSE, TurboQuantProd

__version__ = "0.1.0"

__all__ = [
    "BlockQuantizer",
    "KVCacheConfig",
    "TurboQuantCache",
    "TurboQuantMSE",
    "TurboQuantProd",
    "__version__",
]
