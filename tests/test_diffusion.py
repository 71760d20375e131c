"""diffusion.py against numpy, diffusers' schedulers and the definitions in the papers."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch

from diffusekrona_train.models import process
from diffusekrona_train.models.process import Ddpm
from diffusekrona_train.training import loss as losses
from diffusekrona_train.training.draw import Shelf, draw
from diffusekrona_train.training.optimizer import learning_rate_factor

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SHELF = Shelf(pictures=5, variants=2, shape=(4, 6, 6))


@pytest.mark.parametrize(
    "config",
    [
        SD,
        {**SD, "rescale_betas_zero_snr": True},
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2, "num_train_timesteps": 400},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 300},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
    ],
)
def test_noise_schedule_is_diffusers(config):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(**config).alphas_cumprod
    torch.testing.assert_close(process.noise_schedule(config), theirs, rtol=2e-5, atol=1e-6)


def test_noise_schedule_names_an_unknown_kind():
    with pytest.raises(ValueError, match="'sigmoid'.*scaled_linear"):
        process.noise_schedule({"beta_schedule": "sigmoid"})


def test_add_noise_and_targets_are_diffusers():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**SD)
    x_0, eps = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    t = torch.tensor([0, 500, 999])
    bar = process.noise_schedule(scheduler)
    torch.testing.assert_close(process.add_noise(x_0, eps, t, bar), scheduler.add_noise(x_0, eps, t))  # type: ignore[arg-type]
    wanted = scheduler.get_velocity(x_0, eps, t)  # type: ignore[arg-type]
    torch.testing.assert_close(process.target(x_0, eps, t, bar, "v_prediction"), wanted)
    assert process.target(x_0, eps, t, bar, "epsilon") is eps
    assert process.target(x_0, eps, t, bar, "sample") is x_0
    with pytest.raises(ValueError, match="flow"):
        process.target(x_0, eps, t, bar, "flow")


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_gives_one_value_a_sample(name):
    loss = losses.LOSSES[name]
    a, b = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    together = loss(a, b)
    assert together.shape == (3,)
    for i in range(3):
        torch.testing.assert_close(loss(a[i : i + 1], b[i : i + 1])[0], together[i])
    assert loss(a, a).abs().max() == 0


def test_losses_are_their_formulas():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 5)).astype(np.float32)
    d2 = (a - b) ** 2
    mean = d2.reshape(3, -1).mean(1)
    torch.testing.assert_close(losses.mse(torch.tensor(a), torch.tensor(b)), torch.tensor(mean))
    pseudo = (0.2 * (np.sqrt(d2 + 0.01) - 0.1)).reshape(3, -1).mean(1)
    torch.testing.assert_close(losses.huber(torch.tensor(a), torch.tensor(b)), torch.tensor(pseudo))


@pytest.mark.parametrize("name", [name for name in process.WEIGHTINGS if name != "none"])
def test_a_weighting_means_the_same_whatever_is_predicted(name):
    """For one guess of x_0, the weighted error is one number, be it expressed as noise, v or sample."""
    bar = process.noise_schedule(SD).double()
    t = torch.tensor([1, 100, 500, 998])
    x_0, eps, off = torch.randn(3, 4, 4, 8, 8, dtype=torch.float64)
    a = bar[t].view(-1, 1, 1, 1)
    x_t = process.add_noise(x_0, eps, t, bar)
    x_guess = x_0 + off
    eps_guess = (x_t - a.sqrt() * x_guess) / (1 - a).sqrt()
    errors = {}
    for kind, guess in {"sample": x_guess, "epsilon": eps_guess}.items():
        wanted = process.target(x_0, eps, t, bar, kind)
        errors[kind] = losses.mse(guess, wanted) * process.weights(name, t, bar, kind)
    v_guess = process.target(x_guess, eps_guess, t, bar, "v_prediction")
    v = process.target(x_0, eps, t, bar, "v_prediction")
    errors["v"] = losses.mse(v_guess, v) * process.weights(name, t, bar, "v_prediction")
    torch.testing.assert_close(errors["epsilon"], errors["sample"], rtol=1e-5, atol=0)
    torch.testing.assert_close(errors["v"], errors["sample"], rtol=1e-5, atol=0)


def test_weightings_are_the_papers_on_the_noise():
    bar = process.noise_schedule(SD)
    t = torch.tensor([0, 300, 900])
    snr = (bar[t] / (1 - bar[t])).numpy()
    got = process.weights("min_snr", t, bar, "epsilon", 5.0).numpy()
    np.testing.assert_allclose(got, np.minimum(snr, 5) / snr, rtol=1e-4)
    got = process.weights("debiased", t, bar, "epsilon").numpy()
    np.testing.assert_allclose(got, snr**-0.5, rtol=1e-4)
    assert process.weights("none", t, bar, "epsilon").tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", process.WEIGHTINGS)
@pytest.mark.parametrize("kind", process.PREDICTION_TYPES)
def test_weights_are_finite_at_zero_terminal_snr(name, kind):
    bar = process.noise_schedule({**SD, "rescale_betas_zero_snr": True})
    assert process.weights(name, torch.tensor([0, 999]), bar, kind).isfinite().all()


def test_learning_rate_schedules():
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    factor = learning_rate_factor
    assert [factor("constant", step, 10, 0) for step in (0, 5, 9)] == [1, 1, 1]
    assert [factor("constant", step, 10, 3) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    parameter = torch.nn.Parameter(torch.zeros(1))
    for name, make in {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}.items():
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        schedule = make(optimizer, num_warmup_steps=0, num_training_steps=20)
        for step in range(20):
            assert factor(name, step, 20, 0) == pytest.approx(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()


def uniform(times: int):
    """Ddpm's times of a schedule of so many."""
    return Ddpm(torch.linspace(0.99, 0.01, times)).draw_t


