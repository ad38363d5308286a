"""Resolve and check the paths of media files."""

import os
import stat
from pathlib import Path

from vxl_jax.errors import MediaError


def resolve_media(root: str | Path, relative: str, allow_outside: bool = False) -> Path:
    """Return the path of a sample's media file, which must lie inside `root`.

    Sample files come from elsewhere; they must not make the loader open other files. The path is
    returned with symbolic links followed. That the file exists is not checked. allow_outside:
    absolute paths, `..` and links out of `root` are followed, for sample files that one trusts.

    Raises:
      MediaError: `relative` is absolute, holds `..`, leads out of `root` through a link, or is
        not a valid path.
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
    """Check that a media file exists, can be read and is not empty.

    Raises:
      MediaError: missing, a broken link, a folder, empty, no permission, or a name that the file
        system cannot have.
    """
    name = printable(path)
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):  # opening a pipe would wait
            open(path, "rb").close()
    except FileNotFoundError as error:
        if os.path.islink(path):
            target = printable(os.readlink(path))
            raise MediaError(
                f"{name}: is a broken link, {target} does not exist; fetch the file or remove "
                "the link"
            ) from error
        raise MediaError(f"{name}: no such file; check the sample and the media folder") from error
    except PermissionError as error:
        raise MediaError(
            f"{name}: cannot be read ({error.strerror}); change the permissions of the file and "
            "its folders"
        ) from error
    except OSError as error:  # a name that is too long, links in a circle, a failing disk
        raise MediaError(f"{name}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # UnicodeEncodeError is one
        raise MediaError(
            f"{name}: the name cannot be encoded as a file name; rename the file"
        ) from error
    if stat.S_ISDIR(status.st_mode):
        raise MediaError(
            f"{name}: is not a file but a folder; check the sample and the media folder"
        )
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(f"{name}: is not a file; check the sample and the media folder")
    if status.st_size == 0:
        raise MediaError(f"{name}: is empty; fetch it again")


def printable(path: str | Path) -> str:
    """Return a path for a message: control characters and bytes that are not UTF-8 are escaped.

    Other paths are returned as they are.
    """
    text = str(path)
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
