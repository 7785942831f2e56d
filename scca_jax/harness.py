# pyright: reportMissingImports=false
"""The model `scca_jax` of lm-evaluation-harness, for its three request types.

Importing this module registers the model. It gives the numbers of the harness's
own model `hf` on the exported model: both tokenize alike, begin texts alike,
drop the same tokens of texts that are too long, and roll over long texts in the
same windows. Only the batches differ: here they have few shapes, to save
compilation.

Needs the extra `lm_eval`, but not PyTorch. The parts: scoring, the arguments of
the model, and `SccaLM` with the three request types.
"""

import functools
import logging
import pathlib
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
import transformers
from flax import nnx
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models import utils as model_utils
from tqdm import tqdm

from scca_jax import (
  adapters,
  assets,
  convert,
  generation,
  gguf_file,
  hub,
  losses,
)
from scca_jax import tokenizer as tokenizer_files
from scca_jax.llama import Execution, Patterns
from scca_jax.llama_config import LlamaConfig
from scca_jax.patterns import members, parse

# The pattern that an adapter was trained with, as a value of `pattern`.
_TRAINING = "training"
_DTYPES = ("float32", "bfloat16", "float16")
# Lengths are padded to this many tokens times a power of two.
_SMALLEST = 64
# Positions of each sequence whose logits are held at once.
_LOGITS_CHUNK = 512
# Tokens of a batch with `batch_size=auto`.
_AUTO_TOKENS = 8192
# New tokens if a task sets no limit, as in `hf`.
_MAX_GEN_TOKS = 256
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p")

# Text of a request if it should be cached, its context, and the continuation.
_Request = tuple[tuple[str, str] | None, list[int], list[int]]

_logger = logging.getLogger(__name__)


@functools.partial(
  jax.jit, static_argnames=("graphdef", "patterns", "execution")
)
def _score(
  state: nnx.State,
  tokens: jax.Array,
  starts: jax.Array,
  targets: jax.Array,
  *,
  graphdef: nnx.GraphDef,
  patterns: Patterns,
  execution: Execution,
) -> tuple[jax.Array, jax.Array]:
  """Returns loss in nats and correctness of targets, both `[batch, targets]`.

  A target is correct if it is the most likely token.

  Args:
    state: The model's variables.
    tokens: What the model reads, `[batch, seq]` int32.
    starts: Position that predicts the first target, `[batch]`.
    targets: `[batch, targets]` int32. Results for the padding of a row are
      meaningless.
    graphdef: The model's structure.
    patterns: See `Llama.hidden_states`.
    execution: See `Llama.hidden_states`.
  """
  model = nnx.merge(graphdef, state)
  hidden = model.hidden_states(tokens, patterns, execution)
  places = starts[:, None] + jnp.arange(targets.shape[1])[None]
  places = jnp.minimum(places, tokens.shape[1] - 1)
  hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)

  def of_position(position):
    of_hidden, of_targets = position
    logits = model.logits(of_hidden)
    right = jnp.argmax(logits, axis=-1) == of_targets
    return losses.cross_entropy(logits, of_targets), right

  loss, right = jax.lax.map(
    of_position,
    (jnp.swapaxes(hidden, 0, 1), targets.T),
    batch_size=_LOGITS_CHUNK,
  )
  return loss.T, right.T


def _load_tokenizer(source: pathlib.Path, add_bos_token: bool | None) -> Any:
  """Returns the tokenizer as transformers reads it from our export."""
  if source.suffix != gguf_file.SUFFIX and not tokenizer_files.file_name(
    source
  ):
    raise FileNotFoundError(
      f"{source} has no tokenizer: give a folder with tokenizer.json or"
      " tokenizer.model, or a GGUF file."
    )
  settings = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
  with tempfile.TemporaryDirectory() as folder:
    convert.copy_tokenizer(source, folder)
    words = transformers.AutoTokenizer.from_pretrained(
      folder, local_files_only=True, **settings
    )
  words.name_or_path = str(source)
  return words


