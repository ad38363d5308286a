"""Checkpoints of a run: what they hold, which are kept, and what a failure leaves."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from train.checkpoints import Checkpoints, Position
from train.config import TrainConfig, load_config


def demo_config(*options: str) -> TrainConfig:
    return load_config(["--config", "demo", *options]).config


def test_a_checkpoint_holds_what_was_saved_though_the_buffers_are_given_up(tmp_path: Path):
    """It is written in the background, while steps go on and reuse the memory."""
    checkpoints = Checkpoints(tmp_path, demo_config())
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x - 1, tree), donate_argnums=0)
    expected = np.arange(4_000_000, dtype=np.float32)
    trained, state = {"a": jnp.array(expected)}, {"b": jnp.array(expected)}
    position = Position(7, "of this data")
    checkpoints.save(1, trained, state, position)
    for _ in range(5):
        trained, state = overwrite((trained, state))
    checkpoints.manager.wait_until_finished()
    assert trained["a"][0] == -5
    *trees, found_position = checkpoints.restore(1, trained, state, position)
    assert found_position == position
    for tree in trees:
        (found,) = jax.tree.leaves(tree)
        np.testing.assert_array_equal(found, expected)
    checkpoints.close()
