"""Processes that read and decode samples, each watched: one that dies or hangs costs one sample.

    python -m train.workers SOCKET MEMORY        # started by WorkerPool, never by hand

A worker answers one request at a time over a socket, and leaves pixels in memory that it shares
with the training process. It imports neither JAX nor transformers. Media decoders are C code that
can crash or loop for ever on a damaged file; the training process then ends the worker, starts
another, and goes on.
"""

import contextlib
import mmap
import os
import pickle
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from train.records import BAD, BadSample, Reader, Sample
from vxl_jax.media import MediaError
from vxl_jax.stream import Ratio, Stream, draw_ratio

START_SECONDS = 120.0
"""Most time for a worker to start."""
STARTS = 3
"""Starts of a worker that may fail in a row."""
MEMORY_BYTES = 2**32
"""Most memory of a worker's own: a small file can ask a video decoder for any amount."""
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**27)}
"""Lets glibc keep the memory of one image for the next: fetching it anew from the system took a
third of the time."""


@dataclass(frozen=True)
class Measured:
    """Lengths of a sample: ids without marks, labelled ids, frames or tiles of every block; and
    whether the blocks are videos.
    """

    text: int
    labels: int
    frames: tuple[int, ...]
    is_video: bool = False


@dataclass(frozen=True)
class Loaded:
    """A sample with its stream; its pixels are where the request said."""

    sample: Sample
    stream: Stream


class MediaChanged(MediaError):
    """Media that are not what they were when their data file was measured."""


