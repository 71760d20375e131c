"""A along the gradient, against the gradient of dense weights and torch's SVD of the rearranged blocks."""

from __future__ import annotations

import pytest
import torch

from diffusekrona_train.adapters import KronA
from diffusekrona_train.config import make_config
from diffusekrona_train.training import train
from diffusekrona_train.training.align import collected, leading
from diffusekrona_train.training.loss import Objective
from tests.runs import command, factors, finish, make_run, make_world, newest_state, same_factors, start, world_env

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ALIGNED = {"init_a": "aligned", "align_draws": 5, "a1": 4, "a2": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def blocks_of(gradient, a1, a2):
    """The rearrangement written out: one row for each block of the gradient."""
    rows, columns = gradient.shape[0] // a2, gradient.shape[1] // a1
    blocks = [
        gradient[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].flatten()
        for i in range(a2)
        for j in range(a1)
    ]
    return torch.stack(blocks)


@pytest.mark.parametrize(("a2", "a1"), [(4, 4), (2, 6), (8, 1), (1, 3)])
def test_a_is_the_leading_vector_of_the_blocks(a2, a1):
    gradient = torch.randn(16, 24, generator=torch.Generator().manual_seed(a2))
    A = leading(gradient, a2, a1)
    U, S, _ = torch.linalg.svd(blocks_of(gradient, a1, a2).double(), full_matrices=False)
    cosine = float(torch.dot(A.flatten().double() / A.norm(), U[:, 0]))
    assert abs(cosine) == pytest.approx(1, abs=1e-6)
    assert float(A.square().mean().sqrt()) == pytest.approx(1 / a2, rel=1e-5) and A.flatten()[A.abs().argmax()] > 0
    # B that fits best then leaves the smallest remainder that any A ⊗ B leaves
    B = torch.einsum("ai,abij->bj", A, gradient.view(a2, 16 // a2, a1, 24 // a1).transpose(2, 2)) / A.norm() ** 2
    left = gradient - torch.kron(A, B)
    assert float(left.norm() ** 2) == pytest.approx(float((S[1:] ** 2).sum()), rel=1e-3)


def caught(world, tmp_path, monkeypatch, **sections):
    """The run at its first step, and its objective."""
    held = {}
    from diffusekrona_train.training import run as running

    def stop(run):
        held["run"] = run
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "work", stop)
    with pytest.raises(KeyboardInterrupt):
        train(make_run(world, tmp_path / "run", **sections))
    return held["run"]


def test_the_a_of_a_run_are_those_of_the_mean_gradient_of_dense_weights(world, tmp_path, monkeypatch):
    run = caught(world, tmp_path, monkeypatch, adapter=ALIGNED)
    objective: Objective = run.objective
    adapters = {name: adapter for name, adapter in objective.injection.adapters.items() if isinstance(adapter, KronA)}
    assert torch.count_nonzero(run.descent.factors.gradient) == 0
    batches = [objective.instance(number, "aligned") for number in range(5)]
    model = objective.injection.model
    weights = {name: model.get_parameter(f"{name}.base.weight") for name in adapters}
    for weight in weights.values():
        weight.requires_grad_(True)
    with objective.injection.disabled():
        for batch in batches:
            objective.per_sample(batch).sum().backward()
    seen = 0
    for name, adapter in adapters.items():
        gradient = weights[name].grad
        assert gradient is not None and torch.count_nonzero(adapter.B) == 0
        U = torch.linalg.svd(blocks_of(gradient.double(), 4, 4), full_matrices=False).U[:, 0]
        A = adapter.A.detach().double().flatten()
        assert float(torch.dot(A, U).abs() / A.norm()) == pytest.approx(1, abs=1e-3), name
        seen += 1
    assert seen > 10


def test_it_works_over_nf4(world):
    """What the hooks sum over a quantised layer is the gradient of the weight that it stands for."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    class Net(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.to_q = layer

    dense = torch.nn.Linear(64, 64, bias=False)
    packed = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    packed.load_state_dict(dense.state_dict())
    packed.to("cpu")
    from diffusekrona_train.adapters import build_adapter
    from diffusekrona_train.adapters.grouped import AdaptedLinear
    from diffusekrona_train.config import AdapterConfig
    from diffusekrona_train.models.layers import Layer

    spec, layer = AdapterConfig(a1=4, a2=4), Layer("to_q", 64, 64, "q", "self")
    adapter = build_adapter(spec, layer, {"a1": 4, "a2": 4})
    site = AdaptedLinear(packed, adapter)
    x, target = torch.randn(7, 64), torch.randn(7, 64)

    class Injected:
        model, adapters = Net(site), {"to_q": adapter}

    with collected(Injected(), torch.device("cpu")) as gradients:  # type: ignore[arg-type]
        for _ in range(2):
            (site(x) - target).square().sum().backward()
    with torch.no_grad():
        weight = packed(torch.eye(64)).mT.clone()
    weight.requires_grad_(True)
    (x @ weight.mT - target).square().sum().backward()
    torch.testing.assert_close(gradients["to_q"], 2 * weight.grad, rtol=1e-3, atol=1e-2)


def test_two_processes_a_larger_batch_and_a_second_run_begin_with_the_same_a(world, tmp_path):
    def begun(name):
        state = newest_state(tmp_path / name)
        return {key: value for key, value in state.part("factors").items() if key.endswith("|A")}

    steps = {"steps": 1, "checkpoint_every": 1, "learning_rate": 1e-9, "weight_decay": 0.0}
    one = make_run(world, tmp_path / "one", adapter=ALIGNED, train={**steps, "batch_size": 2})
    train(one)
    train(make_run(world, tmp_path / "again", adapter=ALIGNED, train={**steps, "batch_size": 1}))
    two = make_run(world, tmp_path / "two", adapter=ALIGNED, train={**steps, "batch_size": 1})
    children = [start(lambda: command(two), tmp_path / f"log{i}", **own) for i, own in enumerate(world_env(2))]
    assert [finish(child) for child in children] == [0, 0]
    random = make_run(world, tmp_path / "random", train=steps)
    train(random)
    assert same_factors(begun("one"), begun("again")) and same_factors(begun("one"), begun("two"))
    assert not any(torch.equal(value, begun("random")[name]) for name, value in begun("one").items())


def test_a_resumed_run_does_not_align_again(world, tmp_path):
    straight = factors(train(make_run(world, tmp_path / "a" / "run", adapter=ALIGNED)).file.parent)
    config = make_run(world, tmp_path / "b" / "run", adapter=ALIGNED, train={"steps": 2})
    train(config)
    longer = make_run(world, tmp_path / "b" / "run", adapter=ALIGNED)
    assert same_factors(factors(train(longer, resume=True).file.parent), straight)


def test_an_aligned_start_is_for_krona_with_b_zero():
    tree = {"subject": {"images": "x", "class": "dog"}, "output": "runs/x"}
    for more in ({"type": "lora"}, {"init_b": "same"}):
        with pytest.raises(ValueError, match="init_a: aligned is for type: krona with init_b: zero"):
            make_config({**tree, "adapter": {"init_a": "aligned", **more}})
