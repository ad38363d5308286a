"""Image files to RGB pixels."""

import warnings
from pathlib import Path

from PIL import Image

from vxl_jax.errors import MediaError
from vxl_jax.media.paths import check_file
from vxl_jax.media.tiles import Size

# Larger images are refused: decoding one takes 10 bytes a pixel, and a header of 74 bytes can ask
# for any number.
_MAX_PIXELS = 2**26
# Pillow knows many more, some of which start other programs (EPS).
_IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF")


def load_image(path: str | Path) -> Image.Image:
    """Reads an image as RGB, the first picture of an animation.

    As published, EXIF orientation is not applied, alpha is dropped, and 16-bit grey saturates.

    Raises:
      MediaError: missing, unreadable, truncated, empty or larger than 67 million pixels.
    """
    with _open_image(path) as image:
        try:
            return image.convert("RGB")
        except Exception as error:  # Decoders raise OSError, ValueError, SyntaxError, IndexError...
            raise MediaError(
                f"{path}: image cannot be decoded ({error}); truncated or damaged, replace it"
            ) from error


def image_size(path: str | Path) -> Size:
    """Returns (width, height) of an image in pixels from its header, without decoding it.

    Raises:
      MediaError: missing, not an image, empty or far too large.
    """
    with _open_image(path) as image:
        return image.size


def _open_image(path: str | Path) -> Image.Image:
    """Opens an image file: its header is read, its pixels are not."""
    check_file(path)
    try:
        with warnings.catch_warnings():
            # Pillow warns of images that are refused below, and refuses those twice as large.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=_IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise MediaError(f"{path}: {error}; reduce the image") from error
    except Exception as error:  # As in `load_image`; images of 0 pixels are refused here too.
        raise MediaError(f"{path}: not a readable image ({error}); replace it") from error
    if image.width * image.height > _MAX_PIXELS:
        image.close()
        raise MediaError(
            f"{path}: {image.width} x {image.height} pixels are more than {_MAX_PIXELS:,}, it may "
            "be a decompression bomb; reduce the image"
        )
    return image
