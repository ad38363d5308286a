"""Check the Flax model against golden numbers of the published PyTorch implementations.

    python -m convert.parity HF_DIR GOLDEN_DIR
    python -m convert.parity GOLDEN_DIRS

HF_DIR is a checkpoint, in the published layout or converted. GOLDEN_DIR holds `golden.json` (the
cases) and `golden.safetensors` (their inputs and outputs); `docs/parity.md` describes the format.
With one directory, all golden sets in it are checked, each on the checkpoint that comes with it.
Prints a row a tensor, and exits 1 if a relative error ‖ours − golden‖ / ‖golden‖ is over 1e-4 or
ids differ.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
from tyro.conf import arg

from convert.command import parse_call
from convert.golden.compare import Comparison, GoldenSet
from convert.golden.llava import check_llava, check_slowfast
from convert.golden.media import check_preprocessing
from convert.golden.video_xl import Golden, check
from vxl_jax.checkpoints.load import load_network
from vxl_jax.errors import CheckpointError, ConfigError, VxlError
from vxl_jax.presets import llava_video_7b
from vxl_jax.text.tokenizer import load_tokenizer


def golden_sets(directory: Path) -> list[Path]:
    """Directories of golden sets: this one, or those in it.

    Raises: CheckpointError if there are none.
    """
    if (directory / "golden.json").is_file():
        return [directory]
    found = sorted(path.parent for path in directory.glob("*/golden.json"))
    if not found:
        raise CheckpointError(f"{directory}: neither it nor a folder in it has a golden.json")
    return found


def check_set(directory: Path, checkpoint: Path | None = None) -> Iterator[Comparison]:
    """Compare a golden set, a row at a time.

    checkpoint: the model; the one that comes with the set if None.
    """
    golden = GoldenSet(directory)
    if "sampling" in golden.meta:
        media = directory.parent.parent / "media"
        tokenizer = load_tokenizer(
            directory.parent.parent / "tokenizer" / "qwen2", llava_video_7b().language
        )
        return check_preprocessing(golden, media, tokenizer)
    if checkpoint is None:
        checkpoint = directory / str(golden.meta.get("hf", "hf"))
    model = load_network(checkpoint, dtype="float32", param_dtype="float32")
    if "slowfast" in golden.meta:
        return check_slowfast(model, golden)
    if "training" in golden.meta:
        return check_llava(model, golden, checkpoint)
    return check(model, Golden(directory))


def compare_golden(
    directories: Annotated[tuple[Path, ...], arg(metavar="DIR [DIR]")],
) -> int:
    """Print a row a tensor; returns the exit status.

    Args:
        directories: a checkpoint and a golden set, or golden sets that have their own.
    """
    rows: list[Comparison] = []
    try:
        if not 1 <= len(directories) <= 2:
            raise ConfigError("give a checkpoint and a golden set, or one directory of golden sets")
        *checkpoint, directory = directories
        with jax.default_matmul_precision("highest"):
            for golden in golden_sets(directory):
                print(golden)
                for row in check_set(golden, *checkpoint):
                    rows.append(row)
                    mark = "ok  " if row.passed else "FAIL"
                    print(f"{mark} {row.error:9.2e}  {row.name}  {row.note}".rstrip(), flush=True)
    except (VxlError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = sum(not row.passed for row in rows)
    worst = max((row.error for row in rows), default=np.inf)
    print(f"{len(rows)} tensors, {failed} failed, largest relative error {worst:.2e}")
    return int(failed > 0 or not rows)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return parse_call(compare_golden, "convert.parity", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
