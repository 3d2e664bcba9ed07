# SPDX-License-Identifier: Apache-2.0
"""The mean gradient over streams of batches."""

import functools
import gc
import itertools
import warnings
import weakref

import jax
from jax.experimental import sparse
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import optax_svrg
from optax_svrg import _mean_gradient
from tests import helpers
from tests.helpers import network_data as data
from tests.helpers import network_loss as loss
from tests.helpers import network_params as make_params

GRAD = jax.grad(loss)


def split(batch, sizes):
  """Consecutive batches of the given sizes."""
  ends = list(itertools.accumulate(sizes))
  return [
    jax.tree.map(lambda a, i=end - size, j=end: a[i:j], batch)
    for size, end in zip(sizes, ends, strict=True)
  ]


@pytest.mark.parametrize(
  ("sizes", "make"),
  [
    ([10], list),
    ([4, 4, 2], iter),
    ([1, 2, 3, 4], tuple),
    ([1] * 10, lambda b: (x for x in b)),
  ],
)
def test_weights_batches_by_their_size(x64, sizes, make):
  params, batch = make_params(float), data(10, float)
  got = optax_svrg.mean_gradient(GRAD, params, make(split(batch, sizes)))
  helpers.assert_close(got, GRAD(params, batch), rtol=1e-14)


@pytest.mark.parametrize("tree", helpers.tree_names())
def test_dtypes_and_structure(tree):
  make, x64 = helpers.TREES[tree]
  with jax.enable_x64(x64):
    problem, params = helpers.finite_sum([2, 3]), make()
    got = optax_svrg.mean_gradient(problem.grad, params, problem.batches)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    for p, g in zip(jax.tree.leaves(params), jax.tree.leaves(got), strict=True):
      assert g.shape == jnp.shape(p)
      assert g.dtype == np.promote_types(jnp.result_type(p), np.float32)
    helpers.assert_close(
      got, problem.full_grad(params), rtol=helpers.tolerance(params)
    )


@pytest.mark.parametrize("dtype", [jnp.float32, helpers.slow(jnp.bfloat16)])
def test_error_does_not_grow_with_the_number_of_batches(dtype):
  """Of 10,000 batches a plain sum in float32 is off by 1e-4."""
  values = np.random.default_rng(0).normal(size=(10_000, 1, 3)) + 1
  values = jnp.asarray(values, dtype)
  mean = jax.jit(
    lambda p, x: optax_svrg.mean_gradient(lambda p, b: b[0] + p, p, x)
  )
  got = mean(jnp.zeros(3, dtype), values)
  assert got.dtype == jnp.float32
  want = helpers.wide(values).mean(axis=(0, 1))
  np.testing.assert_allclose(got, want, rtol=2e-7)
  # So is the program of each batch.
  few = values[:300]
  got = optax_svrg.mean_gradient(identity, jnp.zeros(3, dtype), list(few))
  want = helpers.wide(few).mean(axis=(0, 1))
  np.testing.assert_allclose(got, want, rtol=2e-7)


def identity(params, batch):
  return jax.tree.map(lambda p: jnp.mean(batch, axis=0) + 0 * p, params)


