"""Processes that read and decode samples: one that dies or hangs costs one sample at most.

Each worker is a `MediaProcess` that does `RecordWork`. It imports neither JAX nor transformers.
"""

import contextlib
import pickle
import queue
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.data.records.reader import Reader
from train.data.records.sample import BAD, BadSample, Sample
from train.errors import MediaChanged, WorkerError
from vxl_jax.media.children.process import (
    CannotStart,
    HandlerError,
    Hung,
    MediaProcess,
    ProcessDied,
    Stopped,
)
from vxl_jax.media.heartbeat import beat
from vxl_jax.stream.plan import Ratio, Stream, draw_ratio


@dataclass(frozen=True)
class Measured:
    """Lengths of a sample: ids without marks, labelled ids, frames or tiles and visual tokens of
    every block; and whether the blocks are videos.
    """

    text: int
    labels: int
    frames: tuple[int, ...]
    visual: tuple[int, ...]
    is_video: bool = False


@dataclass(frozen=True)
class LoadedSample:
    """A sample with its stream; its pixels are where the request said."""

    sample: Sample
    stream: Stream


class ProgramFault(RuntimeError):
    """An exception that no record can be blamed for: it ends the run."""

    def __init__(self, place: str, what: str):
        """place: the record that was read; what: kind and text of the exception."""
        super().__init__(place, what)
        self.place, self.what = place, what

    def __str__(self) -> str:
        return f"fault of this program, not of the data, at {self.place}: {self.what}"


BAD_SAMPLE = (*BAD, OSError, MemoryError)
"""Exceptions that make a record a bad sample. Any other one is a `ProgramFault`. What decoders
raise is a MediaError by then.
"""


@dataclass(frozen=True)
class RecordWork:
    """What workers do with records. `ratios`: those drawn for windows; none: no compression."""

    reader: Reader
    ratios: tuple[int, ...]

    def __call__(self, request: tuple[Any, ...], out: np.ndarray | None) -> Any:
        """Answer a request of WorkerPool, in a worker.

        Raises: ProgramFault, with the traceback as a note: the exception itself stays here.
        """
        try:
            if out is None:
                return self.measure(*request)
            source, record, seed = request
            return self.load(source, record, seed, out)
        except ProgramFault as fault:
            fault.add_note("In the data process:\n" + "".join(traceback.format_exception(fault)))
            raise

    def measure(self, source: int, records: Sequence[int]) -> list[Measured | BadSample]:
        """Lengths of records, from their text and the headers of their media.

        Raises: ProgramFault.
        """
        found: list[Measured | BadSample] = []
        for record in records:
            beat()  # the limit is that of one record
            try:
                sample, _ = self.reader.open(source, record)
            except BAD_SAMPLE as error:
                found.append(self._bad(source, record, error))
                continue
            except Exception as error:
                raise self._fault(source, record, error) from error
            frames = tuple(block.frames for block in sample.blocks)
            is_video = any(block.is_video for block in sample.blocks)
            visual = tuple(sample.visual_tokens(self.reader.preparer.model))
            found.append(Measured(sample.text, sample.labelled, frames, visual, is_video))
        return found

    def load(
        self,
        source: int,
        record: int,
        seed: tuple[int, ...] | None,
        out: np.ndarray,
    ) -> LoadedSample | BadSample:
        """A sample, its pixels put into `out` [F, S, S, 3], F as it was measured.

        seed: of its ratios and of moving its frames in time; None: the lowest ratio, no moving.

        Raises: ProgramFault.
        """
        try:
            sample, media = self.reader.open(source, record)
            if sample.frames != len(out):
                raise MediaChanged(
                    f"{', '.join(str(block.path) for block in sample.blocks)}: {sample.frames} "
                    f"frames or tiles now, {len(out)} when the data was measured; start again, and "
                    "leave media as they are during a run"
                )
            stream = self.stream(sample, seed)
            jitter = None
            if seed is not None and self.reader.preparer.data.frame_jitter > 0:
                jitter = np.random.default_rng((*seed, 1))  # others than those of the ratios
            start = 0
            for medium in media:
                medium.read(out[start : start + medium.block.frames], jitter)
                start += medium.block.frames
                beat()
        except BAD_SAMPLE as error:
            return self._bad(source, record, error)
        except Exception as error:
            raise self._fault(source, record, error) from error
        return LoadedSample(sample, stream)

    def _fault(self, source: int, record: int, error: Exception) -> ProgramFault:
        return ProgramFault(self.reader.name(source, record), f"{type(error).__name__}: {error}")

    def _bad(self, source: int, record: int, error: Exception) -> BadSample:
        reason = str(error)
        if not isinstance(error, BAD):
            reason = f"{type(error).__name__} ({error}) from {self.reader.files(source, record)}"
        return BadSample(self.reader.name(source, record), reason, isinstance(error, MediaChanged))

    def stream(self, sample: Sample, seed: tuple[int, ...] | None) -> Stream:
        """A sample's stream, with the ratios that `load` gives it."""
        ratio: Ratio = lowest(self.ratios)
        if seed is not None:
            ratio = draw_ratio(self.ratios, np.random.default_rng(seed))
        return sample.plan(self.reader.preparer.model, ratio)


