"""TurboQuant vector quantization and the compressed KV cache built on it."""

from turboquant_core.attention import (
    DecodeAttention,
    PassThroughCache,
    PrefillAttention,
    UnsupportedAttentionError,
    forward_context,
    traceable_forward,
    use_paged_attention,
    use_plain_attention,
)
from turboquant_core.bit_plan import BitPlan, plan_bits
from turboquant_core.block_codec import BlockCodec
from turboquant_core.block_quantizer import KEY_SCALE, VALUE_SCALE, BlockQuantizer, QuantizedBlocks
from turboquant_core.cache import TurboQuantCache, cache_argument
from turboquant_core.config import BLOCK_SIZE, KVCacheConfig
from turboquant_core.decode_buffers import DecodeBuffers
from turboquant_core.dense_cache import DenseCache
from turboquant_core.exact_codec import ExactCodec
from turboquant_core.host_store import HostStore
from turboquant_core.host_tier import Moves
from turboquant_core.layer_probe import (
    LayerShape,
    layer_visibilities,
    probe_dense_layers,
    probe_paged_layers,
)
from turboquant_core.memory_footprint import MemoryFootprint
from turboquant_core.moments import measure_transforms
from turboquant_core.paged_store import PagedStore, StoreLayer
from turboquant_core.quantizer import ProdCodes, TurboQuantMSE, TurboQuantProd
from turboquant_core.reference import AttentionOptions
from turboquant_core.request_cache import CacheManager, RequestCache, Visibility
from turboquant_core.state_pool import StatePool
from turboquant_core.step_plan import Chunk, DecodePlan, DecodeTables
from turboquant_core.timeline import Timeline
from turboquant_core.transform import LayerTransforms, Transform, rotation
from turboquant_core.upload import upload

__all__ = [
    "BLOCK_SIZE",
    "KEY_SCALE",
    "VALUE_SCALE",
    "AttentionOptions",
    "BitPlan",
    "BlockCodec",
    "BlockQuantizer",
    "CacheManager",
    "Chunk",
    "DecodeAttention",
    "DecodeBuffers",
    "DecodePlan",
    "DecodeTables",
    "DenseCache",
    "ExactCodec",
    "HostStore",
    "KVCacheConfig",
    "LayerShape",
    "LayerTransforms",
    "MemoryFootprint",
    "Moves",
    "PagedStore",
    "PassThroughCache",
    "PrefillAttention",
    "ProdCodes",
    "QuantizedBlocks",
    "RequestCache",
    "StatePool",
    "StoreLayer",
    "Timeline",
    "Transform",
    "TurboQuantCache",
    "TurboQuantMSE",
    "TurboQuantProd",
    "UnsupportedAttentionError",
    "Visibility",
    "cache_argument",
    "forward_context",
    "layer_visibilities",
    "measure_transforms",
    "plan_bits",
    "probe_dense_layers",
    "probe_paged_layers",
    "rotation",
    "traceable_forward",
    "upload",
    "use_paged_attention",
    "use_plain_attention",
]
