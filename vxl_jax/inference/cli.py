"""Ask about videos and images.

    python -m vxl_jax.generate --model checkpoints/Video_XL --video film.mp4 --frames 2048 \\
        --prompt "What happens?" --save-memory film.memory
    python -m vxl_jax.generate --model checkpoints/Video_XL --memory film.memory --interactive
    python -m vxl_jax.generate --model video_xl_7b --plan --frames 2048 --card 4090

Answers go to stdout as they come, everything else to stderr. Exit status: 0; 2 after an error that
the user can correct; 3 if a video ended early, after answers about what came before; 130 after
Ctrl-C; 1, with a traceback, after a fault of the program.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vxl_jax.errors import ConfigError, MediaError, VxlError
from vxl_jax.media import MediaOptions
from vxl_jax.planning.cards import DEVICE_ERRORS, claim_memory, find_card, is_out_of_memory
from vxl_jax.presets import PRESETS

COMPUTE_DTYPES = {"bfloat16": "bfloat16", "float32": "float32", "int8": "bfloat16"}
"""Dtypes of activations by `--weights`."""

PIXELS = {
    "square_pixels": "stretch videos whose pixels are not square to their shape on a screen",
    "tone_map": "map HDR videos to the range of ordinary video",
    "color_profile": "convert images with an ICC profile to sRGB",
}
"""Switches of `MediaOptions`."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = read_generate_options(sys.argv[1:] if arguments is None else arguments)
    claim_memory()
    try:
        if options.plan:
            print_inference_plan(options)
            return 0
        return answer_all(options)
    except VxlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 2
    except DEVICE_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        print(f"error: out of device memory ({reason}); --plan shows what fits", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def read_generate_options(arguments: list[str]) -> argparse.Namespace:
    """The options, checked as far as they can be without opening a file."""
    parser = argparse.ArgumentParser(
        prog="python -m vxl_jax.generate", description="Ask about videos and images."
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="checkpoint directory; a preset for --plan")
    media = parser.add_argument_group("what is watched, in the order given")
    for name in ("video", "image"):
        media.add_argument(
            f"--{name}",
            dest="media",
            action=_AddMedia,
            default=[],
            metavar="F",
            help=f"{name} file; may be given several times"
            + (", also a folder of pictures" if name == "video" else ""),
        )
    media.add_argument(
        "--frames", type=int, metavar="N", help="of each video (default: as trained)"
    )
    media.add_argument(
        "--ratio",
        type=read_ratios,
        default="model",
        metavar="R",
        help="compression: 16, by second 0:16,60:4,90:16, none (default: the largest)",
    )
    media.add_argument("--sample-fps", type=float, help="frames taken from a second, up to N")
    media.add_argument("--start", type=float, metavar="S", help="second where frames begin")
    media.add_argument("--end", type=float, metavar="S", help="second where frames end")
    decoders = ("pyav", "decord")
    media.add_argument("--decoder", choices=decoders, help="of video files (default: as trained)")
    for name, what in PIXELS.items():
        media.add_argument(
            f"--{name.replace('_', '-')}", action="store_true", default=None, help=what
        )
    media.add_argument("--memory", type=Path, metavar="F", help="go on with a saved memory")
    media.add_argument("--save-memory", type=Path, metavar="F", help="keep the memory in a file")
    media.add_argument("--overwrite", action="store_true", help="replace the file of --save-memory")
    asked = parser.add_argument_group("what is asked")
    asked.add_argument(
        "--prompt", action="append", default=[], metavar="Q", help="may be given several times"
    )
    asked.add_argument(
        "--interactive", action="store_true", help="a conversation, a question a line"
    )
    asked.add_argument("--max-new-tokens", type=int, default=256)
    asked.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    asked.add_argument("--top-p", type=float, default=1.0)
    asked.add_argument("--top-k", type=int, default=0)
    asked.add_argument("--seed", type=int, default=0, help="of what is drawn")
    loaded = parser.add_argument_group("how the model is loaded")
    loaded.add_argument("--weights", choices=sorted(COMPUTE_DTYPES), help="default: as stored")
    loaded.add_argument("--vision", metavar="DIR", help="the vision tower's config.json")
    loaded.add_argument("--max-context", type=int, help="positions (default: the model's)")
    planned = parser.add_argument_group("will it fit?")
    planned.add_argument(
        "--plan", action="store_true", help="print bytes, compiled; no weights, nothing watched"
    )
    planned.add_argument("--card", default="h100", help="h100, a100, 4090 … (default: h100)")
    planned.add_argument("--memory-gb", type=float, metavar="GB", help="of another card")
    options = parser.parse_args(arguments)
    if options.plan:
        return options
    if not options.prompt and not options.interactive and options.save_memory is None:
        parser.error("nothing is asked: give --prompt, --interactive, or --save-memory")
    if not options.media and options.memory is None:
        parser.error("nothing is watched: give --video, --image or --memory")
    if options.memory is not None and not options.media:
        given = [
            f"--{name.replace('_', '-')}"
            for name in ("frames", "sample_fps", "start", "end")
            if getattr(options, name) is not None
        ] + ["--ratio"] * (options.ratio != "model")
        if given:
            parser.error(f"{', '.join(given)}: the memory has been made, with its own")
    return options


class _AddMedia(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        namespace.media = [*namespace.media, (self.option_strings[0][2:], values)]


def read_ratios(text: str) -> int | str | dict[float, int | None] | None:
    """16, none, pairs of second and ratio such as 0:16,60:none, or model: its own."""

    def one(text: str) -> int | None:
        return None if text == "none" else int(text)

    if text == "model":
        return text
    if ":" not in text:
        return one(text)
    pairs = (pair.split(":") for pair in text.split(","))
    return {float(second): one(ratio) for second, ratio in pairs}


def read_media_options(options: argparse.Namespace, trained: MediaOptions) -> MediaOptions:
    """How pixels are decoded: as in training, but for what the options say."""
    given = {name: getattr(options, name) for name in ("decoder", *PIXELS)}
    return replace(trained, **{name: x for name, x in given.items() if x is not None})


def answer_all(options: argparse.Namespace) -> int:
    """Load, watch, save and answer; returns the exit status."""
    from vxl_jax.inference.chat import check_question
    from vxl_jax.inference.compile_cache import keep_programs
    from vxl_jax.inference.memory import load_memory
    from vxl_jax.inference.memory_file import check_free
    from vxl_jax.inference.model import load
    from vxl_jax.inference.runtime import video_times
    from vxl_jax.inference.sampling import Sampling

    for prompt in options.prompt:
        check_question(prompt, media=False)
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {options.max_new_tokens}: give at least one")
    films = open_films(options)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    if options.save_memory is not None:
        check_free(options.save_memory, options.overwrite)
    changes: dict[str, Any] = {}
    if options.weights is not None:
        changes = {
            "dtype": COMPUTE_DTYPES[options.weights],
            "param_dtype": COMPUTE_DTYPES[options.weights],
        }
        changes["weights"] = "int8" if options.weights == "int8" else None
    if options.max_context is not None:
        changes["max_context"] = options.max_context
    keep_programs()
    model = load(options.model, vision=options.vision, **changes)
    memory = model.remember() if options.memory is None else load_memory(options.memory, model)
    ratios = model.checked_ratios(options.ratio)
    blocks = len(memory.watched) + len(films)
    times = video_times(len(memory.watched), memory.video_times(), films)
    turns = (model.first_turn(blocks, text, times) for text in options.prompt)
    longest = max(map(len, turns), default=0)
    memory.check_room(films, ratios, longest + options.max_new_tokens)
    status = 0
    try:
        status = watch(memory, films, ratios)
    finally:  # also of what was watched before Ctrl-C
        if options.save_memory is not None and memory.watched:
            status = save(memory, options) or status
    asked = {"max_new_tokens": options.max_new_tokens, "sampling": sampling}
    for prompt in options.prompt:
        if len(options.prompt) > 1:
            print(f"> {prompt}", file=sys.stderr)
        print_pieces(model.stream(memory, prompt, **asked))
    if options.interactive:
        chat = model.chat(memory)
        converse(lambda question: print_pieces(chat.stream(question, **asked)))
    return status


def open_films(options: argparse.Namespace) -> list[Any]:
    """What is to be watched, opened, before the weights are loaded."""
    from vxl_jax.checkpoints.hf_config import read_config
    from vxl_jax.inference.ratios import check_ratios
    from vxl_jax.media.open import FrameLimit, Picture, Video, open_film

    config = read_config(Path(options.model), vision=options.vision)
    if options.ratio != "model":
        check_ratios(options.ratio, config)
    size = config.tower.image_size
    frames: FrameLimit = "model" if options.frames is None else options.frames
    pixels = read_media_options(options, config.preprocessing.options)
    films = []
    for kind, path in options.media:
        media: Any = Picture(path, pixels)
        if kind == "video":
            clip = options.sample_fps, options.start, options.end
            media = Video(path, frames, *clip, options=pixels)
        films.append(open_film(media, size, config.preprocessing))
    return films


def watch(memory: Any, films: list[Any], ratios: Any) -> int:
    """Watch films one after another; returns the exit status: 3 if one ended early."""
    status = 0
    for film in films:
        try:
            memory.watch(film, ratios, progress=True)
        except MediaError as error:
            if not memory.watched:
                raise
            print(f"error: {error}", file=sys.stderr)
            status = 3
    return status


def save(memory: Any, options: argparse.Namespace) -> int:
    """Keep the memory in a file; returns the exit status. It can be asked all the same."""
    try:
        memory.save(options.save_memory, overwrite=options.overwrite)
    except (OSError, VxlError) as error:
        print(f"error: {options.save_memory}: cannot be saved ({error})", file=sys.stderr)
        return 2
    print(f"saved {options.save_memory}: {memory!r}", file=sys.stderr)
    return 0


def print_pieces(pieces: Iterator[str]) -> None:
    """Print an answer as it comes."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def converse(answer: Callable[[str], None]) -> None:
    """Answer lines of stdin until it ends."""
    if sys.stdin.isatty():
        print("a question a line; Ctrl-D ends", file=sys.stderr)
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        try:
            answer(line.strip())
        except VxlError as error:  # of this question; the conversation is as it was
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # of this answer
            print(flush=True)


def print_inference_plan(options: argparse.Namespace) -> None:
    """Print what watching and answering need, and how many frames a card has room for.

    Raises: ConfigError if an option cannot be used.
    """
    import jax

    from vxl_jax.checkpoints.hf_config import read_config
    from vxl_jax.inference.ratios import check_ratios
    from vxl_jax.planning.inference_bytes import (
        SEARCHED_FRAMES,
        Estimator,
        estimate_table,
        memory_of,
    )
    from vxl_jax.progress import progress_bar

    jax.config.update("jax_platforms", "cpu")
    card = find_card(options.card)
    memory = memory_of(card, options.memory_gb)
    dtype = COMPUTE_DTYPES[options.weights or "bfloat16"]
    changes: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype}
    if options.model in PRESETS:
        config = PRESETS[options.model](**changes)
    else:
        config = read_config(Path(options.model), vision=options.vision, **changes)
    weights = "int8" if options.weights == "int8" else None
    if options.frames is not None and options.frames < 1:
        raise ConfigError(f"--frames {options.frames}: give at least one")
    if isinstance(options.ratio, dict):
        raise ConfigError("--ratio: a plan is of one ratio, or of all that the model has learned")
    ratios: tuple[int | None, ...] = (options.ratio,)
    if options.ratio == "model":
        ratios = tuple(sorted(config.ratios)) or (None,)
    else:
        check_ratios(options.ratio, config)
    estimator = Estimator(config, weights)
    estimates = []
    with progress_bar(total=len(ratios), desc="compiling", unit="ratio") as progress:
        for ratio in ratios:
            estimates.append(estimator.estimate(options.frames or 2048, ratio))
            progress.update()
    print(f"weights {options.weights or 'bfloat16'}: {estimator.weights / 1e9:.2f} GB")
    print(f"an entry of the memory: {estimator.entry:,} bytes")
    print(f"{estimate_table(estimates)}\n")
    for e in estimates:
        most = estimator.most_frames(e, memory)
        more = " or more" if most == SEARCHED_FRAMES else ""
        print(f"most frames at ratio {e.ratio or '-'}: {most:,}{more} in {memory / 1e9:.1f} GB")


if __name__ == "__main__":
    sys.exit(main())
