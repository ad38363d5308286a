"""Convert a checkpoint in the published layout into one of this library.

    python -m convert.from_hf SRC DST [--dtype bfloat16] [--vision DIR] [--adapter DIR]

SRC has config.json, tokenizer files, and one or several safetensors files. DST is enough by itself
for generation and training; `vxl_jax.checkpoints.load` describes it. Every tensor is accounted for
before anything is written.
"""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from safetensors.numpy import save_file
from tyro.conf import arg

from convert.adapter import MODEL_FIELDS, Adapter, read_adapter
from convert.command import DIRECTORY, StoredDtype, run_command
from convert.writing import (
    byte_bar,
    change_fields,
    check_apart,
    copy_files,
    new_directory,
    set_dtype,
    with_run_fields,
)
from vxl_jax.checkpoints.arrays import Index, check_tensors, read_part, stored_dtype, unused_tensors
from vxl_jax.checkpoints.hf_config import PARAMS, UNUSED, read_config, refuse_adapter
from vxl_jax.checkpoints.json_files import Fields
from vxl_jax.checkpoints.load import abstract_params
from vxl_jax.checkpoints.names import NameRow
from vxl_jax.checkpoints.orbax_tree import save_params
from vxl_jax.checkpoints.safetensors_read import find_tensors
from vxl_jax.checkpoints.tensors import (
    Tensor,
    as_dtype,
    check_finite,
    raise_problems,
    tensors_not_finite,
)
from vxl_jax.config import DTYPES, VideoXLConfig
from vxl_jax.errors import CheckpointError
from vxl_jax.typing import Shapes


def convert_from_hf(
    source: Annotated[str | Path, arg(metavar="SRC")],
    destination: Annotated[str | Path, arg(metavar="DST")],
    *,
    dtype: StoredDtype | None = None,
    vision: Annotated[str | Path | None, DIRECTORY] = None,
    ignore: Annotated[str | None, arg(metavar="REGEX")] = None,
    adapter: Annotated[str | Path | None, DIRECTORY] = None,
    overwrite: bool = False,
) -> None:
    """Convert `source`, in the published layout, into `destination`.

    Args:
        source: directory with config.json and safetensors files.
        destination: directory that is made, whole or not at all.
        dtype: of the weights; None: that of the source.
        vision: directory with config.json of a tower that is neither in the source nor a known one.
        ignore: regular expression; tensors whose whole name it matches are left out.
        adapter: directory of a peft adapter (LoRA) of the source, which is merged into its weights.
        overwrite: replace a checkpoint at the destination.

    Raises: CheckpointError that lists every missing, unexpected, duplicate or misshapen tensor, and
        every one whose weights are not finite; `destination` is then as it was.
    """
    source, destination = Path(source), Path(destination)
    check_apart(source, destination)
    refuse_adapter(source)
    left_out: set[str] = set()
    tensors, problems = find_tensors(source, partial(_leave_out, _pattern(ignore), left_out))
    merged = None
    if adapter is not None:
        merged = read_adapter(Path(adapter), tensors)
        tensors |= merged.replaced
    config = read_config(
        source, vision=vision, tensors=tensors, param_dtype=dtype or stored_dtype(tensors)
    )
    if merged is not None:
        merged.check(config)
        if merged.fields:
            with_run_fields(config, Fields(merged.fields, merged.directory / MODEL_FIELDS))
    _, shapes = abstract_params(config)
    problems += check_tensors(tensors, config, shapes, dtype)
    if problems:
        raise_problems(source, problems + tensors_not_finite(tensors))
    if ignore is not None and not left_out:
        print(f"--ignore {ignore!r} is the whole name of no tensor", file=sys.stderr)
    for name in sorted(left_out):
        print(f"left out {name} (--ignore)", file=sys.stderr)

    def write_files(part: Path) -> None:
        copy_files(source, config, part, vision)
        if merged is not None and merged.fields:
            change_fields(part / "config.json", merged.fields)
        if dtype:
            set_dtype(part, dtype)

    write_checkpoint(
        source, destination, tensors, config, shapes, write_files, overwrite, dtype, merged
    )


def _pattern(ignore: str | None) -> re.Pattern[str] | None:
    try:
        return None if ignore is None else re.compile(ignore)
    except re.error as error:
        raise CheckpointError(f"--ignore {ignore!r}: not a regular expression ({error})") from error


def _leave_out(pattern: re.Pattern[str] | None, left_out: set[str], name: str) -> bool:
    if pattern is None or not pattern.fullmatch(name):
        return False
    left_out.add(name)
    return True


def write_checkpoint(
    source: Path,
    destination: Path,
    tensors: dict[str, Tensor],
    config: VideoXLConfig,
    shapes: Shapes,
    write_files: Callable[[Path], None],
    overwrite: bool,
    unused_dtype: str | None,
    adapter: Adapter | None = None,
) -> None:
    """Read tensors that have been checked, and write a checkpoint of `config.param_dtype`.

    write_files: writes everything but the weights into the directory it is given. unused_dtype: of
    the tensors that the network never reads; as they are stored if None. adapter: merged into the
    kernels in float32.
    """
    dtype = DTYPES[config.param_dtype]
    unused = unused_tensors(tensors, config)
    size = sum(struct.size * struct.dtype.itemsize for struct in shapes.values())
    size += sum(tensor.bytes for tensor in unused.values())
    problems: list[str] = []
    with (
        new_directory(destination, size, overwrite) as part,
        byte_bar("converting", sum(tensor.bytes for tensor in tensors.values())) as bar,
    ):

        def read(row: NameRow, index: Index, out: np.ndarray) -> None:
            if adapter is None or not adapter.touches(row):
                read_part(row, tensors, index, dtype, problems, bar.update, out)
                return
            values = read_part(row, tensors, index, np.float32, problems, bar.update)
            adapter.merge(row, index, values)
            out[...] = values

        save_params(part / PARAMS, config, shapes, read)
        kept = {}
        for name, tensor in unused.items():
            values = tensor.read()
            check_finite(name, tensor, values, problems)
            kept[name] = as_dtype(values, tensor, unused_dtype).copy()
            bar.update(values.nbytes)
        raise_problems(source, sorted(set(problems)))
        if kept:
            save_file(kept, part / UNUSED)
        write_files(part)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(convert_from_hf, "convert.from_hf", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
