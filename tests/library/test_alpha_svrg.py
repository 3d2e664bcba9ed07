# SPDX-License-Identifier: Apache-2.0
"""The invariants of the estimator, of its state and of snapshots."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_svrg
from tests import helpers

PROBLEM = helpers.finite_sum([4, 4, 1])
SNAPSHOT_ARGS = ("grad_fn", "snapshot_grads")
EAGERLY_IS_SLOW = [True, helpers.slow(False)]


@pytest.fixture(params=helpers.tree_names())
def params(request: pytest.FixtureRequest) -> Any:
  make, x64 = helpers.TREES[request.param]
  with jax.enable_x64(x64):
    yield make()


def correct(tx, params, state, batch, arg="grad_fn", **kwargs):
  """One update with the gradient of a batch of PROBLEM."""
  grads = PROBLEM.grad(params, batch)
  if arg == "grad_fn":
    extra = {"grad_fn": lambda p: PROBLEM.grad(p, batch)}
  else:
    snapshot = jax.tree.map(
      lambda w, p: jnp.asarray(w, jnp.result_type(p)),
      helpers.svrg_state(state).snapshot_params,
      params,
    )
    extra = {"snapshot_grads": PROBLEM.grad(snapshot, batch)}
  return tx.update(grads, state, params, **extra, **kwargs)


class TestInvariants:
  """For every kind of parameters."""

  @pytest.mark.parametrize(
    ("alpha", "arg", "jit"),
    [
      (0, "snapshot_grads", True),
      (jnp.array(0.0), "grad_fn", False),
      (lambda _: 0.0, "grad_fn", True),
      helpers.slow(0, "grad_fn", False),
      helpers.slow(jnp.array(0.0), "snapshot_grads", True),
      helpers.slow(lambda _: 0.0, "snapshot_grads", False),
    ],
  )
  def test_alpha_zero_is_the_identity(self, params, alpha, arg, jit):
    tx = optax_svrg.alpha_svrg(alpha)
    state = helpers.with_snapshot(tx, params, PROBLEM)
    point = helpers.perturbed(params)
    update = lambda p, s: (
      *correct(tx, p, s, PROBLEM.batches[0], arg),
      PROBLEM.grad(p, PROBLEM.batches[0]),
    )
    updates, state, grads = (jax.jit(update) if jit else update)(point, state)
    helpers.assert_equal(updates, grads)
    assert state.alpha == 0

  @pytest.mark.parametrize("arg", SNAPSHOT_ARGS)
  def test_inert_before_the_first_snapshot(self, params, arg):
    tx = optax_svrg.alpha_svrg(1.0)
    point = helpers.perturbed(params)
    with pytest.warns(UserWarning, match="no snapshot has been taken yet"):
      updates, state = correct(
        tx, point, tx.init(params), PROBLEM.batches[0], arg
      )
    helpers.assert_equal(updates, PROBLEM.grad(point, PROBLEM.batches[0]))
    assert (state.alpha, state.count, state.num_snapshots) == (0, 1, 0)

  @pytest.mark.parametrize(
    ("alpha", "arg"), [(1, "grad_fn"), (-0.5, "snapshot_grads")]
  )
  def test_unbiased(self, params, alpha, arg):
    tx = optax_svrg.alpha_svrg(alpha)
    state = helpers.with_snapshot(tx, params, PROBLEM)
    point = helpers.perturbed(params)
    corrected, plain, sizes = zip(
      *(
        (
          correct(tx, point, state, batch, arg)[0],
          PROBLEM.grad(point, batch),
          formula(alpha, point, params, state.mean_grads, batch)[1],
        )
        for batch in PROBLEM.batches
      ),
      strict=True,
    )
    for got, want, size, like in zip(
      *map(
        jax.tree.leaves,
        (*map(weighted_mean, (corrected, plain, sizes)), corrected[0]),
      ),
      strict=True,
    ):
      bound = 2 * float(jnp.finfo(like.dtype).eps) * size
      np.testing.assert_array_less(np.abs(got - want), bound)

  @pytest.mark.parametrize(
    ("arg", "jit"),
    [
      ("grad_fn", True),
      helpers.slow("snapshot_grads", True),
      helpers.slow("grad_fn", False),
    ],
  )
  def test_exact_at_the_snapshot(self, params, arg, jit):
    tx = optax_svrg.alpha_svrg(1.0)
    state = helpers.with_snapshot(tx, params, PROBLEM)
    update = lambda p, s, b: correct(tx, p, s, b, arg)[0]
    for batch in PROBLEM.batches:
      got = (jax.jit(update) if jit else update)(params, state, batch)
      rounded = optax.tree.cast_like(state.mean_grads, got)
      helpers.assert_equal(got, rounded)

  def test_formula(self, params):
    tx = optax_svrg.alpha_svrg(0.75)
    state = helpers.with_snapshot(tx, params, PROBLEM)
    point, batch = helpers.perturbed(params), PROBLEM.batches[1]
    got, new_state = correct(tx, point, state, batch)
    want = formula(0.75, point, params, state.mean_grads, batch)
    helpers.assert_rounded(got, *want, ulps=1)
    assert new_state.alpha == 0.75
    helpers.assert_equal(new_state.snapshot_params, state.snapshot_params)
    helpers.assert_equal(new_state.mean_grads, state.mean_grads)

  @pytest.mark.parametrize("snapshot_dtype", [None, helpers.slow("float16")])
  def test_types_never_change(self, params, snapshot_dtype):
    if snapshot_dtype and any(map(jnp.iscomplexobj, jax.tree.leaves(params))):
      pytest.skip("A real dtype cannot hold complex parameters.")
    tx = optax_svrg.alpha_svrg(
      optax.linear_schedule(1.0, 0.0, 3), snapshot_dtype=snapshot_dtype
    )
    state = tx.init(params)
    want = helpers.types(state)
    grads = PROBLEM.grad(helpers.perturbed(params), PROBLEM.batches[0])
    for new_state in (
      jax.jit(tx.init)(params),
      helpers.with_snapshot(tx, params, PROBLEM),
      jax.jit(lambda p: helpers.with_snapshot(tx, p, PROBLEM))(params),
    ):
      assert helpers.types(new_state) == want
      for arg in SNAPSHOT_ARGS:
        for update in (correct, jax.jit(correct, static_argnums=(0, 4))):
          updates, newer = update(
            tx, helpers.perturbed(params), new_state, PROBLEM.batches[0], arg
          )
          assert helpers.types(newer) == want
          assert helpers.types(updates)[0] == helpers.types(grads)[0]
          assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(
            jnp.result_type, grads
          )

  def test_state_is_a_carry_of_scan_and_cond(self, params):
    tx = optax_svrg.alpha_svrg(optax.linear_schedule(1.0, 0.0, 4))
    state = helpers.with_snapshot(tx, params, PROBLEM)
    point = helpers.perturbed(params)

    def body(state, step):
      def snapshot(state):
        return optax_svrg.take_snapshot(state, point, PROBLEM.full_grad)

      state = jax.lax.cond(step == 2, snapshot, lambda s: s, state)
      updates, state = correct(tx, point, state, PROBLEM.batches[0])
      return state, (state.alpha, updates)

    state, (alphas, _) = jax.lax.scan(body, state, jnp.arange(6))
    np.testing.assert_allclose(
      np.asarray(alphas, float), [1, 0.75, 0.5, 0.25, 0, 0], atol=1e-7
    )
    assert (state.count, state.num_snapshots) == (6, 2)
    helpers.assert_close(state.snapshot_params, point, rtol=0)

  def test_abstract_init(self, params):
    if any(isinstance(x, float) for x in jax.tree.leaves(params)):
      pytest.skip("A Python number has no shape.")
    tx = optax_svrg.alpha_svrg(0.5)
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


class TestSecondGradient:
  """It is not computed where it is of no use."""

  @staticmethod
  def jaxpr(alpha, params):
    tx = optax_svrg.alpha_svrg(alpha)
    grad = jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w)))

    def step(params, state, x):
      return tx.update(
        grad(params, x), state, params, grad_fn=lambda w: grad(w, x)
      )

    return jax.make_jaxpr(step)(params, tx.init(params), jnp.ones((2, 3)))

  @pytest.mark.parametrize("alpha", [0, 0.0, np.float32(0)])
  def test_absent_for_the_number_zero(self, alpha):
    text = str(self.jaxpr(alpha, jnp.ones((3, 2))))
    assert text.count(" tanh ") == 1
    assert "cond" not in text

  @pytest.mark.parametrize("alpha", [1.0, lambda _: 0.5, jnp.array(0.0)])
  def test_only_inside_a_branch_otherwise(self, alpha):
    jaxpr = self.jaxpr(alpha, jnp.ones((3, 2)))
    (cond,) = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    outside = [e for e in jaxpr.eqns if e.primitive.name == "tanh"]
    assert len(outside) == 1
    off, on = (
      str(branch).count(" tanh ") for branch in cond.params["branches"]
    )
    assert (off, on) == (0, 1)

  @pytest.mark.parametrize("jit", [False, True])
  def test_not_evaluated_while_alpha_is_zero(self, jit):
    calls = []

    def grad_fn(p):
      jax.debug.callback(lambda: calls.append(1))
      return p

    tx = optax_svrg.alpha_svrg(lambda count: jnp.where(count < 2, 0.0, 1.0))
    params = jnp.ones(2)
    state = optax_svrg.take_snapshot(tx.init(params), params, lambda p: p)
    update = lambda s: tx.update(params, s, params, grad_fn=grad_fn)
    seen = []
    for _ in range(4):
      _, state = (jax.jit(update) if jit else update)(state)
      jax.effects_barrier()
      seen.append(len(calls))
    assert seen == [0, 0, 1, 2]

  def test_one_trace_for_all_steps(self):
    traces = []
    tx = optax_svrg.alpha_svrg(optax.linear_schedule(1.0, 0.0, 3))

    @jax.jit
    def step(params, state, batch):
      traces.append(1)
      return correct(tx, params, state, batch)

    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    for _ in range(2):
      state = optax_svrg.take_snapshot(state, params, PROBLEM.full_grad)
      for _ in range(3):
        _, state = step(params, state, PROBLEM.batches[0])
    assert len(traces) == 1


class TestCoefficient:
  def test_schedule_sees_the_count_before_the_update(self):
    tx = optax_svrg.alpha_svrg(
      lambda count: 0.125 * count.astype(float) + 0.125
    )
    params = jnp.ones(2)
    state = optax_svrg.take_snapshot(tx.init(params), params, PROBLEM.full_grad)
    alphas = []
    for _ in range(3):
      _, state = correct(tx, params, state, PROBLEM.batches[0])
      alphas.append(float(optax.tree.get(state, "alpha")))
    assert alphas == [0.125, 0.25, 0.375]

  @pytest.mark.parametrize("alpha", helpers.HALVES)
  def test_numbers_arrays_and_schedules_agree(self, alpha):
    tx, reference = (optax_svrg.alpha_svrg(a) for a in (alpha, 0.5))
    params = {"w": jnp.ones(3)}
    state = helpers.with_snapshot(tx, params, PROBLEM)
    point = helpers.perturbed(params)
    got, want = (
      correct(t, point, state, PROBLEM.batches[0]) for t in (tx, reference)
    )
    helpers.assert_equal(got, want)

  @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
  @pytest.mark.parametrize("alpha", [0, 0.5, lambda count: 0.25 * (count + 1)])
  @pytest.mark.standard_promotion
  def test_inject_hyperparams(self, alpha, dtype):
    tx = optax.inject_hyperparams(optax_svrg.alpha_svrg)(alpha=alpha)
    reference = optax_svrg.alpha_svrg(alpha)
    params = {"w": jnp.ones(3, dtype)}
    state, want_state = (
      helpers.with_snapshot(t, params, PROBLEM) for t in (tx, reference)
    )
    step = jax.jit(correct, static_argnums=0)
    for _ in range(3):
      point = helpers.perturbed(params)
      updates, state = step(tx, point, state, PROBLEM.batches[0])
      want, want_state = step(reference, point, want_state, PROBLEM.batches[0])
      helpers.assert_equal(updates, want)
      assert helpers.svrg_state(state).alpha == want_state.alpha
    # The user may set the value by hand between steps.
    state.hyperparams["alpha"] = jnp.zeros_like(state.hyperparams["alpha"])
    if not callable(alpha):
      updates, _ = step(tx, point, state, PROBLEM.batches[0])
      helpers.assert_equal(updates, PROBLEM.grad(point, PROBLEM.batches[0]))

  @pytest.mark.parametrize(
    ("alpha", "error", "message"),
    [
      ("0.5", TypeError, r"alpha must be a real number, got '0.5'"),
      (None, TypeError, r"alpha must be a real number, got None"),
      (True, TypeError, r"alpha must be a real number, got True"),
      (0.5j, TypeError, r"alpha must be a real number"),
      (jnp.array(1j), TypeError, r"alpha must be a real number.*complex"),
      (float("nan"), ValueError, r"alpha must be finite, got nan"),
      (jnp.array(jnp.inf), ValueError, r"alpha must be finite, got inf"),
      (jnp.ones(1), ValueError, r"alpha must be a scalar.*\(1,\)"),
      (np.ones((2, 3)), ValueError, r"alpha must be a scalar.*\(2, 3\)"),
      ([0.5], TypeError, r"alpha must be a real number"),
    ],
  )
  def test_bad_values(self, alpha, error, message):
    with pytest.raises(error, match=message):
      optax_svrg.alpha_svrg(alpha)
    if not isinstance(alpha, (str, list, type(None))):
      tx = optax_svrg.alpha_svrg(lambda _: alpha)
      with pytest.raises(error, match=message):
        correct(tx, jnp.ones(2), tx.init(jnp.ones(2)), PROBLEM.batches[0])


def test_vmap_over_an_ensemble():
  """Members at different points, of which some have no snapshot yet."""
  tx = optax_svrg.alpha_svrg(0.75)
  members = [
    helpers.perturbed({"w": jnp.ones(3), "b": jnp.zeros(())}, by)
    for by in (0.0, 0.5, 1.0)
  ]

  def train(params, has_snapshot):
    state = tx.init(params)
    state = jax.lax.cond(
      has_snapshot,
      lambda s: optax_svrg.take_snapshot(s, params, PROBLEM.full_grad),
      lambda s: s,
      state,
    )
    return correct(tx, helpers.perturbed(params), state, PROBLEM.batches[0])

  has_snapshot = jnp.array([True, False, True])
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
  got = jax.jit(jax.vmap(train))(stacked, has_snapshot)
  train = jax.jit(train)
  np.testing.assert_array_equal(got[1].alpha, [0.75, 0, 0.75])
  for i, member in enumerate(members):
    helpers.assert_close(
      jax.tree.map(lambda x, i=i: x[i], got),
      train(member, has_snapshot[i]),
      rtol=1e-6,
    )


class TestNarrowParameters:
  """Of a mean over a data set, float16 and bfloat16 lose too much."""

  @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
  @pytest.mark.parametrize("jit", [False, True])
  def test_mean_is_kept_in_float32(self, dtype, jit):
    eps = float(jnp.finfo(dtype).eps)
    params = {"w": jnp.zeros(2, dtype)}
    tx = optax_svrg.alpha_svrg(1.0)
    batches = [jnp.full(1, x, dtype) for x in (1, 1 + eps, 1 + eps)]
    grad = lambda p, batch: {"w": jnp.broadcast_to(batch, (2,))}
    take = lambda state: optax_svrg.take_snapshot(
      state, params, lambda p: optax_svrg.mean_gradient(grad, p, batches)
    )
    state = (jax.jit(take) if jit else take)(tx.init(params))
    mean = state.mean_grads["w"]
    assert mean.dtype == jnp.float32
    np.testing.assert_allclose(mean, 1 + 2 * eps / 3, rtol=2e-7)
    # And enters the correction as it is.
    updates, _ = tx.update(
      {"w": -jnp.ones(2, dtype)}, state, snapshot_grads=params
    )
    np.testing.assert_allclose(
      updates["w"].astype(float), 2 * eps / 3, rtol=eps
    )


def test_schedule_that_becomes_nan_is_not_hidden():
  """As everywhere in Optax: it goes through to the update."""
  tx = optax_svrg.alpha_svrg(lambda count: jnp.where(count < 1, 0.5, jnp.nan))
  params = {"w": jnp.ones(2)}
  state = optax_svrg.take_snapshot(tx.init(params), params, lambda p: p)
  step = jax.jit(lambda s: tx.update(params, s, grad_fn=lambda p: p))
  updates, state = step(state)
  assert jnp.all(jnp.isfinite(updates["w"]))
  updates, state = step(state)
  assert jnp.all(jnp.isnan(updates["w"]))
  assert jnp.isnan(state.alpha)


class TestSnapshotDtype:
  @pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
  def test_unbiased_at_the_rounded_snapshot(self, dtype):
    with jax.enable_x64(dtype == jnp.float64):
      params = {"w": jnp.linspace(0.1, 0.9, 7).astype(dtype)}
      tx = optax_svrg.alpha_svrg(0.8, snapshot_dtype=jnp.bfloat16)
      state = helpers.with_snapshot(tx, params, PROBLEM)
      rounded = params["w"].astype(jnp.bfloat16)
      assert not np.array_equal(rounded.astype(dtype), params["w"])
      helpers.assert_equal(state.snapshot_params, {"w": rounded})
      helpers.assert_close(
        state.mean_grads,
        PROBLEM.full_grad({"w": rounded.astype(dtype)}),
        rtol=1e-6,
      )
      corrected = [
        correct(tx, params, state, batch)[0] for batch in PROBLEM.batches
      ]
      helpers.assert_close(
        weighted_mean(corrected),
        PROBLEM.full_grad(params),
        rtol=helpers.tolerance(params),
      )

  def test_gradients_are_taken_in_the_dtype_of_the_parameters(self):
    seen = []

    def spy(p):
      seen.append(p["w"].dtype)
      return p

    params = {"w": jnp.ones(2)}
    tx = optax_svrg.alpha_svrg(1.0, snapshot_dtype="bfloat16")
    state = optax_svrg.take_snapshot(tx.init(params), params, spy)
    tx.update(params, state, params, grad_fn=spy)
    assert seen == [jnp.float32] * 2

  def test_as_a_string_under_inject_hyperparams(self):
    tx = optax.inject_hyperparams(optax_svrg.alpha_svrg)(
      alpha=0.5, snapshot_dtype="bfloat16"
    )
    state = tx.init({"w": jnp.ones(2)})
    assert helpers.svrg_state(state).snapshot_params["w"].dtype == jnp.bfloat16

  def test_bad_dtypes(self):
    with pytest.raises(
      TypeError, match=r"snapshot_dtype must be a float.*int32"
    ):
      optax_svrg.alpha_svrg(1.0, snapshot_dtype=jnp.int32)
    with pytest.raises(TypeError, match=r"snapshot_dtype.*'float33'"):
      optax_svrg.alpha_svrg(1.0, snapshot_dtype="float33")
    tx = optax_svrg.alpha_svrg(1.0, snapshot_dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=r"bfloat16.*complex64 at \['w'\]"):
      tx.init({"w": jnp.ones(2, jnp.complex64)})


class TestBuffers:
  """The state never shares memory, so everything can be donated."""

  @staticmethod
  def pointers(tree):
    return [
      x.unsafe_buffer_pointer()
      for x in jax.tree.leaves(tree)
      if isinstance(x, jax.Array)
    ]

  @pytest.mark.parametrize(
    "when",
    ["eager", "init", helpers.slow("jitted_init"), helpers.slow("jitted")],
  )
  @pytest.mark.standard_promotion
  def test_params_and_state_can_be_donated(self, params, when):
    tx = optax.chain(optax_svrg.alpha_svrg(0.5), optax.trace(0.9))
    params = jax.tree.map(jnp.array, params)
    state = (jax.jit(tx.init) if when == "jitted_init" else tx.init)(params)
    # A mean gradient that aliases its argument and the parameters.
    if when == "eager":
      state = optax_svrg.take_snapshot(state, params, lambda _: params)
    elif when == "jitted":
      state = jax.jit(lambda s, p: optax_svrg.take_snapshot(s, p, lambda q: q))(
        state, params
      )
    pointers = self.pointers((params, state))
    assert len(set(pointers)) == len(pointers)

    @jax.jit
    def want_step(params, state):
      return correct(tx, params, state, PROBLEM.batches[0])

    want = want_step(params, state)
    step = jax.jit(want_step, donate_argnums=(0, 1))
    updates, state = step(params, state)
    helpers.assert_equal((updates, state), want)
    updates, state = step(updates, state)
    assert helpers.svrg_state(state).count == 2

  def test_snapshot_outlives_the_parameters(self):
    params = {"w": jnp.ones(3)}
    tx = optax_svrg.alpha_svrg(0.5)
    state = optax_svrg.take_snapshot(tx.init(params), params, lambda p: p)
    jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(
      params
    )
    assert params["w"].is_deleted()
    np.testing.assert_array_equal(state.snapshot_params["w"], np.ones(3))
    np.testing.assert_array_equal(state.mean_grads["w"], np.ones(3))


class TestTakeSnapshot:
  @pytest.mark.parametrize("jit", EAGERLY_IS_SLOW)
  def test_values(self, params, jit):
    tx = optax_svrg.alpha_svrg(0.5)
    point = helpers.perturbed(params)
    snapshot = lambda s, p: optax_svrg.take_snapshot(s, p, PROBLEM.full_grad)
    state = (jax.jit(snapshot) if jit else snapshot)(tx.init(params), point)
    helpers.assert_equal(state.snapshot_params, point)
    full_grad = jax.jit(PROBLEM.full_grad) if jit else PROBLEM.full_grad
    mean = full_grad(point)
    want = helpers.wide(mean)
    rounded = jax.tree.map(
      lambda m, g: m.astype(g.dtype), state.mean_grads, mean
    )
    helpers.assert_rounded(rounded, want, jax.tree.map(np.abs, want), ulps=4)
    assert (state.num_snapshots, state.count) == (1, 0)

  def test_is_pure(self):
    params = {"w": jnp.ones(3)}
    tx = optax_svrg.alpha_svrg(0.5)
    before = tx.init(params)
    optax_svrg.take_snapshot(before, params, PROBLEM.full_grad)
    helpers.assert_equal(before, tx.init(params))

  @pytest.mark.parametrize(
    ("state", "params", "mean_grad_fn", "error", "message"),
    [
      (
        optax.adam(1e-3),
        {"w": 1.0},
        lambda p: p,
        ValueError,
        r"opt_state holds no SVRGState",
      ),
      (
        None,
        {"v": 1.0},
        lambda p: p,
        ValueError,
        r"params must have .*missing \['w'\]; unexpected \['v'\]",
      ),
      (
        None,
        {"w": jnp.ones(3)},
        lambda p: p,
        ValueError,
        r"params .*shapes.*got \(3,\) instead of \(\) at \['w'\]",
      ),
      (
        None,
        {"w": 1j},
        lambda p: p,
        ValueError,
        r"params .*dtype.*complex64 instead of float32 at \['w'\]",
      ),
      (
        None,
        {"w": 1.0},
        lambda p: p["w"],
        ValueError,
        r"result of mean_grad_fn must.*missing \['w'\]",
      ),
      (
        None,
        {"w": 1.0},
        lambda p: {"w": jnp.ones(2)},
        ValueError,
        r"result of mean_grad_fn must.*\(2,\) instead of \(\) at \['w'\]",
      ),
      (
        None,
        {"w": 1.0},
        lambda p: {"w": 1},
        ValueError,
        r"result of mean_grad_fn must.*int32 instead of float32 at \['w'\]",
      ),
      (
        None,
        {"w": 1.0},
        {"w": 1.0},
        TypeError,
        r"mean_grad_fn must be a function",
      ),
    ],
  )
  def test_misuse(self, state, params, mean_grad_fn, error, message):
    state = (state or optax_svrg.alpha_svrg(0.5)).init({"w": 1.0})
    with pytest.raises(error, match=message):
      optax_svrg.take_snapshot(state, params, mean_grad_fn)


class TestMisuse:
  """Wrong use of update raises; nothing trains silently as plain SGD."""

  TX = optax_svrg.alpha_svrg(0.5)
  PARAMS = {"w": jnp.ones(3)}  # noqa: RUF012

  def update(self, grads=None, params=None, **kwargs):
    grads = self.PARAMS if grads is None else grads
    state = self.TX.init(self.PARAMS)
    state = optax_svrg.take_snapshot(state, self.PARAMS, PROBLEM.full_grad)
    # Wrong use is found before the state is looked at, eagerly and by jit.
    results = []
    for update in (
      self.TX.update,
      jax.jit(lambda g, s, p: self.TX.update(g, s, p, **kwargs)),
    ):
      try:
        if update is self.TX.update:
          update(grads, state, params, **kwargs)
        else:
          update(grads, state, params)
      except (TypeError, ValueError) as e:
        results.append((type(e), str(e)))
    assert len(results) == 2
    assert results[0] == results[1]
    error, message = results[0]
    raise error(message)

  def test_neither(self):
    with pytest.raises(ValueError, match=r"exactly one.*grad_fn.*got neither"):
      self.update()

  def test_both(self):
    with pytest.raises(ValueError, match=r"exactly one.*got both"):
      self.update(grad_fn=lambda p: p, snapshot_grads=self.PARAMS)

  def test_not_callable(self):
    with pytest.raises(TypeError, match="grad_fn must be a function"):
      self.update(grad_fn=self.PARAMS)

  @pytest.mark.parametrize("arg", SNAPSHOT_ARGS)
  @pytest.mark.parametrize(
    ("grads", "message"),
    [
      (jnp.ones(3), r"missing \['w'\]"),
      ({"w": jnp.ones(3), "v": jnp.ones(2)}, r"unexpected \['v'\]"),
      ({"w": jnp.ones(2)}, r"\(2,\) instead of \(3,\) at \['w'\]"),
      ({"w": jnp.ones(3, int)}, r"int32 instead of float32 at \['w'\]"),
      ({"w": jnp.ones(3, complex)}, r"complex64 instead of float32 at"),
      ({"w": None}, r"missing \['w'\]"),
    ],
  )
  def test_wrong_gradients(self, arg, grads, message):
    value = (lambda p: grads) if arg == "grad_fn" else grads
    with pytest.raises(ValueError, match=rf"(?s){arg}.*{message}"):
      self.update(**{arg: value})

  @pytest.mark.parametrize("has_snapshot", [False, True])
  @pytest.mark.parametrize("jit", [False, True])
  @pytest.mark.parametrize(
    ("grad_fn", "message"),
    [
      (
        lambda p: jax.tree.map(lambda x: jnp.stack([x, x]), p),
        r"per-example gradients: average them over the leading axis",
      ),
      (
        lambda p: (jnp.ones(()), p),
        r"a pair \(value, gradient\), as jax\.value_and_grad",
      ),
      (
        lambda p: (p, {"accuracy": jnp.ones(())}),
        r"a pair \(gradient, auxiliary data\), as has_aux=True",
      ),
    ],
  )
  def test_names_the_kind_of_a_wrong_gradient(
    self, grad_fn, message, jit, has_snapshot
  ):
    """Also before the first snapshot, where it is not needed yet."""
    tx = optax_svrg.alpha_svrg(0.5)
    state = tx.init(self.PARAMS)
    if has_snapshot:
      state = optax_svrg.take_snapshot(state, self.PARAMS, lambda p: p)
    update = lambda g, s: tx.update(g, s, grad_fn=grad_fn)
    with pytest.raises(ValueError, match=message):
      (jax.jit(update) if jit else update)(self.PARAMS, state)

  @pytest.mark.filterwarnings("ignore:no snapshot has been taken")
  def test_grad_fn_is_checked_once_before_the_first_snapshot(self):
    calls = []

    def grad_fn(p):
      calls.append(1)
      return jax.tree.map(np.asarray, p)  # Needs values: cannot be traced.

    tx = optax_svrg.alpha_svrg(0.5)
    state = tx.init(self.PARAMS)
    for _ in range(3):
      _, state = tx.update(self.PARAMS, state, grad_fn=grad_fn)
    assert len(calls) == 1

  def test_other_container(self):
    with pytest.raises(
      ValueError, match=r"other containers: .*Ordered.* instead"
    ):
      self.update(snapshot_grads=collections.OrderedDict(w=jnp.ones(3)))

  def test_updates_that_do_not_match(self):
    with pytest.raises(ValueError, match=r"updates must.*\(2,\).*at \['w'\]"):
      self.update({"w": jnp.ones(2)}, grad_fn=lambda p: p)

  def test_params_that_do_not_match(self):
    with pytest.raises(ValueError, match=r"params must.*missing \['w'\]"):
      self.update(params={"v": jnp.ones(3)}, grad_fn=lambda p: p)

  @pytest.mark.parametrize("leaf", [jnp.ones(2, int), 1, jnp.ones(2, bool)])
  def test_integer_parameters(self, leaf):
    with pytest.raises(
      TypeError, match=r"params must have float.* at \['layers'\]\[1\]\['n'\]"
    ):
      self.TX.init({"layers": [{"w": jnp.ones(2)}, {"n": leaf}]})

  def test_unknown_extra_args_are_left_to_others(self):
    state = self.TX.init(self.PARAMS)._replace(is_finite=jnp.array(False))
    updates, _ = self.TX.update(
      self.PARAMS, state, grad_fn=lambda p: p, value=1.0, epoch=3
    )
    helpers.assert_equal(updates, self.PARAMS)

  def test_error_of_grad_fn_is_the_users(self):
    def grad_fn(p):
      raise KeyError("oops")

    state = optax_svrg.take_snapshot(
      self.TX.init(self.PARAMS), self.PARAMS, PROBLEM.full_grad
    )
    with pytest.raises(KeyError, match="oops"):
      self.TX.update(self.PARAMS, state, grad_fn=grad_fn)


def formula(alpha, point, snapshot, mean, batch) -> tuple[Any, Any]:
  """The corrected gradient by hand, and the magnitudes that it is a sum of."""
  g, s, m = map(
    helpers.wide,
    (PROBLEM.grad(point, batch), PROBLEM.grad(snapshot, batch), mean),
  )
  a = abs(alpha)
  return (
    jax.tree.map(lambda g, s, m: g - alpha * (s - m), g, s, m),
    jax.tree.map(lambda g, s, m: abs(g) + a * (abs(s) + abs(m)), g, s, m),
  )


def weighted_mean(trees: Any) -> Any:
  """Mean over the batches of PROBLEM, weighted by their sizes."""
  sizes = np.array([len(a) for a, _ in PROBLEM.batches])
  return jax.tree.map(
    lambda *xs: (
      sum(n * x for n, x in zip(sizes, xs, strict=True)) / sizes.sum()
    ),
    *map(helpers.wide, trees),
  )
