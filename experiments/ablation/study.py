"""Runs a study arm by arm, skipping what was measured before."""

import dataclasses
import itertools
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np

from experiments.ablation import pairs, scoring
from experiments.ablation.pairs import Pair, Weights
from experiments.ablation.scoring import Windows
from experiments.ablation.settings import AblationConfig, ArmConfig
from experiments.ablation.store import Store
from experiments.shared import resolve
from experiments.shared.config import to_json
from scca_jax import assets, convert, patterns, tokenizer, training
from scca_jax.llama import Execution
from scca_jax.llama_config import LlamaConfig
from scca_jax.token_file import TokenFile
from scca_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Texts:
  """The texts of a study.

  Attributes:
    train: Tokens to train on.
    validation: Windows of the study's length, to choose rates by.
    looks: Windows for the looks during training.
    test: Windows for the final losses, by length.
    vocabulary: The tokenizer.
  """

  train: TokenFile
  validation: Windows
  looks: Windows
  test: dict[int, Windows]
  vocabulary: Tokenizer

  @classmethod
  def open(cls, study: AblationConfig, cache: pathlib.Path) -> "Texts":
    """Opens the texts; tokens are kept in `cache`.

    Raises:
      OSError: A file is missing.
      ValueError: A text is too short or has too few documents.
    """
    run, base = study.run, base_config(study)
    folder = resolve.model_path(run.model)
    vocabulary = tokenizer.load(run.data.tokenizer or folder)
    tokens, test = (
      resolve.open_tokens(path, vocabulary, cache, vocab_size=base.vocab_size)
      for path in (
        run.data.train or assets.BOOKS_TUNE,
        run.data.test or assets.BOOKS_TEST,
      )
    )
    train, validation = tokens.split(run.data.held_out)
    seq_len, num_windows = run.training.seq_len, run.evaluation.num_windows
    return cls(
      train=train,
      validation=Windows.read(validation, seq_len, study.validation_windows),
      looks=Windows.read(validation, seq_len, study.look_windows),
      test={
        n: Windows.read(test, n, num_windows) for n in test_lens(study, base)
      },
      vocabulary=vocabulary,
    )


def base_config(study: AblationConfig) -> LlamaConfig:
  """Returns the sizes of the model that all arms start from."""
  return convert.load_config(resolve.model_path(study.run.model))


def test_lens(study: AblationConfig, base: LlamaConfig) -> tuple[int, ...]:
  """Returns the lengths of the final losses, including the study's own."""
  seq_len = study.run.training.seq_len
  lens = study.run.evaluation.context_lens or (base.context_len,)
  return tuple(sorted({*lens, seq_len}))


def seeds(study: AblationConfig, arm: ArmConfig) -> tuple[int, ...]:
  """Returns the seeds of an arm; one if nothing is tuned."""
  return study.seeds if arm.tuning != "none" else study.seeds[:1]


def pairs_of_steps(study: AblationConfig, arm: ArmConfig) -> int:
  """Returns an arm's (query, key) pairs in training, over heads and layers.

  Raises:
    ValueError: The pattern is unknown or does not fit the model.
  """
  if arm.tuning == "none":
    return 0
  run, base = study.settings(arm), base_config(study)
  train = run.training
  layers = resolve.make_patterns(run.pattern, base, train.seq_len)
  sparse = sum(layer.num_pairs(train.seq_len) for layer in layers)
  dense = patterns.dense(base.num_heads).num_pairs(train.seq_len)
  dense_from = training.first_dense_step(train.steps, train.dense_fraction)
  a_step = dense * base.num_layers * (train.steps - dense_from)
  return train.batch_size * (sparse * dense_from + a_step)


def num_tokens(study: AblationConfig, arm: ArmConfig) -> int:
  """Returns the tokens that an arm is trained on."""
  if arm.tuning == "none":
    return 0
  train = study.settings(arm).training
  return train.steps * train.batch_size * train.seq_len


def pairs_share(study: AblationConfig, arm: ArmConfig) -> float:
  """Returns an arm's pairs relative to dense attention in all steps."""
  dense = dataclasses.replace(ArmConfig(name="dense"), pattern="dense")
  return pairs_of_steps(study, arm) / pairs_of_steps(study, dense)


