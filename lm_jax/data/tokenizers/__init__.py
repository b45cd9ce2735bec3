"""Text to token ids and back.

Each tokenizer has a fixed number of ids and, where documents are to be told apart, one id that stands before and after
each document and that no text can spell. A tokenizer is kept as a few files, JSON first: nothing of it is ever
executed. `registry.py` finds and reads them; a kind is a file.
"""

from lm_jax.data.tokenizers.huggingface import HuggingFace
from lm_jax.data.tokenizers.registry import NAMES, from_files, is_path, load, open_path
from lm_jax.data.tokenizers.sentencepiece import MODEL, SentencePiece, train_sentencepiece
from lm_jax.data.tokenizers.simple import Bytes, Characters
from lm_jax.data.tokenizers.tiktoken import Tiktoken
from lm_jax.data.tokenizers.tokenizer import DESCRIPTION, Tokenizer

__all__ = [
    "DESCRIPTION",
    "MODEL",
    "NAMES",
    "Bytes",
    "Characters",
    "HuggingFace",
    "SentencePiece",
    "Tiktoken",
    "Tokenizer",
    "from_files",
    "is_path",
    "load",
    "open_path",
    "train_sentencepiece",
]
