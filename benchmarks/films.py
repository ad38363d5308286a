"""Reading videos, compared with bare PyAV and with decord: seconds of the CPU and memory.

    python -m benchmarks.films     # this part of `benchmarks.data` alone, about six minutes

Writes benchmarks/results/films.json.

Each reader runs in a separate process, which reads the same frames through the same resizing; the
sums of all pixels have to be equal.

- An hour of 1280 x 720 H.264 at 24 frames a second, a key frame every ten seconds: 256 frames,
  evenly. `bare`: PyAV with as little code as does it, frames that are not wanted and that no other
  needs skipped.
- Short clips, of which each frame is read in order.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from vxl_jax.media import VideoFile, resize_and_crop, uniform_indices
from vxl_jax.media.video.decord_video import DecordVideo

SIZE = 336
FPS, KEY_FRAMES, MINUTE = 24, 240, 1440
GOAL = 1.1
"""Most CPU seconds and memory, as a multiple of bare PyAV's."""


def make_hour(path: Path, minutes: int) -> Path:
    """A film whose first minute is encoded, and copied for the others."""
    import av

    minute = path.with_name("minute.mp4")
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 256, (45, 400, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    with av.open(str(minute), "w") as container:
        options = {"preset": "veryfast", "g": str(KEY_FRAMES), "sc_threshold": "0", "crf": "30"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for i in range(MINUTE):
            pixels = np.ascontiguousarray(wide[:, 3 * i % 5000 : 3 * i % 5000 + 1280])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(minute)) as source, av.open(str(path), "w") as container:
        video = source.streams.video[0]
        copy = container.add_stream_from_template(video)
        packets = [packet for packet in source.demux(video) if packet.size]
        assert video.time_base is not None
        length = round(MINUTE / FPS / video.time_base)
        times = [(packet.pts, packet.dts) for packet in packets]
        for i in range(minutes):
            for packet, (pts, dts) in zip(packets, times, strict=True):
                packet.pts, packet.dts = pts + i * length, dts + i * length
                packet.time_base, packet.stream = video.time_base, copy
                container.mux(packet)
    minute.unlink()
    return path


def bare(path: Path, count: int | None) -> tuple[int, int]:
    """Frames through PyAV alone; how many, and the sum of their pixels."""
    import av
    from av.video.reformatter import VideoReformatter

    reformatter = VideoReformatter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        context.thread_count = 1
        packets = [(p.pts, p.dts, p.is_keyframe) for p in container.demux(stream) if p.size]
        times = sorted(pts for pts, _, _ in packets)
        keys = sorted((pts, dts) for pts, dts, is_key in packets if is_key)
        indices = range(len(times)) if count is None else uniform_indices(len(times), count)
        wanted = {times[i] for i in indices}
        last, at = max(wanted), -1
        out = np.empty((len(indices), SIZE, SIZE, 3), np.uint8)
        container.seek(keys[0][1], stream=stream)
        frames: Any = None
        for place, index in enumerate(indices):
            key = keys[max(0, bisect_right(keys, (times[index], 2**62)) - 1)]
            if frames is None or key[0] > at + 1000:
                container.seek(key[1], stream=stream)
                frames = skipping_frames(container, stream, wanted, last)
            for frame in frames:
                at = frame.pts
                if at == times[index]:
                    break
            pixels = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
            out[place] = resize_and_crop(pixels, SIZE)
    return len(out), int(out.sum(dtype=np.int64))


def skipping_frames(container: Any, stream: Any, wanted: set[int], last: int) -> Any:
    """Decoded frames, without those that are not wanted and that no other needs."""
    for packet in container.demux(stream):
        skip = packet.size and packet.pts not in wanted and packet.pts <= last
        stream.codec_context.skip_frame = "NONREF" if skip else "DEFAULT"
        yield from packet.decode()


def ours(path: Path, count: int | None) -> tuple[int, int]:
    """The same frames through the reader of this project."""
    return read_all(VideoFile(path), count)


def decord(path: Path, count: int | None) -> tuple[int, int]:
    """The same frames through decord, as this project reads with it."""
    return read_all(DecordVideo(path), count)


def read_all(video: VideoFile | DecordVideo, count: int | None) -> tuple[int, int]:
    """Frames of a video; how many, and the sum of their pixels."""
    indices = range(video.frames) if count is None else uniform_indices(video.frames, count)
    pixels = video.read(indices, SIZE)
    return len(pixels), int(pixels.sum(dtype=np.int64))


READERS: dict[str, Callable[[Path, int | None], tuple[int, int]]] = {
    "bare": bare,
    "ours": ours,
    "decord": decord,
}


def measure(reader: str, count: int | None, paths: Sequence[str]) -> dict[str, Any]:
    """In this process: seconds and memory of reading some files."""
    began = time.perf_counter()
    read = [READERS[reader](Path(path), count) for path in paths]
    seconds = time.perf_counter() - began
    usage = resource.getrusage(resource.RUSAGE_SELF)
    status = Path("/proc/self/status").read_text()  # ru_maxrss counts the parent's memory too
    return {
        "frames": sum(frames for frames, _ in read),
        "sum": sum(total for _, total in read),
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": int(status.split("VmHWM:")[1].split()[0]) * 1024,
    }


def compare(paths: Sequence[Path], count: int | None, rounds: int) -> dict[str, Any]:
    """All readers in turns, each in a separate process; the least of each figure."""
    best: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for reader in list(READERS) if number % 2 else reversed(list(READERS)):
            arguments = [reader, str(count or 0), *map(str, paths)]
            command = [sys.executable, "-m", "benchmarks.films", *arguments]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            least = best.setdefault(reader, row)
            best[reader] = {name: min(value, least[name]) for name, value in row.items()}
    if len({(row["frames"], row["sum"]) for row in best.values()}) != 1:
        raise SystemExit(f"not the same frames: {best}")
    figures = ("seconds", "cpu_seconds", "peak_bytes")
    ratio = {
        reader: {name: best["ours"][name] / row[name] for name in figures}
        for reader, row in best.items()
        if reader != "ours"
    }
    return {"files": len(paths), "readers": best, "ratio": ratio}


def films(folder: Path, clips: Sequence[Path], minutes: int, rounds: int) -> dict[str, Any]:
    """An hour, and short clips."""
    hour = make_hour(folder / "hour.mp4", minutes)
    return {
        "hour": {"minutes": minutes, **compare([hour], 256, rounds)},
        "clips": compare(clips, None, rounds),
    }


def show_films(results: dict[str, Any]) -> None:
    """Seconds, CPU seconds and memory of each reader."""
    print(f"\n{'films':8}{'reader':10}{'frames':>8}{'s':>8}{'CPU s':>8}{'MB':>8}")
    for name, row in results["films"].items():
        for reader, figures in row["readers"].items():
            print(
                f"{name:8}{reader:10}{figures['frames']:8}{figures['seconds']:8.1f}"
                f"{figures['cpu_seconds']:8.1f}{figures['peak_bytes'] / 1e6:8.0f}"
            )
        for reader, ratio in row["ratio"].items():
            text = ", ".join(f"{value:.2f} {figure}" for figure, value in ratio.items())
            print(f"{'':8}ours / {reader}: {text}")
    ratio = results["films"]["hour"]["ratio"]["bare"]
    ok = max(ratio["cpu_seconds"], ratio["peak_bytes"]) <= GOAL
    print(f"hour more than bare PyAV, goal {GOAL}: {'reached' if ok else 'missed'}")


def main() -> None:
    """Run this part alone, and write its results."""
    from benchmarks.core import machine, write_results
    from benchmarks.data_files import FULL, make_videos

    with tempfile.TemporaryDirectory() as name:
        clips = make_videos(Path(name), replace(FULL, videos=len(FULL.seconds)))
        results = {"films": films(Path(name), clips, FULL.minutes, FULL.rounds)}
    show_films(results)
    about = machine()
    about["versions"] |= {name: version(name) for name in ("av", "decord", "pillow")}
    write_results("films", {"goals": {"ratio": GOAL}, **results}, about)


if __name__ == "__main__" and len(sys.argv) == 1:
    main()
elif __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]) or None, sys.argv[3:])))
