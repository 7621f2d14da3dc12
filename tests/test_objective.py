"""The objective against PyTorch references written for these tests from the papers' formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terrafm_jax.ssl.objective import (
    Centers,
    ObjectiveSpec,
    center_metrics,
    center_sums,
    init_centers,
    loss_metrics,
    move_centers,
    pair_cross_entropy,
    teacher_targets,
)

torch = pytest.importorskip("torch")

B, V, G, K = 6, 5, 2, 33


def dino_loss(student, teacher, centers, *, student_temp, teacher_temp, alpha):
    """Loss and metrics, composed as the step does it."""
    targets = teacher_targets(teacher, centers, teacher_temp=teacher_temp, alpha=alpha)
    loss = pair_cross_entropy(student, targets.probs, student_temp)
    return loss, loss_metrics(loss, targets)


def moved(centers, teacher, is_frequent):
    """The centers after a batch."""
    return move_centers(centers, center_sums(teacher, is_frequent), momentum=0.9)


@jax.jit
def default_loss(student, teacher):
    """Loss and metrics with centers at zero."""
    return dino_loss(student, teacher, init_centers(K), student_temp=0.1, teacher_temp=0.04, alpha=0.8)


@pytest.fixture
def logits() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, V, K)).astype(np.float32), rng.normal(size=(B, G, K)).astype(np.float32)


def torch_dino(student, teacher, center, student_temp, teacher_temp):
    """DINO's loss as its paper has it: a double loop over views, lists of [B, K]."""
    targets = [torch.softmax((t - center) / teacher_temp, dim=-1).detach() for t in teacher]
    total, terms = 0.0, 0
    for i, target in enumerate(targets):
        for j, view in enumerate(student):
            if i == j:
                continue
            total = total + torch.sum(-target * torch.log_softmax(view / student_temp, dim=-1), dim=-1).mean()
            terms += 1
    return total / terms


@pytest.mark.parametrize("alpha", [1.0, 0.8, 0.0])
def test_loss_and_gradient_equal_torch(logits: tuple[np.ndarray, np.ndarray], alpha: float) -> None:
    student, teacher = logits
    rng = np.random.default_rng(1)
    overall, frequent = rng.normal(size=(2, K)).astype(np.float32)
    centers = Centers(jnp.asarray(overall), jnp.asarray(frequent))

    def loss_fn(s):
        return dino_loss(s, teacher, centers, student_temp=0.1, teacher_temp=0.05, alpha=alpha)[0]

    loss, gradient = jax.jit(jax.value_and_grad(loss_fn))(jnp.asarray(student))
    # alpha = 1 is plain DINO; otherwise the facts' formula g - alpha c - (1 - alpha) c_h
    center = torch.tensor(overall if alpha == 1 else alpha * overall + (1 - alpha) * frequent)
    s = torch.tensor(student, requires_grad=True)
    expected = torch_dino(list(s.unbind(1)), list(torch.tensor(teacher).unbind(1)), center, 0.1, 0.05)
    expected.backward()
    np.testing.assert_allclose(loss, expected.detach().numpy(), rtol=2e-6)
    np.testing.assert_allclose(gradient, s.grad.numpy(), rtol=1e-4, atol=1e-7)


def test_second_center_is_without_effect_at_alpha_one(logits: tuple[np.ndarray, np.ndarray]) -> None:
    student, teacher = logits
    c = jnp.linspace(-1, 1, K)
    losses = [
        dino_loss(student, teacher, Centers(c, other), student_temp=0.1, teacher_temp=0.04, alpha=1.0)[0]
        for other in (jnp.zeros(K), 5 * c)
    ]
    assert losses[0] == losses[1]


def test_teacher_and_targets_get_no_gradient(logits: tuple[np.ndarray, np.ndarray]) -> None:
    student, teacher = map(jnp.asarray, logits)

    def loss_fn(t, c):
        return dino_loss(student, t, c, student_temp=0.1, teacher_temp=0.04, alpha=0.8)[0]

    gradients = jax.grad(loss_fn, argnums=(0, 1))(teacher, init_centers(K))
    assert all(not np.any(g) for g in jax.tree.leaves(gradients))


def test_own_view_is_no_target() -> None:
    """One global view, one local: only the local view is taught, so the global one gets no gradient."""
    student = jnp.asarray(np.random.default_rng(2).normal(size=(3, 2, K)), jnp.float32)
    teacher = jnp.asarray(np.random.default_rng(3).normal(size=(3, 1, K)), jnp.float32)
    gradient = jax.grad(lambda s: default_loss(s, teacher)[0])(student)
    assert not np.any(gradient[:, 0])
    assert np.all(np.any(gradient[:, 1] != 0, axis=-1))


def test_hand_written_gradient_equals_autodiff(logits: tuple[np.ndarray, np.ndarray]) -> None:
    student, teacher = map(jnp.asarray, logits)
    probs = jax.nn.softmax(teacher, axis=-1)

    def plain(s):
        log = jax.nn.log_softmax(s / 0.1, axis=-1)
        pairs = -jnp.einsum("bgk,bvk->bgv", probs, log, precision="highest")
        mask = 1.0 - jnp.eye(G, V)
        return jnp.sum(pairs * mask[None]) / (B * G * (V - 1))

    ours = jax.jit(jax.value_and_grad(lambda s: 3.0 * pair_cross_entropy(s, probs, 0.1)))(student)
    auto = jax.jit(jax.value_and_grad(lambda s: 3.0 * plain(s)))(student)
    np.testing.assert_allclose(ours[0], auto[0], rtol=2e-6)
    np.testing.assert_allclose(ours[1], auto[1], rtol=1e-4, atol=2e-7)


