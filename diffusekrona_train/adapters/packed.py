"""Adapters of several subjects in one model at once: each sample of a batch sees its own subject's adapter.

    pack = Pack(unet, AdapterConfig(a1=4, a2=64), slots=8)
    dog, cat = pack.seat(0, seed=0), pack.seat(1, seed=1)    # two subjects; a seat is an Injection
    pack.choose([0, 1])                                      # first half of a batch: dog, second half: cat
    unet(x, ...)                                             # one batch for the base, batched products for adapters
    pack.backward(loss)                                      # gradients lie in each subject's own flat buffer

All subjects have adapters of the same type and shapes, so a factor of all of them is one tensor (m, rows, columns):
what m subjects add to a layer takes as many kernels as what one adds. Sample k reaches adapter k only, so the gradient
of a subject is the one that it would have alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffusekrona_train.adapters.base import Adapter, Options, scaled
from diffusekrona_train.adapters.baselines import LoHa, LoKr, LoRA
from diffusekrona_train.adapters.flat import SPARE, FlatFactors, Segment, aligned
from diffusekrona_train.adapters.further import Terms
from diffusekrona_train.adapters.grouped import AdaptedLinear, Chooser
from diffusekrona_train.adapters.inject import Injection
from diffusekrona_train.adapters.kron import kron_macs
from diffusekrona_train.adapters.krona import KronA
from diffusekrona_train.config import AdapterConfig

Factors = dict[str, Tensor]
"""Parameter name -> that parameter of m subjects, (m, rows, columns)."""


class Pack:
    """Room for `slots` subjects in one model. `masters` (slots, n) holds their fp32 factors, a row a subject.

    ValueError for a type of adapter that does not pack, and for targets that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: AdapterConfig,
        slots: int,
        *,
        options: dict[str, Options] | None = None,
        dtype: torch.dtype = torch.float32,
        masters: torch.dtype = torch.float32,
    ):
        first = Injection(model, spec, 0, options, placed=False)
        for adapter in first.adapters.values():
            if type(adapter) not in PRODUCTS:
                kinds = ", ".join(sorted(kind.__name__ for kind in PRODUCTS))
                raise ValueError(f"adapters of type {type(adapter).__name__} cannot be packed; these can: {kinds}")
            if getattr(adapter, "row_permutation", False):
                raise ValueError("adapters of the paper's authors cannot be packed; convert them with krona-convert")
        self.model, self.spec, self.options, self.dtype, self.slots = model, spec, first.options, dtype, slots
        layout = FlatFactors([first.adapters])
        self.size, self.segments = layout.size, layout.segments
        device = layout.master.device
        self.masters = torch.zeros(slots, self.size, dtype=masters, device=device)
        self._buffers = torch.zeros(slots, self.size + aligned(SPARE), dtype=masters, device=device)
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._room: tuple[Tensor, Tensor] | None = None
        self._leaves: dict[int, dict[str, Factors]] = {}
        self._chosen: tuple[int, ...] = ()
        self.active: dict[str, Factors] = {}
        self.strengths: Tensor | None = None
        self.disabled = False
        self._stale = False
        self._place(first)
        model.register_forward_pre_hook(lambda *_: self._renew() if self._stale else None)

    def _place(self, first: Injection) -> None:
        for name, adapter in first.adapters.items():
            assert isinstance(adapter, Adapter)
            parent, _, child = name.rpartition(".")
            site = AdaptedLinear(self.model.get_submodule(name), PackedAdapter(self, adapter))  # type: ignore[arg-type]
            setattr(self.model.get_submodule(parent), child, site)

    def seat(self, slot: int, seed: int = 0) -> Seat:
        """Give `slot` to a new subject, whose factors start from `seed` as those of an injection of its own."""
        return Seat(self, slot, seed)

    def home(self, slot: int) -> tuple[Tensor, Tensor]:
        """Return where a slot's factors are, and its gradients with SPARE numbers behind them."""
        return self.masters[slot], self._buffers[slot, : self.size + SPARE]

    # ---- who sees what ----

    @torch.no_grad()
    def choose(self, slots: Sequence[int], strengths: Sequence[float] | None = None) -> None:
        """Let the samples of the next batches see these slots, each an equal share of the batch, in this order.

        A slot may come several times. `strengths` multiply what each of them adds. The factors are copied as they are
        now, and once more before the model runs after their flat buffers were refreshed.
        """
        self._chosen = tuple(slots)
        self._renew()
        self.active = self._leaves_of(len(slots))
        self._strengthen(strengths or [])

    def _strengthen(self, strengths: Sequence[float]) -> None:
        ones = all(strength == 1 for strength in strengths)
        values = torch.tensor(strengths, device=self.masters.device, dtype=self.dtype)
        self.strengths = None if ones else values.view(-1, 1, 1)

    @torch.no_grad()
    def _renew(self) -> None:
        """Copy the chosen slots' factors."""
        factors, _ = self._space(len(self._chosen))
        factors.copy_(self.masters.index_select(0, self._index()))
        self._stale = False

    def stale(self) -> None:
        """Note that factors have changed since they were copied."""
        self._stale = bool(self._chosen)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the chosen slots, in the type of their factors.

        A pass that fails adds nothing.
        """
        _, stage = self._space(len(self._chosen))
        try:
            with warnings.catch_warnings():  # a factor's copies lie apart, which only the first pass is warned of
                warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
                loss.backward()
            with torch.no_grad():
                self._buffers[:, : self.size].index_add_(0, self._index(), stage.to(self._buffers.dtype))
        finally:
            stage.zero_()

    @contextmanager
    def off(self) -> Generator[None]:
        """Make the model the base model inside the block."""
        before, self.disabled = self.disabled, True
        try:
            yield
        finally:
            self.disabled = before

    @contextmanager
    def by_prompt(self, slots: Sequence[int], strengths: Sequence[float]) -> Generator[Callable[[float], None]]:
        """Within, image i of a batch that is generated sees `slots[i]`, in both its rows where there is guidance.

        Pipelines put the unconditional rows of all images before the others, or call the model twice. What is yielded
        multiplies all strengths from now on.
        """
        factor = 1.0

        def strengthen(by: float) -> None:
            nonlocal factor
            factor = by
            self._strengthen([strength * factor for strength in strengths] * (len(self._chosen) // len(slots)))

        def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            sample = given[0] if given else next(iter(named.values()))
            rows = len(sample) // len(slots)
            if rows * len(slots) != len(sample):
                raise RuntimeError(f"the model was given {len(sample)} rows for {len(slots)} images")
            if self._chosen != tuple(slots) * rows:
                self.choose(tuple(slots) * rows, [strength * factor for strength in strengths] * rows)

        self._chosen = ()
        handle = self.model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield strengthen
        finally:
            handle.remove()

    # ---- the copies that a batch computes with ----

    def _index(self) -> Tensor:
        if self._chosen not in self._indices:
            self._indices[self._chosen] = torch.tensor(self._chosen, device=self.masters.device)
        return self._indices[self._chosen]

    def _space(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the first `count` rows of the copies and of their gradients."""
        if self._room is None or len(self._room[0]) < count:
            shape = max(count, self.slots), self.size
            factors = torch.zeros(shape, dtype=self.dtype, device=self.masters.device)
            # a tensor of its own: autograd counts changes by storage, and gradients change in a backward pass
            self._room, self._leaves = (factors, torch.zeros_like(factors)), {}
        return self._room[0][:count], self._room[1][:count]

    def _leaves_of(self, count: int) -> dict[str, Factors]:
        if count not in self._leaves:
            factors, stage = self._space(count)
            found: dict[str, Factors] = {}
            for segment in self.segments:
                leaf = _all_of(segment, factors).detach().requires_grad_()
                leaf.grad = _all_of(segment, stage)
                found.setdefault(segment.layer, {})[segment.factor] = leaf
            self._leaves[count] = found
        return self._leaves[count]


