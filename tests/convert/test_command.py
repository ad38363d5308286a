"""The command lines of convert: their arguments are those of the functions."""

from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from convert import from_hf, init, parity, to_hf

FUNCTIONS = {
    from_hf: "convert_from_hf",
    to_hf: "convert_to_hf",
    init: "init_from",
    parity: "compare_golden",
}
FROM_HF = {
    **{"source": "a", "destination": "b", "dtype": None, "overwrite": False},
    **{"vision": None, "ignore": None, "adapter": None},
}
TO_HF = {
    **{"source": "a", "destination": "b", "dtype": None, "overwrite": False},
    **{"shard_size": "5GB", "step": None, "base": None, "adapter": False},
}
INIT = {
    **{"directories": (Path("q"), Path("c"), Path("d")), "dtype": None, "overwrite": False},
    **{"projector": None, "seed": 0, "window": None, "ratios": (2, 4, 8, 12, 16)},
}


@pytest.mark.parametrize(
    ("module", "arguments", "expected"),
    [
        (from_hf, "a b", FROM_HF),
        (
            from_hf,
            "--dtype float32 a --overwrite b --vision v",
            FROM_HF | {"dtype": "float32", "overwrite": True, "vision": "v"},
        ),
        (from_hf, "a b --adapter=c --ignore x.*", FROM_HF | {"adapter": "c", "ignore": "x.*"}),
        (to_hf, "a b", TO_HF),
        (to_hf, "a b --shard-size 1KB --step best", TO_HF | {"shard_size": "1KB", "step": "best"}),
        (
            to_hf,
            "a b --step 3 --base c --adapter",
            TO_HF | {"step": "3", "base": "c", "adapter": True},
        ),
        (init, "q c d", INIT),
        (init, "q c d --projector p --seed 3", INIT | {"projector": Path("p"), "seed": 3}),
        (
            init,
            "l d --window 1680 --ratios 2 4",
            INIT | {"directories": (Path("l"), Path("d")), "window": 1680, "ratios": (2, 4)},
        ),
        (parity, "h g", {"directories": (Path("h"), Path("g"))}),
        (parity, "sets", {"directories": (Path("sets"),)}),
    ],
)
def test_arguments_reach_the_function(
    module: ModuleType, arguments: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    found: dict[str, Any] = {}

    @wraps(getattr(module, FUNCTIONS[module]))
    def record(**options: Any) -> int:
        found.update(options)
        return 0

    monkeypatch.setattr(module, FUNCTIONS[module], record)
    assert module.main(arguments.split()) == 0
    assert found == expected


@pytest.mark.parametrize("module", FUNCTIONS, ids=lambda module: module.__name__)
def test_help_and_what_is_missing(module: ModuleType, capsys: pytest.CaptureFixture):
    for arguments, status in ((["--help"], 0), ([], 2), (["a", "b", "c", "--no-such"], 2)):
        try:
            ended = module.main(arguments)  # with any number of directories
        except SystemExit as error:
            ended = error.code
        assert ended == status
    printed = capsys.readouterr()
    assert f"usage: python -m {module.__name__} [-h]" in printed.out
    assert "--no-such" in printed.err
