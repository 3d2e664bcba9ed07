# SPDX-License-Identifier: Apache-2.0
"""The coefficient that is estimated online."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_svrg
from tests import helpers

PROBLEM = helpers.finite_sum([4, 4, 1])


@pytest.fixture(params=helpers.tree_names())
def params(request: pytest.FixtureRequest) -> Any:
  make, x64 = helpers.TREES[request.param]
  with jax.enable_x64(x64):
    yield make()


def correct(tx, params, state, batch):
  """One update with the gradient of a batch of PROBLEM."""
  grad_fn = lambda p: PROBLEM.grad(p, batch)
  return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)


def observe(tx, state, grads, snapshot_grads):
  """An update with these very gradients."""
  return tx.update(grads, state, snapshot_grads=snapshot_grads)


def with_mean(tx, params, mean):
  return optax_svrg.take_snapshot(tx.init(params), params, lambda _: mean)


class TestFormula:
  @pytest.mark.parametrize(
    ("decay", "max_alpha"),
    [(0.9, 1.0), helpers.slow(0.0, 0.4), helpers.slow(0.9, 3.0)],
  )
  def test_against_numpy(self, params, decay, max_alpha):
    if not jax.tree.leaves(params):
      pytest.skip("no gradient, no coefficient")
    tx = optax_svrg.adaptive_svrg(decay=decay, max_alpha=max_alpha)
    update = jax.jit(lambda *args: observe(tx, *args))
    mean = helpers.random_like(params, 0, 0.1)
    state = with_mean(tx, params, mean)
    covariance = variance = moment = 0.0
    # Sums are formed in float32, whatever gradients are rounded to.
    rtol = 64 * float(jnp.finfo(state.estimate.variance.dtype).eps)
    for step in range(6):
      s = helpers.random_like(params, 10 + step)
      noise = helpers.random_like(params, 20 + step, 0.3)
      slope = 0.9 - 0.1 * step
      g = jax.tree.map(
        lambda x, n, a=slope: (a * x + n).astype(x.dtype), s, noise
      )
      alpha = 1.0 if not variance else covariance / variance
      alpha = min(max(alpha, 0.0), max_alpha)
      corrected, state = update(state, g, s)
      np.testing.assert_allclose(state.alpha, alpha, rtol=rtol, atol=rtol)
      wide = tuple(map(helpers.wide, (g, s, mean)))
      helpers.assert_rounded(
        corrected,
        jax.tree.map(lambda g, s, m, a=alpha: g - a * (s - m), *wide),
        jax.tree.map(lambda g, s, m: abs(g) + abs(s) + abs(m), *wide),
        ulps=4,
      )
      want = helpers.flat(g) - alpha * (helpers.flat(s) - helpers.flat(mean))
      centred = helpers.flat(s) - helpers.flat(mean)
      products = [
        np.vdot(centred, helpers.flat(g) - helpers.flat(mean)).real,
        np.vdot(centred, centred).real,
        np.sum(np.abs(want - helpers.flat(mean)) ** 2),
      ]
      covariance, variance, moment = (
        decay * old + (1 - decay) * new
        for old, new in zip(
          (covariance, variance, moment), products, strict=True
        )
      )
      reduction = max(alpha * (2 * covariance - alpha * variance), 0)
      estimate = state.estimate
      np.testing.assert_allclose(
        estimate,
        [covariance, variance, moment, moment / (moment + reduction), 1],
        rtol=rtol,
      )

  @pytest.mark.parametrize("shape", [(2**23,), (2, 2**20), (4096, 256)])
  def test_sums_of_large_leaves_are_accurate(self, shape):
    params = {"w": jnp.zeros(shape)}
    tx = optax_svrg.adaptive_svrg(decay=0.0)
    s = np.random.default_rng(0).random(shape, np.float32)
    g = 0.5 * s + 0.3 * np.sqrt(s)
    state = with_mean(tx, params, params)
    _, state = jax.jit(functools.partial(observe, tx))(
      state, {"w": g}, {"w": s}
    )
    wide = s.astype(np.float64)
    np.testing.assert_allclose(
      state.estimate.covariance / state.estimate.variance,
      np.vdot(wide, g) / np.vdot(wide, wide),
      rtol=1e-5,
    )

  def test_dtypes(self, params):
    state = optax_svrg.adaptive_svrg().init(params)
    dtypes = {jnp.result_type(p) for p in jax.tree.leaves(params)}
    double = dtypes & {np.dtype(np.float64), np.dtype(np.complex128)}
    for value in state.estimate:
      assert value.dtype == (jnp.float64 if double else jnp.float32)
      assert value.shape == ()
    assert state.alpha.dtype == jnp.result_type(float)

  def test_does_not_depend_on_the_batch_that_it_corrects(self):
    """This keeps the corrected gradient unbiased."""
    params = {"w": jnp.ones(3)}
    tx = optax_svrg.adaptive_svrg()
    mean = {"w": jnp.zeros(3)}
    _, state = observe(
      tx,
      with_mean(tx, params, mean),
      {"w": jnp.array([1.0, 0.5, 0.0])},
      {"w": jnp.array([2.0, 0.0, 0.0])},
    )
    used = []
    for seed in range(3):
      g, s = (
        helpers.random_like(params, seed),
        helpers.random_like(params, 50 + seed),
      )
      used.append(observe(tx, state, g, s)[1].alpha)
    assert used == [0.5, 0.5, 0.5]

  def test_optimal_over_a_pass(self):
    """All batches at fixed parameters, weighted alike: Cov / Var over them."""
    with jax.enable_x64(True):
      params = {"w": jnp.zeros(4)}
      snapshots = [helpers.random_like(params, i) for i in range(7)]
      mean = {"w": sum(s["w"] for s in snapshots) / 7}
      grads = [
        {"w": 0.6 * s["w"] + helpers.random_like(params, 90 + i, 0.5)["w"]}
        for i, s in enumerate(snapshots)
      ]
      tx = optax_svrg.adaptive_svrg(decay=1 - 1e-12)
      state = with_mean(tx, params, mean)
      for g, s in zip(grads, snapshots, strict=True):
        _, state = observe(tx, state, g, s)
      _, state = observe(tx, state, grads[0], snapshots[0])
      stack = lambda trees: np.stack([t["w"] for t in trees])
      g, s = stack(grads), stack(snapshots)
      g0, s0 = g - g.mean(axis=0), s - s.mean(axis=0)
      np.testing.assert_allclose(
        state.alpha, np.sum(g0 * s0) / np.sum(s0 * s0), rtol=1e-3
      )


class TestSnapshot:
  def test_inert_before_the_first(self, params):
    tx = optax_svrg.adaptive_svrg()
    start = tx.init(params)
    for extra in ("grad_fn", "snapshot_grads"):
      point = helpers.perturbed(params)
      grads = PROBLEM.grad(point, PROBLEM.batches[0])
      value = grads if extra == "snapshot_grads" else lambda p: p
      update = jax.jit(
        lambda g, s, p, v=value, e=extra: tx.update(g, s, p, **{e: v})
      )
      updates, state = update(grads, start, point)
      helpers.assert_equal(updates, grads)
      assert (state.alpha, state.count, state.num_snapshots) == (0, 1, 0)
      estimate = state.estimate
      if not jax.tree.leaves(params):  # As if all gradients had vanished.
        estimate = estimate._replace(unit=start.estimate.unit)
      helpers.assert_equal(estimate, start.estimate)

  def test_second_gradient_is_evaluated_only_with_a_snapshot(self):
    calls = []

    def grad_fn(p):
      jax.debug.callback(lambda: calls.append(1))
      return p

    params = {"w": jnp.ones(2)}
    tx = optax_svrg.adaptive_svrg()
    step = jax.jit(lambda s: tx.update(params, s, params, grad_fn=grad_fn)[1])
    step(tx.init(params))
    jax.effects_barrier()
    assert not calls
    step(with_mean(tx, params, params))
    jax.effects_barrier()
    assert len(calls) == 1

  @pytest.mark.parametrize("max_alpha", [0.25, 1.0, 2.0])
  def test_makes_the_coefficient_start_at_one(self, max_alpha):
    params = {"w": jnp.array([1.0, -2.0])}
    tx = optax.chain(
      optax_svrg.adaptive_svrg(max_alpha=max_alpha), optax.sgd(0.1)
    )
    # In which the best coefficient is below 1.
    batches = helpers.finite_sum([3, 4, 1]).batches
    state = tx.init(params)
    seen = []
    for _ in range(2):
      state = optax_svrg.take_snapshot(
        state,
        params,
        lambda p: optax_svrg.mean_gradient(PROBLEM.grad, p, batches),
      )
      for batch in batches:
        updates, state = correct(tx, params, state, batch)
        seen.append(float(optax.tree.get(state, "alpha")))
        params = optax.apply_updates(params, updates)
    assert seen[0] == seen[3] == min(1.0, max_alpha)
    if max_alpha == 1.0:
      assert 0 < seen[2] < 1
      assert 0 < seen[5] < 1

  def test_exact_at_the_snapshot(self, params):
    tx = optax_svrg.adaptive_svrg()
    state = helpers.with_snapshot(tx, params, PROBLEM)
    mean = state.mean_grads
    update = jax.jit(lambda *args: observe(tx, *args))
    for batch in PROBLEM.batches:
      grads = PROBLEM.grad(params, batch)
      updates, state = update(state, grads, grads)
      helpers.assert_close(
        updates, mean, rtol=0, atol=helpers.tolerance(params)
      )
      np.testing.assert_allclose(
        state.alpha, 1, rtol=0, atol=helpers.tolerance(params)
      )

  def test_empties_the_averages(self):
    """The variance ratio of the next step is that of a first snapshot."""
    params = {"w": jnp.ones(3)}
    tx = optax_svrg.adaptive_svrg()
    mean = {"w": jnp.zeros(3)}
    fresh = used = with_mean(tx, params, mean)

    def pair(seed):
      s, noise = (helpers.random_like(params, i) for i in (seed, 10 + seed))
      return {"w": 0.8 * s["w"] + 0.2 * noise["w"]}, s

    for seed in range(3):
      _, used = observe(tx, used, *pair(seed))
    assert used.estimate.second_moment > 0
    ratio = used.estimate.variance_ratio
    used = optax_svrg.take_snapshot(used, params, lambda _: mean)
    estimate = used.estimate
    averages = estimate.covariance, estimate.variance, estimate.second_moment
    assert averages == (0, 0, 0)
    assert estimate.variance_ratio == ratio != 1
    _, fresh = observe(tx, fresh, *pair(5))
    _, used = observe(tx, used, *pair(5))
    helpers.assert_equal(used.estimate, fresh.estimate)


class TestUnbiased:
  def test_whatever_the_estimate(self, params):
    tx = optax_svrg.adaptive_svrg(decay=0.5, max_alpha=5.0)
    state = helpers.with_snapshot(tx, params, PROBLEM)
    point = helpers.perturbed(params)
    update = jax.jit(lambda *args: observe(tx, *args))
    pairs = [
      (PROBLEM.grad(point, batch), PROBLEM.grad(params, batch))
      for batch in PROBLEM.batches
    ]
    for pair in pairs:
      _, state = update(state, *pair)
    if jax.tree.leaves(params):
      _, after = update(state, *pairs[0])
      assert after.alpha not in (0, 1, 5)
    corrected = [update(state, *pair)[0] for pair in pairs]
    sizes = np.array([len(batch[0]) for batch in PROBLEM.batches])
    for want, *leaves in zip(
      jax.tree.leaves(PROBLEM.full_grad(point)),
      *map(jax.tree.leaves, corrected),
      strict=True,
    ):
      got = np.average(helpers.wide(leaves), axis=0, weights=sizes)
      size = 1 + np.abs(helpers.wide(leaves)).max()
      eps = float(jnp.finfo(want.dtype).eps)
      assert np.all(np.abs(got - helpers.wide(want)) <= 2 * eps * size)


class TestWithoutVariance:
  def test_full_batches(self, params):
    """The coefficient stays where it is, and is never NaN."""
    problem = helpers.finite_sum([5])
    tx = optax_svrg.adaptive_svrg()
    state = helpers.with_snapshot(tx, params, problem)
    update = lambda p, s: tx.update(
      problem.grad(p, problem.batches[0]),
      s,
      p,
      grad_fn=lambda q: problem.grad(q, problem.batches[0]),
    )
    update = jax.jit(update)
    point = params
    for step in range(4):
      point = helpers.perturbed(point, 0.01 * step)
      updates, state = update(point, state)
      assert state.alpha == 1
      assert np.all(np.isfinite(helpers.flat(updates)))
      assert np.all(np.isfinite(state.estimate))

  def test_an_observation_without_variance_changes_nothing(self):
    params = {"w": jnp.ones(2)}
    tx = optax_svrg.adaptive_svrg(decay=0.5)
    mean = {"w": jnp.array([1.0, -1.0])}
    _, state = observe(
      tx,
      with_mean(tx, params, mean),
      {"w": jnp.array([1.5, -1.0])},
      {"w": jnp.array([2.0, -1.0])},
    )
    estimate = state.estimate
    for _ in range(3):
      _, state = observe(tx, state, {"w": jnp.array([3.0, 3.0])}, mean)
      assert state.alpha == 0.5
      helpers.assert_equal(state.estimate[:2], estimate[:2])

  @pytest.mark.parametrize(("roundings", "varies"), [(2, False), (8, True)])
  def test_a_few_roundings_are_no_variance(self, roundings, varies):
    params = {"w": jnp.ones(2)}
    tx = optax_svrg.adaptive_svrg(decay=0.5)
    s = {"w": 1 + roundings * jnp.full(2, jnp.finfo(jnp.float32).eps)}
    _, state = observe(tx, with_mean(tx, params, params), s, s)
    assert (state.estimate.variance > 0) == varies

  @pytest.mark.parametrize("scale", [1e-24, 1e-20, 1e19, 1e30])
  @pytest.mark.parametrize("slope", [0.25, -0.5])
  def test_extreme_scales(self, scale, slope):
    """The coefficient does not depend on the scale of gradients."""
    params = {"w": jnp.ones(2)}
    tx = optax_svrg.adaptive_svrg(decay=0.5)
    state = with_mean(tx, params, {"w": jnp.zeros(2)})
    update = jax.jit(lambda s, g, c: observe(tx, s, g, c))
    # At the second step already: the first one knows the scale.
    for step in range(2):
      s = helpers.random_like(params, step, scale)
      g = {"w": slope * s["w"]}
      updates, state = update(state, g, s)
    np.testing.assert_allclose(state.alpha, max(slope, 0), rtol=1e-5)
    left = g["w"] - max(slope, 0) * s["w"]
    np.testing.assert_allclose(updates["w"], left, rtol=0, atol=1e-5 * scale)


class TestBadGradients:
  @pytest.mark.parametrize("bad", [np.nan, np.inf])
  @pytest.mark.parametrize("which", [0, 1])
  def test_do_not_spoil_the_estimate(self, bad, which):
    params = {"w": jnp.ones(2)}
    tx = optax_svrg.adaptive_svrg(decay=0.5)
    state = with_mean(tx, params, {"w": jnp.zeros(2)})
    good = ({"w": jnp.array([0.5, 0.0])}, {"w": jnp.array([1.0, 0.0])})
    _, state = observe(tx, state, *good)
    broken = list(good)
    broken[which] = {"w": jnp.array([bad, 0.0])}
    updates, after = observe(tx, state, *broken)
    # The gradient itself is not hidden, nor spoilt by the correction.
    helpers.assert_equal(updates, broken[0])
    helpers.assert_equal(after.estimate, state.estimate)

  def test_gradients_that_oppose_the_snapshot_pass_unchanged(self):
    """A coefficient of 0 is not the end: the estimate goes on."""
    params = {"w": jnp.ones(2)}
    tx = optax_svrg.adaptive_svrg(decay=0.0)
    state = with_mean(tx, params, {"w": jnp.array([0.0, 0.5])})
    s = {"w": jnp.array([1.0, 0.1])}
    opposite = {"w": jnp.array([-1.0, 0.1])}
    _, state = observe(tx, state, opposite, s)
    updates, state = observe(tx, state, s, s)
    helpers.assert_equal(updates, s)
    assert state.alpha == 0
    _, state = observe(tx, state, s, s)
    assert state.alpha == 1


class TestVarianceRatio:
  """Against the variances over all batches, at fixed parameters."""

  @staticmethod
  def ratios(shift):
    """The estimate and the truth; the mean gradient has moved by a shift."""
    with jax.enable_x64(True):
      params = {"w": jnp.zeros(5)}
      s = np.random.default_rng(0).normal(size=(400, 5))
      noise = np.random.default_rng(1).normal(size=(400, 5))
      mean = s.mean(axis=0)
      g = mean + 0.8 * (s - mean) + 0.3 * (noise - noise.mean(axis=0)) + shift
      tx = optax_svrg.adaptive_svrg(decay=0.999)
      state = with_mean(tx, params, {"w": jnp.asarray(mean)})

      def step(state, pair):
        corrected, state = observe(tx, state, *pair)
        return state, corrected["w"]

      pairs = tuple({"w": jnp.asarray(np.tile(x, (20, 1)))} for x in (g, s))
      state, corrected = jax.lax.scan(step, state, pairs)
      last = np.asarray(corrected)[-400:]
      true = last.var(axis=0).sum() / g.var(axis=0).sum()
      return float(state.estimate.variance_ratio), true

  def test_equals_the_truth_while_the_mean_gradient_has_not_moved(self):
    estimate, true = self.ratios(0.0)
    assert 0 < true < 0.3
    np.testing.assert_allclose(estimate, true, rtol=0.02)

  @pytest.mark.parametrize("shift", [0.3, 3.0])
  def test_is_an_upper_bound_otherwise(self, shift):
    estimate, true = self.ratios(shift)
    assert true < estimate < 1

  def test_is_one_until_there_is_an_estimate(self):
    params = {"w": jnp.ones(2)}
    tx = optax_svrg.adaptive_svrg()
    state = tx.init(params)
    assert state.estimate.variance_ratio == 1
    _, state = observe(tx, state, params, params)
    assert optax.tree.get(state, "variance_ratio") == 1


class TestState:
  @pytest.mark.parametrize("snapshot_dtype", [None, helpers.slow(jnp.bfloat16)])
  def test_types_never_change(self, params, snapshot_dtype):
    if snapshot_dtype and any(map(jnp.iscomplexobj, jax.tree.leaves(params))):
      pytest.skip("cannot hold imaginary parts")
    tx = optax_svrg.adaptive_svrg(snapshot_dtype=snapshot_dtype)
    state = tx.init(params)
    want = helpers.types(state)
    taken = helpers.with_snapshot(tx, params, PROBLEM)
    assert helpers.types(taken) == want
    updates, after = correct(tx, params, taken, PROBLEM.batches[0])
    assert helpers.types(after) == want
    assert jax.tree.structure(updates) == jax.tree.structure(params)

  def test_is_a_carry_and_a_donated_argument(self, params):
    params = jax.tree.map(jnp.asarray, params)
    tx = optax_svrg.adaptive_svrg()

    def epoch(params, state):
      state = optax_svrg.take_snapshot(
        state,
        params,
        lambda p: optax_svrg.mean_gradient(PROBLEM.grad, p, PROBLEM.batches),
      )

      def body(carry, _):
        params, state = carry
        updates, state = correct(tx, params, state, PROBLEM.batches[0])
        step = jax.tree.map(lambda u: -0.01 * u, updates)
        return (optax.apply_updates(params, step), state), state.alpha

      (params, state), alphas = jax.lax.scan(body, (params, state), length=3)
      return params, state, alphas

    jitted = jax.jit(epoch, donate_argnums=(0, 1))
    state = tx.init(params)
    types = helpers.types(state)
    for _ in range(2):
      params, state, alphas = jitted(params, state)
      assert helpers.types(state) == types
    assert state.num_snapshots == 2
    assert state.count == 6
    assert alphas[0] == 1

  def test_vmap(self):
    params = {"w": jnp.arange(6.0).reshape(3, 2)}
    tx = optax_svrg.adaptive_svrg()

    @jax.jit
    def run(p):
      state = optax_svrg.take_snapshot(tx.init(p), p, PROBLEM.full_grad)
      for _ in range(3):
        updates, state = correct(
          tx, helpers.perturbed(p), state, PROBLEM.batches[0]
        )
      return updates, state

    got = jax.vmap(run)(params)
    want = [run({"w": w}) for w in params["w"]]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *want)
    helpers.assert_close(got, stacked, rtol=1e-6)

  def test_inject_hyperparams(self):
    params = {"w": jnp.arange(1.0, 4.0)}
    injected = optax.inject_hyperparams(optax_svrg.adaptive_svrg)(
      decay=0.5, max_alpha=0.9
    )
    plain = optax_svrg.adaptive_svrg(decay=0.5, max_alpha=0.9)
    states = [
      helpers.with_snapshot(tx, params, PROBLEM) for tx in (injected, plain)
    ]
    point = helpers.perturbed(params)
    for batch in PROBLEM.batches:
      got, states[0] = correct(injected, point, states[0], batch)
      want, states[1] = correct(plain, point, states[1], batch)
      helpers.assert_close(got, want, rtol=1e-6)
    helpers.assert_close(
      helpers.svrg_state(states[0]).estimate, states[1].estimate, rtol=1e-6
    )


@pytest.mark.parametrize(
  ("kwargs", "error", "message"),
  [
    ({"decay": 1.0}, ValueError, r"decay must be in \[0, 1\), got 1.0"),
    ({"decay": -0.1}, ValueError, r"decay must be in \[0, 1\), got -0.1"),
    ({"decay": jnp.nan}, ValueError, r"decay must be finite, got nan"),
    ({"decay": "0.9"}, TypeError, r"decay must be a real number.*'0.9'"),
    ({"decay": jnp.ones(2)}, ValueError, r"decay must be a scalar.*\(2,\)"),
    ({"max_alpha": 0}, ValueError, r"max_alpha must be positive, got 0"),
    ({"max_alpha": -1.0}, ValueError, r"max_alpha must be positive.*-1"),
    ({"max_alpha": np.inf}, ValueError, r"max_alpha must be finite, got inf"),
    ({"max_alpha": None}, TypeError, r"max_alpha must be a real.*None"),
    ({"snapshot_dtype": int}, TypeError, r"snapshot_dtype must be a float"),
  ],
)
def test_bad_arguments(kwargs, error, message):
  with pytest.raises(error, match=message):
    optax_svrg.adaptive_svrg(**kwargs)


@pytest.mark.parametrize(
  ("extra", "message"),
  [
    ({}, r"exactly one.*got neither"),
    ({"grad_fn": lambda p: p, "snapshot_grads": {}}, r"got both"),
    ({"grad_fn": lambda p: {}}, r"result of grad_fn.*missing \['w'\]"),
  ],
)
def test_bad_updates(extra, message):
  params = {"w": jnp.ones(2)}
  tx = optax_svrg.adaptive_svrg()
  state = with_mean(tx, params, params)
  with pytest.raises(ValueError, match=message):
    tx.update(params, state, params, **extra)
