"""The commands of tokenizers from end to end: learn, train with it, extend, grow the model, train on, compare."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from launch import cli, compare_tokenizers, extend_tokenizer, train_tokenizer
from lm_jax.config import build
from lm_jax.data.tokenizers import open_path
from lm_jax.errors import UserError
from lm_jax.models import transformer
from lm_jax.models.transformer import transformer_specs
from lm_jax.objectives.next_token import next_token
from lm_jax.sharding import one_device_mesh
from lm_jax.training import grow, loop
from lm_jax.training.run import RunConfig
from lm_jax.training.trained import load_trained
from tests.data.test_tokenizer_extension import chinese
from tests.support.small_run import get_config, write_text

EMPTY: dict[str, Any] = {"blocks": {}, "final_norm": {}}


def command(module: ModuleType, *arguments: str) -> int:
    for name in module.FLAGS:
        module.FLAGS[name].unparse()
    return cli.status(module.main, module.FLAGS, [module.__name__, *arguments])


def small(text: Path, tokenizer: Path, cache: Path, **changes: Any) -> RunConfig:
    config = get_config()
    config.model.layers, config.model.embed, config.train.steps, config.train.length = 1, 16, 2, 16
    config.data.source, config.data.tokenizer, config.data.cache = str(text), str(tokenizer), str(cache)
    config.evaluation.batches = 1
    with config.unlocked():
        for name, value in changes.items():
            section, key = name.split("__")
            config[section][key] = value
    return build(RunConfig, config)


def trained(config: RunConfig, directory: Path) -> int:
    return loop.train(config, epath.Path(directory), lambda c: next_token(c.model), "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English text, a tokenizer learnt from it, and Chinese text that neither has seen."""
    made = tmp_path_factory.mktemp("made")
    write_text(made / "text", documents=60)
    (made / "zh").mkdir()
    for seed in range(12):
        (made / "zh" / f"{seed}.txt").write_text(chinese(seed, 200), "utf-8")
    asked = ("--kind=byte_bpe", "--vocab_size=310", "--special=<|user|>", "--held_out=0.2")
    assert command(train_tokenizer, f"--source={made / 'text'}", f"--out={made / 'tok'}", *asked) == 0
    return made


def test_tied_rows_grow_and_rows_to_spare_are_used() -> None:
    c = transformer.TransformerConfig(vocab=12, embed=8, layers=1, heads=1, tied=True)
    old = {"embedding": np.arange(96, dtype=np.float32).reshape(12, 8), "blocks": {}, "final_norm": {}}
    mesh = one_device_mesh()
    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        patch.setattr(grow, "transformer_specs", lambda c: {"embedding": transformer_specs(c)["embedding"]} | EMPTY)
        new, config = grow.grown(old, c, 10, [[0, 1], [2], [3, 4, 5]], mesh)
    assert config.ids == 13 and set(new) == set(old)
    table = np.asarray(new["embedding"])
    np.testing.assert_array_equal(table[:10], old["embedding"][:10])
    np.testing.assert_array_equal(table[10:], [old["embedding"][ids].mean(0) for ids in ([0, 1], [2], [3, 4, 5])])


