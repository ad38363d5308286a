"""The page docs/api.md, from the public names and their docstrings.

    python -m tests.api_page

writes it; tests/test_public.py compares it with the code.
"""

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import vxl_jax

API_PAGE = Path(__file__).parents[1] / "docs" / "api.md"

SECTIONS = {
    "Ask about films": (
        *("load", "Model", "VisualMemory", "Chat", "load_memory"),
        *("Video", "Picture", "MediaOptions", "Sampling", "ScoredAnswer"),
    ),
    "Configuration": (
        *("VideoXLConfig", "VisionConfig", "LanguageConfig", "Compression", "Preprocessing"),
        "LoRAConfig",
    ),
    "Network": (
        *("load_network", "VideoXL", "prefill", "decode_step", "loss_and_metrics"),
        *("Memory", "empty_memory", "window_attention", "KeyValues"),
        *("Collect", "Collected", "VisionEncoder"),
        *("add_lora", "merge_lora", "quantize", "make_mesh", "param_placement"),
    ),
    "Streams and text": (
        *("plan_stream", "Stream", "draw_ratio", "batch_streams", "StreamShape", "StreamBatch"),
        *("batch_visual", "VisualInput"),
        *("encode_prompt", "encode_conversation", "encode_caption"),
    ),
    "Errors": (
        *("VxlError", "ArgumentError", "CheckpointError", "ConfigError", "ConversationError"),
        *("MediaError", "PartlyWatched", "VisualMemoryError"),
    ),
}
"""Where each public name stands in the page."""


def describe_api() -> str:
    """Write the page as text.

    Raises:
      ValueError: a public name is in no section.
    """
    placed = {name for names in SECTIONS.values() for name in names} | {"__version__"}
    if missing := sorted(set(vxl_jax.__all__) - placed):
        raise ValueError(f"{', '.join(missing)}: put them into SECTIONS")
    lines = [
        "# API",
        "",
        "What `import vxl_jax` gives. Everything else may change from one version to the next; the",
        "deprecation policy is in [CHANGELOG.md](../CHANGELOG.md). `help(vxl_jax.NAME)` says more.",
        "This page is written by `python -m tests.api_page` and tested against the code.",
    ]
    for title, names in SECTIONS.items():
        lines += ["", f"## {title}"]
        for name in names:
            lines += ["", *_describe(name, getattr(vxl_jax, name))]
    return "\n".join(lines) + "\n"


def _describe(name: str, value: Any) -> list[str]:
    lines = [f"### `{name}`", "", f"`{_signature(name, value)}`", "", _summary(value)]
    if not inspect.isclass(value) or issubclass(value, Exception):
        return lines
    if dataclasses.is_dataclass(value):
        documented = _field_docs(value)
        rest = (inspect.getdoc(value) or "").split("\n\n")[1:]
        if documented:
            names = (field.name for field in dataclasses.fields(value))
            lines += ["", *(f"- `{name}`{documented.get(name, '')}" for name in names)]
        elif rest:  # the docstring describes the fields
            lines += ["", "```text", *"\n\n".join(rest).splitlines(), "```"]
    methods = [
        f"- `.{_signature(key, member)}`: {_summary(member)}"
        for key, member in vars(value).items()
        if not key.startswith("_") and inspect.isfunction(member)
    ]
    return [*lines, "", *methods] if methods else lines


def _summary(value: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    paragraph = (inspect.getdoc(value) or "").split("\n\n")[0]
    return " ".join(paragraph.split())


def _signature(name: str, value: Any) -> str:
    """Name and arguments with their defaults, as they stand in the source."""
    if inspect.isclass(value):
        return name if dataclasses.is_dataclass(value) else f"class {name}"
    function = ast.parse(inspect.cleandoc("\n" + inspect.getsource(inspect.unwrap(value)))).body[0]
    assert isinstance(function, ast.FunctionDef)
    arguments = [a for a in function.args.args if a.arg not in ("self", "cls")]
    function.args.args = arguments
    for argument in (*arguments, *function.args.kwonlyargs):
        argument.annotation = None
    if function.args.kwarg:
        function.args.kwarg.annotation = None
    return f"{name}({ast.unparse(function.args)})"


def _field_docs(value: type) -> dict[str, str]:
    """First sentences of the texts under the fields of a dataclass."""
    tree = ast.parse(inspect.cleandoc(inspect.getsource(value))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            words = " ".join(str(text.value.value).split())  # type: ignore[attr-defined]
            found[field.target.id] = f": {words}"
    return found


if __name__ == "__main__":
    API_PAGE.write_text(describe_api())
