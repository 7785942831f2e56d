"""Bytes between devices: what programs move, and what patterns need."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import scca_jax
from scca_jax import deviceless, parallel, patterns, sharding, traffic

SEQ, PIECES, HEADS, DIM = 256, 4, 8, 16
PIECE = SEQ // PIECES
# Of one token of one head, key and value, in float32.
TOKEN = 2 * DIM * 4


# Tokens of key and value that a device in the middle receives, by hand.
HALVES = HEADS // 2
CASES = {
  "local": (patterns.local(HEADS, 32), 0),
  "scca_fixed": (patterns.scca_fixed(HEADS, 32), HALVES * 16),
  "s2": (patterns.s2(HEADS, 32), HALVES * 16),
  # The last head looks back by 224 tokens, of which 192 are there at most.
  "scca_flow": (
    patterns.scca_flow(HEADS, 32, 8),
    0 + 32 + 5 * PIECE + 32,
  ),
  # The shifts are 1, 1, 2, 3, 4, 5, 6 and 7 chunks; its own chunk is there.
  "scca_near": (
    patterns.scca_near(HEADS, 32, 8),
    2 * 32 + 5 * PIECE + 32,
  ),
  "sliding": (patterns.sliding(HEADS, 10), HEADS * 9),
  "dna": (patterns.dna(HEADS, 5, 3), HEADS * 12),
  "dilated": (patterns.dilated(HEADS, 32, 4), 0),
  "sda in chunks": (patterns.sda(HEADS, 4, chunk_size=32), 2 * (1 + 2 + 3)),
  # Queries and outputs too; a quarter stays.
  "sda": (patterns.sda(HEADS, 4), 2 * HEADS * PIECE * 3 // 4),
  "dense": (patterns.dense(HEADS), 2 * HEADS * PIECE * 3 // 4),
  "longmixed": (
    patterns.longmixed(HEADS, 32),
    2 * 16 + 2 * HALVES * PIECE * 3 // 4,
  ),
  # Two heads for four devices: everything changes places, keys go round.
  "dense heads": (
    patterns.mix(patterns.scca_fixed(6, 32), patterns.dense(2)),
    3 * 16 + 2 * 2 * PIECE + PIECES * 2 * PIECE,
  ),
}


def _attend(mesh, pattern):
  return functools.partial(
    scca_jax.attention, pattern=pattern, mesh=mesh, implementation="reference"
  )


@pytest.mark.parametrize("name", CASES)
def test_attention_moves_what_the_closed_form_says(name):
  pattern, tokens = CASES[name]
  mesh = sharding.make_mesh(
    sharding.MeshConfig(sequence=PIECES), jax.devices()[:PIECES]
  )
  x = jnp.zeros((1, SEQ, HEADS, DIM))
  run = jax.jit(
    _attend(mesh, pattern),
    compiler_options={"xla_backend_optimization_level": 0},
  )
  moved = traffic.moved_bytes(run.lower(x, x, x).compile())
  found = sum(kind["floats"] for kind in moved.values())
  closed_form = parallel.bytes_received(
    pattern,
    seq_len=SEQ,
    num_shards=PIECES,
    num_kv_heads=HEADS,
    head_dim=DIM,
    itemsize=4,
  )
  assert found == closed_form == tokens * TOKEN


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_go_round_in_float32(dtype):
  pattern, itemsize = patterns.dense(2), jnp.dtype(dtype).itemsize
  forward, backward = (
    parallel.bytes_received(
      pattern,
      seq_len=SEQ,
      num_shards=PIECES,
      num_kv_heads=1,
      head_dim=DIM,
      itemsize=itemsize,
      backward=backward,
    )
    for backward in (False, True)
  )
  # Two heads of queries and outputs, one of keys and values.
  assert forward == (2 + 1 + PIECES) * PIECE * 2 * DIM * itemsize
  # The gradients are rounded before the last turn.
  last = PIECE * 2 * DIM * itemsize
  assert backward == forward + (PIECES - 1) * PIECE * TOKEN + last
  if dtype == "bfloat16":
    return  # CPUs send some of it in float32.
  mesh = sharding.make_mesh(
    sharding.MeshConfig(sequence=PIECES), jax.devices()[:PIECES]
  )
  query = jnp.zeros((1, SEQ, 2, DIM))
  key = jnp.zeros((1, SEQ, 1, DIM))

  def step(query, key, value, d_output):
    output, vjp = jax.vjp(_attend(mesh, pattern), query, key, value)
    return output, vjp(d_output)

  run = jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})
  moved = traffic.moved_bytes(run.lower(query, key, key, query).compile())
  # In one program both passes share what the first turn receives.
  assert sum(kind["floats"] for kind in moved.values()) == (
    forward + backward - PIECE * TOKEN
  )


def test_keys_that_query_heads_share_are_sent_once():
  sizes = {
    "seq_len": SEQ,
    "num_shards": PIECES,
    "head_dim": DIM,
    "itemsize": 4,
  }
  fixed = patterns.scca_fixed(HEADS, 32)
  # Four shifted heads read two key heads.
  assert parallel.bytes_received(fixed, num_kv_heads=4, **sizes) == (
    2 * 16 * TOKEN
  )
  # Whole groups are exchanged: queries and outputs of 8, keys and values of 4.
  assert (
    parallel.bytes_received(patterns.dense(HEADS), num_kv_heads=4, **sizes)
    == (HEADS + 4) * PIECE * 3 // 4 * TOKEN
  )


def test_ring_attention_moves_all_keys_but_its_own():
  assert (
    traffic.ring_bytes(
      seq_len=SEQ,
      num_shards=PIECES,
      num_kv_heads=HEADS,
      head_dim=DIM,
      itemsize=4,
    )
    == 3 * PIECE * HEADS * TOKEN
  )


PROGRAM = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %start = (bf16[1,8]{1,0}, bf16[1,8]{1,0}, u32[], u32[]) \
collective-permute-start(%x), source_target_pairs={{0,1}}
  %done = bf16[1,8]{1,0} collective-permute-done(%start)
  %ids = s32[6]{0} collective-permute(%i), source_target_pairs={{0,1}}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]) while(%init), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %gather = f32[8]{0} all-gather(%p), replica_groups=[2,4]<=[8]
  %scatter = f32[2]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, \
to_apply=%add
  %reduce = (f32[8]{0}, f32[]) all-reduce(%p, %q), \
replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  %later = ((f32[8]{0}, f32[]), (f32[8]{0}, f32[])) all-reduce-start(%p, %q), \
replica_groups={{0,1,2,3}}, to_apply=%add
  %alone = (f32[8]{0}, f32[]) all-reduce-start(%p, %q), \
replica_groups={{0,1,2,3}}, to_apply=%add
  %all = ((f32[8]{0}), f32[8]{0}) all-to-all-start(%p), \
replica_groups={{0,1},{2,3}}
}
"""