class TestSparse:
  """Examples count, not the numbers that are not zero."""

  @staticmethod
  def batches():
    rng = np.random.default_rng(0)
    dense = [rng.normal(size=(3, 4)), rng.normal(size=(1, 4))]
    dense[0][:, 1:] = 0
    dense = [jnp.asarray(x, jnp.float32) for x in dense]
    return dense, [sparse.BCOO.fromdense(x, nse=4) for x in dense]

  @staticmethod
  def loss(params, x):
    return jnp.mean(jnp.square(x @ params - 1))

  @pytest.mark.standard_promotion
  @pytest.mark.parametrize("jit", [True, helpers.slow(False)])
  def test_as_dense_ones(self, jit):
    dense, batches = self.batches()
    params, grad = jnp.arange(4.0), jax.grad(self.loss)

    def measures(params, batches):
      mean, table = optax_svrg.gradient_table(
        grad, params, batches, num_batches=2
      )
      return (
        optax_svrg.mean_gradient(grad, params, batches),
        mean,
        table[1],
        optax_svrg.smoothness(grad, params, batches),
      )

    got = (jax.jit(measures) if jit else measures)(params, batches)
    helpers.assert_close(got, measures(params, dense), rtol=1e-5)

  def test_more_examples_than_int32_counts(self):
    def batch(value):
      return sparse.BCOO(
        (jnp.array([value]), jnp.zeros((1, 2), jnp.int32)), shape=(2**30, 1)
      )

    grad = lambda p, x: p + x.data.sum()
    batches = [batch(1.0), batch(2.0), batch(6.0)]
    got = optax_svrg.mean_gradient(grad, jnp.zeros(2), batches)
    np.testing.assert_allclose(got, 3, rtol=1e-6)

  def test_single_examples_cannot_be_mapped_over(self):
    grads = optax_svrg.per_example_grads(self.loss)
    with pytest.raises(TypeError, match=r"batch must hold dense .*todense"):
      grads(jnp.arange(4.0), self.batches()[1][0])


class TestWeights:
  """Padded batches count by their valid examples."""

  PARAMS = jnp.zeros(2)

  @staticmethod
  def grad(params, batch):
    total = jnp.sum(batch["x"] * batch["mask"][:, None], axis=0)
    return params + total / batch["mask"].sum()

  @staticmethod
  def weight(batch):
    return batch["mask"].sum()

  def batches(self, *valid):
    x = jnp.asarray(
      np.random.default_rng(0).normal(size=(len(valid), 4, 2)), float
    )
    return [
      {"x": x[i], "mask": (jnp.arange(4) < n).astype(float)}
      for i, n in enumerate(valid)
    ]

  @pytest.mark.parametrize("jit", [True, helpers.slow(False)])
  def test_mean_over_the_valid_examples(self, jit):
    """A batch without any has no gradient, and is left out."""
    batches = self.batches(4, 0, 1)
    valid = jnp.concatenate([batches[0]["x"], batches[2]["x"][:1]])

    def measures(batches):
      kwargs = {"weights": self.weight}
      mean = optax_svrg.mean_gradient(self.grad, self.PARAMS, batches, **kwargs)
      again, _ = optax_svrg.gradient_table(
        self.grad, self.PARAMS, batches, **kwargs
      )
      return mean, again

    for got in (jax.jit(measures) if jit else measures)(batches):
      np.testing.assert_allclose(got, valid.mean(axis=0), rtol=1e-6)

  def test_nothing_is_valid(self):
    mean = lambda batches: optax_svrg.mean_gradient(
      self.grad, self.PARAMS, batches, weights=self.weight
    )
    with pytest.raises(ValueError, match="weights must not be 0 for all"):
      mean(self.batches(0, 0))
    assert jnp.all(jnp.isnan(jax.jit(mean)(self.batches(0, 0))))

  def test_negative_weights_show(self):
    got = optax_svrg.mean_gradient(
      self.grad, self.PARAMS, self.batches(4, 4), weights=lambda _: -1.0
    )
    assert jnp.all(jnp.isnan(got))

  @pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
      (3.0, TypeError, "weights must be a function .* got 3.0"),
      (lambda b: b["mask"], ValueError, r"a real scalar, .* shape \(4,\)"),
      (lambda b: 1j, ValueError, r"a real scalar, .* complex64"),
    ],
  )
  def test_misuse(self, weights, error, message):
    with pytest.raises(error, match=message):
      optax_svrg.mean_gradient(
        self.grad, self.PARAMS, self.batches(4), weights=weights
      )


class Reusing:
  """A loader that fills one buffer again and again."""

  def __init__(self, count, length):
    self.count, self.length = count, length

  def __iter__(self):
    buffer = np.zeros((2, 3), np.float32)
    for i in range(self.count):
      buffer[:] = i + 1
      yield buffer
      buffer[:] = np.nan

  def __len__(self):
    return self.length()