def _read_patterns(
  text: str | None, adapter: str | None, model: LlamaConfig, seq_len: int
) -> Patterns:
  """Returns the pattern of each layer, None if all are dense."""
  if text is None:
    return None
  if text == _TRAINING:
    layers = adapters.load_patterns(adapter) if adapter else None
    if layers is None:
      raise ValueError(
        f"pattern={_TRAINING} needs an adapter that records the pattern it was"
        f" tuned with, got adapter={adapter}: name the pattern."
      )
  else:
    layers = parse(
      text,
      num_heads=model.num_heads,
      num_kv_heads=model.num_kv_heads,
      num_layers=model.num_layers,
      seq_len=seq_len,
    )
  for layer in layers:
    for member in members(layer):
      if member.causality != "position":
        raise ValueError(
          f"pattern={text}: with causality={member.causality!r} results depend"
          " on how far a batch is padded; use 'position'."
        )
  return layers


def _check_device(device: str | None) -> None:
  """Checks that the requested device is the one that jax uses.

  By default the harness asks for "cuda:0".
  """
  platform = jax.default_backend()
  if device not in (None, "cuda", "cuda:0", platform):
    raise ValueError(
      f"device={device}: jax runs on {platform} here; choose a device with"
      " JAX_PLATFORMS or CUDA_VISIBLE_DEVICES."
    )


def _positive(name: str, value: Any) -> int | None:
  """Returns a number that may have been given as text; None stays None."""
  if value is None:
    return None
  if not str(value).isdecimal() or int(value) < 1:
    raise ValueError(f"{name} must be a number of at least 1, got {value}.")
  return int(value)


