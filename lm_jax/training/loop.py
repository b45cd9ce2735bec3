"""The loop: read `train` from top to bottom and you have read the program.

It sets up (mesh, data, program, state or restore), runs the steps (batch, step, log, evaluate, save), and ends. It is
the same for every objective.
"""

from __future__ import annotations

import base64
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from lm_jax import paths
from lm_jax.config import completed, differences, redact, to_dict
from lm_jax.data.loader import Batches
from lm_jax.data.pipeline import Prepared, TextSet, prepare, prepare_evaluation
from lm_jax.errors import ConfigError, UserError
from lm_jax.evaluation.loss import held_out_loss
from lm_jax.generation.decode import generate
from lm_jax.generation.sampling import SamplingConfig
from lm_jax.objectives.objective import Objective
from lm_jax.params import count
from lm_jax.sharding import make_mesh
from lm_jax.training import terminal
from lm_jax.training.checkpoint import Checkpointer, CheckpointReader
from lm_jax.training.log import RunLog
from lm_jax.training.manifest import compare
from lm_jax.training.peers import Peers
from lm_jax.training.preemption import StopSignal
from lm_jax.training.profile import StepTrace
from lm_jax.training.program import Program, make_program
from lm_jax.training.report import versions
from lm_jax.training.run import RunConfig
from lm_jax.training.state import TrainState

MakeObjective = Callable[[RunConfig], Objective]
FINISHED, SAVED = 0, 75  # exit statuses: done; saved and not finished: start me again


def train(
    config: RunConfig, directory: epath.Path, make_objective: MakeObjective, command: str, profile: range | None = None
) -> int:
    """Trains until the run's last step, or until a signal asks to stop; goes on where an earlier process stopped.

    Args:
      config: the run's.
      directory: where the run's files are; made if it is not there.
      make_objective: from the config with its vocabulary filled in, what to minimise.
      command: what starts this run again, for the report.
      profile: the steps to trace.

    Returns:
      The exit status: `FINISHED` or `SAVED`.
    """
    with contextlib.ExitStack() as stack:
        # ------------------------------------------------------------------------------------------------------ set-up
        peers = stack.enter_context(Peers(directory))
        mesh = make_mesh(config.mesh)
        config.check_layout(mesh.size)
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(paths.lock(directory) if jax.process_index() == 0 else contextlib.nullcontext())
        data = prepare(config.data, length=config.train.length, seed=config.train.seed)
        config = config.with_vocab(data.tokenizer.vocab_size)
        sets = _evaluation_sets(config, data)
        program = make_program(config, mesh, make_objective(config))

        # --------------------------------------------------------------------------------------------- state or restore
        checkpoints = Checkpointer(directory / "checkpoints", config.checkpoint, _tell)
        stack.callback(checkpoints.close)
        state, step, rows = _start(program, checkpoints, data, _about(program, data))
        total = config.train.total_steps
        facts = {"parameters": f"{count(program.specs):,}", "data": data.description, "mesh": _layout(mesh)}
        log = RunLog(config, directory, start_step=step, command=command, facts=facts)
        stack.push(log.left)
        _tell(*log.writer.notes)
        batches = stack.enter_context(_training_batches(program, data, rows, total - step))
        trace = stack.enter_context(StepTrace(directory, profile, log.say))

        def evaluate() -> None:
            log.evaluation(step, rows, _evaluate(program, state, sets), data.consumed(rows))
            if step > 0:
                _sample(program, state, data, log, step)

        def save() -> None:
            log.writer.flush(sync=True)  # a step's record is on disk before its checkpoint commits
            checkpoints.save(step, state, _metadata(config, data, step, rows), force=True)

        if step == 0:
            evaluate()

        # -------------------------------------------------------------------------------------------------------- steps
        log.start()
        stack.enter_context(peers.stepping())
        stop = stack.enter_context(StopSignal())
        while step < total and not stop.should_stop(step):
            began = time.perf_counter()
            batch = next(batches)
            took = time.perf_counter() - began
            waited = took if log.device_is_idle else 0.0
            state, metrics = trace.run(step + 1, program.train_step, state, batch)
            step, rows = step + 1, rows + config.train.batch_size
            log.step(step, rows, metrics, waited)
            peers.step(took, log.say)
            checkpoints.check()
            if config.evaluation.due(step, total) or checkpoints.due(step):
                log.flush()
                if config.evaluation.due(step, total):
                    evaluate()
                if checkpoints.due(step):
                    save()
                log.resume_clock()

        # ---------------------------------------------------------------------------------------------------------- end
        log.flush()
        save()
        checkpoints.wait()
        finished = step >= total
        log.close("finished" if finished else f"saved at step {step} of {total}: the same command goes on")
        return FINISHED if finished else SAVED