def fail():
  raise TypeError("a stream has no length")


class TestLoaders:
  """What loaders do with their memory, and say of their length."""

  PARAMS = jnp.zeros(3)

  def check(self, batches, **kwargs):
    mean, table = optax_svrg.gradient_table(
      identity, self.PARAMS, batches, **kwargs
    )
    for i in range(4):
      np.testing.assert_array_equal(table[i], np.full(3, i + 1))
    np.testing.assert_allclose(mean, 2.5, rtol=1e-6)

  @pytest.mark.parametrize("length", [lambda: 4, fail])
  def test_a_buffer_that_is_used_again(self, length):
    self.check(Reusing(4, length))
    self.check(iter(Reusing(4, length)))
    self.check(iter(Reusing(4, length)), num_batches=4)
    for _ in range(20):
      got = optax_svrg.mean_gradient(identity, self.PARAMS, Reusing(4, length))
      np.testing.assert_allclose(got, 2.5, rtol=1e-6)
    # As its last batch is worth no more than the first.
    assert jnp.isfinite(
      optax_svrg.smoothness(
        lambda p, x: p * jnp.mean(x), self.PARAMS, Reusing(4, length)
      )
    )

  @pytest.mark.parametrize(
    ("length", "message"),
    [(3, "3 .* there are more"), (5, "5 .* there are only 4")],
  )
  @pytest.mark.parametrize("how", ["length", "num_batches"])
  def test_a_length_that_is_wrong(self, length, message, how):
    if how == "length":
      batches, kwargs = Reusing(4, lambda: length), {}
    else:
      batches, kwargs = iter(Reusing(4, fail)), {"num_batches": length}
    with pytest.raises(ValueError, match=f"batches must hold .*{message}"):
      optax_svrg.gradient_table(identity, self.PARAMS, batches, **kwargs)

  def test_num_batches_is_checked(self):
    with pytest.raises(TypeError, match=r"num_batches must be an .* got 2\.0"):
      optax_svrg.gradient_table(
        identity, self.PARAMS, [jnp.ones((2, 3))], num_batches=2.0
      )

  def test_a_stream_of_known_length_is_not_gathered(self):
    alive = []

    def batches():
      for i in range(5):
        batch = jnp.full((2, 3), float(i))
        alive.append(weakref.ref(batch))
        yield batch
        del batch
        assert sum(reference() is not None for reference in alive) <= 1

    optax_svrg.gradient_table(identity, self.PARAMS, batches(), num_batches=5)
    assert len(alive) == 5

  def test_more_batches_than_an_axis_of_the_table_holds(self):
    batches = [jnp.full((1, 3), float(i)) for i in range(23)]
    mean, table = optax_svrg.gradient_table(identity, self.PARAMS, batches)
    assert len(table) == 23
    read = jax.jit(lambda table, i: table[i])
    for i in range(23):
      np.testing.assert_array_equal(read(table, i), np.full(3, i))
    np.testing.assert_allclose(mean, 11, rtol=1e-6)
    assert jnp.all(jnp.isnan(read(table, 23)))
    # Of the axes of its own, those of the batches are short.
    assert max(table.grads.shape[:-1]) <= 10


