"""Encoding beside the library's own, all cores busy: `python -m benchmarks.tokenizers`.

Tokenizers are learnt from the standard library's text and encode it, file by file. Each library encodes through the
fastest call that it has for many texts, to plain lists of ids; then `encode_batch`, to arrays. The two take turns, and
medians are compared.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from lm_jax.data.sources import EMBEDDED, Policy, Reader, find_files
from lm_jax.data.tokenizers import HuggingFace, SentencePiece, Tiktoken, Tokenizer
from lm_jax.data.tokenizers.huggingface import ALPHABET
from lm_jax.data.tokenizers.tiktoken import write_ranks
from lm_jax.data.tokenizers.train import END, Training, train

BYTES, LEARN, ROUNDS = 6 * 10**6, 2 * 10**6, 9


def main() -> None:
    documents = [d.text for d in Reader(find_files(EMBEDDED), Policy())]
    texts = _up_to(documents, BYTES)
    size = sum(len(text.encode()) for text in texts) / 1e6
    names = ("tokenizers", "tiktoken", "sentencepiece")
    print(
        f"{size:.1f} MB in {len(texts)} files, {os.cpu_count()} cores; " + ", ".join(f"{n} {version(n)}" for n in names)
    )
    for name, tokenizer, library in _pairs(_up_to(documents, LEARN)):
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(ROUNDS):
            theirs.append(_seconds(library, texts))
            ours.append(_seconds(tokenizer.encode_batch, texts))
        a, b = statistics.median(ours), statistics.median(theirs)
        ratios = sorted(x / y for x, y in zip(ours, theirs, strict=True))
        print(
            f"{name:<22} ours {size / a:6.2f} MB/s, library {size / b:6.2f} MB/s, time ratio {a / b:.3f} "
            f"(rounds {ratios[0]:.3f} to {ratios[-1]:.3f})",
            flush=True,
        )


def _up_to(documents: list[str], size: int) -> list[str]:
    """Documents spread over all of them, up to so many characters."""
    out, total = [], 0
    for text in documents[::3] + documents[1::3] + documents[2::3]:
        if total >= size:
            break
        out.append(text)
        total += len(text)
    return out


def _seconds(encode: Callable[[list[str]], Any], texts: list[str]) -> float:
    start = time.perf_counter()
    encode(texts)
    return time.perf_counter() - start


def _pairs(sample: list[str]) -> list[tuple[str, Tokenizer, Callable[[list[str]], Any]]]:
    """A name, ours, and the library's own call for many texts."""
    threads = os.cpu_count() or 1

    def learnt(kind: str) -> Any:
        print(f"learning {kind}", file=sys.stderr)
        return train(sample, Training(kind=kind, vocab_size=16384), lambda n: None)

    byte_bpe = learnt("byte_bpe")
    assert isinstance(byte_bpe, HuggingFace)
    vocab = json.loads(byte_bpe.content)["model"]["vocab"]
    pieces = [bytes(ALPHABET[c] for c in p) for p in sorted(vocab, key=lambda p: vocab[p]) if p != END]
    tiktoken = Tiktoken(write_ranks({p: n for n, p in enumerate(pieces)}), "cl100k_base", {END: len(pieces)})
    found: list[tuple[str, Tokenizer, Callable[[list[str]], Any]]] = [
        (
            "tokenizers, byte BPE",
            byte_bpe,
            lambda texts: [e.ids for e in byte_bpe.library.encode_batch_fast(texts, add_special_tokens=False)],
        ),
        (
            "tiktoken, cl100k",
            tiktoken,
            lambda texts: tiktoken.library.encode_ordinary_batch(texts, num_threads=threads),
        ),
    ]
    for kind in ("bpe", "unigram"):
        model = learnt(kind)
        assert isinstance(model, SentencePiece)
        encode = model.processor.encode
        found.append((f"sentencepiece, {kind}", model, lambda texts, e=encode: e(texts, num_threads=threads)))
    return found


if __name__ == "__main__":
    main()
