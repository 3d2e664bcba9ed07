# SPDX-License-Identifier: Apache-2.0
"""Per-example gradients, measures of variance, the optimal coefficient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_svrg
from tests import helpers
from tests.helpers import network_data as data
from tests.helpers import network_loss as loss
from tests.helpers import network_params as make_params

TREES = helpers.tree_names(without=["empty"])
PERS = ("component", "leaf", "tree")
N = 7


def quadratic(params, batch):
  """A real loss for trees of any form and dtype, in which examples differ."""
  a, b = batch
  total = jnp.zeros(())
  for k, x in enumerate(jax.tree.leaves(params)):
    x = jnp.asarray(x)
    factor = jnp.mean(a * (k + 1)).astype(x.dtype)
    square = jnp.square(jnp.abs(x * factor + jnp.mean(b).astype(x.dtype)))
    total += jnp.sum(square).astype(total.dtype)
  return total


def stack(params, n=N, seed=0):
  """Random gradients for a tree of any form and dtype."""
  rng = np.random.default_rng(seed)

  def leaf(p):
    shape = (n, *np.shape(p))
    values = rng.normal(size=shape) + rng.normal(size=shape[1:])
    if jnp.iscomplexobj(p):
      values = values + 1j * rng.normal(size=shape)
    return jnp.asarray(values, jnp.result_type(p))

  return jax.tree.map(leaf, params)


def row(tree, i):
  return jax.tree.map(lambda x: x[i], tree)


def matrix(tree):
  """All gradients as the rows of one matrix, in double precision."""
  columns = []
  for leaf in jax.tree.leaves(tree):
    wide = np.complex128 if jnp.iscomplexobj(leaf) else np.float64
    columns.append(np.asarray(leaf).astype(wide).reshape(leaf.shape[0], -1))
  return np.concatenate(columns, axis=1)


def direct_variance(tree):
  """The definitions, with the covariance matrix of all coordinates."""
  g = matrix(tree)
  covariance = np.atleast_2d(np.cov(g.T, bias=True))
  cosines = [
    np.vdot(a, b).real / np.linalg.norm(a) / np.linalg.norm(b)
    for a, b in itertools.combinations(g, 2)
  ]
  return (
    np.mean((1 - np.array(cosines)) / 2),
    np.trace(covariance).real,
    np.linalg.eigvalsh(covariance)[-1],
  )


def direct_moments(grads, snapshot_grads):
  """Var g, Var s, Cov of each coordinate."""
  g, s = matrix(grads), matrix(snapshot_grads)
  g, s = g - g.mean(0), s - s.mean(0)
  mean = lambda a, b: (a.conj() * b).real.mean(0)
  return mean(g, g), mean(s, s), mean(s, g)


def direct_alpha(grads, snapshot_grads, per):
  """Cov / Var, as a tree for what has one."""
  leaves, treedef = jax.tree.flatten(grads)
  others = jax.tree.leaves(snapshot_grads)
  if per == "tree":
    _, var, cov = direct_moments(grads, snapshot_grads)
    return cov.sum() / var.sum()
  alphas = []
  for g, s in zip(leaves, others, strict=True):
    _, var, cov = direct_moments(g, s)
    alphas.append(
      cov.sum() / var.sum()
      if per == "leaf"
      else (cov / var).reshape(g.shape[1:])
    )
  return jax.tree.unflatten(treedef, alphas)


def rounding(tree):
  """Of results, which are float32 or wider, not of gradients."""
  wide = [np.promote_types(x.dtype, np.float32) for x in jax.tree.leaves(tree)]
  return 64 * float(np.finfo(np.result_type(*wide)).eps)


class TestPerExampleGrads:
  @pytest.mark.parametrize("chunk_size", [None, 1, 4, 6, 100])
  def test_is_a_loop_over_examples(self, x64, chunk_size):
    params, batch = make_params(float), data(6, float)
    grads = optax_svrg.per_example_grads(loss, chunk_size=chunk_size)
    got = jax.jit(grads)(params, batch)
    singles = [
      jax.grad(loss)(params, jax.tree.map(lambda x, i=i: x[i : i + 1], batch))
      for i in range(6)
    ]
    want = jax.tree.map(lambda *g: jnp.stack(g), *singles)
    helpers.assert_close(got, want, rtol=1e-14)
    mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), got)
    helpers.assert_close(mean, jax.grad(loss)(params, batch), rtol=1e-14)

  @pytest.mark.parametrize("chunk_size", [None, 2])
  @pytest.mark.parametrize("tree", helpers.tree_names())
  def test_any_tree(self, tree, chunk_size):
    make, x64 = helpers.TREES[tree]
    with jax.enable_x64(x64):
      params = make()
      batch = helpers.finite_sum([5]).data
      got = jax.jit(
        optax_svrg.per_example_grads(quadratic, chunk_size=chunk_size)
      )(params, batch)
      assert jax.tree.structure(got) == jax.tree.structure(params)
      for g, p in zip(
        jax.tree.leaves(got), jax.tree.leaves(params), strict=True
      ):
        assert (g.shape, g.dtype) == ((5, *np.shape(p)), jnp.result_type(p))
      grad = jax.jit(jax.grad(quadratic))
      for i in range(5):
        want = grad(params, jax.tree.map(lambda x, i=i: x[i : i + 1], batch))
        helpers.assert_close(row(got, i), want, rtol=helpers.tolerance(params))

  @pytest.mark.parametrize("chunk_size", [None, 2])
  def test_leaves_without_axes_go_to_all_examples(self, chunk_size):
    def noisy(params, batch):
      assert batch["x"].shape == (1, 3)
      assert batch["keys"].shape == (1,)
      if batch["twice"]:  # A Python number stays one.
        noise = jax.random.normal(batch["key"], ())
        own = jax.random.normal(batch["keys"][0], ())
        return (noise + own) * 2 * loss(params, batch)

    key, keys = jax.random.key(0), jax.random.split(jax.random.key(1), 5)
    batch = {"key": key, "keys": keys, "twice": True, **data(5)}
    got = optax_svrg.per_example_grads(noisy, chunk_size=chunk_size)(
      make_params(), batch
    )
    plain = optax_svrg.per_example_grads(loss)(make_params(), data(5))
    factor = 2 * (
      jax.random.normal(key, ()) + jax.vmap(jax.random.normal)(keys)
    )
    want = jax.tree.map(
      lambda g: factor.reshape(-1, *[1] * (g.ndim - 1)) * g, plain
    )
    helpers.assert_close(got, want, rtol=1e-5)

  def test_numpy_batch(self):
    batch = jax.tree.map(np.asarray, data(5))
    for chunk_size in (None, 2):
      grads = optax_svrg.per_example_grads(loss, chunk_size=chunk_size)
      helpers.assert_close(
        grads(make_params(), batch), grads(make_params(), data(5)), rtol=1e-6
      )

  def test_compiles_once(self):
    traces = []

    def traced(params, batch):
      traces.append(batch["x"].shape)
      return loss(params, batch)

    grads = jax.jit(optax_svrg.per_example_grads(traced))
    grads(make_params(), data(5))
    first = len(traces)
    assert set(traces) == {(1, 3)}
    grads(helpers.perturbed(make_params()), data(5))
    assert len(traces) == first

  def test_chunks_bound_memory(self):
    def wide_loss(w, x):
      a = jnp.sin(x[0] * jnp.outer(w, w))
      return jnp.mean(jnp.tanh(a @ a))

    def temporaries(chunk_size):
      grads = optax_svrg.per_example_grads(wide_loss, chunk_size=chunk_size)
      compiled = jax.jit(grads).lower(jnp.ones(128), jnp.ones(64)).compile()
      return compiled.memory_analysis().temp_size_in_bytes

    # In proportion to the examples, of which there are 64.
    assert temporaries(None) > 64 * 128 * 128 * 4
    assert temporaries(4) < temporaries(None) / 12

  @pytest.mark.slow
  def test_inside_vmap_and_grad(self):
    grads = optax_svrg.per_example_grads(loss, chunk_size=2)
    both = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), make_params())
    got = jax.vmap(grads, in_axes=(0, None))(both, data(5))
    for i in (0, 1):
      helpers.assert_close(row(got, i), grads(row(both, i), data(5)), rtol=1e-5)
    penalty = lambda p: sum(
      jnp.sum(g**2) for g in jax.tree.leaves(grads(p, data(5)))
    )
    gradient = jax.grad(penalty)(make_params())
    step = jax.tree.map(lambda g: 1e-3 * g, gradient)
    moved = jax.tree.map(jnp.subtract, make_params(), step)
    assert penalty(moved) < penalty(make_params())

  @pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
      ((3.0,), TypeError, "loss_fn must be a function, got 3.0"),
      ((loss, 0), ValueError, "chunk_size must be at least 1, got 0"),
      ((loss, 2.0), TypeError, "chunk_size must be an integer, got 2.0"),
      ((loss, True), TypeError, "chunk_size must be an integer, got True"),
    ],
  )
  def test_wrong_arguments(self, arguments, error, message):
    loss_fn, *chunk_size = arguments
    with pytest.raises(error, match=message):
      optax_svrg.per_example_grads(
        loss_fn, **dict(zip(["chunk_size"], chunk_size, strict=False))
      )

  @pytest.mark.parametrize(
    ("params", "batch", "error", "message"),
    [
      (
        {"w": jnp.ones(3, int)},
        data(4),
        TypeError,
        r"params .* int32\[3\] at \['w'\]",
      ),
      (make_params(), data(0), ValueError, "batch has no examples"),
      (
        make_params(),
        {"x": jnp.ones((4, 3)), "y": jnp.ones(3)},
        ValueError,
        r"batch .* examples .* got 4 at \['x'\] and 3 at \['y'\]",
      ),
      (
        make_params(),
        {"x": 1.0},
        ValueError,
        "batch must have leaves whose leading axis is the examples, got none",
      ),
      (
        make_params(),
        {"x": jnp.ones((4, 3)), "y": "labels"},
        TypeError,
        r"batch must be a tree of arrays, got a str at \['y'\]",
      ),
    ],
  )
  def test_wrong_trees(self, params, batch, error, message):
    with pytest.raises(error, match=message):
      optax_svrg.per_example_grads(loss)(params, batch)

  @pytest.mark.parametrize(
    "wrong",
    [
      lambda p, b: jnp.ones(2) * loss(p, b),
      lambda p, b: (loss(p, b), 1.0),
      lambda p, b: loss(p, b) * jnp.array(1j),
    ],
  )
  @pytest.mark.standard_promotion
  def test_loss_that_is_no_real_scalar(self, wrong):
    with pytest.raises(TypeError):
      optax_svrg.per_example_grads(wrong)(make_params(), data(4))


class TestGradientVariance:
  @pytest.mark.parametrize("n", [2, 40])
  @pytest.mark.parametrize("tree", TREES)
  def test_against_the_covariance_matrix(self, tree, n):
    make, x64 = helpers.TREES[tree]
    with jax.enable_x64(x64):
      grads = stack(make(), n)
      got = jax.jit(optax_svrg.gradient_variance)(grads)
      assert isinstance(got, optax_svrg.GradientVariance)
      for value in got:
        assert value.shape == ()
        assert value.dtype == (jnp.float64 if x64 else jnp.float32)
      np.testing.assert_allclose(
        got, direct_variance(grads), rtol=rounding(grads)
      )

  @pytest.mark.parametrize("dtypes", [(float, np.complex64), (complex, "f4")])
  def test_widths_may_differ(self, x64, dtypes):
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.normal(size=(5, 3)), dtype) for dtype in dtypes]
    got = optax_svrg.gradient_variance(grads)
    assert {value.dtype for value in got} == {jnp.dtype(jnp.float64)}
    np.testing.assert_allclose(got, direct_variance(grads), rtol=1e-13)

  @pytest.mark.slow
  def test_orthonormal(self):
    got = optax_svrg.gradient_variance({"w": jnp.eye(5).reshape(5, 5, 1)})
    # Total variance 1 - |mean|^2; the covariance is (I - 11'/5) / 5.
    np.testing.assert_allclose(got, (1 / 2, 4 / 5, 1 / 5), rtol=1e-6)

  def test_identical(self):
    gradient = np.random.default_rng(0).normal(size=50).astype(np.float32)
    got = optax_svrg.gradient_variance(jnp.tile(gradient + 100, (7, 1)))
    np.testing.assert_allclose(got.cosine_distance, 0, atol=1e-12)
    assert (got.total_variance, got.spectral_norm) == (0, 0)

  def test_opposite(self):
    g = np.random.default_rng(0).normal(size=50)
    got = optax_svrg.gradient_variance(jnp.asarray([g, -3 * g], jnp.float32))
    squared = 4 * np.sum(g**2)
    np.testing.assert_allclose(got, (1, squared, squared), rtol=1e-6)

  @pytest.mark.slow
  def test_rank_one(self):
    rng = np.random.default_rng(0)
    g = rng.normal(size=40) + rng.normal(size=(8, 1)) * rng.normal(size=40)
    got = optax_svrg.gradient_variance(jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(got.spectral_norm, got.total_variance, rtol=1e-5)
    np.testing.assert_allclose(
      got.total_variance, g.var(axis=0).sum(), rtol=1e-5
    )

  @pytest.mark.slow
  def test_nearly_parallel(self):
    """1 - cosine would be lost to rounding in float32."""
    g = np.ones((2, 1000), np.float32)
    g[1, 0] += 1e-3
    got = optax_svrg.gradient_variance(jnp.asarray(g))
    np.testing.assert_allclose(
      got.cosine_distance, direct_variance(g)[0], rtol=1e-3
    )

  @pytest.mark.parametrize(
    ("grads", "want"),
    [
      (np.array([[1, 0], [0, 0], [0, 2], [0, 0]]), 1 / 2),
      (np.array([[1, 0], [0, 0], [-3, 0]]), 1),
      (np.array([[1, 0], [0, 0]]), 0),
      (np.zeros((3, 2)), 0),
    ],
  )
  def test_zero_gradients_have_no_direction(self, grads, want):
    got = optax_svrg.gradient_variance(jnp.asarray(grads, jnp.float32))
    np.testing.assert_allclose(got.cosine_distance, want, rtol=1e-6)
    np.testing.assert_allclose(
      got.total_variance, grads.var(axis=0).sum(), rtol=1e-6
    )

  @pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
  @pytest.mark.parametrize("exponent", [-100, -40, 40, 120])
  def test_scale(self, exponent, dtype):
    # From 1e-30 to 1e36; powers of two, so that nothing is rounded.
    grads = stack({"a": jnp.ones(3, dtype), "b": jnp.ones((), dtype)})
    plain = optax_svrg.gradient_variance(grads)
    scaled = optax_svrg.gradient_variance(
      jax.tree.map(lambda g: g * jnp.asarray(2.0**exponent, dtype), grads)
    )
    assert scaled.cosine_distance == plain.cosine_distance
    if abs(exponent) < 60:
      assert scaled.total_variance == plain.total_variance * 4.0**exponent
      assert scaled.spectral_norm == plain.spectral_norm * 4.0**exponent

  @pytest.mark.slow
  def test_each_gradient_of_another_scale(self):
    grads = stack(jnp.ones(5), 20)
    lengths = jnp.asarray(10.0 ** np.linspace(-30, 30, 20), jnp.float32)
    got = optax_svrg.gradient_variance(lengths[:, None] * grads)
    np.testing.assert_allclose(
      got.cosine_distance, direct_variance(grads)[0], rtol=1e-5
    )

  @pytest.mark.slow
  def test_large_mean(self):
    g = 1e4 + np.random.default_rng(0).normal(size=(50, 30))
    g = g.astype(np.float32)
    got = optax_svrg.gradient_variance(jnp.asarray(g))
    np.testing.assert_allclose(got[1:], direct_variance(g)[1:], rtol=1e-5)

  @pytest.mark.parametrize("value", [np.nan, np.inf])
  def test_not_finite(self, value):
    grads = np.ones((3, 2), np.float32)
    grads[1, 1] = value
    assert np.isnan(optax_svrg.gradient_variance({"w": grads})).all()

  def test_memory_is_no_square_of_the_parameters(self):
    n, d = 4, 1 << 16
    compiled = (
      jax.jit(optax_svrg.gradient_variance).lower(jnp.ones((n, d))).compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * n * d * 4

  def test_compiles_once(self):
    traces = []

    @jax.jit
    def total(grads):
      traces.append(1)
      return optax_svrg.gradient_variance(grads).total_variance

    grads = stack(make_params())
    for factor in (1.0, 2.0):
      total(jax.tree.map(lambda g, f=factor: f * g, grads))
    assert len(traces) == 1


BAD_STACKS = [
  ({}, ValueError, "grads must have at least one leaf, got PyTreeDef"),
  ({"w": None}, ValueError, "grads must have at least one leaf"),
  ({"w": 2.0}, ValueError, r"grads .* leading axis .* scalar at \['w'\]"),
  (jnp.array(1.0), ValueError, "grads .* got a scalar at the root"),
  (
    {"v": jnp.ones((3, 2)), "w": jnp.ones(2)},
    ValueError,
    r"grads .* gradients in all leaves, got 3 at \['v'\] and 2 at \['w'\]",
  ),
  ({"w": jnp.ones((3, 2), int)}, TypeError, r"grads .* int32\[3, 2\] at"),
  ({"w": jnp.ones((1, 2))}, ValueError, "at least two gradients, got 1"),
  ({"w": jnp.ones((0, 2))}, ValueError, "at least two gradients, got 0"),
]


@pytest.mark.parametrize(("grads", "error", "message"), BAD_STACKS)
def test_wrong_stacks(grads, error, message):
  with pytest.raises(error, match=message):
    optax_svrg.gradient_variance(grads)
  with pytest.raises(error, match=message):
    optax_svrg.optimal_alpha(grads, grads)


@pytest.mark.parametrize("per", ["component", "tree", helpers.slow("leaf")])
class TestOptimalAlpha:
  @pytest.mark.parametrize("tree", TREES)
  def test_against_numpy(self, tree, per):
    make, x64 = helpers.TREES[tree]
    with jax.enable_x64(x64):
      grads, noise = stack(make()), stack(make(), seed=1)
      snapshot_grads = jax.tree.map(lambda g, e: g - e, grads, noise)
      alpha = jax.jit(lambda g, s: optax_svrg.optimal_alpha(g, s, per=per))
      got = alpha(grads, snapshot_grads)
      want = direct_alpha(grads, snapshot_grads, per)
      helpers.assert_close(got, want, rtol=rounding(grads))
      for leaf in jax.tree.leaves(got):
        assert leaf.dtype == (jnp.float64 if x64 else jnp.float32)

  @pytest.mark.parametrize("tree", TREES)
  def test_is_one_at_the_snapshot(self, tree, per):
    make, x64 = helpers.TREES[tree]
    with jax.enable_x64(x64):
      grads = stack(make())
      got = optax_svrg.optimal_alpha(grads, grads, per=per)
      for leaf in jax.tree.leaves(got):
        np.testing.assert_array_equal(leaf, np.ones(leaf.shape))

  def test_orthogonal_noise(self, per, x64):
    s = np.array([[1.0, 2.0], [-1.0, 2.0], [1.0, -2.0], [-1.0, -2.0]])
    noise = np.array([[5.0, 5.0], [-5.0, -5.0], [-5.0, -5.0], [5.0, 5.0]])
    got = optax_svrg.optimal_alpha(0.75 * s + noise + 3, s + 1, per=per)
    np.testing.assert_allclose(got, np.full(np.shape(got), 0.75), rtol=1e-14)

  @pytest.mark.parametrize("constant", [0.0, 0.1, 1e8])
  def test_components_without_variance_have_no_weight(self, per, constant):
    grads = {"dead": stack(jnp.ones(3)), "live": stack(jnp.ones(2), seed=1)}
    snapshot_grads = {
      "dead": jnp.full((N, 3), constant),
      "live": 2 * grads["live"],
    }
    got = optax_svrg.optimal_alpha(grads, snapshot_grads, per=per)
    if per == "tree":
      np.testing.assert_allclose(got, 0.5, rtol=1e-6)
      return
    np.testing.assert_array_equal(got["live"], np.full(got["live"].shape, 0.5))
    assert np.isnan(got["dead"]).all()
    values = np.concatenate([np.ravel(x) for x in jax.tree.leaves(got)])
    assert np.nanmean(values) == 0.5

  def test_gradients_without_variance(self, per):
    snapshot_grads = stack(make_params())
    grads = jax.tree.map(jnp.ones_like, snapshot_grads)
    got = optax_svrg.optimal_alpha(grads, snapshot_grads, per=per)
    for leaf in jax.tree.leaves(got):
      np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))

  def test_nothing_varies(self, per):
    grads = jax.tree.map(lambda p: jnp.stack([p, p]), make_params())
    got = optax_svrg.optimal_alpha(grads, grads, per=per)
    if per == "tree":
      assert got == 0
    else:
      assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(got))

  @pytest.mark.parametrize("exponents", [(83, 83), (-83, -83), (60, -60)])
  def test_scale(self, per, exponents):
    grads, snapshot_grads = (stack(make_params(), seed=i) for i in (0, 1))
    by = lambda tree, e: jax.tree.map(lambda x: x * 2.0**e, tree)
    alpha = lambda g, s: optax_svrg.optimal_alpha(g, s, per=per)
    a, b = exponents
    got = alpha(by(grads, a), by(snapshot_grads, b))
    helpers.assert_equal(got, by(alpha(grads, snapshot_grads), a - b))

  def test_components_of_other_scales(self, per):
    snapshot_grads = {
      "a": stack(jnp.ones(2)) * 1e-25,
      "b": stack(jnp.ones(2), seed=1),
    }
    grads = jax.tree.map(lambda s: 0.25 * s, snapshot_grads)
    got = optax_svrg.optimal_alpha(grads, snapshot_grads, per=per)
    for leaf in jax.tree.leaves(got):
      np.testing.assert_array_equal(leaf, np.full(leaf.shape, 0.25))

  def test_large_mean(self, per):
    rng = np.random.default_rng(0)
    s = (1e4 + rng.normal(size=(50, 30))).astype(np.float32)
    g = (0.5 * s + 1e4 + rng.normal(size=(50, 30))).astype(np.float32)
    got = optax_svrg.optimal_alpha(jnp.asarray(g), jnp.asarray(s), per=per)
    np.testing.assert_allclose(got, direct_alpha(g, s, per), rtol=0, atol=1e-6)

  @pytest.mark.parametrize("value", [np.nan, np.inf])
  def test_not_finite(self, per, value):
    grads = stack({"w": jnp.ones(2)})
    bad = {"w": grads["w"].at[1].set(value)}
    for pair in ((grads, bad), (bad, grads)):
      got = optax_svrg.optimal_alpha(*pair, per=per)
      assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(got))


def test_component_is_the_default():
  grads, snapshot_grads = (stack(make_params(), seed=i) for i in (0, 1))
  got = optax_svrg.optimal_alpha(grads, snapshot_grads)
  want = optax_svrg.optimal_alpha(grads, snapshot_grads, per="component")
  helpers.assert_equal(got, want)
  moments = streamed(grads, snapshot_grads)
  helpers.assert_equal(
    moments.optimal_alpha(), moments.optimal_alpha(per="component")
  )


@pytest.mark.parametrize("per", ["layer", None, "Tree", ""])
def test_bad_per(per):
  message = f"per must be 'component', 'leaf' or 'tree', got {per!r}"
  with pytest.raises(ValueError, match=message):
    optax_svrg.optimal_alpha(jnp.ones((2, 1)), jnp.ones((2, 1)), per=per)
  with pytest.raises(ValueError, match=message):
    optax_svrg.RunningMoments.create(jnp.ones(1)).optimal_alpha(per=per)


@pytest.mark.parametrize(
  ("change", "error", "message"),
  [
    (lambda t: {"w": t["w"]}, ValueError, r"snapshot_grads .* missing \['v'\]"),
    (
      lambda t: {**t, "v": t["v"][1:]},
      ValueError,
      r"snapshot_grads .* got \(6, 4\) instead of \(7, 4\) at \['v'\]",
    ),
    (
      lambda t: {**t, "v": t["v"] * 1j},
      ValueError,
      r"snapshot_grads .* complex64 instead of float32 at \['v'\]",
    ),
    (
      lambda t: {**t, "v": t["v"].astype(int)},
      TypeError,
      r"snapshot_grads .* int32\[7, 4\] at \['v'\]",
    ),
  ],
)
@pytest.mark.standard_promotion
def test_trees_that_do_not_match(change, error, message):
  grads = stack(make_params())
  with pytest.raises(error, match=message):
    optax_svrg.optimal_alpha(grads, change(grads))


@jax.jit
def streamed(grads, snapshot_grads):
  moments, _ = jax.lax.scan(
    lambda moments, pair: (moments.update(*pair), None),
    optax_svrg.RunningMoments.create(row(grads, 0)),
    (grads, snapshot_grads),
  )
  return moments


class TestRunningMoments:
  @pytest.mark.parametrize("tree", TREES)
  def test_against_numpy(self, tree):
    make, x64 = helpers.TREES[tree]
    with jax.enable_x64(x64):
      grads, snapshot_grads = stack(make()), stack(make(), seed=1)
      moments = optax_svrg.RunningMoments.create(make())
      types = helpers.types(moments)
      for i in range(N):
        moments = moments.update(row(grads, i), row(snapshot_grads, i))
        assert helpers.types(moments) == types
      assert moments.count == N
      rtol = rounding(grads)
      for got, want in zip(
        (moments.var_grads, moments.var_snapshot_grads, moments.cov),
        direct_moments(grads, snapshot_grads),
        strict=True,
      ):
        flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(got)])
        assert not np.iscomplexobj(flat)
        helpers.assert_close(flat, want, rtol=rtol)
      for got, stacked in (
        (moments.mean_grads, grads),
        (moments.mean_snapshot_grads, snapshot_grads),
      ):
        flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(got)])
        helpers.assert_close(flat, matrix(stacked).mean(0), rtol=rtol)

  @pytest.mark.parametrize("per", PERS)
  @pytest.mark.parametrize("dtype", [float, complex])
  def test_equals_stacked(self, x64, per, dtype):
    params = make_params(dtype)
    grads, snapshot_grads = (stack(params, 50, seed) for seed in (0, 1))
    got = streamed(grads, snapshot_grads).optimal_alpha(per=per)
    want = optax_svrg.optimal_alpha(grads, snapshot_grads, per=per)
    helpers.assert_close(got, want, rtol=1e-13)

  @pytest.mark.parametrize("per", PERS)
  def test_is_one_at_the_snapshot(self, per):
    grads = stack(make_params())
    got = streamed(grads, grads).optimal_alpha(per=per)
    for leaf in jax.tree.leaves(got):
      np.testing.assert_array_equal(leaf, np.ones(leaf.shape))

  @pytest.mark.parametrize("per", PERS)
  def test_large_mean(self, per):
    rng = np.random.default_rng(0)
    s = (1e4 + rng.normal(size=(500, 30))).astype(np.float32)
    g = (0.5 * s + 1e4 + rng.normal(size=(500, 30))).astype(np.float32)
    moments = streamed(g, s)
    # What rounding of the running mean leaves; it is squared, and nothing is
    # left, in the mean square less the square of the mean.
    atol = 2 * 1e4 * np.finfo(np.float32).eps
    var = direct_moments(g, s)[1]
    textbook = np.mean(s * s, axis=0) - np.mean(s, axis=0) ** 2
    assert np.abs(textbook - var).min() > 100 * atol
    helpers.assert_close(moments.var_snapshot_grads, var, rtol=atol)
    np.testing.assert_allclose(
      moments.optimal_alpha(per=per), direct_alpha(g, s, per), rtol=0, atol=atol
    )

  @pytest.mark.parametrize("exponent", [-100, -73, 73, 110])
  def test_scale(self, exponent):
    """From 1e-30 to 1e33, where squares are out of the range of float32."""
    grads, snapshot_grads = (stack(make_params(), seed=i) for i in (0, 1))
    snapshot_grads = jax.tree.map(lambda g, s: g + s, grads, snapshot_grads)
    scaled = jax.tree.map(lambda x: x * 2.0**exponent, (grads, snapshot_grads))
    plain, moments = streamed(grads, snapshot_grads), streamed(*scaled)
    for per in PERS:
      alpha, want = (m.optimal_alpha(per=per) for m in (moments, plain))
      helpers.assert_close(alpha, want, rtol=1e-5)
      np.testing.assert_allclose(
        moments.variance_ratio(alpha), plain.variance_ratio(want), rtol=1e-4
      )

  def test_first_gradient_may_have_no_square(self):
    s = jnp.array([1e25, 1e25 + 2e18]) + jnp.zeros(2)
    moments = streamed(s, 2 * s)
    assert moments.optimal_alpha(per="tree") == 0.5

  @pytest.mark.parametrize("constant", [0.1, 1e8])
  def test_components_without_variance_have_no_weight(self, constant):
    s = stack(jnp.ones(4)).at[:, 0].set(constant)
    moments = streamed(s / 2, s)
    np.testing.assert_array_equal(
      moments.optimal_alpha(), [np.nan, 0.5, 0.5, 0.5]
    )
    assert moments.optimal_alpha(per="tree") == 0.5

  @pytest.mark.parametrize("count", [0, 1])
  @pytest.mark.parametrize("per", PERS)
  def test_too_few(self, count, per):
    moments = optax_svrg.RunningMoments.create(make_params())
    for _ in range(count):
      moments = moments.update(make_params(), make_params())
    alpha = moments.optimal_alpha(per=per)
    if per == "tree":
      assert alpha == 0
    else:
      assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(alpha))
    assert moments.variance_ratio(0.5) == 1

  def test_scan_and_donation(self):
    params = {"a": make_params(), "b": make_params(jnp.bfloat16)}
    grads, snapshot_grads = stack(params), stack(params, seed=1)
    create = optax_svrg.RunningMoments.create
    scanned, _ = jax.jit(
      lambda g, s: jax.lax.scan(
        lambda m, pair: (m.update(*pair), None), create(params), (g, s)
      )
    )(grads, snapshot_grads)

    traces = []

    @jax.jit(donate_argnums=0)
    def update(moments, g, s):
      traces.append(1)
      return moments.update(g, s)

    moments = create(params)
    for i in range(N):
      old = moments
      moments = update(moments, row(grads, i), row(snapshot_grads, i))
      assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert len(traces) == 1
    helpers.assert_close(moments, scanned, rtol=1e-6)
    assert helpers.types(moments) == helpers.types(scanned)

  def test_memory_is_five_times_the_parameters(self):
    params = make_params()
    moments = optax_svrg.RunningMoments.create(params)
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    assert size(moments) == 5 * size(params) + 8

  @pytest.mark.slow
  def test_per_batch_gradients_of_a_model(self, x64):
    """The state accumulates what stacks of batch gradients hold."""
    params, batch = make_params(float), data(24, float)
    snapshot = helpers.perturbed(params, 0.05)
    batches = jax.tree.map(lambda x: x.reshape(6, 4, *x.shape[1:]), batch)
    grads = jax.lax.map(lambda b: jax.grad(loss)(params, b), batches)
    snapshot_grads = jax.lax.map(lambda b: jax.grad(loss)(snapshot, b), batches)

    def body(moments, b):
      g, s = (jax.grad(loss)(p, b) for p in (params, snapshot))
      return moments.update(g, s), None

    moments, _ = jax.lax.scan(
      body, optax_svrg.RunningMoments.create(params), batches
    )
    alpha = moments.optimal_alpha(per="tree")
    want = direct_alpha(grads, snapshot_grads, "tree")
    np.testing.assert_allclose(alpha, want, rtol=1e-12)
    corrected = jax.tree.map(lambda g, s: g - alpha * s, grads, snapshot_grads)
    before, after = (
      optax_svrg.gradient_variance(t).total_variance for t in (grads, corrected)
    )
    ratio = moments.variance_ratio(alpha)
    np.testing.assert_allclose(ratio, after / before, rtol=1e-12)

  @pytest.mark.parametrize(
    ("wrong", "message"),
    [
      ({"w": jnp.ones((3, 4))}, r"must have the tree structure .*missing"),
      (
        {"w": jnp.ones((3, 4)), "v": jnp.ones(5)},
        r"got \(5,\) instead of \(4,\) at \['v'\]",
      ),
      (
        {"w": jnp.ones((3, 4)), "v": jnp.ones(4, complex)},
        r"complex64 instead of float32 at \['v'\]",
      ),
    ],
  )
  def test_wrong_gradients(self, wrong, message):
    moments = optax_svrg.RunningMoments.create(make_params())
    with pytest.raises(ValueError, match="^grads .*" + message):
      moments.update(wrong, make_params())
    with pytest.raises(ValueError, match="^snapshot_grads .*" + message):
      moments.update(make_params(), wrong)

  def test_wrong_params(self):
    with pytest.raises(TypeError, match=r"params .* int32\[2\] at \['w'\]"):
      optax_svrg.RunningMoments.create({"w": jnp.ones(2, int)})
    with pytest.raises(ValueError, match="params must have at least one leaf"):
      optax_svrg.RunningMoments.create({"w": None})


class TestVarianceRatio:
  @pytest.fixture
  def pair(self, x64):
    params = {"w": jnp.ones((2, 3), complex), "v": jnp.ones(4, float)}
    grads, noise = stack(params, 20), stack(params, 20, seed=1)
    snapshot_grads = jax.tree.map(lambda g, e: 2 * g - e, grads, noise)
    return grads, snapshot_grads

  @staticmethod
  def direct(grads, snapshot_grads, alpha):
    corrected = jax.tree.map(
      lambda g, s, a: np.asarray(g) - a * np.asarray(s),
      grads,
      snapshot_grads,
      jax.tree.broadcast(alpha, grads),
    )
    return matrix(corrected).var(axis=0).sum() / matrix(grads).var(axis=0).sum()

  @pytest.mark.parametrize("alpha", [0, 0.0, 0.3, 1, -2.0, np.float32(0.5)])
  @pytest.mark.parametrize("jit", [False, True])
  def test_scalar(self, pair, alpha, jit):
    moments = streamed(*pair)
    ratio = optax_svrg.RunningMoments.variance_ratio
    got = (jax.jit(ratio) if jit else ratio)(moments, alpha)
    np.testing.assert_allclose(got, self.direct(*pair, alpha), rtol=1e-13)

  @pytest.mark.parametrize("per", PERS)
  def test_optimum(self, pair, per):
    moments = streamed(*pair)
    alpha = moments.optimal_alpha(per=per)
    got = moments.variance_ratio(alpha)
    alphas = jax.tree.map(np.asarray, jax.tree.broadcast(alpha, pair[0]))
    want = self.direct(*pair, alphas)
    np.testing.assert_allclose(got, want, rtol=1e-13)
    for step in (-0.01, 0.01):
      moved = jax.tree.map(lambda a, d=step: a + d, alpha)
      assert moments.variance_ratio(moved) > got
    if per != "component":
      finer = PERS[PERS.index(per) - 1]
      best = moments.variance_ratio(moments.optimal_alpha(per=finer))
      assert best < got

  def test_components_without_variance(self):
    g = stack(jnp.ones(3))
    s = (g / 2).at[:, 0].set(5.0)
    moments = streamed(g, s)
    alpha = moments.optimal_alpha()
    assert np.isnan(alpha[0])
    var = matrix(g).var(axis=0)
    got = moments.variance_ratio(alpha)
    np.testing.assert_allclose(got, var[0] / var.sum(), rtol=1e-5)
    assert np.isnan(moments.variance_ratio(np.nan))

  def test_is_not_negative(self):
    for seed in range(20):
      grads = stack(make_params(), seed=seed)
      snapshot_grads = jax.tree.map(lambda g: g / 3, grads)
      ratio = streamed(grads, snapshot_grads).variance_ratio(3.0)
      assert 0 <= ratio < 1e-5

  def test_alpha_of_zero_leaves_all(self):
    moments = streamed(stack(make_params()), stack(make_params(), seed=1))
    assert moments.variance_ratio(0.0) == 1

  @pytest.mark.parametrize(
    ("alpha", "error", "message"),
    [
      (1j, TypeError, "alpha must be real, got dtype complex"),
      ({"w": 0.5}, ValueError, "alpha must be a scalar or have the tree"),
      (
        {"w": 0.5, "v": jnp.ones(3)},
        ValueError,
        r"alpha .* got \(3,\) instead of \(4,\) at \['v'\]",
      ),
      (jnp.ones(3), ValueError, r"alpha .* got \(3,\) instead of"),
    ],
  )
  def test_wrong_alpha(self, alpha, error, message):
    moments = streamed(stack(make_params()), stack(make_params(), seed=1))
    with pytest.raises(error, match=message):
      moments.variance_ratio(alpha)
