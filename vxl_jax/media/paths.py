"""Paths of media: where they may lead, and whether there is a file."""

from pathlib import Path

from vxl_jax.errors import MediaError


def resolve_media(root: str | Path, relative: str, allow_outside: bool = False) -> Path:
    """Returns the path of a sample's media file, which must lie inside `root`.

    Sample files come from elsewhere; they must not make the loader open other files. The path is
    returned with symbolic links followed. That the file exists is not checked. allow_outside:
    absolute paths, `..` and links out of `root` are followed, for sample files that one trusts.

    Raises:
      MediaError: `relative` is absolute, holds `..`, leads out of `root` through a link, or is
        no usable path.
    """
    if not isinstance(relative, str) or not relative.strip() or "\0" in relative:
        raise MediaError(f"{relative!r}: not a file name; give a path relative to {root}")
    leaves = Path(relative).is_absolute() or ".." in Path(relative).parts
    if leaves and not allow_outside:
        raise MediaError(f"{relative}: leaves the media folder; give a path relative to {root}")
    base = Path(root).resolve()
    try:
        path = (base / relative).resolve()
    except (OSError, RuntimeError, UnicodeError) as error:  # RuntimeError: links in a circle
        raise MediaError(f"{relative!r}: cannot be followed inside {root}: {error}") from error
    if not allow_outside and not path.is_relative_to(base):
        raise MediaError(f"{relative}: a link leads out of {root} to {path}; put the file inside")
    return path


def check_file(path: str | Path) -> None:
    try:
        is_file = Path(path).is_file()
    except OSError as error:  # a folder that may not be read, a name that is too long
        raise MediaError(f"{path}: cannot be read ({error.strerror})") from error
    if not is_file:
        fault = "is not a file" if Path(path).exists() else "no such file"
        raise MediaError(f"{path}: {fault}; check the sample and the media folder")