@register_model("scca_jax")
class SccaLM(TemplateLM):
  """A model of scca_jax with lm-evaluation-harness's interface.

  Its settings are the ones that `--model_args` accepts.
  """

  def __init__(
    self,
    model: str | None = None,
    *,
    adapter: str | None = None,
    pattern: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "float32",
    implementation: str | None = None,
    batch_size: int | str = 1,
    max_batch_size: int | None = None,
    max_length: int | None = None,
    add_bos_token: bool | None = None,
    prefix_token_id: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    **unknown: Any,
  ):
    """Loads the model.

    Args:
      model: Hugging Face folder or GGUF file; None is the embedded model.
      adapter: Folder of an adapter; None uses the model as it is.
      pattern: Attention pattern, as `scca_jax.patterns.parse` reads it, or
        "training" for the adapter's; None is dense. Sizes left out follow from
        `max_length`.
      tokenizer: Folder or GGUF file with a tokenizer; None uses the model's.
      dtype: Of weights and computation: float32, bfloat16 or float16.
      implementation: Attention back end; None picks the best for the device.
      batch_size: Sequences per batch; "auto" fits as many as make 8,192 tokens.
      max_batch_size: Upper limit for "auto".
      max_length: Longest sequence that the model reads, in tokens; None uses
        its context length.
      add_bos_token: Whether texts begin with BOS; None follows the tokenizer's
        files.
      prefix_token_id: Token in front of a text without a context; None uses
        BOS, or EOS if there is no BOS.
      device: The device that jax runs on, only checked.
      trust_remote_code: Ignored, as the harness also sets it for data sets.
      **unknown: Refused.

    Raises:
      ValueError: A setting is unknown or out of range, or the model or adapter
        is damaged.
      OSError: A file is missing.
    """
    super().__init__()
    del trust_remote_code
    if unknown:
      raise ValueError(
        f"unknown model_args {', '.join(sorted(unknown))}: use model, adapter,"
        " pattern, tokenizer, dtype, implementation, batch_size,"
        " max_batch_size, max_length, add_bos_token or prefix_token_id."
      )
    if dtype not in _DTYPES:
      raise ValueError(
        f"dtype must be one of {', '.join(_DTYPES)}, got {dtype}."
      )
    _check_device(device)
    self._sequences = None  # As many as `_AUTO_TOKENS` allows.
    if str(batch_size).split(":")[0] != "auto":
      self._sequences = _positive("batch_size", batch_size)
    self._most_sequences = _positive("max_batch_size", max_batch_size)
    max_length = _positive("max_length", max_length)
    for name, path in (
      ("model", model),
      ("adapter", adapter),
      ("tokenizer", tokenizer),
    ):
      if path is None or (name == "model" and hub.is_name(str(path))):
        continue
      if not pathlib.Path(str(path)).exists():
        raise FileNotFoundError(f"{name}={path} does not exist.")
    source = assets.MODEL if model is None else hub.find(str(model))
    words = source if tokenizer is None else pathlib.Path(str(tokenizer))
    self.tokenizer = _load_tokenizer(words, add_bos_token)
    self._add_bos_token = add_bos_token
    self._prefix_token_id = prefix_token_id
    dtypes: Any = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    if adapter is None:
      self._model = convert.load_model(source, **dtypes)
    else:
      self._model = adapters.load_adapter(source, adapter, **dtypes)
    # By default GPUs round float32 to 10 bits in products; `hf` does not.
    self._precision = "highest" if dtype == "float32" else None
    config = self._model.config
    self.max_length = config.context_len if max_length is None else max_length
    self._patterns = _read_patterns(pattern, adapter, config, self.max_length)
    self._execution = Execution(implementation=implementation)
    self._graphdef, self._state = nnx.split(self._model)

  # Text to tokens and back.

  @property
  def eot_token_id(self) -> int | None:
    """Token that ends a text; None if there is none."""
    return self.tokenizer.eos_token_id

  @property
  def prefix_token_id(self) -> int | None:
    """Token in front of a text without a context; None if there is none."""
    for token in (self._prefix_token_id, self.tokenizer.bos_token_id):
      if token is not None:
        return token
    return self.eot_token_id

  @property
  def tokenizer_name(self) -> str:
    """Name under which the harness caches requests."""
    return self.tokenizer.name_or_path.replace("/", "__")

  def _prefix(self) -> int:
    if self.prefix_token_id is None:
      raise ValueError(
        "a text without a context needs a token in front, and the tokenizer has"
        " neither BOS nor EOS: give prefix_token_id."
      )
    return self.prefix_token_id

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **ignored: Any
  ) -> list[int]:
    """Returns the ids of a text.

    Args:
      string: The text, in which special tokens are recognised.
      add_special_tokens: Whether to add BOS and the like; None follows the
        tokenizer's files and `add_bos_token`, but never adds a second BOS.
      **ignored: Arguments that the harness passes to other models.
    """
    del ignored
    adds = self._add_bos_token
    if add_special_tokens is not None:
      adds = add_special_tokens
    elif self.prefix_token_id is not None and string.startswith(
      self.tokenizer.decode(self.prefix_token_id)
    ):
      adds = False
    settings = {} if adds is None else {"add_special_tokens": adds}
    return self.tokenizer.encode(string, **settings)

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """Returns a conversation as the text that the model reads.

    Args:
      chat_history: Messages with "role" and "content".
      add_generation_prompt: Whether to end where the model's answer begins;
        otherwise the model continues the last message.
    """
    render = functools.partial(
      self.tokenizer.apply_chat_template,
      tokenize=False,
      add_generation_prompt=add_generation_prompt,
      continue_final_message=not add_generation_prompt,
    )
    try:
      return render(chat_history)
    except jinja2.TemplateError:
      # Some templates refuse a system message.
      return render([m for m in chat_history if m["role"] != "system"])

  # Sizes of batches.

  def _padded(self, length: int, limit: int) -> int:
    """Returns the length, at most `limit`, that a sequence is padded to."""
    scaling = self._model.config.rope_scaling
    if (
      scaling is not None
      and scaling.kind == "dynamic"
      and length > scaling.pretrained_len
    ):
      # Its frequencies depend on the length.
      return length
    padded = _SMALLEST
    while padded < length:
      padded *= 2
    return max(length, min(padded, limit))

  def _batched(
    self, groups: dict[Any, list[int]]
  ) -> Iterator[tuple[Any, int, list[int]]]:
    """Yields key, rows and members of each batch, the longest sequences first.

    All batches of one length have the same number of rows, even if few requests
    are left, so that they share a compiled program.

    Args:
      groups: Requests by a key that starts with the padded length.
    """
    num_requests = sum(map(len, groups.values()))
    for key, group in sorted(groups.items(), reverse=True):
      rows = self._sequences
      if rows is None:
        rows = max(1, _AUTO_TOKENS // key[0])
        rows = min(rows, self._most_sequences or rows)
      rows = min(rows, 1 << (num_requests - 1).bit_length())
      for begin in range(0, len(group), rows):
        yield key, rows, group[begin : begin + rows]

  # Requests.

  def _loglikelihood_tokens(
    self,
    requests: Sequence[_Request],
    disable_tqdm: bool = False,
    **ignored: Any,
  ) -> list[tuple[float, bool]]:
    """Returns log likelihood in nats and greediness of every continuation.

    Requests that are too long are cut on the left, to `max_length` tokens.

    Raises:
      ValueError: A continuation is empty, or longer than `max_length`.
    """
    del ignored
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    num_cut = 0
    for i, (text, context, continuation) in enumerate(requests):
      if not context or not 0 < len(continuation) <= self.max_length:
        raise ValueError(
          f"request {text} has {len(context):,} tokens of context, where at"
          f" least 1 is needed, and {len(continuation):,} of continuation,"
          f" where 1 to max_length={self.max_length:,} are allowed."
        )
      for token in (*context, *continuation):
        if not 0 <= token < self._model.config.vocab_size:
          raise ValueError(
            f"request {text} has the token {token}, but the model's vocabulary"
            f" is {self._model.config.vocab_size:,} tokens: give its own"
            " tokenizer."
          )
      length = len(context) + len(continuation) - 1
      num_cut += length > self.max_length
      length = self._padded(min(length, self.max_length), self.max_length)
      groups[length, self._padded(len(continuation), length)].append(i)
    if num_cut:
      _logger.warning(
        "%d of %d requests are longer than the %d tokens that the model reads:"
        " cut on the left.",
        num_cut,
        len(requests),
        self.max_length,
      )
    results = [(0.0, False)] * len(requests)
    bar = tqdm(
      total=len(requests),
      desc="Running loglikelihood requests",
      disable=disable_tqdm,
    )
    for (length, num_targets), rows, part in self._batched(groups):
      tokens = np.zeros((rows, length), np.int32)
      targets = np.zeros((rows, num_targets), np.int32)
      starts = np.zeros(rows, np.int32)
      for row, i in enumerate(part):
        _, context, continuation = requests[i]
        read = [*context, *continuation][-(self.max_length + 1) :][:-1]
        tokens[row, : len(read)] = read
        targets[row, : len(continuation)] = continuation
        starts[row] = len(read) - len(continuation)
      with jax.default_matmul_precision(self._precision):
        found = _score(
          self._state,
          tokens,
          starts,
          targets,
          graphdef=self._graphdef,
          patterns=self._patterns,
          execution=self._execution,
        )
      for i, loss, right in zip(part, *map(np.asarray, found), strict=False):
        text, _, continuation = requests[i]
        size = len(continuation)
        total = -float(loss[:size].sum(dtype=np.float64))
        if not np.isfinite(total):
          raise ValueError(
            f"the loss of request {text} is not finite: the weights are"
            " damaged, or their dtype is too narrow."
          )
        results[i] = total, bool(right[:size].all())
        if text is not None:
          self.cache_hook.add_partial("loglikelihood", text, results[i])
      bar.update(len(part))
    bar.close()
    return results

  def loglikelihood_rolling(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[float]:
    """Returns the log likelihood of every text in nats.

    A text is cut into windows of `max_length`, each of which predicts the
    tokens that no earlier one did; the first token is predicted from
    `prefix_token_id`.
    """
    owners, windows = [], []
    for i, request in enumerate(requests):
      (text,) = request.args
      for window in utils.get_rolling_token_windows(
        token_list=self.tok_encode(text),
        prefix_token=self._prefix(),
        max_seq_len=self.max_length,
        context_len=1,
      ):
        owners.append(i)
        windows.append((None, *utils.make_disjoint_window(window)))
    totals = [0.0] * len(requests)
    found = self._loglikelihood_tokens(windows, disable_tqdm)
    for i, (total, _) in zip(owners, found, strict=True):
      totals[i] += total
    for request, total in zip(requests, totals, strict=True):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
    return totals

  def generate_until(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[str]:
    """Returns the text that continues every context, up to a stop string.

    Contexts are cut on the left, so that `max_gen_toks` more tokens fit into
    `max_length`.

    Raises:
      ValueError: A setting is unknown, or `max_gen_toks` leaves no room.
    """
    prompts: list[list[int]] = []
    settings: list[dict[str, Any]] = []
    groups: dict[tuple[int, str], list[int]] = defaultdict(list)
    for i, request in enumerate(requests):
      context, given = request.args
      settings.append(self._generation_settings(given))
      room = self.max_length - settings[i]["max_gen_toks"]
      prompts.append((self.tok_encode(context) or [self._prefix()])[-room:])
      length = self._padded(len(prompts[i]), room)
      groups[length, repr(sorted(settings[i].items()))].append(i)
    results = [""] * len(requests)
    bar = tqdm(
      total=len(requests),
      desc="Running generate_until requests",
      disable=disable_tqdm,
    )
    for number, (key, rows, part) in enumerate(self._batched(groups)):
      # A short batch is filled up with copies of its last prompt.
      filled = [*part, *[part[-1]] * (rows - len(part))]
      with jax.default_matmul_precision(self._precision):
        answers = self._generate(
          [prompts[i] for i in filled],
          len(part),
          length=key[0],
          seed=number,
          **settings[part[0]],
        )
      for i, answer in zip(part, answers, strict=True):
        results[i] = answer
        self.cache_hook.add_partial("generate_until", requests[i].args, answer)
      bar.update(len(part))
    bar.close()
    return results

  def _generation_settings(self, given: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a request, with defaults filled in."""
    settings: dict[str, Any] = dict(
      model_utils.normalize_gen_kwargs(given, _MAX_GEN_TOKS)
    )
    unknown = settings.keys() - {"until", "max_gen_toks", *_SAMPLING}
    if settings.get("num_beams") == 1:
      unknown -= {"num_beams"}
    if unknown:
      raise ValueError(
        f"unknown gen_kwargs {', '.join(sorted(unknown))}: use until,"
        f" max_gen_toks, {', '.join(_SAMPLING)}."
      )
    if not 0 < settings["max_gen_toks"] < self.max_length:
      raise ValueError(
        f"max_gen_toks={settings['max_gen_toks']} must be at least 1 and below"
        f" max_length={self.max_length}, to leave room for a context."
      )
    eos = None
    if self.eot_token_id is not None:
      eos = self.tokenizer.decode(self.eot_token_id)
    samples = settings.get("do_sample", False)
    return {
      "until": model_utils.handle_stop_sequences(settings["until"], eos=eos),
      "max_gen_toks": settings["max_gen_toks"],
      "temperature": float(settings.get("temperature", 0.0)) * samples,
      "top_k": settings.get("top_k") or None,
      "top_p": settings.get("top_p", 1.0),
    }

  def _generate(
    self,
    prompts: Sequence[Sequence[int]],
    num_wanted: int,
    *,
    length: int,
    seed: int,
    until: Sequence[str],
    max_gen_toks: int,
    **sampling: Any,
  ) -> Iterable[str]:
    """Returns the continuations of the first `num_wanted` prompts."""
    stops = [stop for stop in until if stop]
    # The model may write a stop string with other tokens than its encoding has.
    looked_at = 2 + max(
      (len(self.tok_encode(stop, add_special_tokens=False)) for stop in stops),
      default=0,
    )
    eos_ids = {*self._model.config.eos_token_ids, self.eot_token_id} - {None}

    def has_stop(ids: Sequence[int]) -> bool:
      text = self.tokenizer.decode(ids)
      return any(stop in text for stop in stops)

    answers: list[list[int]] = [[] for _ in range(num_wanted)]
    writing = set(range(num_wanted))
    for tokens in generation.stream(
      self._model,
      prompts,
      max_new_tokens=max_gen_toks,
      sampling=generation.Sampling(seed=seed, **sampling),
      prefill_patterns=self._patterns,
      decode_patterns=self._patterns,
      eos_ids=sorted(eos_ids),
      execution=self._execution,
      prompt_len=length,
    ):
      for row in sorted(writing):
        answers[row].append(int(tokens[row]))
        if tokens[row] in eos_ids or (
          has_stop(answers[row][-looked_at:]) and has_stop(answers[row])
        ):
          writing.remove(row)
      if not writing:
        break
    return [
      model_utils.postprocess_generated_text(
        self.tokenizer.decode(answer, skip_special_tokens=True),
        list(until),
        think_end_token=None,
      )
      for answer in answers
    ]