def test_a_program_is_read_by_the_turns_of_its_loops():
  assert traffic.moved_bytes(PROGRAM) == {
    "collective-permute": {"floats": 3 * 16, "others": 3 * 24},
    "all-gather": {"floats": 32 * 3 / 4, "others": 0},
    "reduce-scatter": {"floats": 3 * 8, "others": 0},
    "all-reduce": {"floats": 3 * 2 * 36 * 3 / 4, "others": 0},
    "all-to-all": {"floats": 16, "others": 0},
  }


def test_an_unknown_dtype_is_refused():
  program = PROGRAM.replace("%gather = f32[8]", "%gather = f8e4m3fn[8]")
  with pytest.raises(ValueError, match="dtype f8e4m3fn.*%gather"):
    traffic.moved_bytes(program)


@pytest.mark.usefixtures("gpu_compiler")
def test_programs_for_gpus_move_the_same_while_local_heads_are_computed():
  mesh = sharding.make_mesh(
    sharding.MeshConfig(sequence=2), deviceless.devices("a100-40gb", 2)
  )
  pattern = patterns.longmixed(4, 64)
  x = jax.ShapeDtypeStruct(
    (1, 256, 4, 32),
    jnp.bfloat16,
    sharding=NamedSharding(mesh, PartitionSpec(None, "sequence")),
  )

  def step(query, key, value, d_output):
    attend = functools.partial(scca_jax.attention, pattern=pattern, mesh=mesh)
    output, vjp = jax.vjp(attend, query, key, value)
    return output, vjp(d_output)

  compiled = deviceless.compile_for("a100-40gb", step, x, x, x, x)
  moved = traffic.moved_bytes(compiled)
  forward = parallel.bytes_received(
    pattern,
    seq_len=256,
    num_shards=2,
    num_kv_heads=4,
    head_dim=32,
    itemsize=2,
  )
  assert sum(kind["floats"] for kind in moved.values()) == 2 * forward
  # In the order of the program: started, a kernel, waited for.
  program = compiled.as_text().split("\nENTRY ")[1]
  _, begun = program.split(" collective-permute-start(", 1)
  meanwhile, _ = begun.split(" collective-permute-done(", 1)
  assert " custom-call(" in meanwhile
  # Gradients of parts are written in place: the kernel that writes to an array
  # does not read it otherwise.
  written = re.findall(
    r"\{\n((?:(?!\n\}).)*)ROOT \S+ = \S+ dynamic-update-slice\((%[\w.-]+),",
    compiled.as_text(),
    re.DOTALL,
  )
  assert written
  for before, array in written:
    named = re.findall(re.escape(array) + r"(?![\w.-])", before)
    assert len(named) <= 1, before
