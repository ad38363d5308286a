"""Ask about videos and images.

    python -m vxl_jax.generate --model checkpoints/Video_XL --video film.mp4 --frames 2048 \\
        --prompt "What happens?" --save-memory film.memory
    python -m vxl_jax.generate --model checkpoints/Video_XL --memory film.memory --interactive
    python -m vxl_jax.generate --model video_xl_7b --plan --frames 2048 --card 4090

Answers go to stdout as they come, everything else to stderr. Exit status: 0; 2 after an error that
the user can correct; 3 if a video ended early, after answers about what came before; 130 after
Ctrl-C; 1, with a traceback, after a fault of the program.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vxl_jax.errors import ConfigError, MediaError, VxlError
from vxl_jax.inference.options import GenerateOptions, read_generate_options, read_media_options
from vxl_jax.planning.cards import DEVICE_ERRORS, claim_memory, find_card, is_out_of_memory
from vxl_jax.presets import PRESETS

COMPUTE_DTYPES = {"bfloat16": "bfloat16", "float32": "float32", "int8": "bfloat16"}
"""Dtypes of activations by `--weights`."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        options = read_generate_options(sys.argv[1:] if arguments is None else arguments)
        claim_memory()
        if options.planning.plan:
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


def answer_all(options: GenerateOptions) -> int:
    """Load, watch, save and answer; returns the exit status."""
    from vxl_jax.inference.chat import check_question
    from vxl_jax.inference.compile_cache import keep_programs
    from vxl_jax.inference.memory import load_memory
    from vxl_jax.inference.memory_file import check_free
    from vxl_jax.inference.model import load
    from vxl_jax.inference.runtime import video_times
    from vxl_jax.inference.sampling import Sampling

    media, question, loading = options.media, options.question, options.loading
    for prompt in question.prompt:
        check_question(prompt, media=False)
    if question.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {question.max_new_tokens}: give at least one")
    films = open_films(options)
    sampling = Sampling(question.temperature, question.top_k, question.top_p, question.seed)
    if media.save_memory is not None:
        check_free(media.save_memory, media.overwrite)
    changes: dict[str, Any] = {}
    if loading.weights is not None:
        changes = {
            "dtype": COMPUTE_DTYPES[loading.weights],
            "param_dtype": COMPUTE_DTYPES[loading.weights],
        }
        changes["weights"] = "int8" if loading.weights == "int8" else None
    if loading.max_context is not None:
        changes["max_context"] = loading.max_context
    keep_programs()
    model = load(options.model, vision=loading.vision, **changes)
    memory = model.remember() if media.memory is None else load_memory(media.memory, model)
    ratios = model.checked_ratios(media.ratio)
    blocks = len(memory.watched) + len(films)
    times = video_times(len(memory.watched), memory.video_times(), films)
    turns = (model.first_turn(blocks, text, times) for text in question.prompt)
    longest = max(map(len, turns), default=0)
    memory.check_room(films, ratios, longest + question.max_new_tokens)
    status = 0
    try:
        status = watch(memory, films, ratios)
    finally:  # also of what was watched before Ctrl-C
        if media.save_memory is not None and memory.watched:
            status = save(memory, options) or status
    asked: dict[str, Any] = {"max_new_tokens": question.max_new_tokens, "sampling": sampling}
    for prompt in question.prompt:
        if len(question.prompt) > 1:
            print(f"> {prompt}", file=sys.stderr)
        print_pieces(model.stream(memory, prompt, **asked))
    if question.interactive:
        chat = model.chat(memory)
        converse(lambda line: print_pieces(chat.stream(line, **asked)))
    return status


def open_films(options: GenerateOptions) -> list[Any]:
    """What is to be watched, opened, before the weights are loaded."""
    from vxl_jax.checkpoints.hf_config import read_config
    from vxl_jax.inference.ratios import check_ratios
    from vxl_jax.media.open import FrameLimit, Picture, Video, open_together

    given = options.media
    config = read_config(Path(options.model), vision=options.loading.vision)
    if given.ratio != "model":
        check_ratios(given.ratio, config)
    size = config.tower.image_size
    frames: FrameLimit = "model" if given.frames is None else given.frames
    pixels = read_media_options(options, config.preprocessing.options)
    media: list[Video | Picture] = []
    for kind, path in given.in_order:
        if kind == "video":
            clip = given.sample_fps, given.start, given.end
            media.append(Video(path, frames, *clip, options=pixels, slow_every=given.slow_every))
        else:
            media.append(Picture(path, pixels))
    return open_together(media, size, config.preprocessing)


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


def save(memory: Any, options: GenerateOptions) -> int:
    """Keep the memory in a file; returns the exit status. It can be asked all the same."""
    path = options.media.save_memory
    try:
        memory.save(path, overwrite=options.media.overwrite)
    except (OSError, VxlError) as error:
        print(f"error: {path}: cannot be saved ({error})", file=sys.stderr)
        return 2
    print(f"saved {path}: {memory!r}", file=sys.stderr)
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


def print_inference_plan(options: GenerateOptions) -> None:
    """Print what watching and answering need, and how many frames a card has room for.

    Raises: ConfigError if an option cannot be used.
    """
    import jax

    from vxl_jax.checkpoints.hf_config import read_config
    from vxl_jax.inference.ratios import check_ratios
    from vxl_jax.planning.compiler import compiler_for
    from vxl_jax.planning.inference_bytes import (
        SEARCHED_FRAMES,
        Estimator,
        estimate_table,
        memory_of,
    )
    from vxl_jax.progress import progress_bar

    jax.config.update("jax_platforms", "cpu")
    media, loading, planning = options.media, options.loading, options.planning
    card = find_card(planning.card)
    memory = memory_of(card, planning.memory_gb)
    dtype = COMPUTE_DTYPES[loading.weights or "bfloat16"]
    changes: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype}
    if options.model in PRESETS:
        config = PRESETS[options.model](**changes)
    else:
        config = read_config(Path(options.model), vision=loading.vision, **changes)
    weights = "int8" if loading.weights == "int8" else None
    if media.frames is not None and media.frames < 1:
        raise ConfigError(f"--frames {media.frames}: give at least one")
    if isinstance(media.ratio, dict):
        raise ConfigError("--ratio: a plan is of one ratio, or of all that the model has learned")
    ratios: tuple[int | None, ...] = (media.ratio,)
    if media.ratio == "model":
        ratios = tuple(sorted(config.ratios)) or (None,)
    else:
        check_ratios(media.ratio, config)
    compiler = compiler_for(card)
    estimator = Estimator(config, weights, compiler)
    estimates = []
    with progress_bar(total=len(ratios), desc="compiling", unit="ratio") as progress:
        for ratio in ratios:
            estimates.append(estimator.estimate(media.frames or 2048, ratio))
            progress.update()
    print(f"compiled by {compiler.name}")
    print(f"weights {loading.weights or 'bfloat16'}: {estimator.weights / 1e9:.2f} GB")
    print(f"an entry of the memory: {estimator.entry:,} bytes")
    print(f"{estimate_table(estimates)}\n")
    for e in estimates:
        most = estimator.most_frames(e, memory)
        more = " or more" if most == SEARCHED_FRAMES else ""
        print(f"most frames at ratio {e.ratio or '-'}: {most:,}{more} in {memory / 1e9:.1f} GB")


if __name__ == "__main__":
    sys.exit(main())
