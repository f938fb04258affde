"""How the comparison with uncompressed predictions starts: its memory, and what it finds at load.

At load the served engine itself answers prompts from `sample_text.txt`, so what is measured has come by the
way that users' answers come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from turboquant_server.cache_memory import build_store, open_manager
from turboquant_server.cache_plan import CachePlan, sample_windows
from turboquant_server.cache_size import TIMELINE, CacheSize, divide_memory
from turboquant_server.engine.exact_reader import ExactReader
from turboquant_server.engine.fidelity import Fidelity
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.load_error import ModelLoadError
from turboquant_server.memory import memory_budget, memory_in_use

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from turboquant_server.attention_check import ModelAttention
    from turboquant_server.config import ServerConfig
    from turboquant_server.engine.engine import Engine

# Tokens that are read without compression, at most, and the part of the cache's memory that they may take.
MAX_TOKENS = 8192
MEMORY_SHARE = 1 / 16
# Of a model that reads all of them in one step, which takes more memory the more they are.
MAX_TOKENS_ONE_SHOT = 2048
# Answers at load, and the tokens of each.
NUM_ANSWERS, NUM_ANSWER_TOKENS = 4, 128


def size_exact_cache(
    config: ServerConfig, model: PreTrainedModel, attention: ModelAttention, max_model_len: int
) -> CacheSize | None:
    """Return the size of the cache for what is read without compression; None if nothing is.

    Raises:
        ModelLoadError: The model has no cache that is compressed, or there is not enough memory.
    """
    if not config.fidelity_sample_rate:
        return None
    if not attention.shapes:
        raise ModelLoadError("--fidelity-sample-rate has nothing to compare: the model has no KV cache")
    device = model.device
    num_bytes = config.kv_cache_memory
    if num_bytes is None:
        num_bytes = memory_budget(device, config.gpu_memory_utilization, config.vram_limit)
        num_bytes = max(0, num_bytes - memory_in_use(device))
    most = MAX_TOKENS_ONE_SHOT if attention.one_shot else MAX_TOKENS
    layers = CachePlan(16, 16, exact_dtype=model.dtype).store_layers(attention)
    alone = config.model_copy(update={"max_num_seqs": 1, "max_num_batched_tokens": MAX_TOKENS_ONE_SHOT})
    try:
        return divide_memory(
            int(MEMORY_SHARE * num_bytes), attention, layers, model.dtype, min(most, max_model_len), alone
        )
    except ModelLoadError as error:
        raise ModelLoadError(
            f"--fidelity-sample-rate has too little memory, {MEMORY_SHARE:.1%} of the cache's: {error}"
        ) from error


def build_fidelity(
    config: ServerConfig, model: PreTrainedModel, attention: ModelAttention, size: CacheSize | None
) -> Fidelity | None:
    """Allocate the cache for what is read without compression; None if nothing is."""
    if size is None:
        return None
    layers = CachePlan(16, 16, exact_dtype=model.dtype).store_layers(attention)
    store, states = build_store(attention, layers, size, model.dtype, model.device)
    manager = open_manager(attention, size, caches_prefixes=False)
    reader = ExactReader(
        model, store, states, manager, is_paged=attention.is_paged, one_shot=attention.one_shot
    )
    return Fidelity(reader, TIMELINE, config.fidelity_sample_rate)


def measure_range(
    engine: Engine, fidelity: Fidelity, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Let the engine answer prompts, and what the comparisons find be the range that is expected.

    Raises:
        ModelLoadError: There is nothing to compare, or it fails.
    """
    max_tokens = min(engine.max_model_len, fidelity.max_tokens)
    windows = sample_windows(model, tokenizer, max_tokens).tolist()
    for index in range(NUM_ANSWERS if windows else 0):
        window = windows[index % len(windows)]
        params = SamplingParams(NUM_ANSWER_TOKENS, seed=index, ignore_eos=True)
        prompt = window[: max(1, len(window) - NUM_ANSWER_TOKENS)]
        engine.add_request(f"fidelity-{index}", prompt, params, cache_salt="fidelity")
    while engine.has_unfinished_requests:
        engine.step()
    while fidelity.has_work:
        fidelity.work()
    if fidelity.state.num_skipped["failed"]:
        raise ModelLoadError(
            "--fidelity-sample-rate cannot be kept: the model cannot be read without compression; "
            "the log above has the details"
        )
    if not fidelity.state.total.num_tokens:
        raise ModelLoadError(
            "--fidelity-sample-rate has nothing to compare: nothing is compressed in the "
            f"{max_tokens:,} tokens that can be read again; give a longer --max-model-len or more memory"
        )
    fidelity.set_range()
