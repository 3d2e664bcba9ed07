# SPDX-License-Identifier: Apache-2.0
"""Methods: the registry, snapshot strategies, and variants under study."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import methods, models
from benchmarks.methods import (
  balanced,
  coefficients,
  recursive,
  saga_variants,
)
from benchmarks.studies import coefficient as coefficient_study
from benchmarks.studies import saga_variants as saga_study
from benchmarks.studies import snapshots as snapshots_study
import optax_svrg
from tests import helpers

STEPS, SIZE, EPOCHS = 16, 4, 8
X = np.random.default_rng(0).normal(size=(STEPS * SIZE, 5))
Y = np.sign(X @ np.arange(5.0) + np.random.default_rng(1).normal(size=len(X)))
PARAMS = {"w": np.zeros(5), "b": np.zeros(())}


def loss(params, rows):
  x, y = jnp.asarray(X)[rows], jnp.asarray(Y)[rows]
  margins = y * (x @ params["w"] + params["b"])
  ridge = 0.05 * (params["w"] @ params["w"] + params["b"] ** 2)
  return jnp.mean(jnp.log1p(jnp.exp(-margins))) + ridge


grad = jax.grad(loss)


def orders(epochs):
  keys = jax.random.split(jax.random.key(0), epochs)
  draw = lambda key: jax.random.permutation(key, len(X)).reshape(STEPS, SIZE)
  return jax.vmap(draw)(keys)


def train(transform, epochs=EPOCHS, lr=0.3):
  """Parameters after each epoch, and the last state of the transformation."""
  tx = optax.chain(optax.with_extra_args_support(transform), optax.sgd(lr))

  def epoch(carry, order):
    def step(carry, i):
      params, state = carry
      grad_fn = lambda p: grad(p, order[i])
      updates, state = tx.update(
        grad_fn(params),
        state,
        params,
        grad_fn=grad_fn,
        batch_index=i,
        batch_grad_fn=lambda p, i: grad(p, order[i]),
      )
      return (optax.apply_updates(params, updates), state), None

    carry, _ = jax.lax.scan(step, carry, jnp.arange(STEPS))
    return carry, carry[0]

  params = jax.tree.map(jnp.asarray, PARAMS)
  (_, state), history = jax.jit(lambda c, o: jax.lax.scan(epoch, c, o))(
    (params, tx.init(params)), orders(epochs)
  )
  return history, state[0]


def experiment(study, name):
  """An experiment of the method that a study has by this name."""
  template = next(iter(study.STUDY.cells.values())).template
  return study.STUDY.arms[name](template.replace(epochs=12))


def follow(strategy, epochs=EPOCHS, lr=0.3):
  context = methods.Context(len(X), SIZE, epochs)
  made = experiment(snapshots_study, strategy)
  method = methods.make("snapshots", context, **made.method_settings)
  return train(method.transform, epochs, lr)


def final_norm(history):
  """Norm of the full gradient after the last epoch."""
  params = jax.tree.map(lambda x: x[-1], history)
  return float(optax.tree.norm(grad(params, np.arange(len(X)))))


def assert_same(got, want):
  for a, b in zip(got.values(), want.values(), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.standard_promotion
@pytest.mark.usefixtures("x64")
class TestSnapshots:
  def test_a_full_pass_is_the_library_as_users_call_it(self):
    got, _ = follow("full pass")
    tx = optax.chain(optax_svrg.adaptive_svrg(), optax.sgd(0.3))
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = tx.init(params)

    @jax.jit
    def step(params, state, rows):
      grad_fn = lambda p: grad(p, rows)
      updates, state = tx.update(
        grad_fn(params), state, params, grad_fn=grad_fn
      )
      return optax.apply_updates(params, updates), state

    full = jax.jit(lambda p: grad(p, np.arange(len(X))))
    for epoch, order in enumerate(orders(EPOCHS)):
      state = optax_svrg.take_snapshot(state, params, full)
      for rows in order:
        params, state = step(params, state, rows)
      np.testing.assert_allclose(params["w"], got["w"][epoch], rtol=1e-12)

  def test_a_table_changes_nothing(self):
    assert_same(follow("gradient table")[0], follow("full pass")[0])

  @pytest.mark.parametrize(
    ("strategy", "gradients"),
    [
      ("gradient table", EPOCHS),
      ("a pass each 4 epochs", EPOCHS + EPOCHS / 4),
      ("1/8 sampled, max_alpha=1/8", EPOCHS + EPOCHS / 8),
      # 1/16, 1/8, 1/4, 1/2, and all.
      ("growing samples", EPOCHS + 15 / 16 + EPOCHS - 4),
      ("second half", EPOCHS),
    ],
  )
  def test_gradients_are_counted(self, strategy, gradients):
    assert follow(strategy)[1].extra_gradients == gradients * STEPS

  @pytest.mark.slow
  def test_coin_flips(self):
    """A snapshot at the start, and then about once per epoch."""
    _, state = follow("coin flips", 40)
    taken = int(state.svrg.num_snapshots)
    assert 25 < taken < 55
    assert state.extra_gradients == (40 + taken) * STEPS

  @pytest.mark.parametrize("strategy", ["gradient table", "coin flips"])
  @pytest.mark.slow
  def test_linear_convergence(self, strategy):
    assert final_norm(follow(strategy, 150, 0.1)[0]) < 1e-9

  def test_plain_does_not_converge(self):
    assert final_norm(train(optax.identity(), 150, 0.1)[0]) > 1e-3

  @pytest.mark.slow
  def test_error_of_a_sampled_mean(self):
    """A constant step ends at a distance that a coefficient makes smaller."""
    alone, accounted = (
      final_norm(follow(strategy, 100, 0.1)[0])
      for strategy in ("1/8 sampled, alpha=1", "1/8 sampled, max_alpha=1/8")
    )
    assert alone > 2 * accounted

  def test_an_unknown_setting(self):
    context = methods.Context(3, 1, 1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'when'"):
      methods.make("snapshots", context, when="coin")


@pytest.mark.usefixtures("x64")
class TestCoefficients:
  @staticmethod
  def follow(tx):
    """Corrected gradients and states over two snapshots."""
    problem = helpers.finite_sum([3, 4, 1])
    params = {"a": jnp.arange(3.0), "b": jnp.array([2.0])}
    state = helpers.with_snapshot(tx, params, problem)
    corrected, states = [], []
    for scale in (0.7, 0.6):
      point = jax.tree.map(lambda x, s=scale: s * x, params)
      for batch in problem.batches:
        grad_fn = lambda p, b=batch: problem.grad(p, b)
        updates, state = tx.update(
          grad_fn(point), state, point, grad_fn=grad_fn
        )
        corrected.append(updates)
        states.append(state)
      state = optax_svrg.take_snapshot(state, point, problem.full_grad)
    return corrected, states

  def test_the_default_is_adaptive_svrg(self):
    """The study is of the library's arithmetic."""
    got, _ = self.follow(coefficients.transform())
    want, _ = self.follow(optax_svrg.adaptive_svrg(decay=0.97))
    helpers.assert_close(got, want, rtol=1e-12)

  @pytest.mark.parametrize("name", coefficient_study.VARIANTS)
  def test_others_differ(self, name):
    settings = experiment(coefficient_study, name).method_settings
    got, _ = self.follow(coefficients.transform(**settings))
    want, _ = self.follow(optax_svrg.adaptive_svrg(decay=0.97))
    with pytest.raises(AssertionError):
      helpers.assert_close(got, want, rtol=1e-12)

  def test_averages_that_are_kept(self):
    """The first step after the second snapshot."""
    alphas = [
      self.follow(coefficients.transform(kept=kept))[1][3].svrg.alpha
      for kept in (True, False)
    ]
    assert 0 < alphas[0] < alphas[1] == 1