def check(study: AblationConfig) -> None:
  """Checks all arms before the first one runs.

  Raises:
    ValueError: A pattern, rope scaling or setting of an arm does not fit.
  """
  for arm in study.arms:
    try:
      resolve.resolve(study.settings(arm))
      pairs_of_steps(study, arm)
    except ValueError as error:
      raise ValueError(f"arm {arm.name}: {error}") from None


class Runner:
  """Runs the arms of a study and keeps the results in its files."""

  def __init__(
    self,
    study: AblationConfig,
    store: Store,
    texts: Texts,
    *,
    timed: bool = True,
  ):
    """Prepares to run arms.

    Args:
      study: The study.
      store: Where its files are.
      texts: Its texts.
      timed: Whether the device has no other work, so that seconds count.
    """
    self._study, self._store, self._texts = study, store, texts
    self._timed = timed
    self._execution = Execution(
      implementation=study.run.training.implementation
    )

  def _losses(self, weights: Weights, windows: Windows) -> np.ndarray:
    return scoring.losses(
      weights,
      windows,
      execution=self._execution,
      batch_tokens=self._study.run.evaluation.batch_tokens,
      loss_chunk=self._study.run.training.loss_chunk,
    )

  def _look(self, weights: Weights) -> np.ndarray:
    found = self._losses(weights, self._texts.looks)
    return scoring.last_quarter(found).mean(axis=-1)

  def run(self, arm: ArmConfig) -> None:
    """Trains and scores whatever an arm still lacks."""
    study, store = self._study, self._store
    all_pairs = itertools.product(study.rates(arm), seeds(study, arm))
    missing = []
    for pair in all_pairs:
      found = store.trained(arm.name, pair)
      if found is None:
        missing.append(pair)
      # Files from before a setting existed have its default.
      elif _about(ArmConfig(name=arm.name)) | found["arm"] != _about(arm):
        raise ValueError(
          f"arm {arm.name} was trained with other settings: rename it, or"
          f" remove {store.folder / 'runs' / arm.name}."
        )
    size = study.pairs_at_once
    for begin in range(0, len(missing), size):
      self._train(arm, missing[begin : begin + size])
    chosen = chosen_pairs(study, store, arm)
    unscored = [pair for pair in chosen if not store.scores(arm.name, pair)]
    for begin in range(0, len(unscored), size):
      self._score(arm, unscored[begin : begin + size])
    store.remove_params(arm.name)

  def _train(self, arm: ArmConfig, some: list[Pair]) -> None:
    study = self._study
    begin = time.perf_counter()
    if arm.tuning == "none":
      run = study.settings(arm)
      weights = pairs.untuned(run, resolve.resolve(run))
      looks, overhead = [], 0.0
    else:
      weights, looks, overhead = pairs.train(
        study, arm, some, self._texts.train, self._look
      )
    validation = self._losses(weights, self._texts.validation)
    for i, pair in enumerate(some):
      self._store.write_trained(
        arm.name,
        pair,
        () if arm.tuning == "none" else _one(weights.params, i),
        {
          "validation": validation[i],
          "look_steps": np.asarray([look.steps for look in looks]),
          "look_seconds": np.asarray(
            [look.seconds if self._timed else np.nan for look in looks]
          ),
          "look_losses": np.asarray([look.losses[i] for look in looks]),
        },
        {
          "arm": _about(arm),
          "seconds": looks[-1].seconds if looks and self._timed else None,
          "pairs_at_once": len(some),
          "overhead_seconds": overhead,
          "device": jax.devices()[0].device_kind,
        },
      )
    found = scoring.last_quarter(validation).mean(axis=-1)
    losses = " ".join(
      f"{rate:g}/{seed}:{loss:.3f}"
      for (rate, seed), loss in zip(some, found, strict=True)
    )
    print(
      f"{arm.name}: {len(some)} pairs in {time.perf_counter() - begin:.1f} s"
      f" ({overhead:.1f} s to load and compile,"
      f" {looks[-1].seconds if looks else 0:.2f} s of training each);"
      f" validation: {losses}",
      flush=True,
    )

  def _weights(self, arm: ArmConfig, some: list[Pair]) -> Weights:
    """Returns trained pairs from their files."""
    run = self._study.settings(arm)
    resolved = resolve.resolve(run)
    if arm.tuning == "none":
      return pairs.untuned(run, resolved)
    blank = pairs.initial(run, resolved, [seed for _, seed in some])
    like = _one(blank.params, 0)
    read = [self._store.read_params(arm.name, pair, like) for pair in some]
    lost = [p for p, x in zip(some, read, strict=True) if x is None]
    if lost:
      raise ValueError(
        f"the parameters of arm {arm.name} at {lost[0]} are gone, but it is not"
        " scored yet: remove its files to train it again."
      )
    return dataclasses.replace(blank, params=pairs.stack(read))

  def _score(self, arm: ArmConfig, some: list[Pair]) -> None:
    study, texts = self._study, self._texts
    begin = time.perf_counter()
    weights = self._weights(arm, some)
    arrays = {
      f"test_{length}": self._losses(weights, windows)
      for length, windows in texts.test.items()
    }
    seq_len, short = study.run.training.seq_len, base_config(study).context_len
    whole = texts.test[seq_len]
    if short <= seq_len - seq_len // 4:
      # The last quarter again, given only the pretrained length before it.
      blocks = self._losses(weights, whole.short(short))[..., -1]
      blocks = blocks.reshape(len(some), len(whole.ids), -1)
      arrays["short"] = blocks.mean(axis=-1)
    for i, pair in enumerate(some):
      model = weights.model(i)
      scores = {
        name: {
          str(length): scoring.score_task(
            model,
            name,
            texts.vocabulary,
            length,
            study.tasks.samples(length),
            execution=self._execution,
            batch_tokens=study.run.evaluation.batch_tokens,
          )
          for length in study.tasks.context_lens
        }
        for name in study.tasks.names
      }
      self._store.write_scores(
        arm.name,
        pair,
        {name: array[i] for name, array in arrays.items()},
        {"tasks": scores},
      )
    quarter = scoring.last_quarter(arrays[f"test_{seq_len}"]).mean()
    print(
      f"{arm.name}: scored in {time.perf_counter() - begin:.1f} s; test, last"
      f" quarter of {seq_len:,}: {quarter:.4f} at {some[0][0]:g}",
      flush=True,
    )