class TestCompilation:
  @staticmethod
  def traced_grad():
    traces = []

    def grad(params, batch):
      traces.append(batch["x"].shape)
      return GRAD(params, batch)

    return grad, traces

  def test_once_per_shape_of_a_batch(self):
    grad, traces = self.traced_grad()
    batches = split(data(22), [4, 4, 4, 4, 4, 2])
    for factor in (1.0, 2.0):
      params = jax.tree.map(lambda p, f=factor: f * p, make_params())
      optax_svrg.mean_gradient(grad, params, batches)
    assert traces == [(4, 3), (2, 3)]

  def test_partial_passes_arrays_as_arguments(self):
    traces = []

    def scaled(scale, params, batch):
      traces.append(1)
      return jax.tree.map(lambda g: scale * g, GRAD(params, batch))

    params, batches = make_params(), split(data(8), [4, 4])
    for scale in (1.0, 3.0):
      got = optax_svrg.mean_gradient(
        jax.tree_util.Partial(scaled, jnp.array(scale)), params, batches
      )
      want = jax.tree.map(lambda g, s=scale: s * g, GRAD(params, data(8)))
      helpers.assert_close(got, want, rtol=1e-6)
    assert len(traces) == 1

  @pytest.mark.parametrize("method", [False, True])
  def test_functions_and_what_they_hold_are_not_kept(self, method):
    """Not even the last one."""
    params, batches = make_params(), split(data(8), [4, 4])

    class Owner:
      def grad(self, params, batch):
        return GRAD(params, batch)

    owner = Owner()
    grad = owner.grad if method else lambda p, b, o=owner: o.grad(p, b)
    optax_svrg.mean_gradient(grad, params, batches)
    optax_svrg.smoothness(grad, params, batches)
    reference = weakref.ref(owner)
    del owner, grad
    gc.collect()
    assert reference() is None

  def test_no_tracers_leak(self):
    params, batches = make_params(), tuple(split(data(8), [4, 4]))
    with jax.checking_leaks():
      for fn in (optax_svrg.mean_gradient, optax_svrg.smoothness):
        jax.jit(lambda p, b, fn=fn: fn(GRAD, p, b))(params, batches)
        fn(GRAD, params, batches)

  def test_callables_that_cannot_be_hashed(self):
    class Gradient(dict):
      def __call__(self, params, batch):
        return GRAD(params, batch)

    params, batches = make_params(), split(data(8), [4, 4])
    got = optax_svrg.mean_gradient(Gradient(), params, batches)
    helpers.assert_close(got, GRAD(params, data(8)), rtol=1e-5)
    assert optax_svrg.smoothness(Gradient(), params, batches) > 0

  def test_warns_once_of_functions_made_for_a_single_use(self):
    params, batches = make_params(), split(data(8), [4, 4])

    def epoch():
      optax_svrg.mean_gradient(lambda p, b: GRAD(p, b), params, batches)

    epoch()
    with pytest.warns(
      UserWarning, match=r"new .* jax\.tree_util\.Partial"
    ) as w:
      epoch()
    assert [x.filename for x in w] == [__file__]
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      epoch()
      for _ in range(3):
        optax_svrg.mean_gradient(GRAD, params, batches)

  def test_compiled_memory_is_one_accumulator(self):
    """Inside one program temporary memory does not grow with the batches."""
    params = {"w": jnp.ones((64, 64)), "v": jnp.ones(64)}

    def temporaries(n):
      batches = [{"x": jnp.ones((2, 64)), "y": jnp.ones(2)} for _ in range(n)]
      mean = jax.jit(lambda p, b: optax_svrg.mean_gradient(GRAD, p, b))
      compiled = mean.lower(params, batches).compile()
      return compiled.memory_analysis().temp_size_in_bytes

    parameter_bytes = sum(p.nbytes for p in jax.tree.leaves(params))
    assert temporaries(16) < temporaries(2) + parameter_bytes / 2


def test_streams_and_donates():
  """One batch at a time is alive, and one accumulator."""
  alive = []

  def batches():
    for seed in range(5):
      batch = data(4, seed=seed)
      alive.append(weakref.ref(batch["x"]))
      yield batch
      del batch
      # All but the batch in use by the loop have been freed.
      assert sum(ref() is not None for ref in alive) <= 1

  before = {id(x) for x in jax.live_arrays()}
  result = optax_svrg.mean_gradient(GRAD, make_params(), batches())
  gc.collect()
  new = [x for x in jax.live_arrays() if id(x) not in before]
  assert len(new) <= len(jax.tree.leaves(result)) + 2  # The params are new too.


def test_no_host_synchronisation():
  params, batches = make_params(), split(data(8), [4, 4])
  optax_svrg.mean_gradient(GRAD, params, batches)
  with jax.transfer_guard_device_to_host("disallow"):
    optax_svrg.mean_gradient(GRAD, params, batches)


