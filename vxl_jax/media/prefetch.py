"""Prefetch items of an iterator in a background thread."""

import queue
import threading
from collections.abc import Generator
from contextlib import closing
from typing import Any


def ahead(chunks: Any, depth: int = 1) -> Generator[Any, None, None]:
    """Prefetch up to `depth` items of an iterator in a thread.

    An exception in the thread is raised after the items before it. chunks: an iterator with
    `close`. Its `stop`, if it has one, is called when the consumer stops early.
    """
    made: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    left = threading.Event()

    def put(kind: str, item: Any = None) -> bool:
        while not left.is_set():
            try:
                made.put((kind, item), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            with closing(chunks):
                for item in chunks:
                    if not put("item", item):
                        return
            put("end")
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=make, daemon=True)  # a camera may never give its next picture
    try:
        thread.start()
        while True:
            kind, item = made.get()
            if kind == "error":
                raise item
            if kind == "end":
                return
            yield item
    finally:
        left.set()
        getattr(chunks, "stop", lambda: None)()
