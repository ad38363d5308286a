"""Seconds and peak memory of conversion, compared with `cp` of the same bytes, in one run.

    python -m benchmarks.convert                 # 3 layers of the 7B shapes: 4.3 GB in bfloat16
    python -m benchmarks.convert --layers 28     # all of it: 16.8 GB

Makes a sharded checkpoint in the published layout with the real 7B tensor shapes and random weights
in a temporary directory, and runs in turn, each in a separate process: `cp`, `convert.from_hf`,
`cp`, `convert.to_hf`; first from disk to disk (what is read is not in the page cache, what is
written is on the disk at the end, as conversion always leaves it), then from cache to cache. The
least seconds of all rounds and the largest memory count. Needs four times the checkpoint's bytes on
the disk. Writes benchmarks/results/convert.json.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.core import write_results
from convert.writing import published_config, write_tower
from vxl_jax.checkpoints.json_files import write_json
from vxl_jax.checkpoints.load import abstract_params
from vxl_jax.checkpoints.names import name_rows
from vxl_jax.checkpoints.safetensors_write import NewTensor, Piece, write_shards
from vxl_jax.config import LanguageConfig, VideoXLConfig

LIMIT = 1.3, 2e9
"""Most memory that conversion may take: times the checkpoint's bytes, plus bytes."""


def make_checkpoint(directory: Path, layers: int) -> int:
    """Write a checkpoint with random weights; returns its bytes."""
    directory.mkdir()
    config = VideoXLConfig(language=LanguageConfig(layers=layers), param_dtype="bfloat16")
    write_json(directory / "config.json", published_config(config))
    write_tower(config.tower, directory)
    _, shapes = abstract_params(config)
    block = np.random.default_rng(0).integers(0, 2**16, 2**24, np.uint16)
    block &= 0xBFFF  # no exponent of all ones: finite weights

    def pieces(size: int) -> Iterator[Piece]:
        for start in range(0, size, len(block)):
            part = block[: min(len(block), size - start)]
            yield Piece(part.nbytes, lambda part=part: part)

    planned = []
    for row in name_rows(config):
        shape = row.published_shape(shapes[row.ours].shape)
        for name in row.names():
            size = int(np.prod(shape))
            planned.append(NewTensor(name, "BF16", shape, list(pieces(size))))
    write_shards(directory, planned, 5 * 10**9, lambda size: None)
    return sum(tensor.bytes for tensor in planned)


def measure(command: list[str]) -> dict[str, float]:
    """Seconds and peak resident memory of a process."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    error = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{error}")
    return {"seconds": time.perf_counter() - began, "peak_bytes": usage.ru_maxrss * 1024}


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """The least seconds and the largest memory."""
    return {
        "seconds": min(run["seconds"] for run in runs),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
    }


def drop_from_cache(directory: Path) -> None:
    """Let the next reading of these files come from the disk."""
    os.sync()  # unwritten pages cannot be dropped
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Run all, print a table, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=3, help="of the language model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to work (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        source, copy, ours, back = (Path(folder) / name for name in ("hf", "copy", "ours", "back"))
        size = make_checkpoint(source, options.layers)
        python = [sys.executable, "-m"]
        commands = {
            "from_hf": (source, [*python, "convert.from_hf", str(source), str(ours)]),
            "to_hf": (ours, [*python, "convert.to_hf", str(ours), str(back)]),
        }
        results = {}
        for place, copying in (("disk", "cp -r {} {} && sync"), ("cache", "cp -r {} {}")):
            rounds: dict[str, list[dict[str, float]]] = {}
            for _ in range(options.rounds):
                for made in (ours, back):
                    shutil.rmtree(made, ignore_errors=True)
                for name, (read, command) in commands.items():
                    copying_it = ["sh", "-c", copying.format(read, copy)]
                    for what, run in ((f"cp ({name})", copying_it), (name, command)):
                        if place == "disk":
                            drop_from_cache(read)
                        rounds.setdefault(what, []).append(measure(run))
                    shutil.rmtree(copy)
            results[place] = {name: summary(runs) for name, runs in rounds.items()}
            for name in commands:
                ratio = results[place][name]["seconds"] / results[place][f"cp ({name})"]["seconds"]
                results[place][name]["times_cp"] = ratio
    print(
        f"{size / 1e9:.2f} GB of weights; memory limit {(LIMIT[0] * size + LIMIT[1]) / 1e9:.2f} GB"
    )
    print(f"{'':20}{'seconds':>9}{'times cp':>10}{'peak GB':>9}")
    for place, rows in results.items():
        for name, values in rows.items():
            ratio_text = f"{values['times_cp']:10.2f}" if "times_cp" in values else " " * 10
            print(
                f"{place:6}{name:14}{values['seconds']:9.2f}{ratio_text}"
                f"{values['peak_bytes'] / 1e9:9.2f}"
            )
    figures = {"weights_bytes": size, "layers": options.layers, "results": results}
    write_results("convert", figures)


if __name__ == "__main__":
    main()