def _all_of(segment: Segment, rows: Tensor) -> Tensor:
    """Return the view (m, rows, columns) of one factor in rows (m, n)."""
    return rows[:, segment.start : segment.start + segment.size].unflatten(1, segment.shape)


class Seat(Injection):
    """One subject of a pack: its adapters, to train, save and load, without a place of its own in the model."""

    def __init__(self, pack: Pack, slot: int, seed: int):
        super().__init__(pack.model, pack.spec, seed, pack.options, placed=False)
        self.pack, self.slot = pack, slot

    def flatten(self, by_operator: Chooser | None = None) -> FlatFactors:
        """Move parameters and gradients into the slot's rows."""
        self.flat = Row(self.pack, self.slot, self.adapters)
        return self.flat

    def set_strength(self, strength: float) -> None:
        """Let the model show only this subject, with this strength."""
        self.pack.choose([self.slot], [strength])

    @contextmanager
    def disabled(self) -> Generator[None]:
        """Make the model the base model inside the block."""
        with self.pack.off():
            yield


class Row(FlatFactors):
    """The flat buffers of one subject, in its pack's."""

    def __init__(self, pack: Pack, slot: int, adapters: Mapping[str, nn.Module]):
        super().__init__([adapters], pack.home(slot))
        self.pack = pack

    def refresh(self) -> None:
        """Have the copies made anew too: the run's average is shown in the factors' place."""
        super().refresh()
        self.pack.stale()


