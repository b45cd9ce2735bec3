"""A vocabulary learnt from any text:

python -m launch.train_tokenizer --source=FILES --kind=byte_bpe --vocab_size=32768 --out=runs/tokenizer

Kinds are bpe and unigram (sentencepiece), byte_bpe and wordpiece (Hugging Face's library). Train with it by
--config.data.tokenizer=runs/tokenizer. docs/tokenizers.md has more.
"""

from __future__ import annotations

from absl import flags

from launch import cli

FLAGS = flags.FlagValues()
SOURCE = flags.DEFINE_list(
    "source", None, "files, directories or globs of text, or python", required=True, flag_values=FLAGS
)
FIELD = flags.DEFINE_string("field", "text", "the field or column that holds the text", flag_values=FLAGS)
OUT = flags.DEFINE_string("out", None, "the folder to write", required=True, flag_values=FLAGS)
KIND = flags.DEFINE_string("kind", "byte_bpe", "bpe, unigram, byte_bpe or wordpiece", flag_values=FLAGS)
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 32768, "how many ids, all told", flag_values=FLAGS)
SPECIAL = flags.DEFINE_list(
    "special", [], "tokens that no text can spell, as '<|user|>,<|assistant|>'", flag_values=FLAGS
)
DIGITS = flags.DEFINE_enum(
    "digits", "keep", ["keep", "split"], "split: every digit is a token of its own", flag_values=FLAGS
)
RUNS = flags.DEFINE_integer(
    "whitespace_runs", 0, "runs of 2 to so many spaces are one token each, for code", flag_values=FLAGS
)
RESERVED = flags.DEFINE_integer("reserved", 0, "special tokens whose ids are kept for later", flag_values=FLAGS)
FALLBACK = flags.DEFINE_bool(
    "byte_fallback", True, "of bpe and unigram: what is no piece is spelt in bytes", flag_values=FLAGS
)
SAMPLE = flags.DEFINE_integer(
    "sample_mb", 64, "how much text to learn from, in 10^6 bytes", lower_bound=1, flag_values=FLAGS
)
HELD_OUT = flags.DEFINE_float("held_out", 0.02, "the share of the text that is kept to measure on", flag_values=FLAGS)


def main() -> int:
    from lm_jax.data.corpus import Corpus
    from lm_jax.data.progress import Progress
    from lm_jax.data.sources import Policy, find_files
    from lm_jax.data.tokenizers.report import measure, table
    from lm_jax.data.tokenizers.train import Training, train
    from lm_jax.errors import UserError
    from lm_jax.paths import make_directory, run_path

    training = Training(
        kind=KIND.value,
        vocab_size=VOCAB_SIZE.value,
        special=tuple(SPECIAL.value),
        split_digits=DIGITS.value == "split",
        whitespace_runs=RUNS.value,
        reserved=RESERVED.value,
        byte_fallback=FALLBACK.value,
    )
    if not 0 < HELD_OUT.value <= 0.5:  # false for NaN
        raise UserError(f"--held_out: {HELD_OUT.value} is no share to measure on\ngive one above 0, to 0.5")
    out = run_path(OUT.value)
    corpus = Corpus(find_files(tuple(SOURCE.value), "--source"), Policy(FIELD.value), HELD_OUT.value)
    texts = corpus.sample(SAMPLE.value * 10**6)
    with Progress("reading what to learn from", sum(map(len, texts))) as progress:
        tokenizer = train(texts, training, progress.advance)
    make_directory(out)
    tokenizer.save(out)
    held_out = [d.text for d, held in zip(corpus, corpus.held_out.tolist(), strict=True) if held]
    print(f"{tokenizer.vocab_size:,} ids in {out}" + (f"; {tokenizer.caveat}" if tokenizer.caveat else ""))
    if tokenizer.vocab_size < training.vocab_size:
        print(f"the text is too small for {training.vocab_size:,} pieces")
    print(table([measure(KIND.value, tokenizer, "held out", held_out)]))
    return 0


if __name__ == "__main__":
    cli.run(main, FLAGS)
