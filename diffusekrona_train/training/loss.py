"""From what a step draws to its loss: batches gathered on the device, class images, the teacher, held-out noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from diffusekrona_train.adapters.inject import Injection
from diffusekrona_train.adapters.texts import Kept
from diffusekrona_train.common.device import ABILITIES, abilities, moved
from diffusekrona_train.config import RunConfig
from diffusekrona_train.data.training_set import Bucket, TrainingSet
from diffusekrona_train.models.contracts import Conditioning, Denoiser, Family, Process, Tensors
from diffusekrona_train.training.draw import Draw, Shelf, draw, generator_of

ON_DEVICE_LIMIT = 2 * 2**30
"""Bytes of cached latents that are kept on the device; more stay in host memory."""
HELD_OUT_PICTURES = 4
HELD_OUT_QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Batch:
    """Samples of one latent shape, on the device. The last `teacher` of them are held to the frozen model's answer."""

    x_0: torch.Tensor
    eps: torch.Tensor
    t: torch.Tensor
    caption: list[int]
    """Rows of TrainingSet.conditioning."""
    extras: Tensors
    """Name -> (B, ...), what the denoiser is told of the pictures; in their own types."""
    share: torch.Tensor
    """(B,): 1 for an instance, the prior weight for a class sample."""
    teacher: int = 0
    conditioning: Conditioning = field(default_factory=dict)
    """What the denoiser is given beside x_t and t: the captions, collated, and the extras."""
    taught: Conditioning = field(default_factory=dict)
    """The same for the last `teacher` samples."""

    def __len__(self) -> int:
        return len(self.t)


