# pyright: reportMissingImports=false
"""Runs lm-evaluation-harness, with its own flags, including model scca_jax.

scca lm_eval --model=scca_jax --tasks=lambada_openai \
  --model_args=model=llama/,adapter=runs/a/adapter --batch_size=auto

`--help` lists the harness's flags; `scca_jax.harness` documents `--model_args`.
Needs the extra `lm_eval`.
"""

from experiments.shared import cli


def main() -> None:
  """Runs the command.

  Raises:
    ValueError: The harness is not installed, or a setting is out of range.
    OSError: A file is missing or cannot be written.
  """
  try:
    from lm_eval.__main__ import cli_evaluate

    from scca_jax import harness  # noqa: F401
  except ModuleNotFoundError as error:
    raise ValueError(
      f"lm-evaluation-harness needs {error.name}, which is not installed: pip"
      " install 'scca_jax[lm_eval]'."
    ) from error
  cli_evaluate()


if __name__ == "__main__":
  cli.run(main, has_flags=False)
