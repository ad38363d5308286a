"""The table of accelerators."""

import pytest

from vxl_jax.cards import CARDS, card_of


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("TPU v5 lite", "tpu-v5e"),
        ("TPU v5", "tpu-v5p"),
        ("H100", "h100"),
        ("a100-40gb", "a100-40gb"),
    ],
)
def test_known(kind, name):
    card = card_of(kind)
    assert card is not None
    assert card.name == name


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
def test_unknown_is_not_guessed(kind):
    assert card_of(kind) is None


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
