"""What compressing the KV cache costs in quality, seen as decoding sees it.

    python scripts/evaluate_quality.py --kv bf16,8,4,3,2

Text is fed in chunks of 64 tokens, so every prediction attends to a past that has gone through the cache;
a one-shot prefill would never see the compression. Reported for each setting, same text and same seeds:
perplexity and its change, KL divergence to the bf16 cache per token (mean and 99th percentile), how often
both agree on the most likely token, and exact retrieval of a planted six-digit code by context length.
A setting is `bf16`, a number of bits (2, 3, 4, 8), or bits of keys and values apart: `4:3`.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from recall_tasks import planted_prompt
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, PreTrainedModel

from turboquant_core import TurboQuantCache

DEMO = Path(__file__).resolve().parents[1] / "turboquant_server/demo"
CHUNK = 64
RETRIEVAL_LENGTHS = (1024, 2048, 4096, 8192)


def open_cache(kv: str, model: PreTrainedModel) -> Cache:
    """Returns an empty cache for the setting `kv`: ``bf16``, ``4`` or ``4:3``."""
    if kv == "bf16":
        return DynamicCache(config=model.config)
    key_bits, _, value_bits = kv.partition(":")
    return TurboQuantCache(
        key_bits=int(key_bits), value_bits=int(value_bits or key_bits), config=model.config
    )


def feed(model: PreTrainedModel, cache: Cache, ids: Tensor, chunk: int) -> Iterator[Tensor]:
    """Feeds ``[batch, length]`` tokens in chunks and yields the logits of each, float32."""
    for start in range(0, ids.shape[1], chunk):
        yield model(input_ids=ids[:, start : start + chunk], past_key_values=cache).logits.float()


@torch.inference_mode()
def prediction_quality(
    model: PreTrainedModel, windows: Tensor, kv: str, reference: list[Tensor], bar: tqdm
) -> dict[str, float]:
    """Measures the predictions in the second half of each window.

    Args:
        windows: ``[num_windows, context]`` token ids.
        reference: log-probabilities of the bf16 cache, a tensor a chunk; filled by the call for ``bf16``.
    """
    first = windows.shape[1] // 2
    cache, losses, divergences, agreements = open_cache(kv, model), [], [], []
    for i, logits in enumerate(feed(model, cache, windows, CHUNK)):
        bar.update()
        start = i * CHUNK
        if start < first:
            continue
        targets = windows[:, start + 1 : start + CHUNK + 1]
        log_probs = logits.log_softmax(-1)[:, : targets.shape[1]]
        losses.append(F.nll_loss(log_probs.flatten(0, 1), targets.flatten(), reduction="none"))
        if kv == "bf16":
            reference.append(log_probs)
        base = reference[i - first // CHUNK]
        divergences.append((base.exp() * (base - log_probs)).sum(-1).flatten())
        agreements.append((base.argmax(-1) == log_probs.argmax(-1)).flatten())
    divergence = torch.cat(divergences)
    result = {
        "predictions": divergence.numel(),
        "perplexity": torch.cat(losses).mean().exp().item(),
        "kld_mean": divergence.mean().item(),
        "kld_p99": divergence.quantile(0.99).item(),
        "top1_agreement": torch.cat(agreements).float().mean().item(),
    }
    if isinstance(cache, TurboQuantCache):
        result["bits_per_value"] = cache.memory_footprint().bits_per_value
    return result


@torch.inference_mode()
def retrieval(
    model: PreTrainedModel, tokenizer: Tokenizer, text: list[int], kv: str, length: int, samples: int
) -> float:
    """Share of planted six-digit codes that greedy decoding gives back exactly, over five depths."""
    rng = np.random.default_rng([length, 1])
    room = length - 8  # the answer must fit, too
    planted = []
    for i in range(samples):
        start = int(rng.integers(max(1, len(text) - length)))
        planted.append(
            planted_prompt(rng, tokenizer, text[start : start + length], room, (i % 5) / 4, chat=i % 2 == 0)
        )
    right = 0
    for batch in (planted[i::2] for i in range(2)):  # chat and plain answers differ in length
        prompts = torch.tensor([prompt for prompt, _ in batch], device=model.device)
        answers = torch.tensor([answer for _, answer in batch], device=model.device)
        cache = open_cache(kv, model)
        for logits in feed(model, cache, prompts, 512):
            token = logits[:, -1].argmax(-1, keepdim=True)
        correct = token == answers[:, :1]
        for i in range(1, answers.shape[1]):
            token = model(input_ids=token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            correct &= token == answers[:, i : i + 1]
        right += int(correct.sum())
    return right / samples


def evaluate(
    model: PreTrainedModel, tokenizer: Tokenizer, text: str, settings: list[str], context: int, samples: int
) -> dict[str, dict]:
    """Returns the measurements of every setting; ``bf16`` is measured first, as everyone's reference."""
    settings = ["bf16", *(kv for kv in settings if kv != "bf16")]
    ids = tokenizer.encode(text).ids
    windows = torch.tensor(ids[: len(ids) // context * context], device=model.device).view(-1, context)
    lengths = [length for length in RETRIEVAL_LENGTHS if length <= context]
    reference: list[Tensor] = []
    results = {}
    total = len(settings) * (-(-context // CHUNK) + len(lengths))
    with tqdm(total=total, unit="part", disable=not sys.stderr.isatty()) as bar:
        for kv in settings:
            bar.set_description(kv)
            results[kv] = prediction_quality(model, windows, kv, reference, bar)
            results[kv]["retrieval"] = {}
            for length in lengths:
                results[kv]["retrieval"][length] = retrieval(model, tokenizer, ids, kv, length, samples)
                bar.update()
    return results


def table(results: dict[str, dict]) -> str:
    """Returns the results as a Markdown table that also reads well as plain text."""
    base = results["bf16"]["perplexity"]
    rows = [["KV bits", "bits/value*", "perplexity", "change", "KLD mean", "KLD p99", "top-1"]]
    rows[0] += [f"recall {length}" for length in results["bf16"]["retrieval"]]
    for kv, r in results.items():
        bits = r.get("bits_per_value", 16.0)
        row = [kv, f"{bits:.2f}", f"{r['perplexity']:.4f}", f"{r['perplexity'] / base - 1:+.2%}"]
        row += [f"{r['kld_mean']:.5f}", f"{r['kld_p99']:.4f}", f"{r['top1_agreement']:.2%}"]
        rows.append(row + [f"{share:.1%}" for share in r["retrieval"].values()])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what KV-cache compression costs in quality.")
    parser.add_argument(
        "--model", default=str(DEMO), help="Hugging Face id or folder (default: the demo model)"
    )
    parser.add_argument(
        "--kv", default="bf16,8,4,3,2", help="settings, comma-separated (default: %(default)s)"
    )
    parser.add_argument("--context", type=int, default=8192, help="tokens in a window (default: %(default)s)")
    parser.add_argument(
        "--samples", type=int, default=50, help="retrieval prompts a length (default: %(default)s)"
    )
    parser.add_argument("--max-windows", type=int, help="use only so many windows of the text")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model).backend_tokenizer
    text = (DEMO / "held_out.txt").read_text("utf-8")
    if args.max_windows:
        tokens = tokenizer.encode(text).ids[: args.max_windows * args.context]
        text = tokenizer.decode(tokens, skip_special_tokens=False)
    results = evaluate(model, tokenizer, text, args.kv.split(","), args.context, args.samples)
    hardware = (
        torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    )
    setup = (
        f"{hardware}, torch {torch.__version__}, transformers {transformers.__version__}, model in {dtype}"
    )
    print(table(results))
    print(
        f"* residual included, at {args.context} tokens. Predictions from token {args.context // 2}. {setup}"
    )
    print(json.dumps({"context": args.context, "samples": args.samples, "setup": setup, "results": results}))


if __name__ == "__main__":
    main()
