"""What commands export is the same in transformers and PEFT."""

import dataclasses
import json

import jax.numpy as jnp
import model_files
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs the extra parity")
transformers = pytest.importorskip(
  "transformers", reason="parity needs the extra parity"
)
peft = pytest.importorskip("peft", reason="parity needs the extra parity")

from scca_jax import (  # noqa: E402
  adapters,
  assets,
  convert,
  generation,
  lora,
  patterns,
  tokenizer,
)
from scca_jax.convert import layout  # noqa: E402
from scca_jax.rope import RopeScaling  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
  # PEFT uses a name that transformers deprecates.
  "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)

TEXTS = [
  "It was the best of times, it was the worst of times.",
  "  two  spaces,\n\n\ttabs; Grüße, мир 🙂 12345",
  "",
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  """Models to tune, by what is special about them."""
  folder = tmp_path_factory.mktemp("bases")
  untied = model_files.write_byte_level(folder / "untied")
  tied = model_files.write_byte_level(
    folder / "tied",
    "smollm",
    dataclasses.replace(model_files.BYTE_LEVEL, tie_embeddings=True),
  )
  # Transformers computes in the dtype of the files.
  pieces = folder / "sentencepiece"
  embedded = convert.load_model(assets.MODEL)
  convert.save_model(embedded, pieces, dtype=jnp.float32)
  convert.copy_tokenizer(assets.MODEL, pieces)
  return {"sentencepiece": pieces, "untied": untied, "tied": tied}


@pytest.fixture(
  scope="module",
  params=["sentencepiece", "untied", "tied"],
)
def tuned(request, bases, tmp_path_factory):
  """A base, an adapted model, and the folder of its adapter."""
  base = bases[request.param]
  config = convert.load_config(base)
  model = convert.load_model(
    base,
    config=dataclasses.replace(
      config,
      context_len=4 * config.context_len,
      rope_scaling=RopeScaling(kind="linear", factor=4.0),
    ),
    lora=lora.LoraConfig(rank=4),
  )
  rng = np.random.default_rng(0)
  for path, array in layout.parameters(model).items():
    if path[-1] == "lora_b" or path[0] in ("embed_tokens", "norm", "lm_head"):
      part = model
      for name in path:
        part = getattr(part, name)
      noise = 0.05 * rng.normal(size=array.shape)
      part[...] = array + jnp.asarray(noise, array.dtype)
  folder = tmp_path_factory.mktemp("tuned") / "adapter"
  layers = (patterns.scca_fixed(config.num_heads, 64),) * config.num_layers
  adapters.save_adapter(model, folder, base_model=str(base), patterns=layers)
  return base, model, folder


def _export(run_command, tuned, kind, output, *args):
  base, _, folder = tuned
  status = run_command(
    "export",
    f"--model={base}",
    f"--adapter={folder}",
    f"--format={kind}",
    f"--output_dir={output}",
    *args,
  )
  assert status == 0


@pytest.fixture(
  scope="module",
  params=[
    (base, whole)
    for base in ("untied", "tied")
    for whole in (
      None,
      ["embed_tokens"],
      ["lm_head"],
      ["embed_tokens", "lm_head"],
    )
  ],
  ids=lambda param: f"{param[0]}-{'-'.join(param[1] or ['none'])}",
)
def of_peft(request, bases, tmp_path_factory):
  """A base, PEFT's model, and the folder of the adapter that PEFT saved."""
  base, whole = bases[request.param[0]], request.param[1]
  theirs = peft.get_peft_model(
    transformers.AutoModelForCausalLM.from_pretrained(base),
    peft.LoraConfig(
      task_type="CAUSAL_LM", init_lora_weights=False, modules_to_save=whole
    ),
  )
  with torch.no_grad():
    for parameter in theirs.parameters():
      if parameter.requires_grad:
        parameter += 0.02 * torch.randn_like(parameter)
  folder = tmp_path_factory.mktemp("of_peft") / "adapter"
  theirs.save_pretrained(folder, save_embedding_layers=False)
  return base, theirs.eval(), folder


@pytest.mark.parametrize("kind", ["hf", "peft", "peft_plain"])
@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings:UserWarning")
def test_an_adapter_of_peft_is_the_same_in_every_format(
  run_command, of_peft, tmp_path, kind
):
  base, theirs, _ = of_peft
  prompt = list(range(3, 40))
  out = tmp_path / kind
  _export(run_command, of_peft, kind, out, "--dtype=float32")
  card = "adapter/README.md" if kind == "peft_plain" else "README.md"
  (found,) = _from_card(out / card, ["model"])
  with torch.no_grad():
    np.testing.assert_allclose(
      found.eval()(torch.tensor([prompt])).logits.numpy(),
      theirs(torch.tensor([prompt])).logits.numpy(),
      rtol=0,
      atol=1e-4,
    )


def _from_card(path, names):
  """Runs the lines of a card that load its model or adapter."""
  card = path.read_text(encoding="utf8")
  found = {}
  exec(card.split("```python\n")[1].split("```")[0], found)
  return [found[name] for name in names]


def _assert_same(theirs, model, tokenizer_of_theirs, words):
  prompt = [words.bos_id, *words.encode(TEXTS[0] + TEXTS[1])]
  for text in TEXTS:
    ids = [words.bos_id] * words.adds_bos + words.encode(text)
    assert tokenizer_of_theirs(text).input_ids == ids, text
  theirs = theirs.eval().to(torch.float32)
  _assert_same_logits(theirs, model, prompt)
  (ours,) = generation.generate(model, [prompt], max_new_tokens=8)
  found = theirs.generate(
    torch.tensor([prompt]), max_new_tokens=8, do_sample=False
  )
  assert found[0, len(prompt) :].tolist() == ours


def _assert_same_logits(theirs, model, prompt):
  ours = np.asarray(model(jnp.asarray([prompt])))
  with torch.no_grad():
    found = theirs(torch.tensor([prompt])).logits.numpy()
  np.testing.assert_allclose(found, ours, rtol=0, atol=1e-4)


def test_a_fused_model_is_the_same_in_transformers(
  run_command, tuned, tmp_path
):
  base, model, _ = tuned
  out = tmp_path / "hf"
  _export(run_command, tuned, "hf", out, "--dtype=float32")
  loaded = _from_card(out / "README.md", ["model", "tokenizer"])
  assert loaded[0].config.max_position_embeddings == model.config.context_len
  _assert_same(loaded[0], model, loaded[1], tokenizer.load(base))


def test_an_adapter_is_the_same_in_peft(run_command, tuned, tmp_path):
  base, model, _ = tuned
  out = tmp_path / "peft"
  _export(run_command, tuned, "peft", out)
  (theirs,) = _from_card(out / "README.md", ["model"])
  head, embedding = (
    theirs.base_model.model.get_output_embeddings(),
    theirs.base_model.model.get_input_embeddings(),
  )
  is_tied = head.weight.data_ptr() == embedding.weight.data_ptr()
  assert is_tied == model.config.tie_embeddings
  words = transformers.AutoTokenizer.from_pretrained(base)
  _assert_same(theirs, model, words, tokenizer.load(base))


def test_a_plain_adapter_on_its_base_is_the_same_in_peft(
  run_command, tuned, tmp_path
):
  _, model, _ = tuned
  out = tmp_path / "plain"
  _export(run_command, tuned, "peft_plain", out, "--dtype=float32")
  (theirs,) = _from_card(out / "adapter" / "README.md", ["model"])
  words = transformers.AutoTokenizer.from_pretrained(out / "base")
  _assert_same(theirs, model, words, tokenizer.load(out / "base"))
  config = json.loads((out / "adapter" / "adapter_config.json").read_text())
  assert config["base_model_name_or_path"] == str(out / "base")


def test_a_gguf_file_exported_to_transformers_has_its_ids(
  run_command, tuned, tmp_path
):
  base, model, _ = tuned
  _export(run_command, tuned, "gguf", tmp_path / "gguf", "--gguf_type=F32")
  file = tmp_path / "gguf" / "gguf-F32.gguf"
  args = (f"--model={file}", f"--output_dir={tmp_path / 'hf'}")
  assert run_command("export", *args) == 0
  loaded = _from_card(tmp_path / "hf" / "README.md", ["model", "tokenizer"])
  words = tokenizer.load(tmp_path / "hf")
  assert words.adds_bos
  assert loaded[1].chat_template == (
    None
    if base.name == "sentencepiece"
    else "{{ messages[0]['content'] }}<|eot_id|>"
  )
  _assert_same(loaded[0], model, loaded[1], words)