# --------------------------------------------------------------------------------------------------------------- set-up


def _tell(*lines: str) -> None:
    for line in lines if jax.process_index() == 0 else ():
        print(line, file=sys.stderr, flush=True)


def _layout(mesh: jax.sharding.Mesh) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def _about(program: Program, data: Prepared) -> list[str]:
    """What the user is told at the start, a line each."""
    layout = f"{program.mesh.size} x {jax.devices()[0].device_kind}: {_layout(program.mesh)}"
    size = f"{terminal.count(count(program.specs))} parameters, {program.config.train.total_steps} steps"
    return [layout, data.description, *data.notes, size]


def _evaluation_sets(config: RunConfig, data: Prepared) -> dict[str, TextSet]:
    """The held-out text (under the empty name) and the further sets of the config, by name."""
    _prompt(config, data)  # a mistake in it shows before anything compiles
    sets = {} if data.held_out is None else {"": data.held_out, **data.held_out_by_source}
    if twice := sorted(set(config.evaluation.sets) & set(data.held_out_by_source)):
        problem = "is also a source of data.mixture, whose held-out text is evaluated under that name"
        raise ConfigError(f"evaluation.sets.{twice[0]}", problem, "give it another name")
    for name, source in config.evaluation.sets.items():
        sets[name] = prepare_evaluation(
            config.data, data.tokenizer, source, length=config.train.length, key=f"evaluation.sets.{name}"
        )
    return sets


def _start(
    program: Program, checkpoints: Checkpointer, data: Prepared, about: list[str]
) -> tuple[TrainState, int, int]:
    """The state to begin with, the steps done and the rows consumed: restored, from another run's weights, or fresh.

    Tells what the run is about once nothing of it can be refused: a mistake has the terminal to itself.
    """
    config, done, other = program.config, {"step": 0, "rows": 0}, None
    if checkpoints.latest is not None:
        done = checkpoints.read_metadata()
        about = [*about, *_check_same_run(done, config, data)]
    elif config.train.init_from is not None:
        reader = CheckpointReader(paths.run_path(config.train.init_from) / "checkpoints", _tell)
        _check_same_ids(reader.read_metadata(), config, data)
        other = reader.restore_params(program.abstract.params, ema=True)
        about = [*about, f"starting from the weights of {config.train.init_from}, checkpoint {other.step}"]
    data.check_epochs(done["rows"] + (config.train.total_steps - done["step"]) * config.train.batch_size)
    _tell(*about)
    restored = checkpoints.restore(program.abstract)
    if restored is not None:
        _tell(f"going on from checkpoint {restored.step}")
        return restored.tree, restored.step, restored.metadata["rows"]
    state = program.init()
    if other is None:
        return state, 0, 0
    return program.starting_from(state, other.tree), 0, 0


def _check_same_ids(metadata: dict[str, Any], config: RunConfig, data: Prepared) -> None:
    """Raises UserError where another run's weights know other ids than those of this run's text."""
    if metadata["identity"]["tokenizer"] == data.tokenizer.fingerprint or "tokenizer" in config.checkpoint.accept:
        return
    raise UserError(
        f"{config.train.init_from} was trained with another tokenizer: its weights know other ids than this text has\n"
        "set data.tokenizer to that run's, grow its vocabulary (launch.extend_tokenizer), or take the weights all the\n"
        'same with checkpoint.accept = ("tokenizer",)'
    )


