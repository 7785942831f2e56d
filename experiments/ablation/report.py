"""Writes the results of a study: results.json, table.md, windows.npz, plots."""

import dataclasses
import io
import itertools
import math
import pathlib
from typing import Any

import jax
import numpy as np

from experiments.ablation import plots, scoring, study
from experiments.ablation.settings import AblationConfig, ArmConfig
from experiments.ablation.store import Store
from experiments.ablation.study import Texts
from experiments.shared.config import to_json
from scca_jax import atomic_file, bootstrap
from scca_jax.tasks.scoring import wilson_interval

_QUARTER = slice(-scoring.NUM_BLOCKS // 4, None)
_BY_DISTANCE = "answer_loss_by_distance"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Found:
  """The results of an arm.

  Attributes:
    arm: The arm.
    learning_rate: The chosen learning rate.
    seeds: Its seeds.
    test: `[seeds, windows, blocks]` losses by context length.
    short: `[seeds, windows]` losses of the last quarter of the study's length,
      given only the pretrained length before it; None if that is all there is.
    validation: Mean loss of the last quarter on held-out text by learning rate.
    seconds: Training seconds of a run; None if they were not measured.
    looks: Steps, seconds and validation losses `[seeds, looks]` during
      training.
    scores: Task scores of each seed.
    about: Facts about the first run: device, pairs at once.
  """

  arm: ArmConfig
  learning_rate: float
  seeds: tuple[int, ...]
  test: dict[int, np.ndarray]
  short: np.ndarray | None
  validation: dict[float, float]
  seconds: float | None
  looks: tuple[np.ndarray, np.ndarray, np.ndarray]
  scores: list[dict[str, Any]]
  about: dict[str, Any]


def _find(settings: AblationConfig, store: Store, arm: ArmConfig) -> Found:
  chosen = study.chosen_pairs(settings, store, arm)
  trained = [store.trained(arm.name, pair) or {} for pair in chosen]
  scored = [store.scores(arm.name, pair) or {} for pair in chosen]
  lens = study.test_lens(settings, study.base_config(settings))
  return Found(
    arm=arm,
    learning_rate=chosen[0][0],
    seeds=tuple(seed for _, seed in chosen),
    test={n: np.stack([x[f"test_{n}"] for x in scored]) for n in lens},
    short=(
      np.stack([x["short"] for x in scored]) if "short" in scored[0] else None
    ),
    validation=study.validation_losses(settings, store, arm),
    seconds=_mean([x["seconds"] for x in trained]),
    looks=(
      trained[0]["look_steps"],
      trained[0]["look_seconds"],
      np.stack([x["look_losses"] for x in trained]),
    ),
    scores=[x["tasks"] for x in scored],
    about=trained[0],
  )


def _mean(values: list[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return float(np.mean(known)) if len(known) == len(values) else None


def _interval(found: bootstrap.Estimate) -> dict[str, Any]:
  return {"mean": found.mean, "interval": list(found.interval)}


def _against(
  found: Found, other: Found, seq_len: int, documents: np.ndarray
) -> dict[str, Any]:
  """Returns the paired difference in the loss of the last quarter."""
  ours, theirs = found.test[seq_len], other.test[seq_len]
  # An untuned model has no seeds, as it is the same for all of them.
  num_seeds = max(len(ours), len(theirs))
  ours = np.broadcast_to(ours, (num_seeds, *ours.shape[1:]))
  return _interval(
    bootstrap.paired_difference(ours, theirs, documents, positions=_QUARTER)
  )


def _context_gain(found: Found, documents: np.ndarray, seq_len: int) -> Any:
  """Returns the gain of the last quarter's tokens from the longer context."""
  if found.short is None:
    return None
  whole = scoring.last_quarter(found.test[seq_len])
  return _interval(
    bootstrap.paired_difference(
      found.short[..., None], whole[..., None], documents
    )
  )


def _loss(found: Found, length: int) -> dict[str, Any]:
  blocks = found.test[length]
  by_seed = scoring.mean(blocks, length).mean(axis=-1)
  quarter = scoring.last_quarter(blocks).mean(axis=-1)
  return {
    "mean": float(by_seed.mean()),
    "by_seed": by_seed.tolist(),
    "last_quarter": float(quarter.mean()),
    "last_quarter_by_seed": quarter.tolist(),
    "perplexity": float(np.exp(by_seed.mean())),
    "last_quarter_perplexity": float(np.exp(quarter.mean())),
  }


def _task_scores(found: Found) -> dict[str, Any]:
  """Returns task scores over all seeds, which answer the same prompts."""
  return {
    name: {
      length: _pooled([of_seed[name][length] for of_seed in found.scores])
      for length in by_length
    }
    for name, by_length in found.scores[0].items()
  }


def _pooled(scores: list[dict[str, Any]]) -> dict[str, Any]:
  """Returns a single score over the samples of several scores."""
  total = sum(score["num_samples"] for score in scores)
  right = round(sum(x["accuracy"] * x["num_samples"] for x in scores))
  result: dict[str, Any] = {
    "accuracy": right / total,
    "interval": list(wilson_interval(right, total)),
    "answer_loss": float(np.mean([x["answer_loss"] for x in scores])),
    "answer_loss_by_seed": [x["answer_loss"] for x in scores],
    "num_samples": total,
    "prompts_sha256": scores[0]["prompts_sha256"],
  }
  by_distance: dict[int, list[dict[str, float]]] = {}
  for entry in itertools.chain(*(score["by_depth"] for score in scores)):
    if "distance" in entry:
      by_distance.setdefault(int(entry["distance"]), []).append(entry)
  if by_distance:
    result[_BY_DISTANCE] = {
      str(distance): float(
        np.average(
          [entry["answer_loss"] for entry in entries],
          weights=[entry["num_samples"] for entry in entries],
        )
      )
      for distance, entries in sorted(by_distance.items())
    }
  return result


def _cost_to_target(found: Found, target: float) -> dict[str, Any]:
  """Returns when the validation loss first reaches the target, or None."""
  steps, seconds, losses = found.looks
  below = np.flatnonzero(losses.mean(axis=0) <= target)
  if not len(below):
    return {"steps": None, "seconds": None}
  first = below[0]
  known = math.isfinite(seconds[first])
  return {
    "steps": int(steps[first]),
    "seconds": float(seconds[first]) if known else None,
  }


def results(
  settings: AblationConfig, store: Store, texts: Texts
) -> tuple[dict[str, Any], dict[str, Found]]:
  """Returns the content of results.json, and what it is made from.

  Raises:
    ValueError: An arm diverged at every rate, or a file is damaged.
  """
  seq_len = settings.run.training.seq_len
  documents = texts.test[seq_len].documents
  found = {arm.name: _find(settings, store, arm) for arm in settings.arms}
  baseline = found[settings.baseline]
  target = float(baseline.looks[2].mean(axis=0)[-1]) + settings.margin
  arms = {}
  for name, one in found.items():
    arms[name] = {
      "pattern": one.arm.pattern,
      "rope": to_json(one.arm.rope),
      "tuning": one.arm.tuning,
      "dense_fraction": one.arm.dense_fraction,
      "skip_window": one.arm.skip_window,
      "learning_rate": one.learning_rate,
      "validation_by_learning_rate": {
        f"{rate:g}": loss if math.isfinite(loss) else None
        for rate, loss in one.validation.items()
      },
      "pairs_share": study.pairs_share(settings, one.arm),
      "tokens": study.num_tokens(settings, one.arm),
      "seconds": one.seconds,
      "pairs_at_once": one.about["pairs_at_once"],
      "device": one.about["device"],
      "seeds": list(one.seeds),
      "loss": {str(n): _loss(one, n) for n in one.test},
      "tasks": _task_scores(one),
      "against_dense": _against(one, baseline, seq_len, documents),
      "context_gain": _context_gain(one, documents, seq_len),
      "cost_to_target": _cost_to_target(one, target),
    }
  whole = {
    "protocol": settings.run.evaluation.protocol,
    "baseline": settings.baseline,
    "target_loss": target,
    "jax": jax.__version__,
    "num_windows": {str(n): len(w.ids) for n, w in texts.test.items()},
    "num_documents": len(np.unique(documents)),
    "arms": arms,
  }
  return whole, found


def table(whole: dict[str, Any], seq_len: int) -> str:
  """Returns the arms as a Markdown table, best first."""
  lens = list(next(iter(whole["arms"].values()))["loss"])
  names = [
    (task, length)
    for task, by_length in next(iter(whole["arms"].values()))["tasks"].items()
    for length in by_length
  ]
  heads = ["arm", "rate", "pairs", "tokens", "seconds"]
  heads += [f"ppl {int(n):,}" for n in lens]
  heads += ["last quarter", f"- {whole['baseline']} [95 %]"]
  heads += ["context gain [95 %]", "steps to target"]
  heads += [f"{task} {int(n):,}" for task, n in names]
  lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
  order = sorted(
    whole["arms"].items(),
    key=lambda item: item[1]["loss"][str(seq_len)]["last_quarter"],
  )
  for name, arm in order:
    gain, against = arm["context_gain"], arm["against_dense"]
    steps = arm["cost_to_target"]["steps"]
    cells = [name, f"{arm['learning_rate']:g}", f"{arm['pairs_share']:.3f}"]
    seconds = arm["seconds"]
    cells += [f"{arm['tokens']:,}", "" if seconds is None else f"{seconds:.2f}"]
    cells += [f"{arm['loss'][n]['perplexity']:.2f}" for n in lens]
    cells += [f"{arm['loss'][str(seq_len)]['last_quarter_perplexity']:.2f}"]
    cells += [_cell(against), "" if gain is None else _cell(gain)]
    cells += ["never" if steps is None else f"{steps:,}"]
    for task, n in names:
      score = arm["tasks"][task][n]
      cells.append(
        f"{score['answer_loss']:.2f}"
        if _BY_DISTANCE in score
        else f"{score['accuracy']:.0%}"
      )
    lines.append(" | ".join(cells))
  return "".join(f"| {line} |\n" for line in lines)


def _cell(found: dict[str, Any]) -> str:
  low, high = found["interval"]
  return f"{found['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


def write(
  settings: AblationConfig, store: Store, texts: Texts, folder: pathlib.Path
) -> None:
  """Writes the report of the arms that are done.

  Raises:
    OSError: A file cannot be written.
  """
  seq_len = settings.run.training.seq_len
  whole, found = results(settings, store, texts)
  atomic_file.write_json(folder / "results.json", whole)
  atomic_file.write(folder / "table.md", table(whole, seq_len).encode("utf8"))
  arrays: Any = {
    f"{name}/{length}": blocks.astype(np.float16)
    for name, one in found.items()
    for length, blocks in one.test.items()
  }
  arrays |= {
    f"{name}/short": one.short.astype(np.float32)
    for name, one in found.items()
    if one.short is not None
  }
  arrays |= {
    f"documents/{length}": windows.documents
    for length, windows in texts.test.items()
  }
  content = io.BytesIO()
  np.savez_compressed(content, **arrays)
  atomic_file.write(folder / "windows.npz", content.getvalue())
  plots.write(whole, {n: one.test[seq_len] for n, one in found.items()}, folder)
  print(table(whole, seq_len))
