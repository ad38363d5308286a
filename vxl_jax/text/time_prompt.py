"""Tell a model when the frames of a video are shown, in the words of LLaVA-Video."""

from vxl_jax.media.sampling import FrameTimes
from vxl_jax.text.chat import IMAGE_MARK


def time_prompt(times: FrameTimes) -> str:
    """Say how long a video is and when its frames are shown."""
    seconds = (max(second - times.begin, 0.0) for second in times.seconds)
    shown = ",".join(f"{second:.2f}s" for second in seconds)
    return (
        f"The video lasts for {times.end - times.begin:.2f} seconds, and {len(times.seconds)} "
        f"frames are uniformly sampled from it. These frames are located at {shown}. Please answer "
        "the following questions related to this video."
    )


def with_time_prompt(turn: str, times: FrameTimes) -> str:
    """Put the times of a turn's one video between its mark and the text of the turn."""
    rest = turn.replace(IMAGE_MARK, "").strip()
    return f"{IMAGE_MARK}\n{time_prompt(times)}\n{rest}".rstrip()
