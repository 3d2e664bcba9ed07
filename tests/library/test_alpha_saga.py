# SPDX-License-Identifier: Apache-2.0
"""The table, the estimator on it and its coefficient."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_svrg
from tests import helpers

KINDS = ("alpha", "adaptive")
both = pytest.mark.parametrize("kind", ["adaptive", helpers.slow("alpha")])


@pytest.fixture(params=helpers.tree_names())
def params(request: pytest.FixtureRequest) -> Any:
  make, x64 = helpers.TREES[request.param]
  with jax.enable_x64(x64):
    yield make()


def make(kind, num_batches, alpha=0.75, **kwargs):
  if kind == "alpha":
    return optax_svrg.alpha_saga(alpha, num_batches, **kwargs)
  return optax_svrg.adaptive_saga(num_batches, **kwargs)


@functools.partial(jax.jit, static_argnames=("kind", "table_dtype"))
def jitted(kind, table_dtype, grads, state, i, kwargs):
  tx = make(kind, len(state.is_filled), table_dtype=table_dtype, **kwargs)
  return tx.update(grads, state, batch_index=i)


def update_fn(kind, table_dtype=None, **kwargs):
  """An update that is compiled once for all coefficients and tests."""
  if kind == "adaptive":
    kwargs = {"decay": 0.97, "max_alpha": 1.0, **kwargs}
  return lambda g, s, i: jitted(kind, table_dtype, g, s, i, kwargs)


def visit(update, state, visits):
  """The state after updates with (batch_index, gradient)."""
  for i, grads in visits:
    _, state = update(grads, state, i)
  return state


def row(state, i):
  """The entry of a batch."""
  return jax.tree.map(lambda t: np.asarray(t)[i], state.table)


def mean_of_table(state):
  """Over the filled entries as stored, in double precision."""
  filled = np.flatnonzero(state.is_filled)
  return np.mean([helpers.flat(row(state, i)) for i in filled], axis=0)


def is_complex(tree):
  return any(map(jnp.iscomplexobj, jax.tree.leaves(tree)))


def related(params, seed, slope=0.6):
  """A gradient that has something to do with that of the same seed."""
  return jax.tree.map(
    lambda x, y: jnp.asarray(slope * np.asarray(x, y.dtype) + 0.2 * y, x.dtype),
    helpers.random_like(params, seed),
    helpers.wide(helpers.random_like(params, 1000 + seed)),
  )


def without_error(state):
  """What rounding left is of the size of roundings."""
  return state._replace(mean_error=None)


class TestAlphaZero:
  @pytest.mark.parametrize("alpha", [0, np.float32(0)])
  def test_number(self, params, alpha):
    tx = optax_svrg.alpha_saga(alpha, 3)
    start = state = tx.init(params)
    for count, i in enumerate([1, 1, 2], start=1):
      grads = helpers.random_like(params, i)
      updates, state = tx.update(grads, state, batch_index=i)
      helpers.assert_equal(updates, grads)
      want = start._replace(count=jnp.array(count, jnp.int32))
      helpers.assert_equal(state, want)

  def check(self, params, update):
    state = optax_svrg.alpha_saga(1.0, 5).init(params)
    for count, i in enumerate([1, 1, 2, 1], start=1):
      grads = helpers.random_like(params, 7 * count)
      updates, state = update(grads, state, i)
      helpers.assert_equal(updates, grads)
      helpers.assert_equal(row(state, i), jax.tree.map(jnp.asarray, grads))
      assert (state.alpha, state.count) == (0, count)
    assert np.flatnonzero(state.is_filled).tolist() == [1, 2]

  def test_array(self, params):
    self.check(params, update_fn("alpha", alpha=0.0))

  @pytest.mark.parametrize("alpha", [jnp.array(0.0), lambda _: 0.0])
  def test_closed_over(self, alpha):
    tx = optax_svrg.alpha_saga(alpha, 5)
    update = jax.jit(lambda g, s, i: tx.update(g, s, batch_index=i))
    self.check(helpers.TREES["mixed"][0](), update)

  def test_schedule_switches_on(self):
    """The table was filled meanwhile, and the schedule sees the count."""
    tx = optax_svrg.alpha_saga(
      lambda count: 0.25 * jnp.astype(count // 2, float), 2
    )
    params = {"w": jnp.ones(3)}
    state, alphas = tx.init(params), []
    update = jax.jit(tx.update)
    for step in range(6):
      _, state = update(params, state, batch_index=step % 2)
      alphas.append(float(optax.tree.get(state, "alpha")))
    assert alphas == [0, 0, 0.25, 0.25, 0.5, 0.5]


def test_schedule_that_becomes_nan_is_not_hidden():
  tx = optax_svrg.alpha_saga(
    lambda count: jnp.where(count < 1, 0.5, jnp.nan), 2
  )
  params = {"w": jnp.ones(2)}
  update = jax.jit(lambda s: tx.update(params, s, batch_index=0))
  updates, state = update(update(tx.init(params))[1])
  assert jnp.all(jnp.isnan(updates["w"]))
  assert jnp.isnan(state.alpha)


@pytest.mark.parametrize("alpha", helpers.HALVES)
def test_numbers_arrays_and_schedules_agree(alpha):
  params = {"w": jnp.ones(3)}
  results = []
  for a in (alpha, 0.5):
    tx = optax_svrg.alpha_saga(a, 2)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(4):
      grads = helpers.random_like(params, step)
      updates, state = update(grads, state, batch_index=step % 2)
    results.append((updates, state))
  helpers.assert_equal(*results)
  assert results[0][1].alpha == 0.5


class TestUnbiased:
  """Over a batch drawn uniformly, from one and the same state."""

  @staticmethod
  def check(update, state, params):
    n = len(state.is_filled)
    grads = [related(params, i, slope=-1.5) for i in range(n)]
    results = [update(g, state, i) for i, g in enumerate(grads)]
    leaves = lambda trees: zip(*map(jax.tree.leaves, trees), strict=True)
    for corrected, plain in zip(
      leaves([u for u, _ in results]), leaves(grads), strict=True
    ):
      eps = float(jnp.finfo(plain[0].dtype).eps)
      corrected, plain = (
        np.stack(helpers.wide(corrected)),
        np.stack(helpers.wide(plain)),
      )
      # Only results are rounded to the dtype of the gradients; sums are not.
      size = np.abs(corrected).max() + np.abs(plain).max()
      error = np.abs(corrected.mean(axis=0) - plain.mean(axis=0))
      assert np.all(error <= 2 * eps * size)
    return [float(after.alpha) for _, after in results]

  @pytest.mark.parametrize(
    "filled",
    [(0, 1, 3), *map(helpers.slow, [(), (2,), (0, 1, 2, 3, 4)])],
  )
  def test_alpha(self, params, filled):
    self.check_alpha(params, filled)

  @pytest.mark.parametrize("filled", [(0, 1, 3), helpers.slow((0, 1, 2, 3, 4))])
  def test_adaptive(self, params, filled):
    self.check_adaptive(params, filled)

  @pytest.mark.parametrize(
    ("tree", "table_dtype"),
    [("float64", "bfloat16"), ("mixed", "float16")],
  )
  def test_table_dtype(self, tree, table_dtype):
    make_params, x64 = helpers.TREES[tree]
    with jax.enable_x64(x64):
      self.check_alpha(make_params(), (0, 1, 3), table_dtype)
      self.check_adaptive(make_params(), (0, 1, 3), table_dtype)

  def check_alpha(self, params, filled, table_dtype=None):
    state = optax_svrg.alpha_saga(1.0, 5, table_dtype=table_dtype).init(params)
    # Entries far from the gradients, so that a wrong mean is seen.
    visits = [(i, helpers.random_like(params, 50 + i, 3.0)) for i in filled]
    state = visit(update_fn("alpha", table_dtype, alpha=1.0), state, visits)
    for alpha in (1.0, -0.5):
      update = update_fn("alpha", table_dtype, alpha=alpha)
      alphas = self.check(update, state, params)
      want = [alpha if i in filled else 0.0 for i in range(5)]
      np.testing.assert_allclose(alphas, want, rtol=1e-6)

  def check_adaptive(self, params, filled, table_dtype=None):
    update = update_fn("adaptive", table_dtype)
    state = optax_svrg.adaptive_saga(5, table_dtype=table_dtype).init(params)
    visits = [(i, helpers.random_like(params, i)) for i in filled]
    visits += [(i, related(params, i)) for i in filled]
    state = visit(update, state, visits)
    alphas = self.check(update, state, params)
    if jax.tree.leaves(params):
      assert 0.05 < alphas[0] < 0.95
      assert alphas == [alphas[0] if i in filled else 0 for i in range(5)]

  @both
  def test_entries_are_rounded(self, kind):
    """The mean is that of what is stored, not of what was given."""
    params = {"w": jnp.zeros(9)}
    state = make(kind, 5, table_dtype=jnp.bfloat16).init(params)
    visits = [(i, helpers.random_like(params, i)) for i in range(5)]
    state = visit(update_fn(kind, "bfloat16"), state, visits)
    given = np.mean([helpers.flat(g) for _, g in visits], axis=0)
    mean = helpers.flat(state.mean_grads)
    assert np.abs(given - mean).max() > 1e-4
    np.testing.assert_allclose(mean, mean_of_table(state), rtol=0, atol=2e-7)


class TestFirstVisit:
  @both
  def test_is_not_corrected(self, params, kind):
    """Also while others are, and bit for bit."""
    tx, update = make(kind, 5), update_fn(kind)
    state = tx.init(params)
    seen = set()
    for step, i in enumerate([3, 3, 0, 3, 1, 0, 4, 1, 2]):
      grads = related(params, 10 * i + step)
      updates, state = update(grads, state, i)
      if i not in seen:
        helpers.assert_equal(updates, jax.tree.map(jnp.asarray, grads))
        assert state.alpha == 0
      elif kind == "alpha":
        assert state.alpha == 0.75
      seen.add(i)
      assert set(np.flatnonzero(state.is_filled)) == seen

  @both
  def test_a_table_that_is_never_full(self, kind):
    """The mean is over the filled entries, and they are corrected."""
    params = {"w": jnp.zeros(4)}
    tx, update = make(kind, 9), update_fn(kind)
    state = tx.init(params)
    for step in range(12):
      i = (0, 4, 7)[step % 3]
      grads = related(params, i, slope=1 + 0.01 * step)
      before = state
      updates, state = update(grads, state, i)
      if step >= 3:
        s = helpers.flat(row(before, i))
        want = helpers.flat(grads) - float(state.alpha) * (
          s - mean_of_table(before)
        )
        np.testing.assert_allclose(updates["w"], want, rtol=0, atol=1e-6)
    assert state.alpha > 0.5
    assert state.is_filled.sum() == 3


class LeastSquares:
  """Mean over batches of 1/2 |A w - y|^2 / rows, strongly convex."""

  def __init__(self, num_batches=8, rows=4, dim=5):
    rng = np.random.default_rng(3)
    self.a = rng.normal(size=(num_batches, rows, dim))
    self.y = rng.normal(size=(num_batches, rows))
    hessians = np.einsum("brd,bre->bde", self.a, self.a) / rows
    self.step = 1 / (3 * np.linalg.eigvalsh(hessians).max())
    flat_a, flat_y = self.a.reshape(-1, dim), self.y.reshape(-1)
    self.optimum = np.linalg.lstsq(flat_a, flat_y)[0]
    self.start = np.full(dim, 2.0)

  def grad(self, w, i, xp=np):
    a, y = xp.asarray(self.a)[i], xp.asarray(self.y)[i]
    return a.T @ (a @ w - y) / a.shape[0]

  def run(self, saga, indices, fill=True):
    """Trajectory of the parameters, under SGD with a constant step."""
    tx = optax.chain(saga, optax.sgd(self.step))

    @jax.jit
    def train(params, indices):
      state = tx.init(params)

      def body(carry, i):
        params, state = carry
        grads = self.grad(params, i, jnp)
        updates, state = tx.update(grads, state, params, batch_index=i)
        params = optax.apply_updates(params, updates)
        return (params, state), params

      if fill:
        every = jnp.arange(len(self.a))
        (_, state), _ = jax.lax.scan(
          lambda carry, i: ((params, body((params, carry[1]), i)[0][1]), None),
          (params, state),
          every,
        )
      return jax.lax.scan(body, (params, state), indices)[1]

    return np.asarray(train(jnp.asarray(self.start), jnp.asarray(indices)))

  def error(self, w):
    return np.linalg.norm(w - self.optimum) / np.linalg.norm(
      self.start - self.optimum
    )


@pytest.mark.usefixtures("x64")
class TestFiniteSum:
  @pytest.mark.parametrize("alpha", [1, 1.0, lambda _: 1.0])
  def test_alpha_one_is_saga_as_published(self, alpha):
    """Defazio et al., equation 1, on mini-batches: the table is full at x0."""
    problem = LeastSquares()
    n = len(problem.a)
    indices = np.random.default_rng(0).integers(n, size=400)
    w = problem.start.copy()
    phi = np.stack([problem.grad(w, j) for j in range(n)])
    want = []
    for j in indices:
      g = problem.grad(w, j)
      w = w - problem.step * (g - phi[j] + phi.mean(axis=0))
      phi[j] = g
      want.append(w)
    got = problem.run(optax_svrg.alpha_saga(alpha, n), indices)
    assert np.linalg.norm(want[-1] - problem.start) > 1
    np.testing.assert_allclose(got, want, rtol=1e-12)

  @pytest.mark.parametrize(
    ("order", "fill"), [("random", True), ("shuffled", False)]
  )
  @both
  def test_linear_convergence(self, kind, order, fill):
    problem = LeastSquares()
    n = len(problem.a)
    rng = np.random.default_rng(1)
    if order == "random":
      indices = rng.integers(n, size=4000)
    else:
      indices = np.concatenate([rng.permutation(n) for _ in range(4000 // n)])
    path = problem.run(make(kind, n, alpha=1.0), indices, fill)
    assert problem.error(path[-1]) < 1e-12
    # As a straight line over the iterations, not at once.
    assert 1e-12 < problem.error(path[400]) < 0.1
    plain = problem.run(optax_svrg.alpha_saga(0, n), indices, fill)
    assert min(map(problem.error, plain[-200:])) > 1e-4


class TestAdaptiveFormula:
  @pytest.mark.parametrize(
    ("decay", "max_alpha"),
    [(0.9, 0.4), helpers.slow(0.0, 1.0), helpers.slow(0.97, 3.0)],
  )
  def test_against_numpy(self, params, decay, max_alpha):
    if not jax.tree.leaves(params):
      pytest.skip("no gradient, no coefficient")
    tx, update = (
      make("adaptive", 5, decay=decay, max_alpha=max_alpha),
      update_fn("adaptive", decay=decay, max_alpha=max_alpha),
    )
    state = tx.init(params)
    covariance = variance = moment = 0.0
    ratio = 1.0
    # Sums are formed in float32, whatever gradients are rounded to.
    rtol = 64 * float(jnp.finfo(state.estimate.variance.dtype).eps)
    seen = []
    for step, i in enumerate([1, 1, 3, 1, 0, 3, 4, 2, 1, 0, 2, 4, 3]):
      g = related(params, i, slope=1.2 - 0.05 * step)
      filled = bool(state.is_filled[i])
      # The variance of the gradient is what its reduction has left over.
      greater = max(variance, moment / ratio) if ratio else variance
      alpha = covariance / greater if filled and greater else 0.0
      alpha = min(max(alpha, 0.0), max_alpha)
      before = state
      corrected, state = update(g, state, i)
      np.testing.assert_allclose(state.alpha, alpha, rtol=rtol, atol=rtol)
      assert jnp.isrealobj(state.alpha)
      seen.append(alpha)
      if not filled:
        helpers.assert_equal(state.estimate, before.estimate)
        continue
      s, mean = helpers.flat(row(before, i)), mean_of_table(before)
      want = helpers.flat(g) - alpha * (s - mean)
      eps = np.concatenate(
        [
          np.full(x.size, float(jnp.finfo(x.dtype).eps))
          for x in jax.tree.leaves(corrected)
        ]
      )
      size = np.abs(helpers.flat(g)) + np.abs(s) + np.abs(mean)
      error = np.abs(helpers.flat(corrected) - want)
      assert np.all(error <= 4 * eps * size)
      # A single entry is its mean.
      if before.is_filled.sum() > 1:
        products = (
          np.vdot(s - mean, helpers.flat(g) - mean).real,
          np.vdot(s - mean, s - mean).real,
          np.sum(np.abs(want - mean) ** 2),
        )
        covariance, variance, moment = (
          decay * old + (1 - decay) * new
          for old, new in zip(
            (covariance, variance, moment), products, strict=True
          )
        )
        reduction = max(alpha * (2 * covariance - alpha * variance), 0)
        ratio = moment / (moment + reduction)
      np.testing.assert_allclose(
        state.estimate,
        [covariance, variance, moment, ratio, 1],
        rtol=rtol,
        atol=rtol,
      )
    assert seen[4] == 0
    assert max(seen) == max_alpha if max_alpha == 0.4 else max(seen) > 0.4

  def test_defaults(self):
    params = {"w": jnp.zeros(3)}
    visits = [(k % 3, related(params, k % 3, 2 - 0.1 * k)) for k in range(12)]
    update = jax.jit(optax_svrg.adaptive_saga(3).update)
    by_default = lambda g, s, i: update(g, s, batch_index=i)
    explicit = update_fn("adaptive", decay=0.97, max_alpha=1.0)
    results = [
      visit(fn, optax_svrg.adaptive_saga(3).init(params), visits)
      for fn in (by_default, explicit)
    ]
    helpers.assert_close(*map(without_error, results), rtol=1e-6)
    assert 0.5 < results[0].alpha < 1

  def test_a_growing_gradient_lowers_the_coefficient(self):
    params = {"w": jnp.zeros(3)}
    tx, update = make("adaptive", 3), update_fn("adaptive")
    alphas = {}
    for growth in (0.8, 1.0, 1.25):
      visits = [
        (k % 3, related(params, k % 3, 5 * growth ** (k // 3)))
        for k in range(60)
      ]
      alphas[growth] = float(visit(update, tx.init(params), visits).alpha)
    # Both slopes are the growth or its inverse, and the smaller one is taken.
    np.testing.assert_allclose(alphas[1.0], 1, rtol=0.02)
    np.testing.assert_allclose(alphas[0.8], 0.8, rtol=0.1)
    np.testing.assert_allclose(alphas[1.25], 0.8, rtol=0.1)

  @pytest.mark.parametrize(
    ("num_batches", "learning_rate"),
    [
      (5, 2e-3),
      *(
        helpers.slow(n, rate)
        for n in (2, 3, 10)
        for rate in (1e-3, 1.5e-3, 2e-3)
      ),
    ],
  )
  def test_holds_where_plain_does_without_any_noise(
    self, num_batches, learning_rate
  ):
    """Entries differ from their mean by age alone; so does the echo of steps.

    At 2e-3 momentum hardly holds the narrow valley of the function.
    """

    def rosenbrock(p):
      return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2

    def end(tx):
      tx = optax.chain(tx, optax.sgd(learning_rate, momentum=0.9))

      def epoch(carry, key):
        def step(carry, i):
          params, state = carry
          updates, state = tx.update(
            jax.grad(rosenbrock)(params), state, params, batch_index=i
          )
          return (optax.apply_updates(params, updates), state), None

        order = jax.random.permutation(key, num_batches)
        return jax.lax.scan(step, carry, order)[0], None

      params = jnp.zeros(2)
      keys = jax.random.split(jax.random.key(0), 10_000 // num_batches)
      carry, _ = jax.lax.scan(epoch, (params, tx.init(params)), keys)
      return rosenbrock(carry[0])

    assert end(optax_svrg.alpha_saga(0.0, num_batches)) < 1e-8
    assert end(optax_svrg.adaptive_saga(num_batches)) < 1e-8

  def test_where_the_correction_leaves_nothing(self):
    """The coefficient has a value there."""
    tx, update = make("adaptive", 2), update_fn("adaptive", decay=0.0)
    grads = [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}]
    state = tx.init(grads[0])
    for k in range(6):
      updates, state = update(grads[k % 2], state, k % 2)
    assert state.estimate.variance_ratio == 0
    assert state.alpha == 1
    np.testing.assert_array_equal(updates["w"], [0.5, 0.5])

  def test_dtypes(self, params):
    state = optax_svrg.adaptive_saga(2).init(params)
    dtypes = {jnp.result_type(p) for p in jax.tree.leaves(params)}
    double = dtypes & {np.dtype(np.float64), np.dtype(np.complex128)}
    for value in state.estimate:
      assert value.dtype == (jnp.float64 if double else jnp.float32)
      assert value.shape == ()
    assert state.alpha.dtype == jnp.result_type(float)

  def test_does_not_depend_on_the_batch_that_it_corrects(self):
    """This keeps the corrected gradient unbiased."""
    params = {"w": jnp.zeros(3)}
    tx, update = make("adaptive", 3), update_fn("adaptive")
    visits = [(k % 3, related(params, k % 3, 1 - 0.1 * k)) for k in range(8)]
    state = visit(update, tx.init(params), visits)
    used = {
      float(update(helpers.random_like(params, seed), state, i)[1].alpha)
      for seed, i in ((1, 0), (2, 0), (3, 2))
    }
    assert len(used) == 1
    assert 0 < used.pop() < 1

  def test_without_variance_the_coefficient_stays(self, params):
    tx, update = make("adaptive", 5), update_fn("adaptive", decay=0.5)
    visits = [(k % 5, related(params, k % 5, 1 - 0.05 * k)) for k in range(10)]
    same = jax.tree.map(jnp.ones_like, helpers.random_like(params, 0))
    state = visit(update, tx.init(params), visits)
    state = visit(update, state, [(i, same) for i in range(5)])
    state = state._replace(
      estimate=state.estimate._replace(
        covariance=0.5 * jnp.ones_like(state.estimate.variance),
        variance=jnp.ones_like(state.estimate.variance),
        second_moment=jnp.zeros_like(state.estimate.variance),
      )
    )
    estimate = state.estimate
    for i in (1, 2, 0, 1):
      updates, state = update(same, state, i)
      assert state.alpha == 0.5
      helpers.assert_equal(state.estimate[:2], estimate[:2])
      assert np.all(np.isfinite(helpers.flat((updates, state))))

  def test_a_single_batch_has_no_variance(self):
    params = helpers.TREES["mixed"][0]()
    tx, update = make("adaptive", 1), update_fn("adaptive")
    state = tx.init(params)
    for step in range(4):
      grads = helpers.random_like(params, step)
      updates, state = update(grads, state, 0)
      helpers.assert_equal(updates, jax.tree.map(jnp.asarray, grads))
      assert state.alpha == 0
    helpers.assert_equal(state.estimate, tx.init(params).estimate)

  def test_readable_inside_a_chain(self):
    params = {"w": jnp.zeros(3)}
    tx = optax.chain(optax_svrg.adaptive_saga(3), optax.sgd(0.1))
    state = tx.init(params)
    assert optax.tree.get(state, "variance_ratio") == 1
    update = jax.jit(tx.update)
    for k in range(9):
      grads = related(params, k % 3, 1 - 0.05 * k)
      _, state = update(grads, state, params, batch_index=k % 3)
    assert 0 < optax.tree.get(state, "alpha") < 1
    assert 0 < optax.tree.get(state, "variance_ratio") < 1


PARAMS = {"w": jnp.ones(3), "b": [jnp.zeros(())]}


class TestBatchIndex:
  def update(self, index, jit=False):
    tx = make("adaptive", 5)
    state = tx.init(PARAMS)
    update = lambda g, s, **kwargs: tx.update(g, s, **kwargs)
    if jit:
      return jax.jit(update)(PARAMS, state, batch_index=index)
    return update(PARAMS, state, batch_index=index)

  def test_missing(self):
    tx = make("adaptive", 5)
    for update in (tx.update, jax.jit(tx.update)):
      with pytest.raises(ValueError, match=r"needs the extra argument batch_i"):
        update(PARAMS, tx.init(PARAMS), PARAMS)
      with pytest.raises(ValueError, match=r"batch_index.* 5 fixed batches"):
        update(PARAMS, tx.init(PARAMS), PARAMS, epoch=1)

  @pytest.mark.parametrize(
    ("index", "error", "message"),
    [
      (1.0, TypeError, r"an integer, got 1\.0"),
      (True, TypeError, r"an integer, got True"),
      (np.True_, TypeError, r"an integer, got np\.True_"),
      ("1", TypeError, r"an integer, got '1'"),
      ([1], TypeError, r"an integer, got \[1\]"),
      (None, ValueError, r"needs the extra argument batch_index"),
      (np.float32(1), TypeError, r"an integer, got np\.float32\(1\.0\)"),
      (np.array(1, np.float32), TypeError, r"an integer, got dtype float32"),
      (jnp.array(1.0), TypeError, r"an integer, got dtype float32"),
      (jnp.array(True), TypeError, r"an integer, got dtype bool"),
      (np.array([1]), ValueError, r"a scalar, got an array of shape \(1,\)"),
      (jnp.ones((2, 1), int), ValueError, r"a scalar.* shape \(2, 1\)"),
    ],
  )
  def test_no_integer(self, index, error, message):
    with pytest.raises(error, match=rf"batch_index.*{message}|{message}") as e:
      self.update(index)
    assert "batch_index" in str(e.value)

  @pytest.mark.parametrize("value", [-1, 5, 2**31 - 1])
  @pytest.mark.parametrize("cast", [int, np.int64, jnp.asarray])
  def test_known_to_be_out_of_range(self, value, cast):
    with pytest.raises(
      ValueError, match=rf"batch_index must be in \[0, 5\).* got {value}\."
    ):
      self.update(cast(value))

  @pytest.mark.parametrize(
    ("index", "error", "message"),
    [
      (jnp.array(1.0), TypeError, "an integer, got dtype float32"),
      (jnp.array(True), TypeError, "an integer, got dtype bool"),
      (jnp.array(1j), TypeError, "an integer, got dtype complex64"),
      (jnp.array([1]), ValueError, r"a scalar, got an array of shape \(1,\)"),
    ],
  )
  def test_traced(self, index, error, message):
    with pytest.raises(error, match=rf"batch_index must be {message}"):
      self.update(index, jit=True)

  def test_all_integer_dtypes_agree(self):
    kind = "adaptive"
    tx = make(kind, 5)
    dtypes = ["int8", "uint16", "uint32"]
    visits = [(i, helpers.random_like(PARAMS, i)) for i in (0, 3, 0, 3)]
    state = visit(update_fn(kind), tx.init(PARAMS), visits)
    grads = related(PARAMS, 3)
    all_results = jax.jit(
      lambda g, s, *index: [tx.update(g, s, batch_index=i) for i in index]
    )(grads, state, 3, *(np.asarray(3, dtype) for dtype in dtypes))
    for updates, after in all_results:
      assert after.alpha > 0
      helpers.assert_equal(row(after, 3), grads)
      helpers.assert_close(
        (updates, without_error(after)),
        (all_results[0][0], without_error(all_results[0][1])),
        rtol=1e-6,
      )

  @pytest.mark.parametrize(
    "index",
    [3, np.int64(3), np.uint64(3), np.array(3, np.int8), jnp.array(3)],
  )
  def test_known(self, index):
    tx = make("adaptive", 5)
    _, state = tx.update(PARAMS, tx.init(PARAMS), batch_index=index)
    assert np.flatnonzero(state.is_filled).tolist() == [3]

  @pytest.mark.parametrize(
    "index", [np.int8(100), np.uint8(100), np.uint8(255), np.int16(299)]
  )
  @pytest.mark.parametrize("traced", [False, True])
  def test_more_batches_than_the_dtype_counts(self, index, traced):
    """300 is out of the range of int8 and uint8, the index is not."""
    tx = make("alpha", 300)
    state = tx.init(PARAMS)
    if traced:
      _, state = update_fn("alpha")(PARAMS, state, index)
    else:
      _, state = tx.update(PARAMS, state, batch_index=index)
    assert np.flatnonzero(state.is_filled).tolist() == [index]
    table = jax.tree.map(lambda t: t.reshape(-1, *t.shape[-1:]), state.table)
    np.testing.assert_array_equal(
      np.flatnonzero(table["w"].any(axis=-1)), [index]
    )

  @pytest.mark.parametrize(
    "index",
    [
      -1,
      5,
      2**31 - 1,
      np.int8(-128),
      np.uint32(2**32 - 1),
    ],
  )
  @both
  def test_traced_out_of_range_changes_nothing(self, kind, index):
    """Neither another entry nor the mean: as if there were no table."""
    tx, update = make(kind, 5), update_fn(kind)
    visits = [(i, helpers.random_like(PARAMS, i)) for i in range(5)]
    visits += [(i, related(PARAMS, i)) for i in range(5)]
    state = visit(update, tx.init(PARAMS), visits)
    assert state.alpha > 0
    grads = helpers.random_like(PARAMS, 99)
    updates, after = update(grads, state, index)
    helpers.assert_equal(updates, grads)
    want = state._replace(
      count=state.count + 1, alpha=jnp.zeros_like(state.alpha)
    )
    helpers.assert_equal(after, want)


class TestMisuse:
  @pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
      ({"num_batches": 0}, ValueError, "num_batches must be at least 1, got 0"),
      ({"num_batches": -1}, ValueError, "num_batches must be at least 1.* -1"),
      ({"num_batches": 1.5}, TypeError, r"num_batches must be an int.* 1\.5"),
      ({"num_batches": True}, TypeError, "num_batches must be an int.* True"),
      ({"num_batches": "3"}, TypeError, "num_batches must be an integer.*'3'"),
      ({"num_batches": None}, TypeError, "num_batches must be an int.* None"),
      ({"table_dtype": int}, TypeError, "table_dtype must be a float.*int32"),
      ({"table_dtype": "float33"}, TypeError, "table_dtype.*'float33'"),
    ],
  )
  def test_common_arguments(self, kwargs, error, message):
    for kind in KINDS:
      with pytest.raises(error, match=message):
        make(kind, **{"num_batches": 3, **kwargs})

  @pytest.mark.parametrize(
    ("alpha", "error", "message"),
    [
      ("0.5", TypeError, "alpha must be a real number, got '0.5'"),
      (None, TypeError, "alpha must be a real number, got None"),
      (True, TypeError, "alpha must be a real number, got True"),
      (0.5j, TypeError, "alpha must be a real number"),
      (jnp.array(1j), TypeError, "alpha must be a real number.*complex"),
      (float("nan"), ValueError, "alpha must be finite, got nan"),
      (jnp.array(jnp.inf), ValueError, "alpha must be finite, got inf"),
      (jnp.ones(1), ValueError, r"alpha must be a scalar.*\(1,\)"),
    ],
  )
  def test_alpha(self, alpha, error, message):
    with pytest.raises(error, match=message):
      optax_svrg.alpha_saga(alpha, 3)
    tx = optax_svrg.alpha_saga(lambda _: alpha, 3)
    with pytest.raises(error, match=message):
      tx.update(PARAMS, tx.init(PARAMS), batch_index=0)

  @pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
      ({"decay": 1.0}, ValueError, r"decay must be in \[0, 1\), got 1.0"),
      ({"decay": -0.1}, ValueError, r"decay must be in \[0, 1\), got -0.1"),
      ({"decay": jnp.nan}, ValueError, "decay must be finite, got nan"),
      ({"decay": "0.9"}, TypeError, "decay must be a real number.*'0.9'"),
      ({"decay": jnp.ones(2)}, ValueError, r"decay must be a scalar.*\(2,\)"),
      ({"max_alpha": 0}, ValueError, "max_alpha must be positive, got 0"),
      ({"max_alpha": -1.0}, ValueError, "max_alpha must be positive.*-1"),
      ({"max_alpha": np.inf}, ValueError, "max_alpha must be finite, got inf"),
      ({"max_alpha": None}, TypeError, "max_alpha must be a real.*None"),
    ],
  )
  def test_estimate(self, kwargs, error, message):
    with pytest.raises(error, match=message):
      optax_svrg.adaptive_saga(3, **kwargs)

  def test_dtype_that_drops_imaginary_parts(self):
    tx = make("alpha", 3, table_dtype=jnp.bfloat16)
    with pytest.raises(
      ValueError,
      match=r"table_dtype=bfloat16 cannot hold .*complex64 at \['w'\]",
    ):
      tx.init({"w": jnp.ones(2, jnp.complex64)})

  @pytest.mark.parametrize("leaf", [jnp.ones(2, int), 1, jnp.ones(2, bool)])
  def test_integer_parameters(self, leaf):
    with pytest.raises(
      TypeError, match=r"params must have float.* at \['layers'\]\[1\]\['n'\]"
    ):
      make("alpha", 3).init({"layers": [{"w": jnp.ones(2)}, {"n": leaf}]})

  @pytest.mark.parametrize("which", ["updates", "params"])
  @pytest.mark.parametrize(
    ("tree", "message"),
    [
      (jnp.ones(3), r"missing \['b'\]\[0\], \['w'\]; unexpected a bare leaf"),
      ({"w": jnp.ones(3)}, r"missing \['b'\]\[0\]"),
      ({**PARAMS, "v": jnp.ones(2)}, r"unexpected \['v'\]"),
      ({**PARAMS, "w": jnp.ones(2)}, r"\(2,\) instead of \(3,\) at \['w'\]"),
      ({**PARAMS, "w": jnp.ones(3, int)}, r"int32 .*float32 at \['w'\]"),
      ({**PARAMS, "w": jnp.ones(3, complex)}, r"complex64 .*float32 at \['w"),
      # As many components as the table of three entries has.
      ({**PARAMS, "w": jnp.ones((3, 3))}, r"\(3, 3\) .*\(3,\) at \['w'\]"),
    ],
  )
  def test_trees_that_do_not_match(self, which, tree, message):
    tx = make("alpha", 3)
    update = lambda g, s, p: tx.update(g, s, p, batch_index=1)
    trees = {"updates": PARAMS, "params": PARAMS, which: tree}
    for fn in (update, jax.jit(update)):
      with pytest.raises(ValueError, match=rf"{which} must have .*{message}"):
        fn(trees["updates"], tx.init(PARAMS), trees["params"])

  def test_a_table_that_is_too_large(self):
    """Said before anything is allocated, with the bytes that it takes."""
    kind = "adaptive"
    params = {"w": jnp.ones(3), "b": jnp.ones((), jnp.bfloat16)}
    with pytest.raises(
      ValueError,
      match=rf"table for {10**13} batches needs {14 * 10**13} bytes, and",
    ):
      make(kind, 10**13).init(params)
    with pytest.raises(ValueError, match=rf"needs {8 * 10**13} bytes, and"):
      make(kind, 10**13, table_dtype=jnp.bfloat16).init(params)

  @pytest.mark.parametrize("leaf", [2.0, np.ones(3, np.float32)])
  def test_a_table_that_is_too_large_for_host_parameters(self, leaf):
    with pytest.raises(ValueError, match=rf"table for {10**13} batches needs"):
      make("alpha", 10**13).init({"w": leaf})

  def test_unknown_extra_args_are_left_to_others(self):
    tx = make("alpha", 3)
    updates, state = tx.update(
      PARAMS, tx.init(PARAMS), batch_index=1, value=1.0, epoch=3
    )
    helpers.assert_equal(updates, PARAMS)
    assert state.is_filled[1]


class TestRunningMean:
  """The error of the mean does not grow with the number of updates."""

  STEPS = 20_000

  @pytest.mark.parametrize(
    ("num_batches", "table_dtype"),
    [
      (7, jnp.bfloat16),
      (7, None),
      helpers.slow(10, jnp.bfloat16),
      helpers.slow(10, None),
    ],
  )
  def test_is_exact(self, num_batches, table_dtype):
    tx = optax_svrg.alpha_saga(0.5, num_batches, table_dtype=table_dtype)
    params = {"w": jnp.zeros(16)}
    start = tx.init(params)

    def body(carry, key):
      state, naive = carry
      keys = jax.random.split(key, 3)
      # Of changing magnitude, about a mean that is not 0.
      scale = 10 ** jax.random.uniform(keys[2], minval=-2.0, maxval=2.0)
      grads = {"w": scale * (1 + jax.random.normal(keys[0], (16,)))}
      i = jax.random.randint(keys[1], (), 0, num_batches)
      old = state.table["w"][i].astype(jnp.float32)
      _, state = tx.update(grads, state, batch_index=i)
      new = state.table["w"][i].astype(jnp.float32)
      return (state, naive + (new - old) / num_batches), None

    keys = jax.random.split(jax.random.key(0), self.STEPS)
    (state, naive), _ = jax.jit(
      lambda s, k: jax.lax.scan(body, (s, jnp.zeros(16)), k)
    )(start, keys)
    assert state.is_filled.all()
    table = np.asarray(state.table["w"]).astype(float)
    # One rounding of each quotient, one of their sum.
    bound = np.finfo(np.float32).eps * np.abs(table).mean(axis=0)
    error = np.abs(
      np.asarray(state.mean_grads["w"], float) - table.mean(axis=0)
    )
    assert np.all(error <= bound)
    # The test would see a mean that is moved by (new - old) / n.
    drift = np.abs(np.asarray(naive, float) - table.mean(axis=0))
    assert np.max(drift / bound) > 10

  def test_of_complex_parameters(self):
    tx, update = make("alpha", 3), update_fn("alpha")
    params = jnp.zeros(4, jnp.complex64)
    visits = [(k % 3, helpers.random_like(params, k)) for k in range(50)]
    state = visit(update, tx.init(params), visits)
    np.testing.assert_allclose(
      state.mean_grads, mean_of_table(state), rtol=0, atol=2e-7
    )


@both
class TestInPlace:
  """The table is as large as memory allows: there is no second copy of it."""

  NUM_BATCHES = 300

  @staticmethod
  def check(compiled, state):
    table_bytes = sum(x.nbytes for x in jax.tree.leaves(state.table))
    memory = compiled.memory_analysis()
    assert table_bytes > 4_000_000
    assert memory.temp_size_in_bytes < 0.1 * table_bytes
    assert memory.alias_size_in_bytes >= table_bytes

  @staticmethod
  def params(*batch):
    return {"w": jnp.ones((*batch, 60, 80)), "b": jnp.ones((*batch, 80))}

  @pytest.mark.parametrize("table_dtype", [None, helpers.slow(jnp.bfloat16)])
  def test_jit(self, kind, table_dtype):
    n = self.NUM_BATCHES * (1 if table_dtype is None else 2)
    tx = make(kind, n, table_dtype=table_dtype)
    params = self.params()
    state = tx.init(params)
    step = jax.jit(
      lambda g, s, i: tx.update(g, s, batch_index=i), donate_argnums=1
    )
    self.check(step.lower(params, state, 0).compile(), state)

  def test_temporary_arrays(self, kind):
    """The stored gradient, and what the mean and its error have in common."""
    tx = make(kind, 10)
    params = jnp.ones((100, 1000))
    step = jax.jit(
      lambda g, s, i: tx.update(g, s, batch_index=i), donate_argnums=1
    )
    compiled = step.lower(params, tx.init(params), 0).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes / params.nbytes
    assert temporary < (2.1 if kind == "alpha" else 3.1)

  @pytest.mark.standard_promotion
  def test_training_step(self, kind):
    """Where the gradient and what follows could be fused with the table."""
    tx = optax.chain(make(kind, self.NUM_BATCHES), optax.adam(1e-3))
    params = self.params()
    state = tx.init(params)
    grad = jax.grad(lambda p, x: jnp.sum(jnp.tanh(x @ p["w"] + p["b"])))

    @jax.jit(donate_argnums=(0, 1))
    def step(params, state, x, i):
      grads = grad(params, x)
      updates, state = tx.update(grads, state, params, batch_index=i)
      return optax.apply_updates(params, updates), state

    lowered = step.lower(params, state, jnp.ones((8, 60)), 0)
    self.check(lowered.compile(), state[0])

  def test_scan(self, kind):
    tx = make(kind, self.NUM_BATCHES)
    params = self.params()
    state = tx.init(params)

    def epoch(state, indices):
      def body(state, i):
        scale = jnp.asarray(i, jnp.float32)
        grads = jax.tree.map(lambda p: scale * p, params)
        updates, state = tx.update(grads, state, batch_index=i)
        return state, jax.tree.map(jnp.sum, updates)

      return jax.lax.scan(body, state, indices)

    compiled = jax.jit(epoch, donate_argnums=0).lower(state, jnp.arange(50))
    self.check(compiled.compile(), state)

  @pytest.mark.slow
  @pytest.mark.parametrize("axes", [(0, 0, 0), (0, 0, None)])
  def test_vmap(self, kind, axes):
    tx = make(kind, self.NUM_BATCHES)
    params = self.params(3)
    state = jax.vmap(tx.init)(params)
    update = lambda g, s, i: tx.update(g, s, batch_index=i)
    step = jax.jit(jax.vmap(update, axes), donate_argnums=1)
    index = jnp.zeros(3, int) if axes[2] == 0 else 0
    self.check(step.lower(params, state, index).compile(), state)


@pytest.mark.parametrize("axes", [(0, 0, 0), helpers.slow((0, 0, None))])
@both
def test_vmap_over_an_ensemble(kind, axes):
  """Members of their own gradients, and of their own order or not."""
  tx = make(kind, 3)
  params = {"w": jnp.ones((4, 2)), "b": jnp.zeros(4)}
  orders = np.array([[0, 1, 2, 0], [1, 1, 1, 1], [2, 0, 2, 0], [0, 9, 0, -1]])
  if axes[2] is None:
    orders[:] = orders[:1]

  update = lambda g, s, i: tx.update(g, s, batch_index=i)
  vmapped = jax.jit(jax.vmap(update, axes))
  member = jax.tree.map(lambda x: x[0], params)
  got, want = jax.vmap(tx.init)(params), [tx.init(member)] * 4
  for step in range(8):
    grads = related(params, step % 4)
    indices = orders[:, step % 4]
    updates, got = vmapped(grads, got, indices if axes[2] == 0 else indices[0])
    for k in range(4):
      one, want[k] = update_fn(kind)(
        jax.tree.map(lambda x, k=k: x[k], grads), want[k], indices[k]
      )
      helpers.assert_close(
        jax.tree.map(lambda x, k=k: x[k], (updates, without_error(got))),
        (one, without_error(want[k])),
        rtol=1e-5,
        atol=1e-7,
      )


@both
class TestBadGradients:
  """They pass, not hidden, but nothing of them stays in the state."""

  @staticmethod
  def finite(tree):
    return np.all(np.isfinite(helpers.flat(tree)))

  def check_afterwards(self, kind, update, state, params):
    assert self.finite(
      (state.table, state.mean_grads, state.mean_error, state.estimate)
    )
    n = len(state.is_filled)
    for k in range(2 * n):
      updates, state = update(related(params, k % n), state, k % n)
      assert self.finite((updates, state))
    TestUnbiased.check(update, state, params)
    assert state.alpha > 0

  @pytest.mark.parametrize("bad", [np.nan, helpers.slow(-np.inf)])
  @pytest.mark.parametrize("where", ["one", helpers.slow("all")])
  @pytest.mark.parametrize(
    "dtype",
    [jnp.bfloat16, helpers.slow(jnp.float32), helpers.slow(jnp.complex64)],
  )
  def test_not_finite(self, kind, bad, where, dtype):
    params = {"w": jnp.zeros(5, dtype), "b": jnp.zeros((), dtype)}
    tx, update = make(kind, 4), update_fn(kind)
    rng = np.random.default_rng(0)
    state = tx.init(params)
    for step in range(24):
      i = int(rng.integers(4))
      grads = related(params, i)
      is_bad = rng.random() < 0.4 or step == 0
      if is_bad and where == "all":
        grads = jax.tree.map(lambda g: jnp.full_like(g, bad), grads)
      elif is_bad:
        grads["w"] = grads["w"].at[2].set(bad)
      updates, state = update(grads, state, i)
      assert self.finite(updates) == (not is_bad)
      assert self.finite(state)
    if where == "one":
      # The other components of a bad gradient are as good as ever.
      helpers.assert_equal(row(state, i)["b"], grads["b"])
    self.check_afterwards(kind, update, state, params)

  def test_beyond_the_range_of_the_table(self, kind):
    params = {"w": jnp.zeros(4)}
    tx = make(kind, 3, table_dtype=jnp.float16)
    update = update_fn(kind, "float16")
    state = tx.init(params)
    for k in range(9):
      grads = related(params, k % 3)
      grads = {"w": grads["w"].at[k % 4].set(1e6 * (-1) ** k)}
      updates, state = update(grads, state, k % 3)
      assert self.finite((updates, state))
    assert np.abs(helpers.flat(state.table)).max() < 10
    # The bad components of the last visit were not stored, the others were.
    np.testing.assert_allclose(
      row(state, 2)["w"][1:], grads["w"][1:], rtol=1e-3
    )
    self.check_afterwards(kind, update, state, params)

  @pytest.mark.parametrize("num_batches", [2, *map(helpers.slow, (1, 3))])
  def test_finite_but_sums_overflow(self, kind, num_batches):
    """As gradients of a run that diverges, which apply_if_finite survives."""
    params = {"w": jnp.zeros(2)}
    tx, update = make(kind, num_batches), update_fn(kind)
    state = tx.init(params)
    largest = float(jnp.finfo(jnp.float32).max)
    for k in range(3 * num_batches):
      huge = {"w": jnp.array([largest, -0.9 * largest])}
      _, state = update(huge, state, k % num_batches)
    for k in range(3 * num_batches):
      updates, state = update(related(params, k), state, k % num_batches)
    assert self.finite((updates, state))


@both
class TestState:
  @pytest.mark.parametrize("table_dtype", [None, helpers.slow("float16")])
  def test_types_never_change(self, params, kind, table_dtype):
    if table_dtype and is_complex(params):
      pytest.skip("A real dtype cannot hold complex parameters.")
    tx = make(kind, 5, table_dtype=table_dtype)
    state = tx.init(params)
    for entry, p in zip(
      *map(jax.tree.leaves, (state.table, params)), strict=True
    ):
      assert entry.shape == (5, *jnp.shape(p))
      assert entry.dtype == jnp.dtype(table_dtype or jnp.result_type(p))
    assert jax.tree.structure(state.mean_grads) == jax.tree.structure(params)
    want = helpers.types(state)
    assert helpers.types(jax.eval_shape(tx.init, params)) == want
    grads = helpers.random_like(params, 0)
    for p in (None, params):
      got = jax.eval_shape(
        lambda g, s, p, i: tx.update(g, s, p, batch_index=i), grads, state, p, 2
      )
      assert helpers.types(got) == helpers.types((grads, state))

  def test_types_never_change_eagerly(self, kind):
    params = helpers.TREES["mixed"][0]()
    tx = make(kind, 3)
    state = tx.init(params)
    grads = helpers.random_like(params, 0)
    want = helpers.types((grads, state))
    for _ in range(2):
      updates, state = tx.update(grads, state, params, batch_index=2)
      assert helpers.types((updates, state)) == want

  @staticmethod
  def epoch(tx, grads, state):
    """Seven steps, of which the last two do nothing."""

    def body(state, k):
      g = jax.tree.map(lambda x: x[k % 3], grads)
      state = jax.lax.cond(
        k < 5,
        lambda s: tx.update(g, s, batch_index=k % 3)[1],
        lambda s: s,
        state,
      )
      return state, state.alpha

    return jax.lax.scan(body, state, jnp.arange(7))

  def test_is_a_carry(self, params, kind):
    tx = make(kind, 5)
    state = tx.init(params)
    stacked = jax.tree.map(
      lambda *x: jnp.stack(x), *[related(params, i) for i in range(3)]
    )
    got, _ = jax.eval_shape(lambda g, s: self.epoch(tx, g, s), stacked, state)
    assert helpers.types(got) == helpers.types(state)

  @pytest.mark.parametrize(
    "tree", helpers.tree_names("mixed", without=["empty", "numpy"])
  )
  def test_is_a_donated_argument(self, kind, tree):
    params = jax.tree.map(jnp.array, helpers.TREES[tree][0]())
    tx = make(kind, 5)
    grads = [related(params, i) for i in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    epoch = jax.jit(lambda s: self.epoch(tx, stacked, s), donate_argnums=0)
    state = tx.init(params)
    want = visit(
      update_fn(kind), state, [(k % 3, grads[k % 3]) for k in range(5)]
    )
    state, alphas = epoch(state)
    assert (alphas[:3] == 0).all()
    helpers.assert_close(
      without_error(state), without_error(want), helpers.tolerance(params)
    )
    state, _ = epoch(state)
    assert state.count == 10

  def test_shares_no_memory(self, params, kind):
    params = jax.tree.map(jnp.array, params)
    state = make(kind, 5).init(params)
    pointers = [
      x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))
    ]
    assert len(set(pointers)) == len(pointers)

  def test_abstract_init(self, params, kind):
    if any(isinstance(x, float) for x in jax.tree.leaves(params)):
      pytest.skip("A Python number has no shape.")
    tx = make(kind, 3)
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params
    )
    concrete = tx.init(params)
    for state in (tx.init(abstract), jax.eval_shape(tx.init, params)):
      assert jax.tree.structure(state) == jax.tree.structure(concrete)
      for got, want in zip(
        *map(jax.tree.leaves, (state, concrete)), strict=True
      ):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)

  def test_one_trace_for_all_steps(self, kind):
    traces = []
    tx = make(kind, 3, alpha=optax.linear_schedule(1.0, 0.0, 3))

    @jax.jit
    def step(params, state, i):
      traces.append(1)
      return tx.update(params, state, params, batch_index=i)

    state = tx.init(PARAMS)
    for k in range(7):
      _, state = step(PARAMS, state, k % 3)
    assert len(traces) == 1
    assert state.count == 7

  def test_is_pure(self, kind):
    tx = make(kind, 3)
    state = tx.init(PARAMS)
    tx.update(PARAMS, state, batch_index=1)
    helpers.assert_equal(state, tx.init(PARAMS))


class TestMemoryKind:
  """The table in the memory of the host."""

  @pytest.mark.parametrize("jit_init", [False, True])
  def test_same_training(self, jit_init):
    params = {"w": jnp.ones((8, 3)), "b": jnp.zeros(3)}
    results = []
    for kind in (None, "pinned_host"):
      tx = optax.chain(
        optax_svrg.adaptive_saga(3, memory_kind=kind), optax.sgd(0.1, 0.9)
      )
      state = (jax.jit(tx.init) if jit_init else tx.init)(params)
      kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state[0].table)}
      assert kinds == {kind or "device"}
      assert state[0].mean_grads["w"].sharding.memory_kind == "device"
      placed = jax.tree.map(lambda x: x.sharding, (params, state))
      step = jax.jit(
        lambda g, s, i, tx=tx: tx.update(g, s, batch_index=i),
        donate_argnums=1,
        out_shardings=placed,
      )
      for i in (0, 1, 2, 1, 0, 2):
        grads = jax.tree.map(lambda p, i=i: 0.5 * p + float(i), params)
        updates, state = step(grads, state, i)
      results.append((updates, optax.tree.get(state, "alpha")))
    chex.assert_trees_all_equal(*results)
    assert results[0][1] > 0

  def test_shardings(self):
    mesh = jax.make_mesh((1,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put(jnp.ones(3), sharding)
    tx = optax_svrg.alpha_saga(1.0, 3, memory_kind="pinned_host")
    got = optax_svrg.state_shardings(tx, params)
    assert got.table.memory_kind == "pinned_host"
    assert got.mean_grads.memory_kind == "device"

  @pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
      ("disk", ValueError, "memory_kind must be one of .*, got 'disk'"),
      (3, TypeError, "memory_kind must be a str, got 3"),
    ],
  )
  def test_wrong_kind(self, kind, error, message):
    with pytest.raises(error, match=message):
      optax_svrg.adaptive_saga(3, memory_kind=kind).init(jnp.ones(3))