def test_consumes_each_batch_once():
  stream = iter(split(data(12), [4, 4, 4]))
  optax_svrg.mean_gradient(GRAD, make_params(), stream)
  assert list(stream) == []


@pytest.mark.parametrize("make", [list, tuple])
def test_inside_jit(make):
  params, batches = make_params(), make(split(data(10), [4, 4, 2]))
  got = jax.jit(lambda p, b: optax_svrg.mean_gradient(GRAD, p, b))(
    params, batches
  )
  helpers.assert_close(got, GRAD(params, data(10)), rtol=1e-5)


def test_inside_jit_twice_with_a_closure_over_tracers():
  params, batches = make_params(), tuple(split(data(8), [4, 4]))

  @jax.jit
  def scaled_mean(scale, params, batches):
    grad = lambda p, b: jax.tree.map(lambda g: scale * g, GRAD(p, b))
    first = optax_svrg.mean_gradient(grad, params, batches)
    return first, optax_svrg.mean_gradient(grad, params, batches[:1])

  for scale in (1.0, 2.0):
    first, second = scaled_mean(scale, params, batches)
    for got, batch in ((first, data(8)), (second, batches[0])):
      want = jax.tree.map(lambda g, s=scale: s * g, GRAD(params, batch))
      helpers.assert_close(got, want, rtol=1e-5)


def test_leaves_without_axes_do_not_count():
  def grad(params, batch):
    noise = jax.random.normal(batch["key"], ())
    return jax.tree.map(lambda g: g * noise, GRAD(params, batch))

  key = jax.random.key(0)
  batches = [{"key": key, **b} for b in split(data(6), [4, 2])]
  noise = jax.random.normal(key, ())
  want = jax.tree.map(lambda g: g * noise, GRAD(make_params(), data(6)))
  got = optax_svrg.mean_gradient(grad, make_params(), batches)
  helpers.assert_close(got, want, rtol=1e-5)


def test_batches_by_index():
  """Python iterates over what has only __getitem__, e.g. a map-style set."""

  class Batches:
    def __getitem__(self, index):
      return split(data(6), [4, 2])[index]

  got = optax_svrg.mean_gradient(GRAD, make_params(), Batches())
  helpers.assert_close(got, GRAD(make_params(), data(6)), rtol=1e-5)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_array_of_batches(array, jit):
  """E.g. the indices of the examples of each batch."""
  order = array(np.random.default_rng(0).permutation(12).reshape(3, 4))
  everything = data(12)
  grad = lambda p, i: GRAD(p, jax.tree.map(lambda x: x[i], everything))
  mean = lambda p, batches: optax_svrg.mean_gradient(grad, p, batches)
  got = (jax.jit(mean) if jit else mean)(make_params(), order)
  helpers.assert_close(got, GRAD(make_params(), everything), rtol=1e-5)


