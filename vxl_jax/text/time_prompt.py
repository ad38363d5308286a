"""Tell a model when the frames of a video are shown, in the words of LLaVA-Video."""

from vxl_jax.media.sampling import FrameTimes
from vxl_jax.text.template import IMAGE_MARK
from vxl_jax.typing import Family


def time_prompt(times: FrameTimes, family: Family = "video_xl") -> str:
    """Say how long a video is and when its frames are shown.

    LLaVA-Video was trained without a blank after the times.
    """
    seconds = (max(second - times.begin, 0.0) for second in times.seconds)
    shown = ",".join(f"{second:.2f}s" for second in seconds)
    blank = "" if family == "llava_video" else " "
    return (
        f"The video lasts for {times.end - times.begin:.2f} seconds, and {len(times.seconds)} "
        f"frames are uniformly sampled from it. These frames are located at {shown}.{blank}Please "
        "answer the following questions related to this video."
    )


def with_time_prompt(turn: str, times: FrameTimes, family: Family = "video_xl") -> str:
    """Put the times of a turn's one video between its mark and the text of the turn.

    The text loses the blanks and newlines around it, but for LLaVA-Video, whose questions keep the
    newline that stood after their mark.
    """
    rest = turn.replace(IMAGE_MARK, "")
    rest = rest if family == "llava_video" else rest.strip()
    return f"{IMAGE_MARK}\n{time_prompt(times, family)}\n{rest}".rstrip()