@pytest.mark.standard_promotion
class TestSagaVariants:
  """With gradients that shrink from visit to visit."""

  NUM_BATCHES = 12  # More than one axis of the table holds.
  ORDER = tuple(np.random.default_rng(0).permutation(12)) * 3

  @property
  def params(self):
    return {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}

  def grads(self, i, step):
    return jax.tree.map(
      lambda g, n: 0.6 ** (step // self.NUM_BATCHES) * (g + 0.1 * n),
      helpers.random_like(self.params, 100 + int(i)),
      helpers.random_like(self.params, step),
    )

  def batch_grad_fn(self, params, i):
    return jax.tree.map(lambda p: jnp.full(p.shape, 1.0 + i), params)

  def run(self, tx, order=ORDER):
    """The corrected gradients of the steps, and the states after them."""
    state = tx.init(self.params)
    update = jax.jit(tx.update, static_argnames="batch_grad_fn")
    corrected, states = [], []
    for step, i in enumerate(order):
      updates, state = update(
        self.grads(i, step),
        state,
        self.params,
        batch_index=i,
        batch_grad_fn=self.batch_grad_fn,
      )
      corrected.append(updates)
      states.append(state)
    return corrected, states

  def variant(self, **settings):
    return saga_variants.transform(self.NUM_BATCHES, **settings)

  def test_without_an_addition_is_adaptive_saga(self):
    """The study is of the library's arithmetic."""
    want, _ = self.run(optax_svrg.adaptive_saga(self.NUM_BATCHES))
    got, _ = self.run(self.variant())
    helpers.assert_close(got, want, rtol=1e-6)

  def test_a_part_of_a_table_leaves_the_rest_uncorrected(self):
    corrected, states = self.run(self.variant(share=0.5))
    is_kept = helpers.flat(states[-1].is_kept).astype(bool)
    assert is_kept.sum() == 5
    last = len(self.ORDER) - 1
    plain = self.grads(self.ORDER[last], last)
    same = helpers.flat(corrected[-1]) == helpers.flat(plain)
    np.testing.assert_array_equal(same, ~is_kept)
    variances = helpers.flat(
      jax.tree.map(
        lambda t: t.var(axis=0),
        saga_variants.entries(states[11].saga, self.NUM_BATCHES),
      )
    )
    assert variances[is_kept].min() > variances[~is_kept].max()

  def test_a_table_that_is_filled_first(self):
    _, (state, *_) = self.run(self.variant(filled_first=True), (1,))
    table = saga_variants.entries(state.saga, self.NUM_BATCHES)["b"][:, 0]
    others = np.delete(np.arange(self.NUM_BATCHES), 1)
    np.testing.assert_array_equal(table[others], others + 1)
    helpers.assert_close(table[1], self.grads(1, 0)["b"][0], rtol=1e-6)
    assert state.saga.is_filled.all()
    assert state.extra_gradients == self.NUM_BATCHES

  def test_the_oldest_entry_is_refreshed(self):
    _, states = self.run(self.variant(refreshed=1), (2, 1, 1, 1))
    # Refreshed were 0, 1, 3 and 4: those never visited come first.
    table = saga_variants.entries(states[-1].saga, self.NUM_BATCHES)["b"][:, 0]
    np.testing.assert_array_equal(table[jnp.array([0, 3, 4])], [1, 4, 5])
    helpers.assert_close(table[1], self.grads(1, 3)["b"][0], rtol=1e-6)
    assert states[-1].extra_gradients == 4

  @pytest.mark.parametrize(
    ("name", "epochs"),
    [
      ("half a table", 12),
      ("table filled first", 11),
      ("one more entry per step", 6),
    ],
  )
  def test_equal_gradients(self, name, epochs):
    assert experiment(saga_study, name).epochs == epochs


class TestRegistry:
  CONTEXT = methods.Context(num_examples=10, batch_size=4, epochs=3)

  @pytest.mark.parametrize("name", methods.METHODS)
  def test_every_method_makes_a_state(self, name):
    method = methods.make(name, self.CONTEXT)
    arrays = jax.tree.leaves(method.transform.init({"w": jnp.zeros(3)}))
    assert all(np.isfinite(x).all() for x in arrays)
    assert method.num_steps(self.CONTEXT) == (
      3 if method.has_fixed_batches else 2
    )

  def test_linear_schedule(self):
    method = methods.make("alpha-svrg", self.CONTEXT, alpha0=0.5)
    assert method.coefficient(0) == 0.5
    assert method.coefficient(5) == 0
    assert method.uses_snapshot(0, 2)
    assert not method.uses_snapshot(4, 6)

  def test_an_order_that_is_fixed(self):
    for name in ("plain-fixed", "adaptive-saga"):
      assert not methods.make(name, self.CONTEXT).has_fixed_order
      fixed = methods.make(name, self.CONTEXT, fixed_order=True)
      assert fixed.has_fixed_order

  def test_a_table_of_another_dtype(self):
    method = methods.make("adaptive-saga", self.CONTEXT, table_dtype="bfloat16")
    state = method.transform.init({"w": jnp.zeros(3)})
    assert state.table["w"].dtype == jnp.bfloat16


class TestRecursive:
  def test_approximate_mars_is_quasi_hyperbolic_momentum(self):
    beta, gamma = 0.9, 0.3
    grads = np.random.default_rng(0).normal(size=(30, 5))
    tx = optax.chain(
      recursive.mars(None, gamma, is_exact=False).transform,
      optax.ema(beta, debias=False),
    )
    state = tx.init(jnp.zeros(5))
    published = average = last = np.zeros(5)
    for g in grads:
      got, state = tx.update(
        jnp.asarray(g, jnp.float32), state, jnp.zeros(5), grad_fn=None
      )
      c = g + gamma * beta / (1 - beta) * (g - last)
      published = beta * published + (1 - beta) * c
      average = beta * average + (1 - beta) * g
      last = g
      momentum = (1 - gamma) * average + gamma * g
      np.testing.assert_allclose(momentum, published, rtol=0, atol=1e-12)
      np.testing.assert_allclose(got, published, rtol=0, atol=1e-6)

  @pytest.mark.parametrize(
    ("method", "want"),
    [
      # g + 0.9 (d - s), and g + 0.5 * 9 (g - s), for gradients p and d = 1.
      (recursive.storm(None, 0.1), 3 + 0.9 * (1 - 1)),
      (recursive.mars(None, 0.5), 3 + 4.5 * (3 - 1)),
    ],
    ids=["storm", "mars"],
  )
  def test_the_second_gradient_is_at_the_last_parameters(self, method, want):
    tx = method.transform
    params = jnp.array([1.0])
    state = tx.init(params)
    grad_fn = lambda p: p
    first, state = tx.update(params, state, params, grad_fn=grad_fn)
    np.testing.assert_array_equal(first, params)
    moved = jnp.array([3.0])
    second, state = tx.update(moved, state, moved, grad_fn=grad_fn)
    np.testing.assert_allclose(second, [want], rtol=1e-6)
    assert state.extra_gradients == 2


class TestBalancedOrder:
  """The signs are those of GraB, computed from whole gradients one by one."""

  @staticmethod
  def reference(grads, signed, mean):
    signs = []
    for grad in grads - mean:
      sign = -1.0 if grad @ signed > 0 else 1.0
      signed = signed + sign * grad
      signs.append(sign)
    return np.array(signs), signed

  @pytest.mark.parametrize("form", ["last", "whole"])
  def test_signs(self, form):
    model = models.MODELS["mlp2"](4, 1, 3, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(6, 4, 4, 1)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 3, 6))
    graphdef, params = nnx.split(model, nnx.Param)
    params = nnx.as_pure(params)

    def factors_fn(params, whole):
      return balanced.factors(
        nnx.merge(graphdef, params), images, labels, whole
      )

    def grad(params, image, label):
      loss = lambda p: optax.losses.softmax_cross_entropy_with_integer_labels(
        nnx.merge(graphdef, p)(image[None]), label[None]
      ).sum()
      layers = [*jax.grad(loss)(params)["mlp"]["layers"].values()]
      kept = layers if form == "whole" else layers[-1:]
      return np.concatenate(
        [np.ravel(np.vstack([x["kernel"], x["bias"]])) for x in kept]
      )

    grads = np.stack(
      [grad(params, *pair) for pair in zip(images, labels, strict=True)]
    )
    context = methods.Context(num_examples=12, batch_size=6, epochs=2)
    transform = methods.make("balanced-order", context, form=form).transform
    state = transform.init(params)
    signed = mean = np.zeros(grads.shape[1])
    for _ in range(2):
      drawn = jnp.arange(12)[::-1]
      state = balanced.next_order(state, drawn, num_steps=2)
      seen = []
      for _ in range(2):
        _, state = transform.update({}, state, params, factors_fn=factors_fn)
        signs, signed = self.reference(grads, signed, mean)
        seen += [*signs]
      np.testing.assert_array_equal(state.signs, seen)
      flat = np.concatenate([np.ravel(x) for x in state.signed])
      np.testing.assert_allclose(flat, signed, rtol=1e-4, atol=1e-5)
      mean, signed = grads.mean(axis=0), np.zeros_like(mean)
    after = balanced.next_order(state, drawn, num_steps=2)
    front = [i for i, sign in zip(state.order, seen, strict=True) if sign > 0]
    back = [i for i, sign in zip(state.order, seen, strict=True) if sign < 0]
    np.testing.assert_array_equal(after.order, front + back[::-1])
    assert sorted(after.order.tolist()) == list(range(12))
    # An epoch that is resumed keeps its order.
    _, state = transform.update({}, after, params, factors_fn=factors_fn)
    kept = balanced.next_order(state, drawn, num_steps=2)
    np.testing.assert_array_equal(kept.order, after.order)

  def test_what_was_left_out_comes_first(self):
    params = {"mlp": {"layers": {0: {"kernel": jnp.ones((2, 3))}}}}
    context = methods.Context(num_examples=5, batch_size=2, epochs=1)
    state = methods.make("balanced-order", context).transform.init(params)
    state = state._replace(
      order=jnp.array([4, 3, 2, 1, 0]),
      signs=jnp.array([1, -1, -1, 1, 0], jnp.int8),
      step=jnp.int32(2),
    )
    after = balanced.next_order(state, jnp.arange(5), num_steps=2)
    assert after.order.tolist() == [0, 4, 1, 2, 3]
