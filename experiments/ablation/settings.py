"""Settings of a study: what its arms share and how they differ."""

import dataclasses
import math

from experiments.shared.config import FinetuneConfig, RopeConfig
from scca_jax import tasks

# What is trained in an arm: as in `FinetuneConfig`, or nothing.
TUNINGS = ("lora", "full", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmConfig:
  """One way to extend the context, compared with the others.

  Attributes:
    name: Its name in tables and files: letters, digits, "-", "_" and ".".
    pattern: Attention pattern of training, such as "s2" or
      "scca_fixed(chunk_size=2048)"; see `scca_jax.patterns.parse`.
    rope: Rope scaling.
    dense_fraction: Share of the steps, at the end, with dense attention.
    steps_fraction: Share of the study's steps to run, for arms that get fewer
      tokens.
    tuning: "lora", "full" (every parameter) or "none" (the model as it is).
    rank: Rank of LoRA, with the study's `alpha / rank`; None uses the study's
      rank.
    train_norms: Whether LoRA trains the norms too; None follows the study.
    train_embeddings: The same for the embeddings.
    embedding_ratio: See `OptimizerConfig`.
    lora_b_ratio: See `OptimizerConfig`.
    skip_window: Length of PoSE's short windows, whose positions skip up to the
      study's length; None trains on whole windows.
    learning_rates: Rates to try; if empty, the study's.
  """

  name: str = ""
  pattern: str = "dense"
  rope: RopeConfig = RopeConfig()
  dense_fraction: float = 0.0
  steps_fraction: float = 1.0
  tuning: str = "lora"
  rank: int | None = None
  train_norms: bool | None = None
  train_embeddings: bool | None = None
  embedding_ratio: float = 1.0
  lora_b_ratio: float = 1.0
  skip_window: int | None = None
  learning_rates: tuple[float, ...] = ()

  def __post_init__(self):
    if not self.name or not all(c.isalnum() or c in "-_." for c in self.name):
      raise ValueError(
        "the name of an arm consists of letters, digits, '-', '_' and '.', got"
        f" {self.name!r}."
      )
    if self.tuning not in TUNINGS:
      raise ValueError(
        f"tuning of arm {self.name} must be one of {', '.join(TUNINGS)}, got"
        f" {self.tuning!r}."
      )
    if not 0 < self.steps_fraction <= 1:
      raise ValueError(
        f"steps_fraction of arm {self.name} must lie in (0, 1], got"
        f" {self.steps_fraction}."
      )
    check_rates(self.learning_rates, f"arm {self.name}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TasksConfig:
  """Tasks that the chosen runs are scored on; see `scca_jax.tasks`.

  Attributes:
    names: Tasks.
    context_lens: Lengths in tokens.
    num_samples: Samples of each at each length.
    longest_samples: Samples of each at the longest length; None means as many
      as at the others.
  """

  names: tuple[str, ...] = ()
  context_lens: tuple[int, ...] = ()
  num_samples: int = 50
  longest_samples: int | None = None

  def __post_init__(self):
    for name in self.names:
      tasks.get(name)
    for name in ("num_samples", "longest_samples"):
      number = getattr(self, name)
      if number is not None and number < 1:
        raise ValueError(f"tasks.{name} must be at least 1, got {number}.")

  def samples(self, context_len: int) -> int:
    """Returns how many samples a task has at a length."""
    if self.longest_samples and context_len == max(self.context_lens):
      return self.longest_samples
    return self.num_samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickConfig:
  """How `--quick` shortens a study, to minutes on a CPU.

  Attributes:
    arms: Names of the arms.
    steps: Optimiser steps.
    num_windows: Windows of validation and of test.
    num_samples: Samples of each task.
  """

  arms: tuple[str, ...] = ()
  steps: int = 20
  num_windows: int = 8
  num_samples: int = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationConfig:
  """A study.

  Attributes:
    run: What the arms share, as settings of `scca finetune`. `data.held_out` is
      the number of documents for validation; `evaluation` says how the final
      losses are measured, with the "longlora" protocol. Its pattern, rope,
      tuning, learning rate and seed are replaced.
    arms: The arms.
    baseline: Name of the arm that others are compared with.
    learning_rates: Rates to try in each arm.
    seeds: Seeds of initialisation and order of the data.
    validation_windows: Windows of the held-out documents by which a learning
      rate is chosen.
    looks: How often the validation loss is measured during training, evenly
      spaced, for the cost to a target.
    look_windows: Windows per look.
    margin: The target is the baseline's loss plus this many nats.
    pairs_at_once: How many (learning rate, seed) pairs a GPU trains at once.
    tasks: Retrieval.
    quick: What `--quick` does.
  """

  run: FinetuneConfig = FinetuneConfig()
  arms: tuple[ArmConfig, ...] = ()
  baseline: str = "dense"
  learning_rates: tuple[float, ...] = (1e-3,)
  seeds: tuple[int, ...] = (0,)
  validation_windows: int = 32
  looks: int = 5
  look_windows: int = 16
  margin: float = 0.005
  pairs_at_once: int = 1
  tasks: TasksConfig = TasksConfig()
  quick: QuickConfig = QuickConfig()

  def __post_init__(self):
    if not self.arms:
      raise ValueError("the study has no arms: give at least one.")
    if not self.seeds:
      raise ValueError("the study has no seeds: give at least one.")
    names = [arm.name for arm in self.arms]
    for name in names:
      if names.count(name) > 1:
        raise ValueError(f"two arms have the name {name!r}.")
    for name in (self.baseline, *self.quick.arms):
      if name not in names:
        raise ValueError(
          f"unknown arm {name!r}: the arms are {', '.join(names)}."
        )
    check_rates(self.learning_rates, "the study")
    for arm in self.arms:
      if arm.name == self.baseline and arm.tuning == "none":
        raise ValueError(
          f"the baseline {arm.name} is not tuned, so it sets no target: name an"
          " arm that is."
        )
      if not (arm.learning_rates or self.learning_rates):
        raise ValueError(f"arm {arm.name} has no learning rates: give one.")
    for name in (
      "validation_windows",
      "looks",
      "look_windows",
      "pairs_at_once",
    ):
      if getattr(self, name) < 1:
        raise ValueError(
          f"{name} must be at least 1, got {getattr(self, name)}."
        )
    if self.run.evaluation.protocol != "longlora":
      raise ValueError(
        "a study uses the protocol 'longlora', got"
        f" {self.run.evaluation.protocol!r}."
      )
    if self.run.data.held_out < 1:
      raise ValueError(
        "a study chooses learning rates on held-out documents: give"
        " run.data.held_out of at least 1."
      )

  def rates(self, arm: ArmConfig) -> tuple[float, ...]:
    """Returns the learning rates to try in an arm; 0 if nothing is tuned."""
    if arm.tuning == "none":
      return (0.0,)
    return arm.learning_rates or self.learning_rates

  def settings(self, arm: ArmConfig) -> FinetuneConfig:
    """Returns settings for `finetune` that do the same as the arm.

    The learning rate and the seed come from `run`.

    Raises:
      ValueError: PoSE's window does not divide the length, or a setting is out
        of range.
    """
    run, train, data = self.run, self.run.training, self.run.data
    train = dataclasses.replace(
      train,
      steps=max(1, round(train.steps * arm.steps_fraction)),
      dense_fraction=arm.dense_fraction,
    )
    if arm.skip_window is not None:
      num_tokens = train.batch_size * train.seq_len
      batch_size = num_tokens // arm.skip_window if arm.skip_window > 0 else 0
      if not 0 < arm.skip_window <= train.seq_len:
        raise ValueError(
          f"skip_window of arm {arm.name} must lie in 1 to the {train.seq_len}"
          f" tokens of the study, got {arm.skip_window}."
        )
      data = dataclasses.replace(data, skip_to=train.seq_len)
      train = dataclasses.replace(
        train,
        seq_len=arm.skip_window,
        batch_size=batch_size,
        num_micro_batches=math.gcd(batch_size, train.num_micro_batches),
      )
    adapter = run.lora
    changes = {
      name: getattr(arm, name)
      for name in ("rank", "train_norms", "train_embeddings")
      if getattr(arm, name) is not None
    }
    if "rank" in changes:
      changes["alpha"] = adapter.alpha * changes["rank"] / adapter.rank
    adapter = dataclasses.replace(adapter, **changes)
    return dataclasses.replace(
      run,
      pattern=arm.pattern,
      rope=arm.rope,
      tuning="full" if arm.tuning == "full" else "lora",
      lora=adapter,
      data=data,
      training=train,
      optimizer=dataclasses.replace(
        run.optimizer,
        embedding_ratio=arm.embedding_ratio,
        lora_b_ratio=arm.lora_b_ratio,
      ),
    )

  def quickened(self) -> "AblationConfig":
    """Returns the study as `--quick` runs it: few arms, rates and steps."""
    quick, run = self.quick, self.run
    few = [arm for arm in self.arms if arm.name in (self.baseline, *quick.arms)]

    def middle(rates: tuple[float, ...]) -> tuple[float, ...]:
      return rates[len(rates) // 2 :][:1]

    run = dataclasses.replace(
      run,
      training=dataclasses.replace(run.training, steps=quick.steps),
      optimizer=dataclasses.replace(
        run.optimizer, warmup_steps=min(run.optimizer.warmup_steps, 3)
      ),
      evaluation=dataclasses.replace(
        run.evaluation, num_windows=quick.num_windows
      ),
    )
    return dataclasses.replace(
      self,
      run=run,
      arms=tuple(
        dataclasses.replace(arm, learning_rates=middle(arm.learning_rates))
        for arm in few
      ),
      learning_rates=middle(self.learning_rates),
      seeds=self.seeds[:1],
      validation_windows=quick.num_windows,
      look_windows=quick.num_windows,
      looks=2,
      pairs_at_once=1,
      tasks=dataclasses.replace(
        self.tasks, num_samples=quick.num_samples, longest_samples=None
      ),
    )


def check_rates(rates: tuple[float, ...], whose: str) -> None:
  """Checks learning rates.

  Raises:
    ValueError: One is not above 0, or given twice.
  """
  for rate in rates:
    if not rate > 0:
      raise ValueError(f"a learning rate of {whose} must be above 0: {rate}.")
  if len(set(rates)) < len(rates):
    raise ValueError(f"a learning rate of {whose} is given twice: {rates}.")