def test_a_model_grows_with_its_vocabulary(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = small(folder / "text", folder / "tok", tmp_path / "cache", model__tied=False)
    assert trained(first, tmp_path / "run") == loop.FINISHED
    wanted = [f"--source={folder / 'zh'}", "--add=60", f"--out={tmp_path / 'tok'}", "--held_out=0.2"]
    where = [f"--workdir={tmp_path / 'run'}", f"--out_workdir={tmp_path / 'grown'}"]
    assert command(extend_tokenizer, *wanted, *where) == 0
    assert "60 pieces more: 370 ids" in capsys.readouterr().out
    assert command(extend_tokenizer, *wanted, *where) == 2  # a run is there by now
    assert "is a run already" in capsys.readouterr().err

    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        old, new = (load_trained(epath.Path(tmp_path / name), mesh) for name in ("run", "grown"))
        ids = old.tokenizer.encode("the cat ran over green hills")[None]
        z_old, z_new = (
            transformer.logits(m.params, transformer.hidden(m.params, ids, c=m.config.model)[0], c=m.config.model)
            for m in (old, new)
        )
    assert new.config.model.ids == new.tokenizer.vocab_size == 370
    np.testing.assert_allclose(z_new[..., :310], z_old, rtol=1e-5, atol=1e-6)  # in other blocks of a matmul
    extension = json.loads((tmp_path / "tok" / extend_tokenizer.SPELT).read_text())
    assert extension["first"] == 310 and len(extension["spelt"]) == 60
    for weights in ["embedding", "output"]:
        before, after = (np.asarray(m.params[weights]) for m in (old, new))
        if weights == "output":
            before, after = before.T, after.T
        np.testing.assert_array_equal(after[:310], before)
        for row, spelt in zip(after[310:], extension["spelt"], strict=True):
            np.testing.assert_allclose(row, before[spelt].mean(0), rtol=1e-6)

    start = {"train__init_from": str(tmp_path / "grown"), "model__tied": False}
    on = small(folder / "zh", tmp_path / "tok", tmp_path / "cache", **start)
    assert trained(on, tmp_path / "on") == loop.FINISHED
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        trained(small(folder / "text", folder / "tok", tmp_path / "cache", **start), tmp_path / "no")


def test_a_vocabulary_that_the_model_has_no_room_for_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.vocab: 300 ids are fewer than the 310 of the tokenizer\nuse 310"):
        trained(small(folder / "text", folder / "tok", tmp_path, model__vocab=300), tmp_path / "run")
    assert small(folder / "text", folder / "tok", tmp_path).with_likely_vocab().model.vocab == 310


def test_tokenizers_are_compared(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "zh.jsonl").write_text(json.dumps({"text": chinese(50, 100)}) + "\n")
    picture = tmp_path / "x.png"
    chosen = f"--tokenizers=bytes,learnt={folder / 'tok'}"
    texts = f"--texts=English={folder / 'text'},Chinese={tmp_path / 'zh.jsonl'}"
    assert command(compare_tokenizers, chosen, texts, f"--png={picture}") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[:3] for line in lines] == [
        ["bytes", "English", "257"],
        ["learnt", "English", "310"],
        ["bytes", "Chinese", "257"],
        ["learnt", "Chinese", "310"],
    ]
    assert float(lines[1][4]) > 2 > 1.05 > float(lines[3][4])  # bytes a token: of what it learnt from, and of the other
    assert picture.read_bytes()[:4] == b"\x89PNG"


MISTAKES: list[tuple[ModuleType, list[str], str]] = [
    (train_tokenizer, ["--source={d}/text", "--out={d}/x", "--kind=words"], "--kind: 'words' is unknown"),
    (train_tokenizer, ["--source={d}/none", "--out={d}/x"], "--source: "),
    (train_tokenizer, ["--source={d}/text", "--out={d}/x", "--held_out=0"], "--held_out: 0.0"),
    (train_tokenizer, ["--out={d}/x"], "--source is missing"),
    (extend_tokenizer, ["--source={d}/zh", "--out={d}/x"], "--tokenizer: give this or --workdir"),
    (extend_tokenizer, ["--source={d}/zh", "--out={d}/x", "--tokenizer={d}/none"], "--tokenizer: "),
    (
        extend_tokenizer,
        ["--source={d}/zh", "--out={d}/x", "--tokenizer={d}/tok", "--out_workdir={d}/y"],
        "--out_workdir: there is no model",
    ),
    (extend_tokenizer, ["--source={d}/zh", "--out={d}/x", "--workdir={d}/none"], "is no run's folder"),
    (compare_tokenizers, ["--tokenizers={d}/none", "--texts={d}/text"], "--tokenizers: "),
    (compare_tokenizers, ["--tokenizers=bytes,bytes", "--texts={d}/text"], "'bytes' is named twice"),
    (compare_tokenizers, ["--tokenizers=bytes", "--texts=x={d}/none"], "--texts: "),
]


@pytest.mark.parametrize(("module", "arguments", "message"), MISTAKES)
def test_a_mistake_is_named(
    module: ModuleType, arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(module, *(a.format(d=folder) for a in arguments)) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") <= 3


def test_a_tokenizer_is_opened_where_it_was_written(folder: Path) -> None:
    made = open_path(str(folder / "tok"), True)
    assert made.vocab_size == 310 and made.exact and "<|user|>" in made.special
