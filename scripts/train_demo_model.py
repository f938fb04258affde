"""Trains the bundled demo model: a 13M-parameter Qwen2 that finds facts in 8,192 tokens of text.

    python scripts/train_demo_model.py --out turboquant_server/demo

One run on one GPU, start to end: collects the text that lies on this machine (sources and docs of the
standard library and of the installed packages), trains a byte-level BPE on it, trains the model for a
fixed number of steps while worker processes make the sequences (`recall_tasks.py`), and measures the
perplexity and exact recall of the exported model in transformers. Same machine image, same seed: same
data, same steps. The last line is one JSON object.

Speed comes from three things: sequences of 512, then 2,048, then 8,192 tokens with the same number of
tokens a step, so that everything around attention is compiled once; cuDNN attention; Muon, whose
orthogonalisation runs on stacks of equal matrices. The file has more than 300 lines because a run is read
from top to bottom.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
import numpy as np
import torch
import torch.nn.functional as F
from demo_text import VOCABULARY, collect_text, tokenize, train_tokenizer
from evaluate_quality import evaluate, open_cache_factory
from quality_table import table
from recall_tasks import (
    ANSWER_WEIGHT,
    LONG_MIX,
    SHORT_MIX,
    SPECIAL_TOKENS,
    Prose,
    SequenceMaker,
)
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoTokenizer

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN = 384, 6, 6, 2, 128, 1024
ROPE_THETA, MAX_POSITIONS, NORM_EPS = 1e6, 8192, 1e-6
TOKENS_PER_STEP = 131_072
STAGES = ((512, 0.36), (2048, 0.34), (8192, 0.30))  # sequence length, share of the steps
MUON_LR, ADAM_LR, WARMUP_STEPS, DECAY_SHARE = 0.02, 3e-3, 100, 0.45
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def log(message: str) -> None:
    print(f"[{time.monotonic() - START:6.1f} s] {message}", flush=True)


class Batches(Dataset):
    """Batch number `step` of one stage, made from (seed, step) alone."""

    def __init__(
        self, maker: SequenceMaker, length: int, mix: dict[str, float], steps: range, seed: int
    ) -> None:
        self.maker, self.length, self.mix, self.steps, self.seed = maker, length, mix, steps, seed

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, self.steps[index]])
        rows = [
            self.maker.make(rng, self.length + 1, self.mix) for _ in range(TOKENS_PER_STEP // self.length)
        ]
        return torch.from_numpy(np.stack([r[0] for r in rows])), torch.from_numpy(
            np.stack([r[1] for r in rows])
        )


# --------------------------------------------------------------------------------------------- model


def initial_weights(device: str, seed: int) -> dict[str, Tensor]:
    """Float32 master weights under the names that transformers' Qwen2ForCausalLM uses."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * gain * columns**-0.5

    weights = {"model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN, generator=generator) * 0.02}
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weights[f"{p}self_attn.{name}_proj.weight"] = matrix(heads * HEAD_DIM, HIDDEN)
            weights[f"{p}self_attn.{name}_proj.bias"] = torch.zeros(heads * HEAD_DIM)
        weights[f"{p}self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * HEAD_DIM, gain=0.1)
        weights[f"{p}mlp.gate_proj.weight"] = matrix(FFN, HIDDEN)
        weights[f"{p}mlp.up_proj.weight"] = matrix(FFN, HIDDEN)
        weights[f"{p}mlp.down_proj.weight"] = matrix(HIDDEN, FFN, gain=0.1)
        weights[f"{p}input_layernorm.weight"] = torch.ones(HIDDEN)
        weights[f"{p}post_attention_layernorm.weight"] = torch.ones(HIDDEN)
    weights["model.norm.weight"] = torch.ones(HIDDEN)
    return {name: w.to(device).requires_grad_() for name, w in weights.items()}


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight, NORM_EPS).to(x.dtype)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


# The pieces around attention, on flat [num_tokens, hidden]: the same shapes at every sequence length.
@partial(torch.compile, fullgraph=True, dynamic=False)
def before_attention(x, norm, wq, bq, wk, bk, wv, bv, cos, sin):
    h = rms_norm(x, norm)
    q, k, v = (
        F.linear(h, w.to(h.dtype), b.to(h.dtype)).unflatten(-1, (-1, HEAD_DIM))
        for w, b in ((wq, bq), (wk, bk), (wv, bv))
    )
    cos, sin = cos[:, None], sin[:, None]
    k, v = rotate_half(k, cos, sin), v
    group = HEADS // KV_HEADS
    return rotate_half(q, cos, sin), k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)


