"""Train many subjects on one frozen base: jobs enter free slots between two steps, and each ends for itself."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from diffusekrona_train.adapters import plan
from diffusekrona_train.common import run_folder
from diffusekrona_train.common.device import free
from diffusekrona_train.common.progress import EventLog, Progress, Stopped
from diffusekrona_train.config import RunConfig
from diffusekrona_train.data import collect, collect_prior
from diffusekrona_train.fleet import folder as place
from diffusekrona_train.fleet.call import Call
from diffusekrona_train.fleet.hook import Webhook
from diffusekrona_train.fleet.jobs import Job, JobError, Tree, job_hash, make_job
from diffusekrona_train.fleet.outlet import Outlet, open_outlet
from diffusekrona_train.fleet.page import keep_photo, write_fleet_page
from diffusekrona_train.fleet.photos import fetch, is_elsewhere
from diffusekrona_train.fleet.seats import Rider, Seats
from diffusekrona_train.models import configured_model
from diffusekrona_train.models.layers import select_layers
from diffusekrona_train.training import run

BUSY_SECONDS = 0.5
"""How long to wait before a job is asked for again that another process holds."""
SHOW_SECONDS = 15.0
"""How often fleet.html is written."""
REPORT_SECONDS = 1.0
"""How often the state of all slots is reported."""

End = Literal["trained", "skipped", "failed", "cancelled", "stopped"]


@dataclass(frozen=True)
class Done:
    """How a job ended."""

    id: str
    end: End
    """trained; skipped: it was done before; failed; cancelled by its file; stopped with everything, to be resumed."""
    adapter: Path | str | None = None
    """The final one: a path, or a URL where the output is one."""
    reason: str = ""
    """Why it failed."""
    steps: int = 0
    seconds: float = 0.0
    """From the slot that it got, in this call, to its end."""
    device_seconds: float = 0.0
    """Its share of the device's time: a step of eight jobs counts an eighth for each."""
    loss: float | None = None
    """The last one that was logged."""


class Source(Protocol):
    """Where jobs come from, one at a time."""

    def take(self, wait: bool) -> tuple[int, Tree | JobError] | None:
        """Return the next job's number and row, or why there is none; None where none is there now (not with `wait`).

        StopIteration after the last one.
        """
        ...


class Rows:
    """Jobs that are there already, or that an iterator gives."""

    def __init__(self, rows: Iterator[Tree | JobError]):
        self.rows, self.number = rows, 0

    def take(self, wait: bool) -> tuple[int, Tree | JobError] | None:
        self.number += 1
        return self.number, next(self.rows)


def check(call: Call) -> None:
    """Raise ValueError for a model or an adapter that no job could be trained with. Loads no weights."""
    config = call.config
    if config.adapter.type == "full":
        raise ValueError(
            "adapter.type: full cannot be trained for several subjects at once; use krona, lora, lokr or loha"
        )
    source = configured_model(config)
    source.check()
    plan(config.adapter, select_layers(source.layers(), config.adapter))


class Saving(Progress):
    """Passes everything on, and makes a checkpoint safe as soon as it is written."""

    def __init__(self, above: Progress, outlet: Outlet):
        super().__init__()
        self.above, self.outlet = above, outlet

    def report(self, event: str, **fields: object) -> None:
        self.above.report(event, **fields)
        if event == "saved":
            self.outlet.push(str(fields["job"]))

    def should_stop(self) -> bool:
        return self.above.should_stop()


@dataclass
class Waiting:
    """A job that another process holds."""

    job: Job
    again: float


