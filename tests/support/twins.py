"""A config made small enough to train in seconds, with all of its choices kept."""

from __future__ import annotations

import dataclasses

from lm_jax.training.run import RunConfig

LAYERS, EMBED, HEADS, INNER, VOCABULARY = 2, 32, 4, 64, 320
STEPS, ROWS, LENGTH = 20, 4, 32


def twin(config: RunConfig) -> RunConfig:
    """The tiny twin of a config: the same architecture, optimizer, schedule and data settings in the smallest sizes.

    2 layers of 32, 4 heads on as large a share of key-value heads as the config has, a vocabulary of 320 where it is
    not that of the characters, 20 steps of 4 rows of 32 tokens, the first 5 of them warm-up at most.
    """
    model, train, optimizer = config.model, config.train, config.optimizer
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            model,
            layers=LAYERS,
            embed=EMBED,
            heads=HEADS,
            kv_heads=max(1, HEADS * model.key_heads // model.heads),
            head_dim=EMBED // HEADS,
            feed_forward_dim=INNER,
            vocab=None if model.vocab is None else VOCABULARY,
        ),
        data=dataclasses.replace(config.data, vocab_size=VOCABULARY),
        train=dataclasses.replace(
            train,
            steps=STEPS,
            tokens=None,
            batch_size=ROWS,
            length=LENGTH,
            microbatches=min(train.microbatches, 2),
        ),
        optimizer=dataclasses.replace(
            optimizer,
            warmup_steps=min(optimizer.warmup_steps, 5),
            momentum_warmup_steps=min(optimizer.momentum_warmup_steps, 5),
        ),
    )
