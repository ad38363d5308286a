"""Device memory that runs out in the middle of a step costs that step, and nothing before it.

The failures are XLA's own: a child process lowers its address space (`tests.support.starved`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.starved import ENVIRONMENT


@pytest.fixture(scope="module")
def cases(demo_data: Path) -> dict[str, Any]:
    """What each case left behind."""
    tokenizer = str(demo_data / "tokenizer")
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.support.starved", tokenizer]
    environment = os.environ | ENVIRONMENT
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def assert_no_memory(error: list[str]) -> None:
    """It is the library's error, from XLA's."""
    name, message, cause, reason = error
    assert (name, cause) == ("VisualMemoryError", "JaxRuntimeError")
    assert message.startswith(("out of device memory ", "the device has no room for "))
    assert "RESOURCE_EXHAUSTED" in reason


def assert_same(found: list[Any], expected: list[Any]) -> None:
    """Two memories are equal in length, frames, norms of their entries, and answers."""
    assert found[:2] == expected[:2]
    assert found[2] == pytest.approx(expected[2], rel=1e-5)
    assert found[3] == expected[3]


@pytest.mark.parametrize(("case", "frames"), [("first", 100), ("second", 356), ("encode", 356)])
def test_failing_extension_keeps_all_steps_before(cases: dict[str, Any], case: str, frames: int):
    found = cases[case]
    assert_no_memory(found["error"])
    said = f"what was watched can be used, of 100 frames {frames} frames" in found["error"][1]
    assert said == (frames > 100)
    assert_same(found["left"], cases["alone"][str(frames)])
    assert_same(found["whole"], cases["alone"]["600"])


def test_failing_question_leaves_the_memory(cases: dict[str, Any]):
    assert_no_memory(cases["ask"]["error"])
    assert_same(cases["ask"]["left"], cases["alone"]["100"])


def test_conversation_whose_turn_fails_is_as_it_was(cases: dict[str, Any]):
    """In the middle of an answer, and in the middle of a chat's film."""
    found = cases["chat"]
    assert len(found["errors"]) == 2
    for error in found["errors"]:
        assert_no_memory(error)
    assert found["turns"] == 2
    assert found["answers"][0] == found["answers"][1]


def test_growth_is_exact_where_half_as_much_again_does_not_fit(cases: dict[str, Any]):
    found = cases["grow"]
    assert found["exact"] == [], found
    assert found["held"] < found["after"] < 1.07 * found["held"]


def test_failing_growth_changes_nothing(cases: dict[str, Any]):
    found = cases["grow"]
    assert_no_memory(found["none"])
    assert found["capacity"] == found["after"]
    assert_same(found["left"], cases["alone"]["100"])