class Fleet:
    """The jobs of one call."""

    def __init__(self, source: Source, call: Call, outlet: Outlet, progress: Progress):
        self.source, self.call, self.outlet, self.progress = source, call, outlet, progress
        self.seats = Seats(call.pack, Saving(progress, outlet))
        self.hook = Webhook(call.webhook, progress.warning) if call.webhook else None
        self.failures = place.Failures(outlet.root)
        self.seen: dict[str, tuple[str, str]] = {}
        self.waiting: list[Waiting] = []
        self.exhausted = False
        self.counts: dict[str, int] = {}
        self._began = time.monotonic()
        self._reported, self._shown, self._steps = self._began, 0.0, 0
        self._held: dict[str, ExitStack] = {}
        self._wrong: set[str] = set()

    # ---- the loop ----

    def ends(self) -> Iterator[Done]:
        """Yield each job as it ends. Stopped by `progress`, every running job is saved first."""
        try:
            while True:
                yield from self._fill()
                if not self.seats.riders:
                    if self.progress.should_stop() or (self.exhausted and not self.waiting):
                        return
                    continue
                yield from self._step()
        finally:
            self.seats.end()
            for stack in self._held.values():
                stack.close()
            if self.hook is not None:
                self.hook.close()
            self._show(running=False)
            self.outlet.push_lists()

    def _fill(self) -> Iterator[Done]:
        """Give free slots to the next jobs."""
        while self.seats.free and not self.progress.should_stop():
            job = self._next()
            if isinstance(job, Done):
                yield self._counted(job)
            elif job is None:
                return
            elif (done := self._open(job)) is not None:
                yield self._counted(done)

    def _next(self) -> Job | Done | None:
        """Return the next job; one that failed before it was one; None where there is none now."""
        idle = not self.seats.riders
        if not self.exhausted:
            try:
                found = self.source.take(wait=idle and not self.waiting)
            except StopIteration:
                self.exhausted = True
                return self._next()
            if found is not None:
                return self._job(*found)
        due = next((waiting for waiting in self.waiting if waiting.again <= time.monotonic()), None)
        if due is None:
            if idle and self.waiting:
                time.sleep(BUSY_SECONDS / 5)
            return None
        self.waiting.remove(due)
        return due.job

    def _job(self, number: int, row: Tree | JobError) -> Job | Done:
        """Check a row: its fields, and that no other job of this call has its id."""
        try:
            if isinstance(row, JobError):
                raise row
            job = make_job(row, self.call.common, number)
            said = (job.id, json.dumps(row, sort_keys=True))
            if (before := self.seen.setdefault(job.id.lower(), said)) is said:
                if (other := place.same_but_for_case(self.outlet.root, job.id)) is not None:
                    raise JobError(job.id, f"id: {other} is there already and differs in upper and lower case only")
            elif before != said:
                what = (
                    "is used twice" if before[0] == job.id else f"and {before[0]} differ in upper and lower case only"
                )
                raise JobError(job.id, f"id: {job.id} {what}; give each job an id of its own")
            return job
        except JobError as error:
            return self._failed(error.id, str(error))

    # ---- one job ----

    def _open(self, job: Job) -> Done | None:
        """Give a job a slot; how it ended where it gets none. A job that another process holds waits."""
        folder, stack = self.outlet.folder(job.id), ExitStack()
        try:
            stack.enter_context(place.held(self.outlet.root, job.id))
            if self.outlet.cancelled(job.id):
                stack.close()
                return self._ended(Done(job.id, "cancelled", reason=f"there is a file {job.id}/{place.CANCEL_FILE}"))
            self.outlet.bring(job.id)
            config, mark = self._looked_at(job, folder)
            record = self._accepted(folder, mark)
            if record is not None:
                stack.close()
                self._settle(job.id)
                adapter = self.outlet.adapter(job.id)
                return self._ended(Done(job.id, "skipped", adapter, steps=record.steps, loss=record.loss))
            rider = self.seats.open(job, config, mark, folder)
        except run_folder.Busy:
            stack.close()
            self.waiting.append(Waiting(job, time.monotonic() + BUSY_SECONDS))
            return None
        except (ValueError, OSError, RuntimeError) as error:
            stack.close()
            return self._failed(job.id, _reason(error))
        self._held[job.id] = stack
        self._settle(job.id)
        begin = "resumed" if rider.step else "started"
        self.progress.report("job", job=job.id, state=begin, step=rider.step, steps=rider.steps, slot=rider.slot)
        return self._finished(rider) if rider.step >= rider.steps else None

    def _looked_at(self, job: Job, folder: Path) -> tuple[RunConfig, str]:
        """Return a job's config and its hash, its photos being read; those from elsewhere are brought here."""
        config, images = job.config(str(folder)), job.tree["subject"].get("images")
        if is_elsewhere(images):
            tree = {**job.tree, "subject": {**job.tree["subject"], "images": str(fetch(images, folder / "photos"))}}
            config = Job(job.id, tree).config(str(folder))
        pictures = collect(config).pictures
        if config.prior.kind == "images" and config.prior.images is not None:
            pictures = pictures + collect_prior(config, Path(config.prior.images).expanduser()).pictures
        keep_photo(folder, config, pictures)
        rows = [(picture.sha256, picture.captions, picture.repeats) for picture in pictures]
        return config, job_hash(config, self.seats.model(config).identity, rows)

    def _accepted(self, folder: Path, mark: str) -> place.Record | None:
        """Return the record of a job that is done; None where it is to be trained, its folder being ready for it."""
        try:
            record = place.read_record(folder)
        except ValueError:
            if not self.call.overwrite:
                raise
            record = None
        if self.outlet.done(folder.name, record, mark):
            return record
        why_not = place.other_job(folder, record, mark)
        if why_not is not None and not self.call.overwrite:
            raise ValueError(why_not)
        if why_not is not None or record is None:
            run_folder.remove_own(folder)
        place.write_record(folder, place.Record(folder.name, mark, "open"))
        return None

    def _step(self) -> Iterator[Done]:
        self._steps += 1
        for rider, error in self.seats.step():
            yield self._counted(self._broken_off(rider, error))
        for rider in [rider for rider in self.seats.riders if rider.step >= rider.steps]:
            yield self._counted(self._finished(rider))
        if time.monotonic() - self._reported >= REPORT_SECONDS:
            self.report()

    def _finished(self, rider: Rider) -> Done:
        """Save a job's adapter and free its slot."""
        folder = rider.run.folder
        try:
            run.finish(rider.run)
            record = place.Record(
                rider.job.id,
                rider.hash,
                "done",
                rider.steps,
                round(rider.seconds, 3),
                round(rider.device_seconds, 3),
                rider.progress.loss,
                round(time.time(), 3),
            )
            place.write_record(folder, record)
            run_folder.forget_states(folder)
            self.outlet.push(rider.job.id)
        except (ValueError, OSError, RuntimeError) as error:
            return self._broken_off(rider, error)
        self._leave(rider)
        told = (rider.steps, rider.seconds, rider.device_seconds, record.loss)
        return self._ended(Done(rider.job.id, "trained", self.outlet.adapter(rider.job.id), "", *told))

    def _broken_off(self, rider: Rider, error: Exception) -> Done:
        """Free the slot of a job that ends before its last step; an error that is no job's own is raised."""
        self._leave(rider)
        times = {"steps": rider.step, "seconds": rider.seconds, "device_seconds": rider.device_seconds}
        if isinstance(error, Stopped):
            if rider.progress.cancelled:
                reason = f"cancelled after step {error.step} of {error.steps}"
                return self._ended(Done(rider.job.id, "cancelled", None, reason, **times))
            return self._ended(Done(rider.job.id, "stopped", None, str(error), **times))
        if not isinstance(error, ValueError | OSError | RuntimeError):
            raise error
        return self._failed(rider.job.id, _reason(error))

    def _leave(self, rider: Rider) -> None:
        self.seats.close(rider)
        self._held.pop(rider.job.id).close()

    def _settle(self, name: str) -> None:
        """Forget what an earlier call wrote of a job that is fine now; a second job under its id keeps its line."""
        if name not in self._wrong:
            self.failures.drop(name)

    def _failed(self, name: str, reason: str) -> Done:
        self._wrong.add(name)
        self.failures.add(name, reason)
        return self._ended(Done(name, "failed", reason=reason))

    def _ended(self, done: Done) -> Done:
        told = asdict(done)
        about = {"job": told.pop("id"), "state": told.pop("end"), **told}
        about["adapter"] = str(done.adapter) if done.adapter else None
        self.progress.report("job", **about)
        if self.hook is not None and done.end in ("trained", "failed", "cancelled"):
            self.hook.send(about)
        return done

    def _counted(self, done: Done) -> Done:
        self.counts[done.end] = self.counts.get(done.end, 0) + 1
        self.outlet.push_lists()
        self.report()
        return done

    def report(self) -> None:
        """Report who is in which slot, and how many are done."""
        now = time.monotonic()
        rate, self._steps = self._steps / max(now - self._reported, 1e-9), 0
        self._reported = now
        self.outlet.keep()
        running: list[dict[str, Any]] = [
            {"job": rider.job.id, "slot": rider.slot, "step": rider.step, "steps": rider.steps,
             "loss": rider.progress.loss}
            for rider in sorted(self.seats.riders, key=lambda rider: rider.slot)
        ]  # fmt: skip
        about = {"waiting": len(self.waiting), "seconds": round(now - self._began, 3), "steps_a_second": round(rate, 3)}
        self.progress.report("pack", slots=self.seats.count, running=running, **about, **self.counts)
        if now - self._shown >= SHOW_SECONDS:
            self._show(running=True)

    def _show(self, running: bool) -> None:
        """Write fleet.html; a failure costs only the page."""
        self._shown = time.monotonic()
        try:
            write_fleet_page(self.outlet.root, dollars_an_hour=self.call.dollars_an_hour, running=running)
        except Exception as error:
            self.progress.warning(f"fleet.html was not written ({type(error).__name__}: {error})")


def train_here(call: Call, source: Source, progress: Progress, *, events: str = "events.jsonl") -> Iterator[Done]:
    """Train all jobs of a checked call on this machine; at the end the model is freed. `events`: the file in the output
    that gets what happens, a line of JSON each."""
    outlet = open_outlet(call.output)
    outlet.root.mkdir(parents=True, exist_ok=True)
    log = EventLog(progress)
    log.open(outlet.root / events)
    fleet = Fleet(source, call, outlet, log)
    try:
        yield from fleet.ends()
    finally:
        del fleet
        outlet.close()
        free()


def _reason(error: BaseException) -> str:
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    return " ".join(text.split()) or type(error).__name__