@partial(torch.compile, fullgraph=True, dynamic=False)
def after_attention(x, attended, wo, norm, gate, up, down):
    x = x + F.linear(attended, wo.to(x.dtype))
    h = rms_norm(x, norm)
    return x + F.linear(F.silu(F.linear(h, gate.to(h.dtype))) * F.linear(h, up.to(h.dtype)), down.to(h.dtype))


@partial(torch.compile, fullgraph=True, dynamic=False)
def loss_per_token(x, norm, embedding, targets):
    logits = F.linear(rms_norm(x, norm), embedding.to(x.dtype)).float()
    return F.cross_entropy(logits, targets, reduction="none")


def rope_tables(length: int, device: str) -> tuple[Tensor, Tensor]:
    """cos and sin, each ``[TOKENS_PER_STEP, head_dim / 2]``, for sequences of `length` laid end to end."""
    frequencies = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2, device=device).float() / HEAD_DIM)
    angles = torch.arange(TOKENS_PER_STEP, device=device).remainder(length).float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def token_losses(w: dict[str, Tensor], ids: Tensor, targets: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of each target: ids, targets ``[batch, length]`` -> ``[batch * length]`` float32."""
    batch, length = ids.shape
    x = F.embedding(ids.flatten(), w["model.embed_tokens.weight"]).bfloat16()
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        qkv = [w[f"{p}self_attn.{n}_proj.{kind}"] for n in "qkv" for kind in ("weight", "bias")]
        heads = before_attention(x, w[p + "input_layernorm.weight"], *qkv, *rope)
        q, k, v = (h.view(batch, length, HEADS, HEAD_DIM).transpose(1, 2) for h in heads)
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = attended.transpose(1, 2).reshape(batch * length, HEADS * HEAD_DIM)
        mlp = [w[f"{p}mlp.{n}_proj.weight"] for n in ("gate", "up", "down")]
        x = after_attention(
            x, attended, w[p + "self_attn.o_proj.weight"], w[p + "post_attention_layernorm.weight"], *mlp
        )
    return loss_per_token(x, w["model.norm.weight"], w["model.embed_tokens.weight"], targets.flatten())


class Muon:
    """Momentum, orthogonalised by 5 Newton-Schulz steps (Jordan et al. 2024), on stacks of equal shapes."""

    def __init__(self, parameters: list[Tensor], momentum: float = 0.95) -> None:
        shapes = sorted({tuple(p.shape) for p in parameters})
        self.groups = [[p for p in parameters if tuple(p.shape) == s] for s in shapes]
        self.momenta = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]
        self.momentum = momentum

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([p.grad for p in group])
            momentum.lerp_(gradient, 1 - self.momentum)
            update = self._orthogonalize(gradient.lerp(momentum, self.momentum))
            scale = max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            torch._foreach_add_(group, list(update.float().unbind()), alpha=-lr * scale)

    @staticmethod
    def _orthogonalize(g: Tensor) -> Tensor:
        wide = g.shape[1] <= g.shape[2]
        x = (g if wide else g.mT).bfloat16()
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x if wide else x.mT


def train(
    maker: SequenceMaker, num_steps: int, max_seconds: float, seed: int, device: str
) -> tuple[dict[str, Tensor], dict]:
    """Returns the weights and what the run did; stops early, with what it has, after `max_seconds`."""
    weights = initial_weights(device, seed)
    matrices = [p for n, p in weights.items() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in weights.items() if p.dim() == 1 or "embed" in n]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    bar = tqdm(total=num_steps, unit="step", disable=not sys.stderr.isatty())
    step, done, tokens = 0, False, 0
    first_steps = np.cumsum([0] + [round(share * num_steps) for _, share in STAGES])
    loaders = []
    for (length, _), start, stop in zip(STAGES, first_steps, first_steps[1:], strict=False):
        mix = SHORT_MIX if length == STAGES[0][0] else LONG_MIX
        dataset = Batches(maker, length, mix, range(start, stop), seed)
        workers = max(1, (os.cpu_count() or 2) - 2)
        loaders.append(
            DataLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=4, pin_memory=True)
        )
    for (length, _), loader in zip(STAGES, loaders, strict=True):
        rope = rope_tables(length, device)
        stage_start, stage_first = time.monotonic(), step
        for ids, token_weights in loader:
            ids, token_weights = (
                ids.to(device, non_blocking=True),
                token_weights.to(device, non_blocking=True),
            )
            decay = min(1.0, (num_steps - step) / (DECAY_SHARE * num_steps), (step + 1) / WARMUP_STEPS)
            for group in adam.param_groups:
                group["lr"] = ADAM_LR * decay
            losses = token_losses(weights, ids[:, :-1], ids[:, 1:], rope)
            loss = (losses * token_weights[:, 1:].flatten()).sum() / token_weights.sum()
            loss.backward()
            muon.step(MUON_LR * decay)
            adam.step()
            for p in weights.values():
                p.grad = None
            step, tokens = step + 1, tokens + TOKENS_PER_STEP
            bar.update()
            if step % 100 == 0 or step == 1:
                is_answer = token_weights[:, 1:].flatten() == ANSWER_WEIGHT
                answer_loss = losses[is_answer].mean().item()
                rate = (step - stage_first) * TOKENS_PER_STEP / (time.monotonic() - stage_start)
                bar.set_postfix_str(f"loss {loss.item():.3f}")
                log(
                    f"step {step:5d}/{num_steps} length {length} loss {loss.item():.3f} "
                    f"answers {answer_loss:.4f} {rate / 1e6:.2f}M tokens/s"
                )
            if time.monotonic() - START > max_seconds:
                done = True
                break
        if done:
            log(f"stopped by --max-seconds at step {step}")
            break
    bar.close()
    return weights, {"steps": step, "planned_steps": num_steps, "tokens": tokens}


# --------------------------------------------------------------------------------- export and checks


def export(weights: dict[str, Tensor], tokenizer: Tokenizer, held_out: str, out: Path):
    """Writes the model in transformers' format and returns it as loaded from there."""
    from transformers import (
        AutoModelForCausalLM,
        GenerationConfig,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    end_of_text, _, turn_end = (tokenizer.token_to_id(t) for t in SPECIAL_TOKENS)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, intermediate_size=FFN,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA}, rms_norm_eps=NORM_EPS,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=turn_end, pad_token_id=end_of_text,
        dtype="bfloat16",
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    missing = model.load_state_dict({k: v.detach().bfloat16() for k, v in weights.items()}, strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys, missing
    model.tie_weights()
    model.generation_config = GenerationConfig(eos_token_id=[turn_end, end_of_text], pad_token_id=end_of_text)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=MAX_POSITIONS,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)
    (out / "held_out.txt").write_text(held_out, "utf-8")
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled demo model on one GPU.")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[1] / "turboquant_server/demo"
    )
    parser.add_argument("--steps", type=int, default=5200, help="optimizer steps of 131,072 tokens")
    parser.add_argument("--max-seconds", type=float, default=515, help="stop training at this age of the run")
    parser.add_argument("--max-text-mb", type=int, default=300, help="most source text to collect, in MB")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)

    prose_texts, code_texts, held_out = collect_text(args.max_text_mb * 1_000_000)
    sample = [t for texts in (prose_texts, code_texts) for t in texts[:: max(1, len(texts) // 2500)]]
    tokenizer = train_tokenizer(sample)
    log(f"tokenizer: {tokenizer.get_vocab_size()} tokens from {len(sample)} files")
    streams = [tokenize(tokenizer, texts) for texts in (prose_texts, code_texts)]
    log(f"tokens: prose {len(streams[0]) / 1e6:.1f}M, code {len(streams[1]) / 1e6:.1f}M")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    maker = SequenceMaker(tokenizer, *(Prose(tokenizer, s) for s in streams))
    weights, run = train(maker, args.steps, args.max_seconds, args.seed, device)
    log("trained")
    model = export(weights, tokenizer, held_out, args.out).to(device)
    fast = AutoTokenizer.from_pretrained(args.out)
    caches = {"bf16": open_cache_factory("bf16", model, fast, MAX_POSITIONS)}
    result = evaluate(model, fast, held_out, caches, context=MAX_POSITIONS)
    print(table(result))
    parameters = sum(p.numel() for p in weights.values())
    text_tokens = sum(map(len, streams))
    print(json.dumps({**run, **result["bf16"], "parameters": parameters, "text_tokens": text_tokens,
                      "seconds": round(time.monotonic() - START, 1)}))  # fmt: skip


START = time.monotonic()
if __name__ == "__main__":
    main()
