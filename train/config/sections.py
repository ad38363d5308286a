"""Training configuration: frozen dataclasses, the command line over them, and resume checks.

A configuration is a Python module with `CONFIG: TrainConfig`, in `configs/` or any `.py` file. It
may define `prepare(config) -> None`, which is called before training to make or fetch its data.

Paths in `model` and `data` may contain the literal `{run_dir}`; `TrainConfig.resolved` replaces it
with `run.run_dir`. A run keeps the unresolved form in its `config.json`, so it can be moved.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from vxl_jax.config import LoRAConfig, Remat
from vxl_jax.errors import ConfigError
from vxl_jax.media import MediaOptions
from vxl_jax.media.layout import Newline, PoolMode
from vxl_jax.media.preprocessing import ImageMode, Preprocessing, parse_grids, tile_grids
from vxl_jax.media.sampling import FrameSampling
from vxl_jax.presets import PRESETS

Part = Literal["vision", "projector", "language", "beacon", "lora"]
"""A part of the model whose parameters are trained or frozen together; lora: the low-rank updates
that `lora.rank` adds."""


def part_of(path: tuple[str, ...]) -> str:
    """Which part a parameter belongs to, from its path in the model."""
    if path[-1].startswith("lora_"):
        return "lora"
    if path[0] != "language":
        return path[0]
    return "beacon" if any(name.startswith("beacon_") for name in path) else "language"


def _check(ok: bool, field: str, value: Any, rule: str) -> None:
    if not ok:
        raise ConfigError(f"{field} is {value!r}; it must be {rule}")


def _check_least(section: str, config: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _check(value is None or value >= least, f"{section}.{name}", value, f"at least {least}")


LAYOUT = ("pool_stride", "pool_mode", "newline", "slow_every")
"""Fields of the model that decide visual tokens, and that a run may change of its checkpoint."""


@dataclass(frozen=True)
class ModelSection:
    """The network and where its weights and tokenizer come from."""

    preset: str = "video_xl_7b"
    """Named sizes in vxl_jax.presets.PRESETS; a checkpoint's own sizes take their place."""
    checkpoint: str | None = None
    """Directory in the published Hugging Face layout to start from; None: random weights."""
    tokenizer: str | None = None
    """Directory with the tokenizer's files; None: that of the checkpoint."""
    ratios: tuple[int, ...] | None = None
    """Compression ratios drawn for each window in training; none given after the option: no
    compression; None: the preset's."""
    pool_stride: int | None = None
    """Patches of a frame become fewer by this factor along each side; None: the preset's."""
    pool_mode: PoolMode | None = None
    """How they become fewer: average, bilinear or max; None: the preset's."""
    newline: Newline | None = None
    """Where a video has newline tokens: none, grid, frame or one_token; None: the preset's."""
    slow_every: int | None = None
    """Every such frame of a video is slow and the others are fast (SlowFast); None: the preset's.
    """
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of frozen parameters; optim.param_dtype is that of trained ones."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of activations and matrix products."""
    remat: Remat = "full"
    """What a layer keeps for the backward pass. full: its input alone, for the longest samples and
    about a third more time; products: the results of matrix products too; none: all."""

    def __post_init__(self) -> None:
        _check(self.preset in PRESETS, "model.preset", self.preset, f"one of {', '.join(PRESETS)}")
        _check(
            self.checkpoint is not None or self.tokenizer is not None,
            "model.tokenizer",
            self.tokenizer,
            "a directory when model.checkpoint is not set",
        )
        _check_least("model", self, 1, "pool_stride", "slow_every")
        _check(min(self.ratios or (1,)) >= 1, "model.ratios", self.ratios, "at least 1 each")
        if self.checkpoint is not None:
            return
        try:
            PRESETS[self.preset](**self.changes())
        except ConfigError as error:
            text = str(error)
            for name in ("VideoXLConfig.", "Compression.", "VisualLayout."):
                text = text.replace(name, "model.")
            raise ConfigError(text) from None

    def changes(self) -> dict[str, Any]:
        """Fields of `VideoXLConfig` that differ from the preset or the checkpoint, by name."""
        names = ("ratios", *LAYOUT, "param_dtype", "dtype", "remat")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class DataSection:
    """Samples in LLaVA's JSON format and how they become batches."""

    train_json: tuple[str, ...]
    """Training samples: .json, .jsonl or .parquet files, patterns such as `{a,b}.json` or `*.json`,
    or .yaml mixtures; see docs/data.md."""
    media_root: str
    """Directory below which the records' image and video paths start; a mixture may name others."""
    allow_outside_root: bool = False
    """Follow absolute paths, `..` and links that lead out of media_root, for trusted data files."""
    epochs: tuple[int, ...] = (1,)
    """Passes over the training files: one number for all of them, or one for each."""
    sequential: bool = False
    """Train on one file after the other (a curriculum) instead of on all of them mixed."""
    eval_json: tuple[str, ...] = ()
    """Files of held-out questions that are answered after training; their records may have a
    question_type."""
    template: Literal["chat", "caption"] = "chat"
    """Text around a sample: the chat template, or the plain picture and caption of pre-training."""
    image_mode: ImageMode = "anyres"
    """An image becomes the tiles that suit its size, or the square in its centre."""
    min_tiles: int = 2
    """Tiles of one image at least; the published model gives even a small image two."""
    max_tiles: int = 49
    """Tiles of one image at most."""
    image_grids: str | None = None
    """Grids of tiles (columns x rows) that an image may have, as LLaVA-Video names them:
    `(1x1),...,(6x6)` are all from the first to the last. None: those of min_tiles and max_tiles."""
    max_frames: int = 128
    """Frames of one video at most; a longer one is sampled uniformly."""
    frame_sampling: FrameSampling = "capped"
    """capped: video_fps frames a second, and max_frames uniformly where that is more; uniform:
    max_frames uniformly; fps: video_fps a second always, a video with more than max_frames is bad.
    LLaVA-Video's: strided, as capped, with a frame of a last second that is not full; forced:
    max_frames uniformly always, a shorter video repeats some."""
    video_fps: float = 1.0
    """Frames taken from one second of video."""
    frame_jitter: float = 0.0
    """Frames of training are moved later at random, by up to this share of the way to the next."""
    time_prompt: bool = False
    """Tell the model when the frames of a record's video were, in the words of LLaVA-Video."""
    control_tokens: bool = True
    """Control tokens that a record's text spells out, such as `<|im_end|>`, become these tokens, as
    in the published code; False: they stay letters."""
    decoder: Literal["pyav", "decord"] = "pyav"
    """Decoder of video files; decord is the one of the published code, which refuses some kinds."""
    square_pixels: bool = False
    """Stretch videos whose pixels are not square to their shape on a screen."""
    tone_map: bool = False
    """Map HDR videos (PQ, HLG) to the range of ordinary video."""
    color_profile: bool = False
    """Convert images with an ICC profile to sRGB."""
    max_length: int = 32768
    """Tokens of a sample at most, its visual tokens included; a longer one is skipped as bad."""
    batch_size: int = 1
    """Samples in one forward and backward pass at most."""
    max_tokens_per_batch: int | None = None
    """Tokens in one forward and backward pass at most, beacons and padding included: short samples
    share a batch, up to batch_size of them, and a long one has it alone. None: batch_size counts
    alone."""
    shapes: int = 16
    """Padded shapes of batches at most: more pad less, and each is compiled once. Samples of text
    alone have separate shapes."""
    workers: int = 2
    """Processes that read and prepare samples; 0: the training process itself, where a damaged file
    that stops a decoder stops the run."""
    sample_seconds: float = 60.0
    """CPU seconds without progress (no packet or frame decoded) after which a worker is ended, or
    ten times as many seconds on the clock. The record is tried once more; then it is bad. The load
    of the machine does not count. Not enforced with workers 0."""
    buffer_mb: int = 1024
    """Pixels of batches that are prepared ahead at most, in MB; one batch in any case."""
    cache_mb: int = 0
    """Prepared media that are kept in memory from epoch to epoch, in MB."""
    cache_dir: str | None = None
    """Directory for the indices and lengths of data files; None: a hidden folder next to each."""
    max_bad_share: float = 0.1
    """Training stops when more than this share of its samples is bad."""

    def __post_init__(self) -> None:
        _check(len(self.train_json) > 0, "data.train_json", self.train_json, "at least one file")
        _check(
            len(self.epochs) in {1, len(self.train_json)} and min(self.epochs) >= 1,
            "data.epochs",
            self.epochs,
            "one number, or one for each file of data.train_json; each at least 1",
        )
        _check_least("data", self, 1, "max_frames", "max_length", "batch_size", "min_tiles")
        _check(
            self.max_tiles >= self.min_tiles,
            "data.max_tiles",
            self.max_tiles,
            f"at least data.min_tiles ({self.min_tiles})",
        )
        _check(
            self.image_grids is None or bool(parse_grids(self.image_grids)),
            "data.image_grids",
            self.image_grids,
            "a range of grids such as (1x1),...,(6x6)",
        )
        _check_least("data", self, 1, "shapes", "max_tokens_per_batch")
        _check(
            self.max_tokens_per_batch is None or self.batch_size > 1,
            "data.batch_size",
            self.batch_size,
            "more than 1 with data.max_tokens_per_batch: it is the most samples of a batch",
        )
        _check_least("data", self, 0, "workers", "cache_mb", "buffer_mb")
        _check(self.sample_seconds > 0, "data.sample_seconds", self.sample_seconds, "more than 0")
        _check(0 <= self.frame_jitter <= 1, "data.frame_jitter", self.frame_jitter, "in [0, 1]")
        _check(self.video_fps > 0, "data.video_fps", self.video_fps, "more than 0")
        _check(0 <= self.max_bad_share <= 1, "data.max_bad_share", self.max_bad_share, "in [0, 1]")
        _check(
            self.decoder == "pyav" or not (self.square_pixels or self.tone_map),
            "data.decoder",
            self.decoder,
            "pyav with data.square_pixels or data.tone_map",
        )

    @property
    def preprocessing(self) -> Preprocessing:
        """How samples become pixels, but for the rules that the model decides."""
        grids = parse_grids(self.image_grids) if self.image_grids is not None else None
        return Preprocessing(
            image_mode=self.image_mode,
            grids=grids or tile_grids(self.min_tiles, self.max_tiles),
            frame_sampling=self.frame_sampling,
            max_frames=self.max_frames,
            video_fps=self.video_fps,
            time_prompt=self.time_prompt,
            options=MediaOptions(
                self.decoder, self.square_pixels, self.tone_map, self.color_profile
            ),
        )

    def preprocessing_for(self, model: Preprocessing) -> Preprocessing:
        """How samples become pixels for a model; written into the checkpoints of the run.

        model: its own, of which the rules are taken that no field of the section has.
        """
        names = ("resize", "base_tile", "pad_several", "background")
        rules = {name: getattr(model, name) for name in names}
        return dataclasses.replace(self.preprocessing, **rules)


