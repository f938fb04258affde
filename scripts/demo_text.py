"""The demo model's training text and tokenizer, made from what lies on this machine.

Sources and docs of the Python standard library and of the installed packages, deduplicated by file, with
generated tables left out; long docstrings count as prose once more. A file is held out by its hash, so the
same file is never trained on, wherever it lies. This file knows nothing of models or tasks.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import sys
import sysconfig
from pathlib import Path

import numpy as np
from recall_tasks import END_OF_TEXT, SPECIAL_TOKENS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 4096
HELD_OUT_BYTES = 400_000
# Qwen2's splitting rule: single digits, words with one leading space, runs of punctuation.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def is_text(text: str) -> bool:
    """Refuses generated tables and data in disguise."""
    sample = text[:20_000]
    letters, digits = sum(map(str.isalpha, sample)), sum(map(str.isdigit, sample))
    lines = sample.count("\n") + 1
    return letters > 0.45 * len(sample) and digits < 0.08 * len(sample) and len(sample) < 120 * lines


def docstrings(source: str) -> str:
    """The long strings of a Python file: English about code, where a machine holds little other prose."""
    found = re.findall(r'"""(.+?)"""', source, re.DOTALL)
    return "\n\n".join(inspect.cleandoc(text) for text in found if len(text) > 200)


def collect_text(max_bytes: int) -> tuple[list[str], list[str], str]:
    """Returns prose files, source files (held-out ones left out), and held-out standard-library text."""
    library = Path(sysconfig.get_paths()["stdlib"]).resolve()
    roots = [library, *map(Path, sys.path), Path("/usr/lib/python3/dist-packages"), Path("/usr/share/doc")]
    seen: set[bytes] = set()
    prose, code, held_out = [], [], []
    sizes = {"prose": 0, "code": 0, "held out": 0}
    visited: set[Path] = set()
    for root in dict.fromkeys(r.resolve() for r in roots if r.is_dir()):
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(s for s in subfolders if s != "__pycache__")
            if Path(folder) in visited:
                subfolders.clear()
                continue
            visited.add(Path(folder))
            for name in sorted(names):
                is_prose = name.endswith((".rst", ".md", ".txt")) or name == "METADATA"
                if not (is_prose or name.endswith((".py", ".pyi"))):
                    continue
                if re.search(
                    r"LICEN|COPYING|NOTICE|top_level|entry_points|requirements|CMakeLists|SOURCES", name
                ):
                    continue
                path = Path(folder, name)
                try:
                    if not 400 < path.stat().st_size < 400_000:
                        continue
                    text = path.read_text("utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                digest = hashlib.sha256(re.sub(r"\s+", "", text).encode()).digest()
                if digest in seen or not is_text(text) or any(t in text for t in SPECIAL_TOKENS):
                    continue
                seen.add(digest)
                own = path.is_relative_to(library) and "site-packages" not in path.parts
                if digest[0] < (
                    24 if own else 4
                ):  # never trained on: 9% of the standard library, 2% elsewhere
                    if own and len(text) < 120_000 and sizes["held out"] < HELD_OUT_BYTES:
                        held_out.append(text)
                        sizes["held out"] += len(text)
                    continue
                kind = "prose" if is_prose else "code"
                if sizes[kind] < max_bytes:
                    (prose if is_prose else code).append(text)
                    sizes[kind] += len(text)
                    if not is_prose and len(english := docstrings(text)) > 400:
                        prose.append(english)
                        sizes["prose"] += len(english)
    return prose, code, END_OF_TEXT.join(held_out)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Returns all documents in a fixed random order, each ended by <|endoftext|>: ``[num_tokens]`` uint16."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    order = np.random.default_rng(0).permutation(len(texts))
    pieces = []
    for i in range(0, len(order), 512):
        for encoding in tokenizer.encode_batch_fast([texts[j] for j in order[i : i + 512]]):
            pieces.append(np.array([*encoding.ids, end], dtype=np.uint16))
    return np.concatenate(pieces)