@dataclass(frozen=True)
class Work:
    """What workers do with records. `ratios`: those drawn for windows; none: no compression."""

    reader: Reader
    ratios: tuple[int, ...]

    def measure(self, source: int, records: Sequence[int]) -> list[Measured | BadSample]:
        """Lengths of records, from their text and the headers of their media."""
        found: list[Measured | BadSample] = []
        for record in records:
            try:
                sample, _ = self.reader.open(source, record)
            except Exception as error:  # a decoder may raise anything, and memory may run out
                found.append(self._bad(source, record, error))
                continue
            frames = tuple(block.frames for block in sample.blocks)
            is_video = any(block.is_video for block in sample.blocks)
            found.append(Measured(sample.text, sample.labelled, frames, is_video))
        return found

    def load(
        self,
        source: int,
        record: int,
        seed: tuple[int, ...] | None,
        out: np.ndarray,
    ) -> Loaded | BadSample:
        """A sample, its pixels put into `out` [F, S, S, 3], F as it was measured.

        seed: of its ratios and of moving its frames in time; None: the lowest ratio, no moving.
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
        except Exception as error:  # as in `measure`
            return self._bad(source, record, error)
        return Loaded(sample, stream)

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


class WorkerError(RuntimeError):
    """Data processes cannot be started; the message says what to do."""


class WorkerPool:
    """Does `Work` in processes of its own, for any number of calling threads.

    A call waits for an idle worker and for its answer, `seconds` at most; a worker that takes
    longer is killed and its record bad. One that dies is replaced, and its record tried once more,
    since it may not have been the record's fault.
    """

    def __init__(self, work: Work, count: int, seconds: float):
        """count: processes; 0: everything in this process, unwatched."""
        self.work, self.count, self.seconds = work, count, seconds
        self.closed = False
        self._stops = 0
        self._idle: queue.Queue[_Worker] = queue.Queue()
        setup = pickle.dumps(work, protocol=5)
        self._workers = [_Worker(setup) for _ in range(count)]
        for worker in self._workers:
            self._idle.put(worker)  # its process starts with its first request
        if count:
            threading.Thread(target=self._watch, daemon=True, name="data watchdog").start()

    def measure(self, source: int, records: Sequence[int]) -> list[Measured | BadSample]:
        """As `Work.measure`."""
        if not self.count:
            return self.work.measure(source, records)
        answer = self._ask(("measure", source, list(records)), tries=2 if len(records) == 1 else 1)
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
    ) -> Loaded | BadSample:
        """As `Work.load`."""
        if not self.count:
            return self.work.load(source, record, seed, out)
        request = "load", source, record, seed, len(out)
        answer = self._ask(request, tries=2, out=out)
        return self._bad(source, record, answer) if isinstance(answer, str) else answer

    def _bad(self, source: int, record: int, reason: str) -> BadSample:
        reader = self.work.reader
        return BadSample(reader.name(source, record), f"{reader.files(source, record)}: {reason}")

    def rest(self) -> None:
        """End the processes until they are needed again; no other thread may be asking."""
        for worker in self._workers:
            if worker.process is not None:
                worker.end()

    def stop(self) -> None:
        """Give up what is being read: its callers get WorkerError. The pool can be used on."""
        self._stops += 1
        for worker in self._workers:
            with worker.lock:
                if worker.deadline < float("inf"):
                    worker.kill()

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        self.closed = True
        for worker in self._workers:
            worker.ended = True
            worker.kill()
        for _ in self._workers:
            worker = self._idle.get()  # once its caller is done
            try:
                if worker.process is not None:
                    worker.end()
            finally:
                self._idle.put(worker)  # for callers that wait, and see that the pool is closed

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: tuple[Any, ...], tries: int, out: np.ndarray | None = None) -> Any:
        """The answer to a request, or text that says why there is none."""
        reason, stops = "", self._stops
        while tries:
            with self._worker() as worker:
                try:
                    return worker.ask(
                        request, self.seconds, out, stopped=lambda: stops != self._stops
                    )
                except (EOFError, OSError) as error:
                    hung, begun, how = worker.hung, worker.begun, worker.end()
                    if self.closed or stops != self._stops:
                        raise WorkerError("the data processes were ended") from error
                    if not begun:  # it never got as far as the request
                        continue
                    if hung:
                        return f"reading it took more than data.sample_seconds ({self.seconds:g} s)"
                    reason = f"the process that read it died ({how})"
                    tries -= 1
        return reason

    @contextlib.contextmanager
    def _worker(self) -> Iterator["_Worker"]:
        worker = self._idle.get()
        try:
            if self.closed:
                raise WorkerError("the data processes were ended")
            yield worker
        finally:
            self._idle.put(worker)

    def _watch(self) -> None:
        while not self.closed:
            now = time.monotonic()
            for worker in self._workers:
                with worker.lock:
                    if worker.deadline < now:
                        worker.hung = True
                        worker.kill()
            time.sleep(0.1)


class _Worker:
    """The training process's end of one worker; used by one thread at a time."""

    def __init__(self, setup: bytes):
        self.setup = setup
        self.lock = threading.Lock()  # of the deadline, so that nobody is killed who was in time
        self.deadline = float("inf")
        self.hung = self.ended = self.killed = self.ready = self.begun = False
        self.failed_starts = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process; it is ready when it first answers.

        Raises: WorkerError if it cannot be started.
        """
        command = [sys.executable, "-m", "train.workers"]
        environment = {
            **os.environ,
            **KEEP_MEMORY,
            "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
        }
        try:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                self.memory_file = os.memfd_create("vxl-pixels")
                passed = theirs.fileno(), self.memory_file
                self.process = subprocess.Popen(
                    [*command, *map(str, passed)],
                    pass_fds=passed,
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for the training process alone
                )
                ours = ours.dup()
        except OSError as error:
            raise WorkerError(
                f"a data process cannot be started ({error}); lower data.workers, or raise the "
                "limits of processes and open files"
            ) from error
        self.memory: mmap.mmap | None = None
        self.connection, self.ready = Connection(ours.detach()), False
        if self.ended:  # meanwhile
            self.process.kill()

    def ask(
        self,
        request: tuple[Any, ...],
        seconds: float,
        out: np.ndarray | None,
        stopped: Callable[[], bool],
    ) -> Any:
        """The answer to a request; pixels go to `out`. stopped: whether it is no longer wanted.

        Raises: EOFError or OSError if the process is dead, or killed for taking longer (`hung`).
        """
        self.begun = False
        try:
            if self.process is not None and (self.killed or self.process.poll() is not None):
                self.end()  # it died while it had nothing to do
            if self.process is None:
                self.start()
            if not self.ready:
                self._set_up()
            if out is not None:
                self._grow(out.nbytes)
            self._allow(seconds)
            if stopped():
                raise OSError("given up")
            self.connection.send(request)
            self.connection.recv()
            self.begun = True
            answer = self.connection.recv()
        finally:
            self._allow(float("inf"))
        if out is not None and out.size and self.memory is not None:
            out.reshape(-1)[...] = np.frombuffer(self.memory, np.uint8, out.nbytes)
        return answer

    def _allow(self, seconds: float) -> None:
        with self.lock:
            self.deadline = time.monotonic() + seconds

    def _set_up(self) -> None:
        self._allow(START_SECONDS)
        self.failed_starts += 1
        try:
            self.connection.send_bytes(self.setup)
            self.connection.recv()
        except (EOFError, OSError) as error:
            if self.failed_starts < STARTS or self.ended:
                raise
            raise WorkerError(
                f"a data process ended {STARTS} times as it started ({self.end()}); its error is "
                "above, and data.workers 0 does without"
            ) from error
        self.ready, self.failed_starts = True, 0

    def _grow(self, size: int) -> None:
        if size and (self.memory is None or len(self.memory) < size):
            os.ftruncate(self.memory_file, size)
            self.memory = mmap.mmap(self.memory_file, size)

    def kill(self) -> None:
        """End the process; whoever waits for its answer sees that it is gone."""
        process = self.process  # another thread may clear it away
        if process is not None:
            self.killed = True
            process.kill()

    def end(self) -> str:
        """Clear away the process, and say how it ended; the next request starts another."""
        assert self.process is not None
        self.connection.close()
        try:
            code = self.process.wait(1.0)  # it may be about to end by itself, with a status to tell
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.process, self.hung, self.killed, self.memory = None, False, False, None
        os.close(self.memory_file)
        if code >= 0:
            return f"exit status {code}"
        names = {int(number): number.name for number in signal.Signals}
        return f"signal {names.get(-code, -code)}"


# The worker's side.


def main(arguments: list[str]) -> None:
    """Answer requests until the training process is gone."""
    # A scheduler sends it to all processes: the run finishes its step, and needs its samples.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection, memory_file = Connection(int(arguments[0])), int(arguments[1])
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
    with contextlib.suppress(ImportError):  # hundreds of lines for a damaged file, which is named
        from decord import logging

        logging.set_level(logging.QUIET)
    threading.Thread(target=_follow_parent, args=(os.getppid(),), daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):  # the training process is gone
        _answer(connection, memory_file)


def _answer(connection: Connection, memory_file: int) -> None:
    work: Work = pickle.loads(connection.recv_bytes())
    connection.send("ready")
    size = work.reader.preparer.size
    memory: mmap.mmap | None = None
    while True:
        name, *rest = connection.recv()
        connection.send("begun")
        try:
            if name == "measure":
                answer: Any = work.measure(*rest)
            else:
                source, record, seed, frames = rest
                need = frames * size * size * 3
                if need and (memory is None or len(memory) < need):
                    memory = mmap.mmap(memory_file, os.fstat(memory_file).st_size)
                out = np.broadcast_to(np.uint8(0), (frames, size, size, 3))  # takes no memory
                if need and memory is not None:
                    out = np.frombuffer(memory, np.uint8, need).reshape(out.shape)
                answer = work.load(source, record, seed, out)
        except Exception as error:  # memory may run out
            answer = f"{type(error).__name__} ({error})"
        connection.send(answer)


def _follow_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