def same(a, b):
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("picture", "variant", "t", "eps", "dropout"))


def test_a_draw_depends_on_seed_step_and_index_alone():
    shelves = [SHELF, Shelf(3, 1, (4, 4, 8))]
    for step in range(9):
        whole = draw(7, step, range(4), 4, shelves, draw_t=uniform(1000))
        torch.randn(17)  # the global generator plays no part
        halves = [draw(7, step, part, 4, shelves, draw_t=uniform(1000)) for part in ([0, 1], [2, 3])]
        assert {half.shelf for half in halves} == {whole.shelf}
        for key in ("picture", "variant", "t", "eps", "dropout"):
            assert torch.equal(torch.cat([getattr(half, key) for half in halves]), getattr(whole, key))
        assert same(draw(7, step, range(4), 4, shelves, draw_t=uniform(1000)), whole)
        assert not same(draw(8, step, range(4), 4, shelves, draw_t=uniform(1000)), whole)


def test_streams_differ():
    a, b = (draw(0, 0, range(2), 2, [SHELF], draw_t=uniform(1000), stream=name) for name in ("instance", "prior"))
    assert not torch.equal(a.eps, b.eps)


@pytest.mark.parametrize("global_batch", [1, 2, 3, 8])
def test_every_pass_shows_every_picture_once(global_batch):
    stream = [
        int(picture)
        for step in range(15)
        for picture in draw(0, step, range(global_batch), global_batch, [SHELF], draw_t=uniform(10)).picture
    ]
    passes = [stream[i : i + 5] for i in range(0, len(stream) - 4, 5)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_buckets_come_up_in_proportion_and_pictures_equally_often():
    shelves = [Shelf(6, 1, (4, 4, 4)), Shelf(1, 1, (4, 2, 8)), Shelf(3, 1, (4, 8, 2))]
    seen = collections.Counter()
    for step in range(40):
        drawn = draw(3, step, range(3), 3, shelves, draw_t=uniform(10))
        assert drawn.eps.shape[1:] == shelves[drawn.shelf].shape
        seen.update((drawn.shelf, int(picture)) for picture in drawn.picture)
    assert len(seen) == 10 and set(seen.values()) == {12}


def test_timesteps_are_uniform_and_noise_is_normal():
    drawn = [draw(0, step, range(8), 8, [SHELF], draw_t=uniform(50)) for step in range(200)]
    t = torch.cat([d.t for d in drawn])
    counts = torch.bincount(t, minlength=50).float()
    assert t.min() == 0 and t.max() == 49
    assert ((counts - 32) ** 2 / 32).sum() < 85  # chi-square, 49 degrees of freedom, p = 0.001
    eps = torch.cat([d.eps for d in drawn])
    assert abs(eps.mean()) < 0.01 and abs(eps.std() - 1) < 0.01
    assert set(torch.cat([d.variant for d in drawn]).tolist()) == {0, 1}


def test_noise_offset_moves_whole_channels():
    plain = draw(0, 0, range(2), 2, [SHELF], draw_t=uniform(10))
    moved = draw(0, 0, range(2), 2, [SHELF], draw_t=uniform(10), noise_offset=0.1)
    shift = moved.eps - plain.eps
    assert shift.flatten(2).std(-1).max() < 1e-6 and shift.abs().max() > 0