def lowest(ratios: Sequence[int]) -> Ratio:
    """The ratio that leaves most beacons. As in `draw_ratio`, a window keeps one at least."""
    return (lambda count: min(*ratios, count)) if ratios else None


class WorkerPool:
    """Does `RecordWork` in processes, for any number of calling threads.

    A call waits for an idle worker and for its answer. A worker that dies or hangs is replaced and
    its record tried once more, since the record may not be the cause; then the record is bad.
    """

    def __init__(self, work: RecordWork, count: int, seconds: float):
        """Prepare workers; each starts with its first request.

        Args:
          work: what they do; it must pickle.
          count: number of processes; 0 does everything in this process, without a limit.
          seconds: CPU time without progress that one record may take; see `MediaProcess.ask`.
        """
        self.work, self.count, self.seconds = work, count, seconds
        self.closed = False
        self._stops = 0
        self._idle: queue.Queue[MediaProcess] = queue.Queue()
        handler = pickle.dumps(work, protocol=5)
        self._workers = [MediaProcess(handler, "data process") for _ in range(count)]
        for worker in self._workers:
            self._idle.put(worker)

    def measure(self, source: int, records: Sequence[int]) -> list[Measured | BadSample]:
        """As `RecordWork.measure`."""
        if not self.count:
            return self.work.measure(source, records)
        answer = self._ask((source, list(records)), tries=2 if len(records) == 1 else 1)
        if isinstance(answer, list):
            return answer
        if len(records) == 1:
            return [self._bad(source, records[0], answer)]
        return [self.measure(source, [record])[0] for record in records]

    def load(
        self,
        source: int,
        record: int,
        seed: tuple[int, ...] | None,
        out: np.ndarray,
    ) -> LoadedSample | BadSample:
        """As `RecordWork.load`."""
        if not self.count:
            return self.work.load(source, record, seed, out)
        answer = self._ask((source, record, seed), tries=2, out=out)
        return self._bad(source, record, answer) if isinstance(answer, str) else answer

    def _bad(self, source: int, record: int, reason: str) -> BadSample:
        reader = self.work.reader
        return BadSample(reader.name(source, record), f"{reader.files(source, record)}: {reason}")

    def _place(self, source: int, records: int | Sequence[int]) -> str:
        """The name of a record, or of the first and last of several."""
        ends = [records] if isinstance(records, int) else sorted({records[0], records[-1]})
        return " to ".join(self.work.reader.name(source, record) for record in ends)

    def rest(self) -> None:
        """End the processes until they are needed again; no other thread may be asking."""
        for worker in self._workers:
            worker.end()

    def stop(self) -> None:
        """Give up what is being read: its callers get WorkerError. The pool can be used again."""
        self._stops += 1  # threads that wait for an answer look at it

    def close(self) -> None:
        """End all workers, also those that are busy; their callers get WorkerError."""
        self.closed = True
        held: list[MediaProcess] = []
        try:
            while len(held) < self.count:
                held.append(self._idle.get())  # the thread that uses it gives up
                held[-1].kill()
            for worker in held:
                worker.end()
        finally:
            for worker in held:
                self._idle.put(worker)  # for threads that wait, and see that the pool is closed

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: tuple[Any, ...], tries: int, out: np.ndarray | None = None) -> Any:
        """The answer to a request, or text that says why it failed."""
        reason, stops = "", self._stops

        def stopped() -> bool:
            return self.closed or stops != self._stops

        for _ in range(tries):
            try:
                with self._worker() as worker:
                    return worker.ask(request, self.seconds, out, stopped)
            except HandlerError as error:
                if isinstance(error.original, ProgramFault):
                    raise error.original from None
                if not isinstance(error.original, BAD_SAMPLE):  # as it was sent or answered
                    source, records, *_ = request
                    raise ProgramFault(self._place(source, records), str(error)) from error
                return str(error)
            except ProcessDied as error:
                reason = f"the process that read it died ({error})"
            except Hung as error:
                reason = (
                    f"the process that read it {error}; the file may make its decoder loop, or its "
                    f"disk may not answer: check both, or raise data.sample_seconds "
                    f"({self.seconds:g})"
                )
            except Stopped as error:
                raise WorkerError("the data processes were ended") from error
            except CannotStart as error:
                raise WorkerError(
                    f"{error}; see its error above, lower data.workers (0 starts none), or raise "
                    "the limits of processes and open files"
                ) from error
        return reason

    @contextlib.contextmanager
    def _worker(self) -> Iterator[MediaProcess]:
        worker = self._idle.get()
        try:
            yield worker
        finally:
            self._idle.put(worker)