@dataclass(frozen=True)
class MeshSection:
    """The devices of all processes as a mesh data x fsdp x tensor. No number depends on it."""

    data: int | None = None
    """Copies of the model, each for a share of the samples; None: as many as there are devices for.
    """
    fsdp: int = 1
    """Devices that parameters, gradients and optimizer state of one copy are cut over; samples are
    divided over these too."""
    tensor: int = 1
    """Devices that heads and MLP columns of one copy are divided over."""

    def __post_init__(self) -> None:
        _check_least("mesh", self, 1, "data", "fsdp", "tensor")


@dataclass(frozen=True)
class OptimSection:
    """AdamW or Adafactor with linear warm-up and cosine decay to 0."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    warmup_share: float = 0.03
    """Share of all optimizer steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the weight matrices."""
    b1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    b2: float = 0.999
    """Decay of AdamW's mean of squared gradients."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    accumulate: int = 1
    """Batches whose gradients are averaged for one optimizer step."""
    train: tuple[Part, ...] = ("vision", "projector", "language", "beacon")
    """Parts of the model that are trained; the others are frozen."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """adamw keeps 8 bytes for each trained parameter; adafactor next to nothing: a row and a column
    of numbers for each matrix."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of trained parameters; bfloat16 is rounded stochastically, so that steps of 1e-5 count.
    """
    vision_learning_rate: float | None = None
    """Peak learning rate of the vision tower; None: learning_rate."""
    projector_learning_rate: float | None = None
    """Peak learning rate of the projector; None: learning_rate."""
    language_learning_rate: float | None = None
    """Peak learning rate of the language model but its beacons; None: learning_rate."""
    beacon_learning_rate: float | None = None
    """Peak learning rate of beacon embedding and projections; None: learning_rate."""
    lora_learning_rate: float | None = None
    """Peak learning rate of low-rank adapters; None: learning_rate."""

    def __post_init__(self) -> None:
        _check(self.learning_rate > 0, "optim.learning_rate", self.learning_rate, "more than 0")
        _check(0 <= self.warmup_share < 1, "optim.warmup_share", self.warmup_share, "in [0, 1)")
        _check(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "at least 0")
        _check(0 <= self.b1 < 1, "optim.b1", self.b1, "in [0, 1)")
        _check(0 <= self.b2 < 1, "optim.b2", self.b2, "in [0, 1)")
        _check(self.clip_norm > 0, "optim.clip_norm", self.clip_norm, "more than 0")
        _check_least("optim", self, 1, "accumulate")
        _check(len(self.train) > 0, "optim.train", self.train, "at least one part of the model")
        for part in ("vision", "projector", "language", "beacon", "lora"):
            name = f"{part}_learning_rate"
            rate = getattr(self, name)
            _check(rate is None or rate > 0, f"optim.{name}", rate, "more than 0")
            rule = f"None where optim.train does not have {part!r}; it is {self.train}"
            _check(rate is None or part in self.train, f"optim.{name}", rate, rule)

    def peak(self, part: str) -> float:
        """Peak learning rate of a part of the model."""
        rate = getattr(self, f"{part}_learning_rate")
        return self.learning_rate if rate is None else rate


@dataclass(frozen=True)
class RunSection:
    """The run's directory and seed, what it reports, and how it is evaluated."""

    run_dir: str
    """Directory of everything the run writes; a run that was cut short there is resumed."""
    seed: int = 0
    """Seed of random weights, the order of samples and the ratios."""
    moved: bool = False
    """Resume although data.train_json, data.media_root, model.checkpoint or model.tokenizer name
    another place than before (--moved is short for it). Their content has to be the same: data
    files, weights and vocabulary are compared by digest."""
    max_steps: int | None = None
    """Stop after this many optimizer steps; the learning rate is scheduled for all. None: no."""
    log_every: int = 10
    """Steps from one line of metrics to the next."""
    save_every: int = 500
    """Steps from one checkpoint to the next; there is one at the end in any case."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int | None = None
    """Checkpoints of each keep_every-th step are kept too (a multiple of save_every); None: no."""
    keep_best: int = 0
    """Checkpoints that answer most held-out questions right are kept as well; needs eval_every."""
    skip_steps: tuple[int, ...] = ()
    """Steps whose update is left out, such as one that gave a loss that is not finite."""
    eval_every: int | None = None
    """Steps from one pass over the held-out questions to the next; None: at the end alone."""
    answers_shown: int = 8
    """Held-out questions printed with the model's answers at the end."""
    eval_batch_size: int = 8
    """Held-out questions answered at once."""
    max_new_tokens: int = 64
    """Tokens of an answer at most."""
    eval_ratio: int | None = None
    """Compression ratio for held-out questions; None: the largest that is trained, as asking does
    by default."""

    def __post_init__(self) -> None:
        _check(self.run_dir != "", "run.run_dir", self.run_dir, "a directory")
        _check_least("run", self, 0, "seed", "answers_shown")
        _check_least("run", self, 1, "max_steps", "log_every", "save_every", "keep_checkpoints")
        _check_least("run", self, 1, "eval_batch_size", "max_new_tokens", "eval_ratio")
        _check_least("run", self, 1, "eval_every")
        _check(
            min(self.skip_steps, default=1) >= 1, "run.skip_steps", self.skip_steps, "at least 1"
        )
        _check_least("run", self, 0, "keep_best")
        _check(
            self.keep_every is None
            or (self.keep_every >= 1 and not self.keep_every % self.save_every),
            "run.keep_every",
            self.keep_every,
            f"a multiple of run.save_every ({self.save_every})",
        )
        _check(
            not self.keep_best or self.eval_every is not None,
            "run.keep_best",
            self.keep_best,
            "0 where there is no run.eval_every to find the best by",
        )


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    model: ModelSection
    data: DataSection
    optim: OptimSection
    run: RunSection
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    mesh: MeshSection = MeshSection()

    def __post_init__(self) -> None:
        if ("lora" in self.optim.train) != (self.lora.rank > 0):
            raise ConfigError(
                f"optim.train is {self.optim.train!r} and lora.rank is {self.lora.rank}; to train "
                "with LoRA, 'lora' must be in optim.train and lora.rank at least 1"
            )
        beacons = [name for name in self.lora.targets if name.startswith("beacon_")]
        if self.lora.rank and beacons and self.model.ratios == ():
            raise ConfigError(
                f"lora.targets has {', '.join(beacons)}, but model.ratios is (): without "
                "compression there are no beacons to train"
            )
        if "beacon" in self.optim.train and self.model.ratios == ():
            raise ConfigError(
                "optim.train has 'beacon', but model.ratios is (): without compression there are "
                "no beacons to train"
            )

    def resolved(self) -> "TrainConfig":
        """The same with `{run_dir}` replaced in all paths."""

        def resolve(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(resolve, value))
            return value.replace("{run_dir}", self.run.run_dir) if isinstance(value, str) else value

        def section(config: Any) -> Any:
            values = {f.name: resolve(getattr(config, f.name)) for f in dataclasses.fields(config)}
            return dataclasses.replace(config, **values)

        return dataclasses.replace(self, model=section(self.model), data=section(self.data))
