"""Wrap linear layers with adapters, and compute those with the same input together: a node before and one for each.

    z = inner factors of all members on x        `_Enter`, at the first member that sees x
    y = base(x) + scale * outer factor on z      `_Plain` or `_Over`, at each member

Where a GPU waits for its next kernel, the number of kernels is what counts: products add into the base's output and
into the gradient of x, and the gradients of the factors go straight into the flat buffers (`flat`). So the members'
nodes only hand their gradients to `_Enter`, whose backward comes after all of theirs and does all the work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusekrona_train.adapters import operator
from diffusekrona_train.adapters.base import Adapter, check_plain
from diffusekrona_train.adapters.flat import FlatFactors, Members, Segment, grouped, reads_the_text
from diffusekrona_train.adapters.kron import Left, computes_in_own_type
from diffusekrona_train.adapters.texts import Ahead, Texts


class AdaptedLinear(nn.Module):
    """A frozen layer and what is added to it, in the layer's output type. The base may be adapted itself.

    The layer is linear, or a 1x1 convolution, which is the same on channels (proj_in and proj_out of SD 1).
    """

    def __init__(self, base: nn.Module, adapter: Adapter):
        super().__init__()
        self.base, self.adapter, self.fused = base, adapter, False
        self.channels_first = isinstance(self.innermost(), nn.Conv2d)
        adapter.attached(self.innermost())

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        lane = self.adapter.lane
        if self.fused or self.adapter.off:
            return self.base(x, *args, **kwargs)
        plain = not (args or kwargs or self.channels_first or torch.compiler.is_compiling())
        if lane is not None and plain and computes_in_own_type(x):
            return lane.forward(self.base, x)
        y = self.base(x, *args, **kwargs)
        if self.channels_first:
            return y + self.adapter(x.movedim(1, -1)).movedim(-1, 1).to(y.dtype)
        return y + self.adapter(x).to(y.dtype)

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        return self.base.in_channels if self.channels_first else self.base.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        return self.base.out_channels if self.channels_first else self.base.out_features  # type: ignore[return-value]

    def check_fusable(self) -> None:
        """Raise ValueError if the weights cannot be changed."""
        check_plain(self.adapter.layer.name, self.innermost())

    def fuse_for_good(self) -> None:
        """Fuse without the copy that `unfuse` needs; for a layer with one adapter, so that it is rounded once."""
        linear = self.innermost()
        with torch.no_grad():
            difference = self.adapter.delta().view_as(linear.weight)  # type: ignore[arg-type]
            linear.weight.copy_(linear.weight.float() + difference)  # type: ignore[operator,union-attr]
        self.fused = True

    def fuse(self) -> None:
        linear = self.innermost()
        self.check_fusable()
        fused: list[Adapter] = linear.__dict__.setdefault("_fused_adapters", [])
        if not fused:
            linear.__dict__["_unfused_weight"] = linear.weight.detach().clone()  # type: ignore[operator]
        fused.append(self.adapter)
        _sum_into(linear)
        self.fused = True

    def unfuse(self) -> None:
        linear = self.innermost()
        if self.adapter not in linear.__dict__.get("_fused_adapters", []):
            raise ValueError(f"{self.adapter.layer.name} was fused permanently; load the model again to remove it")
        linear.__dict__["_fused_adapters"].remove(self.adapter)
        _sum_into(linear)
        self.fused = False

    def take_out(self, model: nn.Module, name: str) -> None:
        """Put the base in this wrapper's place, wherever it is in a stack."""
        parent, _, child = name.rpartition(".")
        holder = model.get_submodule(parent)
        while getattr(holder, child) is not self:
            holder, child = getattr(holder, child), "base"
        setattr(holder, child, self.base)

    def innermost(self) -> nn.Module:
        """Return the frozen layer itself, beneath all adapters."""
        linear = self.base
        while isinstance(linear, AdaptedLinear):
            linear = linear.base
        return linear


@torch.no_grad()
def _sum_into(linear: nn.Module) -> None:
    """weight = original + all fused differences, in fp32, rounded once; with none left the original itself."""
    kept, fused = linear.__dict__["_unfused_weight"], linear.__dict__["_fused_adapters"]
    total = kept
    for adapter in fused:
        total = total.float() + adapter.delta().view_as(kept)
    linear.weight.copy_(total)  # type: ignore[operator]
    if not fused:
        del linear.__dict__["_unfused_weight"], linear.__dict__["_fused_adapters"]


# ---- several together -----------------------------------------------------------------------------------------------

Chooser = Callable[[Tensor, Tensor, Tensor], bool]
"""(x, A, B) -> whether one operator should compute both products."""


