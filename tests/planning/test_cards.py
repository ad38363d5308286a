"""The table of accelerators, and the share of a GPU's memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vxl_jax.errors import ConfigError
from vxl_jax.planning.cards import CARDS, SHARE_VARIABLES, card_of, find_card


@pytest.mark.parametrize(
    ("name", "gigabytes", "bandwidth"),
    [
        # As devices call themselves.
        ("NVIDIA B200", 192, 8.0),
        ("NVIDIA H200", 141, 4.8),
        ("NVIDIA H100 80GB HBM3", 80, 3.35),
        ("NVIDIA H100 PCIe", 80, 2.0),
        ("NVIDIA A100-SXM4-80GB", 80, 2.0),
        ("NVIDIA A100-SXM4-40GB", 40, 1.6),
        ("NVIDIA L4", 24, 0.3),
        ("NVIDIA L40S", 48, 0.86),
        ("NVIDIA GeForce RTX 4090", 24, 1.0),
        ("NVIDIA GeForce RTX 3090", 24, 0.94),
        ("TPU v5 lite", 16, 0.82),
        ("TPU v5", 95, 2.8),
        # As users call them.
        ("h100", 80, 3.35),
        ("H100", 80, 3.35),
        ("h100-nvl", 94, 3.9),
        ("h200", 141, 4.8),
        ("a100", 80, 2.0),
        ("a100-40gb", 40, 1.6),
        ("l4", 24, 0.3),
        ("a10g", 24, 0.6),
        ("4090", 24, 1.0),
        ("tpu-v5e", 16, 0.82),
        ("tpu-v6e", 32, 1.6),
    ],
)
def test_a_name_finds_the_memory_of_that_card(name: str, gigabytes: int, bandwidth: float):
    """As sold, rounded: ECC may take up to a sixteenth of the memory. Bandwidth is in TB/s."""
    card = find_card(name)
    assert 15 / 16 * gigabytes <= card.memory / 2**30 <= gigabytes
    assert card.bandwidth == pytest.approx(bandwidth * 1e12, rel=0.05)


def test_cards_in_the_documentation_are_found():
    root = Path(__file__).parents[2]
    texts = [root / "README.md", *(root / "docs").glob("*.md")]
    names = {name for path in texts for name in re.findall(r"--card ([\w-]+)", path.read_text())}
    assert len(names) > 1
    for name in names:
        find_card(name)


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "",
        "NVIDIA",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA L40",
        "NVIDIA A100-SXM-64GB",
        "Quadro RTX 6000",
        "TPU v4 lite",
    ],
)
def test_unknown_is_not_guessed(kind: str):
    assert card_of(kind) is None
    with pytest.raises(ConfigError) as refused:
        find_card(kind)
    start, _, names = str(refused.value).partition("choose from ")
    assert start == f"--card {kind}: unknown card; "
    assert names.split(", ") == [card.name for card in CARDS]


def test_every_card_is_found_by_all_its_names():
    for card in CARDS:
        for name in (card.name, *card.kinds, *(f"NVIDIA {kind}" for kind in card.kinds)):
            assert card_of(name) is card


def test_figures():
    """Bytes and operations a second, not the thousands and millions that data sheets print."""
    h100 = card_of("h100")
    assert h100 is not None
    assert (h100.flops, h100.bandwidth, h100.memory) == (989.5e12, 3.35e12, 80 * 2**30)
    for card in CARDS:
        assert 50 < card.flops / card.bandwidth < 700
        assert 0.2e12 < card.bandwidth < 10e12
        assert 14 * 2**30 < card.memory <= 192 * 2**30
        for name in (card.name, *card.kinds):
            for gigabytes in re.findall(r"(\d+)gb", name.lower()):
                assert card.memory == int(gigabytes) * 2**30


# The share of memory. Without a GPU, a child process sees what JAX would tell one.


def child(code: str, **environment: str) -> list[str]:
    """Lines that a new process prints, with warnings as errors."""
    kept = {name: value for name, value in os.environ.items() if name not in SHARE_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        env={**kept, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


OPTIONS = """
from jaxlib import xla_client
print(xla_client.generate_pjrt_gpu_plugin_options().get("memory_fraction"))
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "0.95"),
        ({"XLA_CLIENT_MEM_FRACTION": ""}, "0.95"),
        ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, "0.5"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4"}, "0.4"),
    ],
)
def test_jax_is_told_the_share_unless_the_user_has(environment: dict[str, str], expected: str):
    code = (
        f"from vxl_jax.planning.cards import claim_memory\nclaim_memory()\nclaim_memory(){OPTIONS}"
    )
    assert child(code, **environment) == [expected]


def test_loading_a_model_claims_memory_before_a_device_is_used():
    load = """
import jax, vxl_jax
try:
    vxl_jax.load("nowhere")
except vxl_jax.VxlError:
    pass
"""
    assert child(load + OPTIONS) == ["0.95"]


@pytest.mark.parametrize(("backend", "expected"), [("cpu", []), ("gpu", ["<string>:8: 0.75"])])
def test_a_claim_that_is_too_late_warns_once_on_a_gpu(backend: str, expected: list[str]):
    code = f"""
import warnings, jax
from jax._src import xla_bridge
from vxl_jax.planning.cards import claim_memory
jax.devices()
xla_bridge.default_backend = lambda: {backend!r}
def load(): claim_memory()
def main(): [load(), load()]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    main()
    load()
for w in caught:
    assert "set XLA_CLIENT_MEM_FRACTION=0.95 in the environment" in str(w.message)
    print(f"{{w.filename}}:{{w.lineno}}: {{'0.75' * ('0.75' in str(w.message))}}")
"""
    assert child(code + OPTIONS) == [*expected, "None"]