@dataclass
class Objective:
    """The loss of a run as a function of the step: the model, what it is shown and how it is judged."""

    config: RunConfig
    family: Family
    denoiser: Denoiser
    injection: Injection
    data: TrainingSet
    process: Process
    dtype: torch.dtype
    device: torch.device
    processes: int = 1
    rank: int = 0
    captions: list[Tensors] = field(init=False)
    """One row a caption, in the denoiser's type; on the device where they are not too many."""

    def __post_init__(self) -> None:
        # Extras keep their type: bf16 would round a size of 1365 pixels to 1368.
        rows = self.data.conditioning
        size = sum(value.numel() for row in rows for value in row.values()) * self.dtype.itemsize
        home = self.device if size <= ON_DEVICE_LIMIT else torch.device("cpu")
        self.captions = [moved(row, home, self.dtype) for row in rows]
        buckets = [*self.data.instances, *self.data.priors]
        if sum(bucket.latents.nbytes for bucket in buckets) <= ON_DEVICE_LIMIT:
            for bucket in buckets:
                bucket.latents = bucket.latents.to(self.device)
        self._pins = abilities(self.device).pinned and self.device.type in ABILITIES  # not for meta tensors
        self.process.check_weighting(self.config.train.weighting)
        self.process = self.process.to(self.device)
        self._own = object()  # another objective's captions have the same numbers

    # ---- what a step sees ----

    @property
    def global_batch(self) -> int:
        return self.config.train.batch_size * self.config.train.gradient_accumulation * self.processes

    def batches(self, step: int, micro: int) -> list[Batch]:
        """This process's samples of micro-batch `micro`, one batch for each latent shape (mostly one).

        All that is random, on the host or of another step is in here; `loss_of` only computes.
        """
        return [self.conditioned(batch) for batch in self.samples(step, micro)]

    def samples(self, step: int, micro: int) -> list[Batch]:
        """Return the batches of a micro-batch without their conditioning."""
        size = self.config.train.batch_size
        first = (micro * self.processes + self.rank) * size
        instances = self._drawn(self.data.instances, step, range(first, first + size), "instance")
        if self.config.prior.kind == "teacher":
            return [_joined(instances, self._taught(instances))]
        if not self.data.priors:
            return [instances]
        priors = self._drawn(self.data.priors, step, range(first, first + size), "prior")
        same = instances.x_0.shape[1:] == priors.x_0.shape[1:]
        return [_joined(instances, priors)] if same else [instances, priors]

    def instance(self, number: int, stream: str) -> Batch:
        """Sample `number` of a stream of its own, alone: whatever the batch size and number of processes."""
        train, buckets = self.config.train, self.data.instances
        shelves = [shelf_of(bucket) for bucket in buckets]
        drawn = draw(train.seed, number, [0], 1, shelves, draw_t=self.process.draw_t, stream=stream)
        return self.conditioned(self._gathered(buckets[drawn.shelf], drawn, 1.0, 0.0))

    def _drawn(self, buckets: Sequence[Bucket], step: int, indices: range, stream: str) -> Batch:
        train = self.config.train
        drawn = draw(
            train.seed,
            step,
            indices,
            self.global_batch,
            [shelf_of(bucket) for bucket in buckets],
            draw_t=self.process.draw_t,
            noise_offset=train.noise_offset,
            stream=stream,
        )
        share = self.config.prior.weight if stream == "prior" else 1.0
        return self._gathered(buckets[drawn.shelf], drawn, share, train.caption_dropout)

    def _gathered(self, bucket: Bucket, drawn: Draw, share: float, dropout: float) -> Batch:
        caption = bucket.captions_of(drawn.picture, drawn.turn)
        if dropout:
            caption = torch.where(drawn.dropout < dropout, self.data.captions.index(""), caption)
        home = bucket.latents.device
        latents = bucket.latents[self._sent(drawn.picture, home), self._sent(drawn.variant, home)]
        return Batch(
            self._sent(latents, self.device).float(),
            self._sent(drawn.eps, self.device),
            self._sent(drawn.t, self.device),
            caption.tolist(),
            {
                name: self._sent(value[drawn.picture, drawn.variant], self.device)
                for name, value in bucket.extras.items()
            },
            torch.full((len(caption),), share, device=self.device),
        )

    def _sent(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """On `device`, without waiting for it: from pinned memory, so that the copy queues behind the last step."""
        if tensor.device.type == device.type:
            return tensor
        return tensor.pin_memory().to(device, non_blocking=True) if self._pins else tensor.to(device)

    def _taught(self, instances: Batch) -> Batch:
        """The same noisy pictures under the class prompt, where the adapted model should answer as the frozen one."""
        prompt = self.config.subject.fill(self.config.prior.prompt)
        caption = [self.data.captions.index(prompt)] * len(instances)
        share = torch.full_like(instances.share, self.config.prior.weight)
        count = len(instances)
        return Batch(instances.x_0, instances.eps, instances.t, caption, instances.extras, share, teacher=count)

    def conditioned(self, batch: Batch) -> Batch:
        """The batch with its captions and extras as the denoiser takes them."""
        taught = self._told(batch, slice(-batch.teacher, None)) if batch.teacher else {}
        return replace(batch, conditioning=self._told(batch, slice(None)), taught=taught)

    def _told(self, batch: Batch, part: slice) -> Conditioning:
        extras = {name: value[part] for name, value in batch.extras.items()}
        captions = batch.caption[part]
        collated = self.kept.again((self._own, *captions), lambda: self.family.collate(self._rows(captions)))
        return {**collated, **extras}

    @property
    def kept(self) -> Kept:
        """Where the injection's layers keep what they make of captions."""
        return self.injection.texts.kept if self.injection else Kept(limit=0)  # none: a bare denoiser is timed

    def prompts(self, batch: Batch) -> list[Tensors]:
        """Return the encoded captions of a batch, one row a sample."""
        return self._rows(batch.caption)

    def _rows(self, captions: Sequence[int]) -> list[Tensors]:
        rows = [self.captions[i] for i in captions]
        return [{name: self._sent(value, self.device) for name, value in row.items()} for row in rows]

    # ---- how it is judged ----

    def loss_of(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Loss of each sample times its weight, summed, divided by the number of instance images."""
        total = sum(self.per_sample(batch).sum() for batch in batches)
        return torch.as_tensor(total) / self.config.train.batch_size

    def per_sample(self, batch: Batch, *, weighted: bool = True) -> torch.Tensor:
        """(B,) fp32."""
        x_t = self.process.noised(batch.x_0, batch.eps, batch.t)
        wanted = self.process.target(batch.x_0, batch.eps, batch.t)
        if batch.teacher:
            with torch.no_grad(), self.injection.disabled():
                part = slice(-batch.teacher, None)
                answer = self._predicted(x_t[part], batch.t[part], batch.taught)
            wanted = torch.cat([wanted[: -batch.teacher], answer])
        prediction = self._predicted(x_t, batch.t, batch.conditioning)
        bare = None
        if weighted and self.config.train.loss in AGAINST_BASE:
            with torch.no_grad(), self.injection.disabled():
                bare = self._predicted(x_t, batch.t, batch.conditioning)
        return self.judged(prediction, wanted, batch, bare, weighted=weighted)

    def judged(
        self,
        prediction: torch.Tensor,
        wanted: torch.Tensor,
        batch: Batch,
        bare: torch.Tensor | None = None,
        *,
        weighted: bool = True,
    ) -> torch.Tensor:
        """Return the loss of each sample, (B,) fp32, for predictions and targets (B, C, h, w).

        `bare` is what the model without its adapter predicts, for a loss that is measured against it.
        """
        train = self.config.train
        distance, against = LOSSES.get(train.loss, mse), AGAINST_BASE.get(train.loss)
        loss = distance(prediction, wanted)
        if not weighted:
            return loss
        if against is not None:  # of what the teacher answers, the base's own distance is 0
            assert bare is not None
            base = distance(bare, wanted)
            own = len(batch) - batch.teacher
            loss = torch.cat([against(loss[:own], base[:own], train.dco_beta), loss[own:]])
        return loss * self.process.weight(train.weighting, batch.t, train.snr_gamma) * batch.share

    def _predicted(self, x_t: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        if self.injection and self.family.caption and not self.config.train.compile:  # compiled layers look nowhere
            self.injection.texts.expect(conditioning[self.family.caption])
        return self.family.predict(self.denoiser, x_t.to(self.dtype), t, conditioning).float()

    @torch.no_grad()
    def held_out_loss(self, at_once: int | None = None) -> float:
        """Mean loss on noise that no step draws, at fixed timestep quantiles: comparable between steps and runs.

        `at_once` samples are computed together, a training batch's without it.
        """
        losses = [self.per_sample(batch, weighted=False) for batch in self._held_out(at_once)]
        return torch.cat(losses).mean().item()

    def _held_out(self, at_once: int | None = None) -> Iterator[Batch]:
        left, size = HELD_OUT_PICTURES, at_once or self.config.train.batch_size
        for number, bucket in enumerate(self.data.instances):
            pictures = list(range(min(left, len(bucket.latents))))
            left -= len(pictures)
            samples = [(picture, quantile) for picture in pictures for quantile in HELD_OUT_QUANTILES]
            for start in range(0, len(samples), size):
                part = samples[start : start + size]
                shape = tuple(bucket.latents.shape[2:])
                noises = [torch.randn(shape, generator=generator_of("held out", number, *s)) for s in part]
                picture = torch.tensor([picture for picture, _ in part])
                t = torch.stack([self.process.quantile(quantile) for _, quantile in part])
                none = torch.zeros_like(picture)
                drawn = Draw(number, picture, none, t, torch.stack(noises), torch.ones(len(part)))
                yield self.conditioned(self._gathered(bucket, drawn, 1.0, 0.0))


def shelf_of(bucket: Bucket) -> Shelf:
    """How many pictures and variants of which shape a bucket holds."""
    count, variants, *shape = bucket.latents.shape
    return Shelf(count, variants, tuple(shape))  # type: ignore[arg-type]


def _joined(a: Batch, b: Batch) -> Batch:
    x_0, eps, t, share = (torch.cat([getattr(a, name), getattr(b, name)]) for name in ("x_0", "eps", "t", "share"))
    extras = {name: torch.cat([a.extras[name], b.extras[name]]) for name in a.extras}
    return Batch(x_0, eps, t, a.caption + b.caption, extras, share, teacher=b.teacher)


HUBER_C = 0.1
"""Where the pseudo-Huber loss turns from square to linear."""


def mse(prediction: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample, (B,)."""
    return (prediction - wanted).square().flatten(1).mean(1)


def huber(prediction: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Pseudo-Huber loss of each sample, (B,): 2c (sqrt(d^2 + c^2) - c), near d^2 for small d."""
    distance = (prediction - wanted).square()
    return (2 * HUBER_C * ((distance + HUBER_C**2).sqrt() - HUBER_C)).flatten(1).mean(1)


def dco(loss: torch.Tensor, base: torch.Tensor, beta: float) -> torch.Tensor:
    """Direct consistency optimisation (arXiv 2402.12004): -log sigmoid(-beta (loss - base)) * 2 / beta, (B,).

    `base` is the loss of the model without the adapter on the same noisy picture: what the adapter improves already
    counts less and less. With the factor 2 / beta the gradient is that of `loss` where nothing is learnt yet, so that
    clipping and the weights of other terms mean the same.
    """
    return torch.nn.functional.softplus(beta * (loss - base)) * (2 / beta)


LOSSES = {"mse": mse, "huber": huber}
AGAINST_BASE = {"dco": dco}
"""Losses that compare each sample's mean squared error with the base model's: fn(loss, base's loss, beta) -> (B,)."""
