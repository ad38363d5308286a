"""The options of `python -m vxl_jax.generate`, checked as far as they can be without a file."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Suppress, UseAppendAction
from tyro.constructors import PrimitiveConstructorSpec

from vxl_jax.errors import ConfigError
from vxl_jax.inference.ratios import Ratios
from vxl_jax.media import MediaOptions

PIXELS = ("square_pixels", "tone_map", "color_profile")
"""Switches of `MediaOptions`."""


def read_ratios(text: str) -> Ratios | Literal["model"]:
    """Read 16, none, pairs of second and ratio such as 0:16,60:none, or model: its own.

    Raises: ConfigError for any other text.
    """

    def one(text: str) -> int | None:
        return None if text == "none" else int(text)

    if text == "model":
        return "model"
    try:
        if ":" not in text:
            return one(text)
        pairs = (pair.split(":") for pair in text.split(","))
        return {float(second): one(ratio) for second, ratio in pairs}
    except ValueError:
        raise ConfigError(
            f"{text!r} is not a ratio; use a number such as 16, none, or by second 0:16,60:4"
        ) from None


_RATIO = PrimitiveConstructorSpec(
    nargs=1,
    metavar="R",
    instance_from_str=lambda values: read_ratios(values[0]),
    is_instance=lambda value: True,
    str_from_instance=lambda value: [str(value)],
)


def _shown(metavar: str | None = None, default: str | None = None) -> Any:
    """How `--help` shows the value of an option, and what stands for it if it is not given."""
    hint = "" if default is None else f"(default: {default})"
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


_Switch = Annotated[bool, _shown()]
_Files = Annotated[UseAppendAction[tuple[str, ...]], _shown("F")]


@dataclass(frozen=True)
class _Media:
    """What is watched, in the order given."""

    video: _Files = ()
    """video file; may be given several times, also a folder of pictures"""
    image: _Files = ()
    """image file; may be given several times"""
    in_order: Suppress[tuple[tuple[str, str], ...]] = ()
    """All of them as they were given: "video" or "image", and the path."""
    frames: Annotated[int | None, _shown("N", "as trained")] = None
    """of each video"""
    ratio: Annotated[Any, _RATIO, _shown("R", "the largest")] = "model"
    """compression: 16, by second 0:16,60:4,90:16, none"""
    sample_fps: Annotated[float | None, _shown("FPS")] = None
    """frames taken from a second, up to N"""
    start: Annotated[float | None, _shown("S")] = None
    """second where frames begin"""
    end: Annotated[float | None, _shown("S")] = None
    """second where frames end"""
    slow_every: Annotated[int | None, _shown("N", "as trained")] = None
    """every such frame is slow, the others fast (SlowFast)"""
    decoder: Annotated[Literal["pyav", "decord"] | None, _shown(default="as trained")] = None
    """of video files"""
    square_pixels: _Switch = False
    """stretch videos whose pixels are not square to their shape on a screen"""
    tone_map: _Switch = False
    """map HDR videos to the range of ordinary video"""
    color_profile: _Switch = False
    """convert images with an ICC profile to sRGB"""
    memory: Annotated[Path | None, _shown("F")] = None
    """go on with a saved memory"""
    save_memory: Annotated[Path | None, _shown("F")] = None
    """keep the memory in a file"""
    overwrite: _Switch = False
    """replace the file of --save-memory"""


@dataclass(frozen=True)
class _Question:
    """What is asked."""

    prompt: Annotated[UseAppendAction[tuple[str, ...]], _shown("Q")] = ()
    """may be given several times"""
    interactive: _Switch = False
    """a conversation, a question a line"""
    max_new_tokens: int = 256
    """most tokens of an answer"""
    temperature: float = 0.0
    """0: the likeliest token"""
    top_p: float = 1.0
    """draw from the likeliest tokens with this probability together"""
    top_k: int = 0
    """draw from as many of the likeliest tokens; 0: from all"""
    seed: int = 0
    """of what is drawn"""


@dataclass(frozen=True)
class _Loading:
    """How the model is loaded."""

    weights: Annotated[
        Literal["bfloat16", "float32", "int8"] | None, _shown(default="as stored")
    ] = None
    """dtype of the weights"""
    vision: Annotated[str | None, _shown("DIR")] = None
    """directory of the vision tower's config.json"""
    max_context: Annotated[int | None, _shown("N", "the model's")] = None
    """positions"""


@dataclass(frozen=True)
class _Planning:
    """Will it fit?"""

    plan: _Switch = False
    """print bytes, compiled; no weights, nothing watched"""
    card: str = "h100"
    """h100, a100, 4090 …"""
    memory_gb: Annotated[float | None, _shown("GB")] = None
    """of another card"""


@dataclass(frozen=True)
class GenerateOptions:
    """Options of the command line, in the groups of its `--help`."""

    model: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """checkpoint directory; a preset for --plan"""
    media: _Media = _Media()
    question: _Question = _Question()
    loading: _Loading = _Loading()
    planning: _Planning = _Planning()


def read_generate_options(arguments: Sequence[str]) -> GenerateOptions:
    """Read a command line.

    Raises: ConfigError for options that do not go together; SystemExit(2), after a message on
        stderr, for one that cannot be read.
    """
    options = tyro.cli(
        GenerateOptions,
        prog="python -m vxl_jax.generate",
        description="Ask about videos and images.",
        args=arguments,
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.DisallowNone,
            tyro.conf.FlagCreatePairsOff,
        ),
    )
    media, question = options.media, options.question
    if options.planning.plan:
        return options
    if not question.prompt and not question.interactive and media.save_memory is None:
        raise ConfigError("nothing is asked: give --prompt, --interactive, or --save-memory")
    if not media.video and not media.image and media.memory is None:
        raise ConfigError("nothing is watched: give --video, --image or --memory")
    if media.memory is not None and not media.video and not media.image:
        given = [
            f"--{name.replace('_', '-')}"
            for name in ("frames", "sample_fps", "start", "end")
            if getattr(media, name) is not None
        ] + ["--ratio"] * (media.ratio != "model")
        if given:
            raise ConfigError(f"{', '.join(given)}: the memory has been made, with its own")
    # tyro keeps a list of each option; it takes no value that is the name of an option.
    names = (argument.partition("=")[0] for argument in arguments)
    rest = {"--video": iter(media.video), "--image": iter(media.image)}
    in_order = tuple((name[2:], next(rest[name])) for name in names if name in rest)
    return dataclasses.replace(options, media=dataclasses.replace(media, in_order=in_order))


def read_media_options(options: GenerateOptions, trained: MediaOptions) -> MediaOptions:
    """How pixels are decoded: as in training, but for what the options say."""
    given = {name: getattr(options.media, name) for name in ("decoder", *PIXELS)}
    return dataclasses.replace(trained, **{name: x for name, x in given.items() if x})