def flatten(
    subjects: Sequence[Mapping[str, nn.Module]],
    by_operator: Chooser | None = None,
    sites: Mapping[str, AdaptedLinear] | None = None,
    texts: Texts | None = None,
) -> FlatFactors:
    """Move the subjects' parameters into flat buffers, and have those that can be computed together computed so.

    `by_operator` says which products the operator computes; default: `operator.use_operator` on a GPU, else none.
    `sites`: layer name -> where its adapter is, for those that can be computed ahead (see `texts`).
    """
    flat, texts = FlatFactors(subjects), texts or Texts()
    flat.after_round.append(texts.forget)
    for slot, layers, segments in flat.layout:
        adapters = {layer: adapter for layer in layers if isinstance(adapter := subjects[slot][layer], Adapter)}
        if not adapters or adapters[layers[0]].sides is None:
            continue
        groups = []
        for names in grouped(adapters):
            starts = {segment.factor: segment for segment in segments if segment.layer == names[0]}
            groups.append(group := Group(flat, [adapters[name] for name in names], starts, texts, by_operator))
            for index, name in enumerate(names):
                adapters[name].lane = GroupLane(group, index)
        if sites and reads_the_text(adapters[layers[0]]):
            texts.ahead.append(Ahead(flat, groups, [sites[layer] for layer in layers]))
    return flat


class Group(Members):
    """Members that one block computes together: they are given the same input."""

    def __init__(
        self,
        flat: FlatFactors,
        adapters: list[Adapter],
        starts: Mapping[str, Segment],
        texts: Texts,
        by_operator: Chooser | None,
    ):
        super().__init__(flat, adapters, starts)
        self.texts = texts
        self._shared: _Shared | None = None
        if Left not in (self.inner, self.outer):
            by_operator = None
        elif by_operator is None and flat.master.is_cuda:
            by_operator = operator.use_operator
        self._by_operator = by_operator

    def kron(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return (inner, outer) as (A, B)."""
        return pair if self.inner is Left else (pair[1], pair[0])

    def by_operator(self, x: Tensor) -> bool:
        """Return whether one operator computes both products."""
        if self._by_operator is None:
            return False
        A, B = self.kron(self.factors(x.dtype))
        return self._by_operator(x, A[0], B[0])

    def enter(self, x: Tensor) -> Tensor:
        """Compute z (s, n, *) of all members for x (n, in); empty where the operator is used, which needs none."""
        return x.new_empty(0) if self.by_operator(x) else self.inner.many(self.factors(x.dtype)[0], x)

    def add(self, index: int, y: Tensor, x: Tensor, z: Tensor, *, fresh: bool) -> Tensor:
        """Add to y (n, out) what a member adds for x (n, in), in place unless `fresh`."""
        inner, outer = self.each(x.dtype)[index]
        scale = self.adapters[index].multiplier
        if z.numel():
            return self.outer.add(y, outer, z[index], scale, fresh=fresh)
        A, B = self.kron((inner, outer))
        if fresh:
            return operator.kron_add(y, x, A, B, scale)
        operator.kron_add_(y, x, A, B, scale)
        return y

    def shared(self, index: int, x: Tensor, plain: bool) -> _Shared:
        """Return what the members share for this x; made for the first that asks, dropped after the last."""
        shared = self._shared
        if shared is None or shared.x is not x or index not in shared.waiting or shared.grad != torch.is_grad_enabled():
            shared = self._shared = _Shared(self, x, plain)
        shared.waiting.discard(index)
        if not shared.waiting:
            self._shared = None
        return shared

    def backward(self, x: Tensor, z: Tensor, taken: _Taken, grad_x: Tensor | None, wants_x: bool) -> Tensor | None:
        """Store the gradients of both factors; return that of x (n, in), `grad_x` (which bases made) included."""
        some = next(grad for grad in taken.grads if grad is not None)
        grads = [torch.zeros_like(some) if grad is None else grad for grad in taken.grads]
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_z = self._factor_gradients(x, z, grads)
        if not wants_x:
            return None
        each, first = self.each(x.dtype), grad_x is None and bool(z.numel())
        total = None if grad_x is None else grad_x.reshape(x.shape).clone()  # another's buffer is not written to
        if first:  # a small product first: the large one reads what is there while it computes
            total = torch.empty_like(x)
            self.inner.add(total, each[0][0].mT, grad_z[0], 1.0, beta=0)
        for grad, weight in zip(grads, taken.weights, strict=True):
            if weight is not None:
                total = grad @ weight if total is None else total.addmm_(grad, weight)
        total = torch.zeros_like(x) if total is None else total
        for index in range(first, len(each)):
            inner, outer = each[index]
            if z.numel():
                self.inner.add(total, inner.mT, grad_z[index], 1.0)
            else:
                A, B = self.kron((inner, outer))
                operator.kron_add_(total, grads[index], A.mT, B.mT, self.adapters[index].multiplier)
        return total

    def _factor_gradients(self, x: Tensor, z: Tensor, grads: list[Tensor]) -> Tensor:
        """Compute gradients of the factors into the stages (the operator's: into the fp32 gradients); returns that of
        z."""
        each, scales = self.each(x.dtype), self.scales()
        if not z.numel():
            pairs = zip(each, zip(*self._gradients, strict=True), grads, scales, strict=True)
            for pair, into, grad, scale in pairs:
                operator.kron_grads_(*self.kron(into), x, grad, *self.kron(pair), scale, accumulate=True)
            return z
        grad_z = torch.empty_like(z)
        for into, (_, outer), grad, scale in zip(grad_z, each, grads, scales, strict=True):
            self.outer.add(into, outer.mT, grad, scale, beta=0)
        to_inner, to_outer = self.stages(x.dtype)
        self.outer.grams(to_outer, grads, list(z), scales)
        self.inner.grams_of_one(to_inner, grad_z, x)
        return grad_z


class _Taken:
    """What the members hand to `_Enter` in the backward pass: their gradients, and the weights of plain bases."""

    def __init__(self, members: int):
        self.grads: list[Tensor | None] = [None] * members
        self.weights: list[Tensor | None] = [None] * members


class _Shared:
    """One input of a group: x, z of all members, and x again for bases that make their own gradient of it."""

    def __init__(self, group: Group, x: Tensor, plain: bool):
        self.x, self.grad = x, torch.is_grad_enabled()
        self.waiting = set(range(len(group.adapters)))
        self.taken = _Taken(len(group.adapters))
        self.through = x
        if plain or not x.requires_grad:
            self.z = _Enter.apply(group, self.taken, x, group.anchor, False)
        else:
            self.z, self.through = _Enter.apply(group, self.taken, x, group.anchor, True)  # type: ignore[misc]


class GroupLane:
    """One adapter's place in its group."""

    def __init__(self, group: Group, index: int):
        self.group, self.index = group, index

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """Copy without the flat buffers: a copy's factors are not in them."""

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """Compute base(x) plus what the adapter adds, (..., out), for x (..., in)."""
        texts = self.group.texts
        if texts.ready and (ready := texts.take(self.group.adapters[self.index], x)) is not None:
            return ready
        plain = _is_plain(base, x)
        shared = self.group.shared(self.index, x, plain)
        if (kept := texts.kept.of(base, x)) is not None:
            return _Over.apply(self, shared.taken, shared.z, (x,), kept)  # type: ignore[return-value]
        if plain:
            return _Plain.apply(self, shared.taken, shared.z, (x, base.weight, base.bias))  # type: ignore[return-value]
        return _Over.apply(self, shared.taken, shared.z, (x,), base(shared.through))  # type: ignore[return-value]

    def add(self, y: Tensor, x: Tensor, z: Tensor, *, fresh: bool) -> Tensor:
        rows = y.reshape(-1, y.shape[-1])
        return self.group.add(self.index, rows, x.reshape(-1, x.shape[-1]), z, fresh=fresh).view(y.shape)


def _is_plain(base: nn.Module, x: Tensor) -> bool:
    """Return whether this is only a frozen product, which the nodes below then compute themselves."""
    return (
        type(base) is nn.Linear
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks)
        and base.weight.dtype == x.dtype
        and not base.weight.requires_grad
    )


class _Enter(torch.autograd.Function):
    """z (s, n, *) of all members, and x once more where bases are not plain.

    The anchor is a factor: it makes the node wanted where x itself wants no gradient.
    """

    @staticmethod
    def forward(ctx, group: Group, taken: _Taken, x: Tensor, anchor: Tensor, through: bool):
        ctx.group, ctx.taken = group, taken
        ctx.set_materialize_grads(False)
        z = group.enter(x.reshape(-1, x.shape[-1]))
        ctx.save_for_backward(x, z)
        return (z, x.view_as(x)) if through else z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _, grad_x: Tensor | None = None):  # type: ignore[override]
        x, z = ctx.saved_tensors
        taken: _Taken = ctx.taken
        if any(grad is not None for grad in taken.grads):
            grad_x = ctx.group.backward(x.reshape(-1, x.shape[-1]), z, taken, grad_x, ctx.needs_input_grad[2])
            taken.grads = [None] * len(taken.grads)
        return None, None, None if grad_x is None else grad_x.view(x.shape), None, None


