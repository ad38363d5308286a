"""Decode image files to RGB pixels, as a viewer shows them."""

import io
import os
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin, features

from vxl_jax.errors import MediaError
from vxl_jax.media.kinds import describe_format, ends_early, first_bytes, format_of
from vxl_jax.media.options import DEFAULT_OPTIONS, MediaOptions
from vxl_jax.media.paths import check_file, printable
from vxl_jax.media.tiles import Size

# Larger images are refused: decoding one takes 10 bytes a pixel, and a header of 74 bytes can ask
# for any number. JPEGs are decoded at 1/2, 1/4 or 1/8 of their size instead, up to a limit. The
# decoder keeps 6 bytes a pixel of a progressive JPEG, also if it is decoded at a reduced size.
_MAX_PIXELS = 2**26
_MAX_JPEG_PIXELS = 2**29
_MAX_PROGRESSIVE_PIXELS = 2**27
# Pixels of 32 bits that are scaled at a time, as float64.
_BLOCK = 2**20

_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transpose operation that makes an image upright, by EXIF orientation."""


def load_image(path: str | Path, options: MediaOptions = DEFAULT_OPTIONS) -> Image.Image:
    """Read an image file as RGB, the way a viewer shows it; the first picture if it has several.

    - EXIF orientation is applied.
    - Transparent images are composed on white. Opaque images are converted to RGB only.
    - 16-bit grey is divided by 257. 32-bit integers and floats, which have no agreed white, are
      scaled so that white is 1 (floats only), 255 or 65535, the first that no pixel exceeds; if
      there are larger or negative values, the least becomes black and the greatest white.
    - JPEGs of more than 67 million pixels are decoded at 1/2, 1/4 or 1/8 of their size.
    - `options.color_profile` converts images with an ICC profile to sRGB.

    HEIC images need the package pillow-heif.

    Raises:
      MediaError: missing, not an image, truncated, damaged, or more than 67 million pixels (JPEG:
        537 million, or 134 million if it is progressive).
    """
    with open_image(path) as image:
        form = "HEIC" if image.format == "HEIF" else str(image.format)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                turn = orientation(image, path)
                profile = image.info.get("icc_profile") if options.color_profile else None
                return upright(flatten(image, profile), turn)
        except Exception as error:  # Decoders raise OSError, ValueError, SyntaxError, IndexError...
            raise MediaError(
                f"{printable(path)}: image cannot be decoded {_fault(path, form, error)}"
            ) from error


def image_size(path: str | Path) -> Size:
    """Return (width, height) of the image that `load_image` gives, from the file's header.

    Raises:
      MediaError: missing, not an image, or too large.
    """
    with open_image(path) as image:
        width, height = image.size
        return (height, width) if orientation(image, path) >= 5 else (width, height)


def open_image(path: str | Path) -> Image.Image:
    """Open an image file and read its header, without decoding pixels.

    The size is checked, and a huge JPEG is set to be decoded at a reduced size.

    Raises:
      MediaError: as `load_image`.
    """
    check_file(path)
    name, beginning = printable(path), first_bytes(path)
    form = format_of(beginning)
    if form is None:
        what, advice = describe_format(beginning)
        raise MediaError(f"{name}: not a readable image ({what}); {advice}")
    try:
        with warnings.catch_warnings():
            # Pillow warns of images that are refused below, and of damaged tags.
            warnings.simplefilter("ignore")
            image = _open(path, form)
    except ImportError as error:
        raise MediaError(
            f"{name}: is a HEIC image; pip install 'vxl-jax[heic]' reads it, or convert it to JPEG"
        ) from error
    except Image.DecompressionBombError as error:
        raise MediaError(
            f"{name}: more than {_MAX_PIXELS:,} pixels, it may be a decompression bomb; reduce "
            "the image"
        ) from error
    except Exception as error:  # As in `load_image`; images of 0 pixels are refused here too.
        if form == "AVIF" and not features.check("avif"):
            raise MediaError(
                f"{name}: is an AVIF image, which this build of Pillow does not read; pip install "
                "pillow again, or convert it to JPEG"
            ) from error
        raise MediaError(f"{name}: not a readable image {_fault(path, form, error)}") from error
    try:
        check_size(image, name)
    except MediaError:
        image.close()
        raise
    return image


def _open(path: str | Path, form: str) -> Image.Image:
    """Open with the reader of one format alone: Pillow has some that start other programs."""
    if form == "HEIC":
        from pillow_heif import HeifImageFile

        return HeifImageFile(os.fspath(path))
    if form == "JPEG":  # without Pillow's limit of pixels; the first picture of an MPO
        return JpegImagePlugin.JpegImageFile(path)
    return Image.open(path, formats=[form])


def check_size(image: Image.Image, name: str) -> None:
    """Refuse images that are too large; set a huge JPEG to be decoded at a reduced size.

    Raises: MediaError.
    """
    pixels, most = image.width * image.height, _MAX_PIXELS
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        most = _MAX_PROGRESSIVE_PIXELS if image.info.get("progressive") else _MAX_JPEG_PIXELS
    if pixels > most:
        raise MediaError(
            f"{name}: {image.width} x {image.height} pixels are more than {most:,}, it may be a "
            "decompression bomb; reduce the image"
        )
    if pixels > _MAX_PIXELS:
        scale = 2 if -(-image.width // 2) * -(-image.height // 2) <= _MAX_PIXELS else 4
        image.draft(None, (image.width // scale, image.height // scale))


def orientation(image: Image.Image, file: str | Path | BinaryIO) -> int:
    """Return the EXIF orientation (1 to 8) that an opened image still needs.

    The readers of TIFF and HEIC apply it and leave 1. file: path or file of the image.
    """
    exif = image.info.get("exif")
    if image.format == "PNG" and exif is None:
        exif = _png_exif(file)
    if not exif:
        return 1
    tags = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tags.load(exif)
            value = tags.get(ExifTags.Base.Orientation)
    except Exception:  # Damaged tags raise many kinds; viewers ignore them.
        return 1
    return value if isinstance(value, int) and value in _TRANSPOSED else 1


def _png_exif(file: str | Path | BinaryIO) -> bytes | None:
    """Read the EXIF data of a PNG, which may follow its pixels; Pillow decodes those first."""
    if isinstance(file, str | Path):
        with open(file, "rb") as opened:
            return _png_exif(opened)
    file.seek(8)
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"eXIf":
            return file.read(length)
        file.seek(length + 4, io.SEEK_CUR)
    return None


def upright(image: Image.Image, turn: int) -> Image.Image:
    """Apply an EXIF orientation."""
    return image.transpose(_TRANSPOSED[turn]) if turn in _TRANSPOSED else image


def flatten(image: Image.Image, profile: bytes | None = None) -> Image.Image:
    """Convert an image to RGB, on white if it is transparent.

    profile: ICC profile to convert from, to sRGB.
    """
    colour, alpha = _layers(image)
    if profile:
        colour = _to_srgb(colour, profile)
    colour = colour.convert("RGB")
    if alpha is None:
        return colour
    result = Image.new("RGB", colour.size, (255, 255, 255))
    result.paste(colour, mask=alpha)
    return result


def to_rgba(image: Image.Image) -> Image.Image:
    """Convert an image to RGBA, from the same modes as `flatten`."""
    colour, alpha = _layers(image)
    result = colour.convert("RGBA")
    if alpha is not None:
        result.putalpha(alpha)
    return result


def _layers(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return 8-bit colours, and alpha (mode L) if any pixel is not opaque."""
    tiles = getattr(image, "tile", None)  # of an image that is not decoded yet
    raw = tiles[0].args if tiles else None
    image.load()
    transparent = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        return _grey(image), _grey_alpha(image, transparent)
    if not image.has_transparency_data:
        return image, None
    if raw == "RGB;16B" and isinstance(transparent, tuple):  # Pillow keeps the upper 8 bits
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return image, None
    return rgba.convert("L" if image.mode in ("L", "LA", "1") else "RGB"), alpha