def _identity(config: RunConfig, data: Prepared) -> dict[str, str]:
    """What must stay the same for a resumed run to be the same run."""
    return {
        "tokenizer": data.tokenizer.fingerprint,
        "data": f"{data.data}, rows of {config.train.length}{data.train.plan.way}",
        "seed": str(config.train.seed),
    }


def _check_same_run(metadata: dict[str, Any], config: RunConfig, data: Prepared) -> list[str]:
    """What differs from the run that saved a checkpoint, a line each.

    Raises:
      UserError: where it is something that makes it another run.
    """
    old, new = completed(RunConfig, metadata["config"]), redact(to_dict(config))
    changed = differences(old["model"], new["model"])
    shapes = [line for line in changed if not line.startswith(("dtype", "scan"))]
    if shapes and "model" not in config.checkpoint.accept:
        raise UserError(
            f"the checkpoint is of another model: {'; '.join('model.' + line for line in shapes[:3])}\n"
            'give another workdir, or go on all the same with checkpoint.accept = ("model",)'
        )
    lines = compare(
        metadata | {"config": old}, {"identity": _identity(config, data), "config": new}, config.checkpoint.accept
    )
    return [f"changed: {line}" for line in lines]


def _metadata(config: RunConfig, data: Prepared, step: int, rows: int) -> dict[str, Any]:
    """What a checkpoint holds beside the state: enough to go on, to generate and to evaluate without the source."""
    files = {name: base64.b64encode(content).decode() for name, content in data.tokenizer.files().items()}
    return {
        "step": step,
        "rows": rows,
        "config": redact(to_dict(config)),
        "identity": _identity(config, data),
        "tokenizer": files,
        "versions": versions(),
    }


@contextlib.contextmanager
def _training_batches(program: Program, data: Prepared, rows: int, steps: int) -> Iterator[Iterator[Any]]:
    if steps <= 0:
        yield iter(())
        return
    train = program.config.train
    with Batches(
        data.train.plan,
        data.train.store,
        program.mesh,
        batch_size=train.batch_size,
        start=rows,
        threads=data.config.threads,
    ) as batches:
        yield batches


# ----------------------------------------------------------------------------------------------------------- evaluation


def _evaluate(program: Program, state: TrainState, sets: dict[str, TextSet]) -> dict[str, tuple[float, int, float]]:
    """The sum of the loss, the targets and the bytes a target of every set, on the averaged weights where there are
    any."""
    config, results = program.config, {}
    params = program.weights(state)
    for name, text in sets.items():
        rows, size = text.plan.rows_per_epoch, config.train.batch_size
        stop = rows if config.evaluation.batches is None else min(rows, config.evaluation.batches * size)
        with Batches(text.plan, text.store, program.mesh, batch_size=size, stop=stop) as batches:
            nats, targets = held_out_loss(program.eval_step, params, state.frozen, state.extra, batches)
        results[name] = (nats, targets, text.bytes_per_target)
    return results


def _sample(program: Program, state: TrainState, data: Prepared, log: RunLog, step: int) -> None:
    """Writes down how the model continues the config's prompt."""
    config, tokenizer = program.config, data.tokenizer
    prompt, ids = _prompt(config, data)
    if not ids:
        return
    (tokens,) = generate(
        program.weights(state),
        [ids],
        c=config.model,
        max_tokens=config.evaluation.sample_tokens,
        sampling=SamplingConfig(),
        seed=0,
        stop_id=tokenizer.boundary,
    )
    log.sample(step, prompt, tokenizer.decode(tokens))


def _prompt(config: RunConfig, data: Prepared) -> tuple[str, list[int]]:
    """What samples go on from, as text and as ids; no ids where there are to be no samples.

    Raises:
      ConfigError: where the tokenizer cannot encode it.
    """
    if config.evaluation.prompt is None:
        return "", []
    boundary = data.tokenizer.boundary
    text = config.evaluation.prompt or ("" if boundary is not None else "\n")
    try:
        ids = data.tokenizer.encode(text).tolist()
    except UserError as e:
        raise ConfigError("evaluation.prompt", str(e)) from e
    return text, ([] if boundary is None else [boundary]) + ids