class _Plain(torch.autograd.Function):
    """A frozen linear layer and its adapter. `given` is hidden in a tuple: no gradient passes here."""

    @staticmethod
    def forward(ctx, lane: GroupLane, taken: _Taken, z: Tensor, given: tuple[Tensor, Tensor, Tensor | None]):
        x, weight, bias = given
        ctx.lane, ctx.taken, ctx.weight = lane, taken, weight
        return lane.add(F.linear(x, weight, bias), x, z, fresh=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        index = ctx.lane.index
        ctx.taken.grads[index], ctx.taken.weights[index] = grad, ctx.weight
        return None, None, None, None


class _Over(torch.autograd.Function):
    """What an adapter adds to the output y of a base that is not a plain linear layer."""

    @staticmethod
    def forward(ctx, lane: GroupLane, taken: _Taken, z: Tensor, given: tuple[Tensor], y: Tensor):
        ctx.lane, ctx.taken, ctx.dtype = lane, taken, z.dtype
        if y.dtype == z.dtype:
            return lane.add(y, *given, z, fresh=True)
        return y + lane.add(torch.zeros_like(y, dtype=z.dtype), *given, z, fresh=False).to(y.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        ctx.taken.grads[ctx.lane.index] = grad.to(ctx.dtype)
        return None, None, None, None, grad