def _grey(image: Image.Image) -> Image.Image:
    """Scale 16 and 32 bits a pixel to 8, as `load_image` says."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        white = 2 ** int(tags.get(258, (16,))[0]) - 1  # BitsPerSample, 12 is another
        table = np.rint(np.minimum(np.arange(65536) * (255 / white), 255)).astype(np.uint8)
        if tags.get(262) == 0:  # PhotometricInterpretation: white is 0
            table = 255 - table
        return Image.fromarray(table[values])
    known = values[np.isfinite(values)] if image.mode == "F" else values
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    # Pillow scales PPM files of more than 8 bits to 16.
    whites = [65535.0] if image.format == "PPM" else [1.0] * (image.mode == "F") + [255.0, 65535.0]
    for white in whites:
        if low >= 0 and high <= white:
            low, high = 0.0, white
            break
    result = np.empty(values.size, np.uint8)
    for start in range(0, values.size, _BLOCK):
        block = values.ravel()[start : start + _BLOCK].astype(np.float64)
        share = (block - low) / max(high - low, np.finfo(np.float64).tiny)
        share = np.nan_to_num(share, nan=0, posinf=0, neginf=0)
        result[start : start + _BLOCK] = np.rint(255 * np.clip(share, 0, 1))
    return Image.fromarray(result.reshape(values.shape))


def _grey_alpha(image: Image.Image, transparent: object) -> Image.Image | None:
    """Return the alpha of a 16-bit grey PNG that declares one value transparent."""
    if not isinstance(transparent, int) or not image.mode.startswith("I;16"):
        return None
    opaque = np.asarray(image) != transparent
    return None if opaque.all() else Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert colours from an ICC profile to sRGB; unreadable and unfit profiles are ignored."""
    from PIL import ImageCms  # loads another library, for an option

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        space = source.profile.xcolor_space.strip()
        if space == "RGB" and image.mode not in ("CMYK", "L", "1", "LAB"):
            image = image.convert("RGB")
        converted = ImageCms.profileToProfile(
            image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError):  # also a profile of other channels
        return image
    return converted or image


def _fault(path: str | Path, form: str, error: Exception) -> str:
    """Describe why an image cannot be decoded, and the remedy, from the decoder's error."""
    reason = clean(error)
    if reason in (_EARLY, "cannot load this image") or ends_early(path, form):
        return f"({form}, cut off); fetch it again"
    reason = f"{form}, {reason}" if reason else form
    return f"({reason}); it is damaged or of an unknown kind, replace it"


_EARLY = "its data ends early"


def clean(error: Exception) -> str:
    """Return one line of a decoder's message, or "" if it names files or Python objects."""
    reason = " ".join(str(error).split())
    if "truncated" in reason.lower():
        return _EARLY
    unfit = isinstance(error, Image.UnidentifiedImageError) or "<" in reason or "/" in reason
    return "" if unfit else reason[:120]