def test_low_precision_logits_are_summed_in_float32(logits: tuple[np.ndarray, np.ndarray]) -> None:
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in logits)
    low = default_loss(student, teacher)[0]
    high = default_loss(student.astype(jnp.float32), teacher.astype(jnp.float32))[0]
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, high, rtol=1e-6)


def test_metrics(logits: tuple[np.ndarray, np.ndarray]) -> None:
    student, teacher = logits
    loss, metrics = default_loss(student, teacher)
    probs = torch.softmax(torch.tensor(teacher) / 0.04, dim=-1).numpy().astype(np.float64)
    entropy = -(probs * np.log(np.maximum(probs, 1e-300))).sum(-1)
    mean = probs.mean((0, 1))
    np.testing.assert_allclose(metrics["teacher_entropy"], entropy.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["sample_entropy"], entropy.mean(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["kl"], loss - entropy.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["marginal_entropy"], -(mean * np.log(mean)).sum(), rtol=1e-5)


def test_collapse_shows_in_the_monitors() -> None:
    """Every sample on one prototype: both entropies vanish; uniform outputs: both reach ln K."""
    one = jnp.zeros((B, G, K)).at[..., 3].set(10.0)
    flat = jnp.zeros((B, G, K))
    student = jnp.zeros((B, V, K))
    for teacher, expected in ((one, 0.0), (flat, np.log(K))):
        metrics = default_loss(student, teacher)[1]
        np.testing.assert_allclose([metrics["teacher_entropy"], metrics["marginal_entropy"]], expected, atol=1e-5)


def test_extreme_logits_stay_finite() -> None:
    student = jnp.full((2, 3, K), 1e4).at[:, :, 0].set(-1e4)
    teacher = jnp.full((2, 2, K), -1e4).at[:, :, 0].set(1e4)
    loss, gradient = jax.value_and_grad(lambda s: default_loss(s, teacher)[0])(student)
    assert np.isfinite(loss)
    assert np.all(np.isfinite(gradient))


# --- centers ----------------------------------------------------------------------------------


def test_centers_follow_their_samples() -> None:
    teacher = np.random.default_rng(4).normal(size=(B, G, K)).astype(np.float32)
    is_frequent = np.array([1, 0, 0, 1, 1, 0], bool)
    before = Centers(jnp.ones(K), 2 * jnp.ones(K))
    after = moved(before, jnp.asarray(teacher), jnp.asarray(is_frequent))
    np.testing.assert_allclose(after.overall, 0.9 + 0.1 * teacher.reshape(-1, K).mean(0), rtol=1e-5)
    np.testing.assert_allclose(after.frequent, 1.8 + 0.1 * teacher[is_frequent].reshape(-1, K).mean(0), rtol=1e-5)


def test_batch_without_frequent_samples_leaves_the_second_center() -> None:
    teacher = jnp.ones((B, G, K))
    before = Centers(jnp.zeros(K), jnp.linspace(0, 1, K))
    after = moved(before, teacher, jnp.zeros(B, bool))
    np.testing.assert_array_equal(after.frequent, before.frequent)
    np.testing.assert_allclose(after.overall, 0.1, rtol=1e-6)


def test_all_frequent_makes_both_centers_move_alike() -> None:
    teacher = jnp.asarray(np.random.default_rng(5).normal(size=(B, G, K)), jnp.float32)
    after = moved(init_centers(K), teacher, jnp.ones(B, bool))
    np.testing.assert_allclose(after.overall, after.frequent, rtol=1e-6)
    np.testing.assert_allclose(center_metrics(after)["center_distance"], 0.0, atol=1e-7)


def test_sums_of_parts_equal_the_whole() -> None:
    """Microbatches and devices contribute sums, so that an uneven number of frequent samples weighs right."""
    teacher = jnp.asarray(np.random.default_rng(6).normal(size=(B, G, K)), jnp.float32)
    is_frequent = jnp.asarray([True, False, False, False, True, True])
    whole = moved(init_centers(K), teacher, is_frequent)
    parts = [center_sums(teacher[i : i + 2], is_frequent[i : i + 2]) for i in range(0, B, 2)]
    total = jax.tree.map(lambda *x: sum(x), *parts)
    summed = move_centers(init_centers(K), total, momentum=0.9)
    for a, b in zip(whole, summed, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_center_metrics() -> None:
    metrics = center_metrics(Centers(3 * jnp.ones(K), -1 * jnp.ones(K)))
    np.testing.assert_allclose(
        [metrics["center_norm"], metrics["center_frequent_norm"], metrics["center_distance"]], [3, 1, 4], rtol=1e-6
    )


def test_spec_names_all_faults() -> None:
    with pytest.raises(ValueError, match=r"student_temp = 0.*alpha = 1\.5.*warmup_steps = -1"):
        ObjectiveSpec(student_temp=0, alpha=1.5, teacher_temp_warmup_steps=-1)
