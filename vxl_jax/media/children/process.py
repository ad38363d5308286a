"""Run media decoders in a child process that can be killed: a crash or hang costs one request.

    python -m vxl_jax.media.children.process SOCKET MEMORY PARENT  # by MediaProcess, never by hand

Decoders are C code that can crash or loop for ever on a damaged file. `MediaProcess` is the
parent's end: it sends requests to a handler in the child. Pixels come back in shared memory,
everything else as pickles over a socket. The first page of the shared memory holds a counter of
`heartbeat.beat` calls (uint64); pixels follow it.

This module imports neither JAX nor transformers. `vxl_jax.media` must not import it, because the
child runs it as a program.
"""

import faulthandler
import math
import mmap
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from vxl_jax.media.heartbeat import set_listener

POLL = 0.05
"""Seconds between two checks of a child that has not answered."""
WAIT = 10.0
"""Wall time without a beat that ends a child, as a multiple of its limit of CPU time."""
START_SECONDS = 60.0
"""CPU time in which a child must start, or receive a request. `WAIT` applies here too."""
STARTS = 3
"""Starts in a row that may fail."""
END_SECONDS = 2.0
"""Wall time to wait for a killed child. One that reads a dead disk stays; it is abandoned."""
ORPHAN_SECONDS = 1200.0
"""Time after which a child ends in which Python threads do not run: its parent may be gone."""
MEMORY_BYTES = 2**32
"""Limit of a child's private memory: a small file can ask a video decoder for any amount."""
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**27)}
"""Lets glibc reuse the memory of one image for the next. Getting it from the system each time took
a third of the time."""

Handler = Callable[[Any, np.ndarray | None], Any]
"""Called as `handler(request, out)` in the child; it must not keep the uint8 array `out`."""

_PAGE = mmap.PAGESIZE


class ProcessError(RuntimeError):
    """Base class of the errors of `MediaProcess.ask`."""


class CannotStart(ProcessError):
    """The child cannot be started, or the system has no memory to share with it."""


class ProcessDied(ProcessError):
    """The child died during a request; the message is `signal NAME` or `exit status N`."""


class Hung(ProcessError):
    """The child was killed because it hung; the message completes "the process ..."."""


class Stopped(ProcessError):
    """The argument `stopped` returned true; a child that was busy was killed."""


class HandlerError(ProcessError):
    """The handler raised an exception: its type's name, its text, and itself if it pickles."""

    def __init__(self, kind: str, text: str, original: Exception | None = None):
        super().__init__(kind, text, original)
        self.kind, self.text, self.original = kind, text, original

    def __str__(self) -> str:
        return f"{self.kind} ({self.text})"