def test_numpy_batches():
  batch = jax.tree.map(np.asarray, data(6))
  got = optax_svrg.mean_gradient(GRAD, make_params(), split(batch, [4, 2]))
  helpers.assert_close(got, GRAD(make_params(), data(6)), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Some donated buffers")  # The first zeros.
def test_vmap():
  params, batches = make_params(), split(data(6), [4, 2])
  mean = lambda p: optax_svrg.mean_gradient(GRAD, p, batches)
  stacked = optax.tree.scale(jnp.array(2.0), params)
  both = jax.tree.map(lambda *x: jnp.stack(x), params, stacked)
  got = jax.vmap(mean)(both)
  for i, p in enumerate((params, stacked)):
    helpers.assert_close(
      jax.tree.map(lambda g, i=i: g[i], got), mean(p), rtol=1e-5
    )


def with_leaf(**leaves):
  return {**data(4), **leaves}


@pytest.mark.parametrize(
  ("batches", "error", "message"),
  [
    ([], ValueError, r"batches must hold at least one batch, got none"),
    (iter([]), ValueError, r"batches must hold at least one batch, got none"),
    (data(4), TypeError, r"batches must be an iterable of batches, got a dict"),
    (np.ones(4), ValueError, r"batches\[0\] must have leaves whose leading"),
    (jnp.ones(()), TypeError, r"iterat"),
    (7, TypeError, r"batches must be an iterable of batches, got a int"),
    ("abc", TypeError, r"batches must be an iterable of batches, got a str"),
    (
      [with_leaf(y=jnp.ones(3))],
      ValueError,
      r"batches\[0\] .* got 4 at \['x'\] and 3 at \['y'\]",
    ),
    ([data(4), data(0)], ValueError, r"batches\[1\] has no examples"),
    (
      [{"x": jnp.array(1.0)}],
      ValueError,
      r"batches\[0\] must have leaves whose leading axis",
    ),
    (
      [data(4), (jnp.ones((4, 3)), jnp.ones(4))],
      ValueError,
      r"batches\[1\] must have the tree structure of batches\[0\]",
    ),
    (
      [data(4), with_leaf(y=jnp.ones((4, 1)))],
      ValueError,
      r"batches\[1\] .*axes.* got 2 instead of 1 at \['y'\]",
    ),
    (
      [with_leaf(y="labels")],
      TypeError,
      r"batches\[0\] must be a tree of arrays, got a str at \['y'\]",
    ),
    (
      [with_leaf(y=np.array(["cat", "dog", "cat", "cow"]))],
      TypeError,
      r"batches\[0\] must be a tree of numbers, .* dtype <U3 at \['y'\]",
    ),
    (
      [{"key": jax.random.PRNGKey(0), "x": jnp.ones((2, 3))}],
      ValueError,
      r"batches\[0\] has a uint32 .* at \['key'\], .* use jax\.random\.key",
    ),
    (
      [{"key": jax.random.PRNGKey(0), **data(4)}],
      ValueError,
      r"uint32 array of shape \(2,\) at \['key'\]",
    ),
  ],
)
def test_misshaped_batches(batches, error, message):
  with pytest.raises(error, match=message):
    optax_svrg.mean_gradient(GRAD, make_params(), batches)


@pytest.mark.parametrize(
  ("grad", "params", "error", "message"),
  [
    (3.0, make_params(), TypeError, r"grad_fn must be a function, got 3.0"),
    (GRAD, {"w": jnp.ones(3, int)}, TypeError, r"params .*int32.*at \['w'\]"),
    (loss, make_params(), ValueError, r"the result of grad_fn .*missing"),
    (
      lambda p, b: jax.tree.map(lambda x: x[None], p),
      make_params(),
      ValueError,
      r"grad_fn .*\(1, 4\) instead of \(4,\) at \['v'\]",
    ),
    (
      lambda p, b: jax.tree.map(lambda x: x.astype(complex), p),
      make_params(),
      ValueError,
      r"grad_fn .*complex64 instead of float32 at \['v'\]",
    ),
  ],
)
def test_wrong_functions_and_params(grad, params, error, message):
  with pytest.raises(error, match=message):
    optax_svrg.mean_gradient(grad, params, [data(4)])


class TestGradientTable:
  """One pass for the mean gradient and the gradients of the batches."""

  @pytest.mark.parametrize(
    ("sizes", "make"), [([4, 4, 2], list), ([1] * 10, iter)]
  )
  def test_values(self, x64, sizes, make):
    params, batch = make_params(float), data(10, float)
    batches = split(batch, sizes)
    mean, table = optax_svrg.gradient_table(GRAD, params, make(batches))
    helpers.assert_equal(mean, optax_svrg.mean_gradient(GRAD, params, batches))
    assert len(table) == len(sizes)
    read = jax.jit(lambda table, i: table[i])
    for i, one in enumerate(batches):
      want = GRAD(params, one)
      helpers.assert_close(table[i], want, rtol=1e-14)
      for index in (np.int8(i), jnp.asarray(i, jnp.uint8), jnp.asarray(i)):
        helpers.assert_equal(read(table, index), table[i])
    assert [len(jax.tree.leaves(entry)) for entry in table] == [2] * len(sizes)

  @pytest.mark.parametrize("tree", helpers.tree_names())
  def test_dtypes_and_structure(self, tree):
    make, x64 = helpers.TREES[tree]
    with jax.enable_x64(x64):
      problem, params = helpers.finite_sum([2, 3]), make()
      mean, table = optax_svrg.gradient_table(
        problem.grad, params, problem.batches
      )
      assert jax.tree.structure(table[0]) == jax.tree.structure(params)
      for p, t, m in zip(
        *map(jax.tree.leaves, (params, table.grads, mean)), strict=True
      ):
        assert t.shape == (2, *jnp.shape(p))
        assert t.dtype == jnp.result_type(p)
        assert m.dtype == np.promote_types(jnp.result_type(p), np.float32)

  def test_mean_is_that_of_what_is_stored(self):
    """So that the estimator stays unbiased."""
    params, batches = make_params(), split(data(10), [4, 4, 2])
    mean, table = optax_svrg.gradient_table(
      GRAD, params, batches, dtype=jnp.bfloat16
    )
    exact = optax_svrg.mean_gradient(GRAD, params, batches)
    for m, e, t in zip(
      *map(jax.tree.leaves, (mean, exact, table.grads)), strict=True
    ):
      assert t.dtype == jnp.bfloat16
      stored = np.asarray(t, np.float32)
      want = np.average(stored, axis=0, weights=[4, 4, 2])
      np.testing.assert_allclose(m, want, rtol=1e-6, atol=1e-7)
      assert not np.allclose(m, e, rtol=1e-5)

  @pytest.mark.parametrize(
    "make",
    [
      lambda: optax_svrg.alpha_svrg(0.75),
      helpers.slow(lambda: optax_svrg.adaptive_svrg()),
    ],
  )
  def test_the_same_trajectory_as_with_grad_fn(self, x64, make):
    """Epochs that are scanned, each over the batches in another order."""
    batches = data(40, float)
    batches = jax.tree.map(lambda x: x.reshape(10, 4, *x.shape[1:]), batches)
    as_list = [jax.tree.map(lambda x, i=i: x[i], batches) for i in range(10)]
    tx = optax.chain(make(), optax.sgd(0.1, momentum=0.9))

    @functools.partial(jax.jit, static_argnames="from_table")
    def epoch(params, state, table, order, from_table):
      def step(carry, i):
        params, state = carry
        grad_fn = lambda p: GRAD(p, jax.tree.map(lambda x: x[i], batches))
        other = {"grad_fn": grad_fn}
        if from_table:
          other = {"snapshot_grads": table[i]}
        updates, state = tx.update(grad_fn(params), state, params, **other)
        return (optax.apply_updates(params, updates), state), None

      return jax.lax.scan(step, (params, state), order)[0]

    ends = []
    for from_table in (False, True):
      params = make_params(float)
      state = tx.init(params)
      for seed in range(5):
        mean, table = optax_svrg.gradient_table(GRAD, params, as_list)
        state = optax_svrg.take_snapshot(state, params, lambda _, m=mean: m)
        order = np.random.default_rng(seed).permutation(10)
        params, state = epoch(params, state, table, order, from_table)
      ends.append((params, state))
    helpers.assert_close(*ends, rtol=1e-10)

  def test_bad_index(self):
    params, batches = make_params(), split(data(10), [5, 5])
    mean, table = optax_svrg.gradient_table(GRAD, params, batches)
    for index in (-1, 2, np.int8(2)):
      with pytest.raises(IndexError, match=f"batches 0 to 1, got {index}"):
        table[index]
    for index in (0.0, True, "0", slice(1)):
      with pytest.raises(TypeError, match="must be an integer, got"):
        table[index]
    with pytest.raises(ValueError, match="must be a scalar"):
      table[np.arange(2)]
    # A traced one cannot raise; the gradient of another batch would be wrong.
    tx = optax_svrg.alpha_svrg(1.0)
    state = optax_svrg.take_snapshot(tx.init(params), params, lambda _: mean)
    grads = GRAD(params, batches[0])
    step = jax.jit(
      lambda table, i: tx.update(grads, state, snapshot_grads=table[i])[0]
    )
    for index in (-1, 2):
      helpers.assert_equal(step(table, index), grads)
    helpers.assert_close(step(table, 0), mean, rtol=1e-5, atol=1e-7)

  def test_in_place(self):
    """Beside the table there are a few gradients at a time."""
    params = {"w": jnp.ones((128, 128))}
    grad = jax.grad(lambda p, x: jnp.mean((x @ p["w"]) ** 2))
    batch = jnp.ones((2, 128))
    _, table = optax_svrg.gradient_table(grad, params, [batch] * 40)
    carry = (_mean_gradient._nothing(params), table)
    compiled = (
      _mean_gradient._accumulation(grad, None, True)
      .lower(carry, 3, batch, 2.0, (), {}, params)
      .compile()
    )
    size = params["w"].nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * size

  def test_in_the_memory_of_the_host(self):
    params, batches = make_params(), split(data(10), [5, 5])
    _, table = optax_svrg.gradient_table(GRAD, params, batches)
    sharding = jax.tree.leaves(table)[0].sharding
    offloaded = jax.device_put(table, sharding.with_memory_kind("pinned_host"))
    for read in (lambda t, i: t[i], jax.jit(lambda t, i: t[i])):
      got = read(offloaded, 1)
      helpers.assert_equal(got, table[1])
      for leaf in jax.tree.leaves(got):
        assert leaf.sharding.memory_kind == "device"

  @pytest.mark.parametrize("spec", [P(), P("data")])
  def test_made_in_the_memory_of_the_host(self, spec):
    """From the beginning, replicated or sharded."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    params = jax.device_put(make_params(), NamedSharding(mesh, spec))
    batches = split(data(10), [5, 3, 2])
    want = optax_svrg.gradient_table(GRAD, params, batches)
    mean, table = optax_svrg.gradient_table(
      GRAD, params, batches, memory_kind="pinned_host"
    )
    helpers.assert_equal(mean, want[0])
    for leaf, mean_leaf in zip(
      jax.tree.leaves(table), jax.tree.leaves(mean), strict=True
    ):
      assert leaf.sharding.memory_kind == "pinned_host"
      assert leaf.sharding.spec == P(None, *spec)
      assert mean_leaf.sharding.memory_kind == "device"
    for i in range(3):
      helpers.assert_equal(table[i], want[1][i])

  def test_too_large(self):
    """Known before any gradient is computed."""

    class Batches(list):
      def __len__(self):
        return 10**13

      def __iter__(self):
        raise AssertionError("the pass has begun")

    for memory_kind, where in ((None, "cpu:0"), ("pinned_host", "the host")):
      message = (
        f"table for {10**13} batches needs {64 * 10**13} bytes, .*{where}"
      )
      with pytest.raises(ValueError, match=message):
        optax_svrg.gradient_table(
          GRAD, make_params(), Batches(), memory_kind=memory_kind
        )

  @pytest.mark.parametrize(
    ("change", "error", "message"),
    [
      ({"grad_fn": None}, TypeError, "grad_fn must be a function"),
      ({"batches": []}, ValueError, "batches must hold at least one batch"),
      ({"batches": {"x": 1}}, TypeError, "batches must be an iterable"),
      ({"dtype": "int8"}, TypeError, "dtype"),
      (
        {"memory_kind": "disk"},
        ValueError,
        "memory_kind must be one of device, .*, got 'disk'",
      ),
      (
        {"params": {"w": jnp.ones(2, jnp.complex64)}, "dtype": "float32"},
        ValueError,
        "dtype",
      ),
    ],
  )
  def test_errors(self, change, error, message):
    args = {
      "grad_fn": GRAD,
      "params": make_params(),
      "batches": split(data(10), [5, 5]),
    } | change
    with pytest.raises(error, match=message):
      optax_svrg.gradient_table(**args)
