"""Text from a trained model: `python -m launch.generate --workdir=runs/tiny --prompt="def main"`."""

from __future__ import annotations

from absl import flags

from launch import cli, runtime

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder", required=True, flag_values=FLAGS)
PROMPT = flags.DEFINE_string(
    "prompt", "", "what the model continues; empty: the beginning of a document", flag_values=FLAGS
)
TOKENS = flags.DEFINE_integer("tokens", 200, "how many tokens to write at most", lower_bound=1, flag_values=FLAGS)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token always", flag_values=FLAGS)
TOP_K = flags.DEFINE_integer("top_k", None, "choose among the likeliest so many tokens", flag_values=FLAGS)
TOP_P = flags.DEFINE_float("top_p", None, "choose among the likeliest tokens of so much probability", flag_values=FLAGS)
SEED = flags.DEFINE_integer("seed", 0, "of the choices", flag_values=FLAGS)
STEP = flags.DEFINE_integer("step", None, "which checkpoint (the newest, if not given)", flag_values=FLAGS)


def main() -> int:
    import jax

    from lm_jax.errors import UserError
    from lm_jax.generation.decode import generate
    from lm_jax.generation.sampling import SamplingConfig
    from lm_jax.paths import run_path
    from lm_jax.sharding import one_device_mesh
    from lm_jax.training.terminal import visible
    from lm_jax.training.trained import load_trained

    runtime.use_compilation_cache()
    sampling = SamplingConfig(temperature=TEMPERATURE.value, top_k=TOP_K.value, top_p=TOP_P.value)
    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        model = load_trained(run_path(WORKDIR.value), mesh, step=STEP.value)
        boundary = model.tokenizer.boundary
        ids = ([] if boundary is None else [boundary]) + model.tokenizer.encode(PROMPT.value).tolist()
        if not ids:
            raise UserError(
                "--prompt is empty, and this model's tokenizer has no token for the beginning of a document\n"
                "give a prompt"
            )
        (tokens,) = generate(
            model.params,
            [ids],
            c=model.config.model,
            max_tokens=TOKENS.value,
            sampling=sampling,
            seed=SEED.value,
            stop_id=boundary,
        )
    print(visible(PROMPT.value + model.tokenizer.decode(tokens)))
    return 0


if __name__ == "__main__":
    cli.run(main, FLAGS)