class MediaProcess:
    """A child process that answers requests. The first request starts it, and restarts it.

    One thread at a time may call `ask` and `end`; any thread may call `kill`. `process` is None
    while there is no child.
    """

    def __init__(self, handler: bytes, name: str):
        """handler: pickle of a `Handler`. name: what errors call the child ("data process")."""
        self.handler, self.name = handler, name
        self.process: subprocess.Popen[bytes] | None = None
        self._failed_starts = 0
        self._beats: Any = None
        self._memory: Any = None

    def ask(
        self,
        request: Any,
        seconds: float,
        out: np.ndarray | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Any:
        """Return the handler's answer to a request, and copy its pixels to `out`.

        The limit does not depend on the load of the machine. A child that dies before it begins
        the request is replaced without an error.

        Args:
          request: any object that pickles.
          seconds: CPU seconds without a `heartbeat.beat` after which the child is killed. It is
            also killed after `WAIT` times as many seconds of wall time without one.
          out: uint8 array. The handler gets one of this shape with undefined values.
          stopped: called every `POLL` seconds; the child is killed if it returns true.

        Raises:
          HandlerError, ProcessDied, Hung: no answer; `out` is unchanged. `ask` can be used again.
          CannotStart: the child cannot be started, or its memory not enlarged.
          Stopped: `stopped` returned true.
        """
        if stopped():
            raise Stopped("stopped")
        message = pickle.dumps((request, None if out is None else out.shape), protocol=5)
        try:
            self._begin(message, 0 if out is None else out.nbytes, stopped)
            answer = pickle.loads(_receive(self._socket, self._limit(seconds, stopped)))
        except (EOFError, OSError) as error:
            raise ProcessDied(self.end()) from error
        except BaseException:  # otherwise its answer would reach the next request
            self.kill()
            self.end()
            raise
        if isinstance(answer, HandlerError):
            raise answer
        if out is not None:
            out[...] = np.ndarray(out.shape, np.uint8, self._memory, _PAGE)
        return answer

    def kill(self) -> None:
        """Kill the child, if there is one; a thread that waits for its answer gets ProcessDied."""
        process = self.process  # another thread may clear it
        if process is not None:
            process.kill()

    def end(self) -> str:
        """End the child and return how it ended, as in `exit status 0` or `signal SIGSEGV`.

        An idle child ends by itself. One that has not ended after a second is killed.
        """
        process = self.process
        if process is None:
            return "not started"
        self.process = None  # first: Ctrl-C may come at any moment
        self._socket.close()
        self._file.close()
        self._beats = self._memory = None
        try:
            code = process.wait(1.0)  # a child that crashed may take a moment to leave its status
        except subprocess.TimeoutExpired:
            process.kill()
            code = -signal.SIGKILL
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
        if code >= 0:
            return f"exit status {code}"
        names = {int(number): number.name for number in signal.Signals}
        return f"signal {names.get(-code, -code)}"

    def _begin(self, message: bytes, size: int, stopped: Callable[[], bool]) -> None:
        """Send a request with `size` bytes of pixels to a child that is or will be started.

        Raises: CannotStart, Stopped.
        """
        while True:
            is_new = self.process is None
            if is_new:
                self._start()
            limit = self._limit(START_SECONDS, stopped)
            self._share(size)
            try:
                if is_new:
                    _send(self._socket, self.handler, limit)
                _send(self._socket, message, limit)
                _receive(self._socket, limit)
                self._failed_starts = 0
                return
            except (EOFError, OSError):
                how = self.end()
            except Hung as error:
                self.kill()
                self.end()
                how = f"it {error}"
            self._failed_starts += is_new
            if self._failed_starts >= STARTS:
                raise CannotStart(f"a {self.name} ended {STARTS} times as it started ({how})")

    def _start(self) -> None:
        environment = {
            **os.environ,
            **KEEP_MEMORY,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        try:
            self._file = _memory_file()
            self._socket, theirs = socket.socketpair()
            with theirs:
                self._socket.settimeout(POLL)
                passed = theirs.fileno(), self._file.fileno()
                arguments = *passed, os.getpid()
                self.process = subprocess.Popen(
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        "vxl_jax.media.children.process",
                        *map(str, arguments),
                    ],
                    pass_fds=passed,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for the parent alone
                )
            self._memory = mmap.mmap(self._file.fileno(), _PAGE)
            self._beats = memoryview(self._memory).cast("Q")
        except OSError as error:
            raise CannotStart(f"a {self.name} cannot be started ({error})") from error

    def _share(self, size: int) -> None:
        """Enlarge the shared memory to `size` bytes of pixels."""
        if len(self._memory) >= _PAGE + size:
            return
        try:
            os.ftruncate(self._file.fileno(), _PAGE + size)
            self._memory = mmap.mmap(self._file.fileno(), _PAGE + size)
        except OSError as error:
            text = f"a {self.name} cannot share {size} bytes of pixels ({error})"
            raise CannotStart(text) from error

    def _limit(self, seconds: float, stopped: Callable[[], bool]) -> Callable[[], None]:
        """A function that raises Stopped, or Hung if the child's last beat is too long ago."""
        assert self.process is not None
        process, seen, cpu = self.process.pid, self._beats[0], _cpu_seconds(self.process.pid)
        checked, waited = time.monotonic(), 0.0

        def check() -> None:
            nonlocal seen, cpu, checked, waited
            if stopped():
                raise Stopped("stopped")
            now = time.monotonic()
            waited += min(now - checked, 1.0)  # more: this process itself was stopped meanwhile
            checked = now
            if self._beats[0] != seen:
                seen, cpu, waited = self._beats[0], _cpu_seconds(process), 0.0
            elif _cpu_seconds(process) - cpu > seconds:
                raise Hung(f"made no progress in {seconds:g} s of CPU time")
            elif waited > WAIT * seconds:
                raise Hung(f"gave no sign of life for {WAIT * seconds:g} s")

        return check


def _memory_file() -> IO[bytes]:
    """An unnamed file of one page, in memory where the system allows that."""
    if hasattr(os, "memfd_create"):
        file: IO[bytes] = os.fdopen(os.memfd_create("vxl-pixels"), "r+b", buffering=0)
    else:  # macOS
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    os.ftruncate(file.fileno(), _PAGE)
    return file


def _cpu_seconds(process: int) -> float:
    """CPU time of all threads of a process, user and system; 0 where it cannot be read."""
    with suppress(OSError):
        return time.clock_gettime((~process << 3) | 2)  # MAKE_PROCESS_CPUCLOCK of Linux
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


# Messages of both ends. A socket of the parent has a timeout; `wait` is called whenever it passes.


def _send(channel: socket.socket, message: bytes, wait: Callable[[], None] = lambda: None) -> None:
    rest = memoryview(len(message).to_bytes(8, "little") + message)
    while rest:
        try:
            rest = rest[channel.send(rest) :]
        except TimeoutError:
            wait()


def _receive(channel: socket.socket, wait: Callable[[], None] = lambda: None) -> bytearray:
    def fill(data: bytearray) -> bytearray:
        rest = memoryview(data)
        while rest:
            with suppress(TimeoutError):
                count = channel.recv_into(rest)
                if not count:
                    raise EOFError
                rest = rest[count:]
                continue
            wait()
        return data

    return fill(bytearray(int.from_bytes(fill(bytearray(8)), "little")))


# The child's end.


def main(arguments: list[str]) -> None:
    """Answer requests until the parent is gone."""
    # Schedulers send it to all processes; the parent still needs answers to finish its work.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        limit = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
    threading.Thread(target=_follow_parent, args=(int(arguments[2]),), daemon=True).start()
    channel, file = socket.socket(fileno=int(arguments[0])), int(arguments[1])
    channel.setblocking(True)
    with suppress(EOFError, ConnectionError):  # the parent is gone
        _answer(channel, file)


def _answer(channel: socket.socket, file: int) -> None:
    memory = mmap.mmap(file, _PAGE)
    beats = memoryview(memory).cast("Q")

    def beat() -> None:
        beats[0] += 1

    set_listener(beat)
    handler: Handler = pickle.loads(_receive(channel))
    with open(os.devnull, "wb") as nowhere:  # decoders write about damaged files, which are named
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    while True:
        message = _receive(channel)
        _send(channel, b"begun")
        try:
            request, shape = pickle.loads(message)
            out = None
            if shape is not None:
                if len(memory) < _PAGE + math.prod(shape):
                    memory = mmap.mmap(file, os.fstat(file).st_size)
                out = np.ndarray(shape, np.uint8, memory, _PAGE)
            reply = pickle.dumps(handler(request, out), protocol=5)
        except Exception as error:  # decoders raise anything, and memory may run out
            reply = pickle.dumps(_sendable(error))
        _send(channel, reply)


def _sendable(error: Exception) -> HandlerError:
    kind, text = type(error).__name__, ""
    with suppress(Exception):
        text = str(error)
    with suppress(Exception):
        pickle.loads(pickle.dumps(error))
        return HandlerError(kind, text, error)
    return HandlerError(kind, text)


def _follow_parent(parent: int) -> None:
    while os.getppid() == parent:
        # Ends the process also if a decoder keeps this thread from running.
        faulthandler.dump_traceback_later(ORPHAN_SECONDS, exit=True)
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    # By its name, so that HandlerError is the class that the parent knows.
    from vxl_jax.media.children.process import main as main_by_name

    main_by_name(sys.argv[1:])