def _about(arm: ArmConfig) -> dict[str, Any]:
  """Returns the settings that an arm's files depend on, as JSON types."""
  about = json.loads(json.dumps(to_json(arm)))
  del about["learning_rates"]  # Others may be added.
  return about


def _one(params: Any, index: int) -> Any:
  return jax.tree.map(lambda leaf: leaf[index], params)


def validation_losses(
  study: AblationConfig, store: Store, arm: ArmConfig
) -> dict[float, float]:
  """Returns the mean loss of the last quarter of held-out text by rate.

  The mean is over seeds and windows; NaN if a run diverged or is missing.
  """
  result = {}
  for rate in study.rates(arm):
    known = [
      store.trained(arm.name, (rate, seed)) for seed in seeds(study, arm)
    ]
    losses = [
      np.nan if x is None else scoring.last_quarter(x["validation"]).mean()
      for x in known
    ]
    result[rate] = float(np.mean(losses))
  return result


def chosen_pairs(
  study: AblationConfig, store: Store, arm: ArmConfig
) -> list[Pair]:
  """Returns the pairs of the arm's best learning rate on validation text.

  Raises:
    ValueError: No rate has a finite loss.
  """
  found = validation_losses(study, store, arm)
  finite = {rate: loss for rate, loss in found.items() if np.isfinite(loss)}
  if not finite:
    raise ValueError(
      f"arm {arm.name} diverged at every learning rate, {list(found)}: give"
      " lower rates."
    )
  best = min(finite, key=lambda rate: finite[rate])
  return [(best, seed) for seed in seeds(study, arm)]
