"""One record of a data file as a sample: token ids, labels, and the pixels of its media.

A record is `{"id", "conversations": [{"from", "value"}, …]}` with one of `image` (a path or a list
of paths), `video` (a path or a list: video files, or folders of frames), or neither. A video may
have `start` and `end` in seconds, and a folder of frames `fps`; lists of them where there are
several videos. `system` is the text of the system turn.

Records of LLaMA-Factory and Qwen are brought into this shape first (`read_record`). A record that
holds something else that would change training (media under another name, a mark without a file,
tools) is refused by name.

This module runs in data workers, which do not import JAX.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from train.data.index import RecordIndex
from train.data.records.fields import short
from train.data.records.media import Medium, Preparer, VideoMedium
from train.data.records.sample import BAD, Clip, Sample
from train.data.records.shapes import read_record
from train.data.sources import Source
from train.errors import DataError
from vxl_jax.media import resolve_media
from vxl_jax.text.chat import DEFAULT_SYSTEM, encode_caption, encode_conversation, encode_prompt
from vxl_jax.text.template import IGNORE, IMAGE_MARK, Tokenizer
from vxl_jax.text.time_prompt import with_time_prompt
from vxl_jax.typing import Family


class Reader:
    """Reads records of several sources as samples. Small when pickled: data workers hold one.

    prompts: make samples that end where the last answer is to begin, for evaluation.
    control_tokens: see `vxl_jax.text.chat.encode_conversation`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        indices: Sequence[RecordIndex],
        preparer: Preparer,
        tokenizer: Tokenizer,
        prompts: bool = False,
        control_tokens: bool = True,
    ):
        self.sources, self.indices, self.preparer = list(sources), list(indices), preparer
        self.tokenizer, self.prompts, self.control_tokens = tokenizer, prompts, control_tokens

    def name(self, source: int, record: int) -> str:
        """`FILE[17] ID`: data sets repeat ids, so it says the place too."""
        value = None
        with suppress(DataError):
            value = self.indices[source][record]
        return self._name(source, record, value)

    def _name(self, source: int, record: int, value: Any) -> str:
        place = f"{self.sources[source].path}[{record}]"
        name = value.get("id") if isinstance(value, dict) else None
        name = "" if name is None else name if isinstance(name, str) else short(name)
        # Half of a surrogate pair, which JSON can spell, could not be printed.
        return f"{place} {name.encode(errors='replace').decode()}".rstrip()

    def files(self, source: int, record: int) -> str:
        """The media that a record names, for an error about them."""
        with suppress(*BAD):
            files = read_record(self.indices[source][record]).files
            return ", ".join(short(file) for file in files) or "no media"
        return "no media"

    def open(self, source: int, record: int) -> tuple[Sample, list[Medium]]:
        """A sample, and its media ready to be read.

        Raises: ConversationError, MediaError, DataError: the record cannot be used.
        """
        value = self.indices[source][record]
        shape = read_record(value)
        files, conversations = shape.files, shape.conversations
        media = self._media(self.sources[source], files, shape.clips)
        questions = [turn["value"] for turn in conversations if turn["from"] == "human"]
        if self.preparer.preprocessing.time_prompt and len(media) == 1:
            conversations = _with_times(conversations, media[0], self.preparer.model.family)
        ids, labels = self._encode(conversations, len(files), shape.system)
        kind = "video" if shape.is_video else "image" if files else "text"
        sample = Sample(
            name=self._name(source, record, value),
            ids=ids,
            labels=labels,
            blocks=tuple(medium.block for medium in media),
            question=questions[-1].replace(IMAGE_MARK, "").strip(),
            answer=conversations[-1]["value"],
            question_type=kind if shape.question_type is None else shape.question_type,
            choices=shape.choices,
        )
        self._check_length(sample)
        return sample, media

    def _media(self, source: Source, files: list[str], clips: list[Clip | None]) -> list[Medium]:
        media: list[Medium] = []
        several = sum(clip is None for clip in clips) > 1
        for file, clip in zip(files, clips, strict=True):
            path = resolve_media(source.media_root, file, source.allow_outside)
            if clip is None:
                media.append(self.preparer.image(path, several))
            else:
                media.append(self.preparer.video(path, clip, source.allow_outside))
        return media

    def _encode(
        self, conversations: Any, files: int, system: str | None
    ) -> tuple[np.ndarray, np.ndarray]:
        options: dict[str, Any] = {"control_tokens": self.control_tokens}
        family = self.preparer.model.family
        caption = self.preparer.data.template == "caption"
        if caption:
            encoded = encode_caption(_caption(conversations), self.tokenizer, **options)
            if files != 1:
                raise DataError("the caption template needs one image or video a record")
            if system is not None:
                raise DataError(
                    "the record has a system message, but the caption template has no system turn; "
                    "remove it, or use data.template chat"
                )
        else:
            options |= {"system": DEFAULT_SYSTEM if system is None else system, "family": family}
            encoded = encode_conversation(conversations, self.tokenizer, **options)
        if not self.prompts:
            return encoded.ids, encoded.labels
        if conversations[-1]["from"] != "gpt":
            raise DataError("the last turn must be the answer that is asked for (from gpt)")
        # A caption follows its picture; an answer follows the turns before it.
        if caption:
            ids = encoded.ids[:1]
        else:
            ids = encode_prompt(conversations[:-1], self.tokenizer, **options)
        return ids, np.full_like(ids, IGNORE)

    def _check_length(self, sample: Sample) -> None:
        tokens = sample.text + sum(sample.visual_tokens(self.preparer.model))
        longest = self.preparer.data.max_length
        if tokens > longest:
            raise DataError(
                f"{tokens} tokens ({sample.frames} frames or tiles) are over data.max_length "
                f"{longest}; lower data.max_frames or data.max_tiles"
            )


def _with_times(
    conversations: list[dict[str, Any]], medium: Medium, family: Family
) -> list[dict[str, Any]]:
    """Turns of which the one with a video's mark says when its frames are shown."""
    if not isinstance(medium, VideoMedium):
        return conversations
    return [
        turn | {"value": with_time_prompt(turn["value"], medium.times, family)}
        if IMAGE_MARK in turn["value"]
        else turn
        for turn in conversations
    ]


def _caption(conversations: list[dict[str, Any]]) -> str:
    answers = [turn["value"] for turn in conversations if turn["from"] == "gpt"]
    if len(answers) != 1:
        raise DataError(f"the caption template needs one answer (the caption), got {len(answers)}")
    return answers[0]