class PackedAdapter(nn.Module):
    """What the chosen subjects of a pack add to one layer; `kind` is any of their adapters."""

    lane = None

    def __init__(self, pack: Pack, kind: Adapter):
        super().__init__()
        self._of = (pack, kind)  # in a tuple, so that neither is a part of the model
        self.layer = kind.layer

    @property
    def off(self) -> bool:
        """Whether the model is the base model now."""
        return self._of[0].disabled

    def attached(self, base: nn.Module) -> None:
        """Do nothing: types that pack need nothing of their layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute what is added, (B, ..., out), for x (B, ..., in); the m subjects have B / m samples each."""
        pack, kind = self._of
        factors = {name: value.to(x.dtype) for name, value in pack.active[kind.layer.name].items()}
        rows = x.reshape(len(next(iter(factors.values()))), -1, x.shape[-1])
        added = PRODUCTS[type(kind)](kind, factors, rows)
        if pack.strengths is not None:
            added = added * pack.strengths
        return added.view(*x.shape[:-1], added.shape[-1])


# ---- the products, for x (m, n, in) -> (m, n, out) ------------------------------------------------------------------


def _krona(kind: Adapter, of: Factors, x: Tensor) -> Tensor:
    return _kron(x, scaled(of["A"], kind.multiplier), of["B"])


def _lora(kind: Adapter, of: Factors, x: Tensor) -> Tensor:
    return _linear(_linear(x, of["lora_down"]), scaled(of["lora_up"], kind.multiplier))


def _lokr(kind: Adapter, of: Factors, x: Tensor) -> Tensor:
    w1, w2 = (of[name] if name in of else of[f"{name}_a"] @ of[f"{name}_b"] for name in ("lokr_w1", "lokr_w2"))
    return _kron(x, scaled(w1, kind.multiplier), w2)


def _loha(kind: Adapter, of: Factors, x: Tensor) -> Tensor:
    """Multiply as LoHa does: as the LoRA of rank² that it is, or by the dense ΔW where that is cheaper."""
    up_1, down_1, up_2, down_2 = (of[f"hada_w{side}"] for side in ("1_a", "1_b", "2_a", "2_b"))
    scale, (outs, rank), ins = kind.multiplier, up_1.shape[1:], down_1.shape[2]
    if rank**2 * (ins + outs) >= ins * outs:
        return _linear(x, scaled((up_1 @ down_1) * (up_2 @ down_2), scale))
    up = (up_1[..., :, None] * up_2[..., None, :]).flatten(2)
    down = (down_1[:, :, None] * down_2[:, None]).flatten(1, 2)
    return _linear(_linear(x, down), scaled(up, scale))


def _terms(kind: Adapter, of: Factors, x: Tensor) -> Tensor:
    rho = of["terms_a"].shape[2]
    tokens, first = x.unflatten(2, (-1, rho)), scaled(of["terms_a"], kind.multiplier)
    return torch.einsum("mncr,mkac,mkbr->mnab", tokens, first, of["terms_b"]).flatten(2)


PRODUCTS: dict[type[Adapter], Callable[[Adapter, Factors, Tensor], Tensor]] = {
    KronA: _krona,
    LoRA: _lora,
    LoKr: _lokr,
    LoHa: _loha,
    Terms: _terms,
}
"""Type of adapter -> its product for the factors of m subjects."""


def _linear(x: Tensor, W: Tensor) -> Tensor:
    """Compute x (m, n, i) times the transpose of W (m, o, i): (m, n, o)."""
    return torch.bmm(x, W.mT)


def _kron(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Compute x times the transpose of A ⊗ B for A (m, a2, a1), B (m, b2, b1), in the cheaper order.

    The side of the first product goes in front of the tokens, so that the second one is one product too, and only its
    result is transposed.
    """
    (m, a2, a1), (_, b2, b1) = A.shape, B.shape
    tokens = x.shape[1]
    b_first, a_first = kron_macs(a1, a2, b1, b2)
    if b_first <= a_first:
        inner = torch.bmm(B, x.reshape(m, tokens * a1, b1).mT)  # (m, b2, tokens * a1)
        outer = torch.bmm(inner.view(m, b2 * tokens, a1), A.mT).view(m, b2, tokens, a2)
        return outer.permute(0, 2, 3, 1).reshape(m, tokens, a2 * b2)
    parts = x.view(m, tokens, a1, b1).transpose(1, 2).reshape(m, a1, tokens * b1)
    outer = torch.bmm(torch.bmm(A, parts).view(m, a2 * tokens, b1), B.mT).view(m, a2, tokens, b2)
    return outer.transpose(1, 2).reshape(m, tokens, a2 * b2)
