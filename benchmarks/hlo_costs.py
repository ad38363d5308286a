"""Kernels of a program that XLA has compiled for a GPU: operations, bytes, and how often they run.

Read from the text of the scheduled HLO module (`jax.stages.Compiled.as_text()`). Bytes of a kernel
are those of its operands and results; one that slices reads the slice, one that updates in place
writes the update. Attention kernels count as what they are given, `Kernel.is_attention`: their
operations are arithmetic of the caller.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "token": 0, "s4": 0.5, "u4": 0.5}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(
    r"^\s+(ROOT )?(%[\w.\-]+) = ((?:\([^=]*?\))|(?:\w+\[[\d,]*\](?:\{[^}]*\})?)) ([\w\-]+)\((.*)$"
)
_FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"),
    *("partition-id", "replica-id"),
}
_SLICES = {"dynamic-slice", "slice", "gather"}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Kernel:
    """An instruction that runs.

    name, opcode: as in the text; for a custom call, its target. source: the JAX operation. flops,
    bytes: of one run. times: runs in all; loops of unknown length count once, and are `dynamic`.
    """

    name: str
    opcode: str
    source: str
    flops: float
    bytes: float
    times: float
    dynamic: bool

    @property
    def is_attention(self) -> bool:
        """Whether it is a fused attention kernel, whose operations are not counted."""
        return "fmha" in self.opcode or "window_attention" in self.source

    @property
    def is_collective(self) -> bool:
        """Whether it moves bytes between devices."""
        return self.opcode.startswith(_COLLECTIVES)

    def seconds(self, flops_per_second: float, bandwidth: float) -> float:
        """Least seconds of all runs: at the peak of products or of the memory."""
        return self.times * max(self.flops / flops_per_second, self.bytes / bandwidth)


@dataclass(frozen=True)
class _Instruction:
    is_root: bool
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


_Computation = dict[str, _Instruction]


def kernels_of(text: str) -> list[Kernel]:
    """List the kernels of a module, in the order in which they are first run."""
    computations, entry = _parse(text)
    return list(_walk(computations, entry, 1.0, False))


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?(%[\w.\-]+) .*\{$", line):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
            continue
        found = _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line))
        if found is None or current is None:
            continue
        root, name, shape, opcode, rest = found.groups()
        end = _closing(rest)
        operands = tuple(re.findall(r"%[\w.\-]+", rest[:end]))
        current[name] = _Instruction(bool(root), name, shape, opcode, operands, rest[end + 1 :])
    if not entry:
        raise ValueError("not the text of an HLO module: it has no ENTRY")
    return computations, entry


def _closing(text: str) -> int:
    depth = 1
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return index
    return len(text)


def _walk(
    computations: dict[str, _Computation], name: str, times: float, dynamic: bool
) -> Iterator[Kernel]:
    body = computations[name]
    for one in body.values():
        called = re.findall(r"(?:body|to_apply|calls)=(%[\w.\-]+)", one.attributes)
        if one.opcode in _FREE or one.opcode.endswith("-done"):
            continue
        if one.opcode == "while":
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', one.attributes)
            count = float(trips[1]) if trips else 1.0
            (loop,) = re.findall(r"body=(%[\w.\-]+)", one.attributes)
            yield from _walk(computations, loop, times * count, dynamic or not trips)
        elif one.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
            names = branches[1] if branches else one.attributes
            for branch in re.findall(r"(%[\w.\-]+)", names)[: 2 if not branches else None]:
                yield from _walk(computations, branch, times, dynamic)
        elif one.opcode in ("call", "async-start") and called:
            yield from _walk(computations, called[0], times, dynamic)
        else:
            source = re.search(r'op_name="([^"]*)"', one.attributes)
            flops, moved, opcode = _cost(one, body, computations)
            if opcode == "__gpu$xla.gpu.triton":
                label = re.search(r"name = \"?(\w+)", one.attributes)
                opcode = label[1] if label else opcode
            origin = f"{source[1] if source else ''} {opcode}"
            yield Kernel(one.name, opcode, origin, flops, moved, times, dynamic)


def _cost(
    one: _Instruction, body: _Computation, computations: dict[str, _Computation]
) -> tuple[float, float, str]:
    """Operations, bytes and opcode of an instruction."""
    given = sum(_size(body[name].shape) for name in one.operands if name in body)
    out = _size(one.shape)
    if one.opcode == "fusion":
        (called,) = re.findall(r"calls=(%[\w.\-]+)", one.attributes)
        inner = computations[called]
        flops = sum(_dot_flops(x, inner) for x in inner.values() if x.opcode == "dot")
        return flops, _fusion_bytes(inner), one.opcode
    if one.opcode == "custom-call":
        (target,) = re.findall(r'custom_call_target="([^"]*)"', one.attributes)
        if "cublas" not in target:
            return 0.0, _custom_bytes(one, body), target
        workspace = sum(map(_count, re.findall(r"s8\[(\d+)\]\{0\}\)", one.shape)))
        return _dot_flops(one, body), given + out - workspace, target
    if one.opcode == "dot":
        return _dot_flops(one, body), given + out, one.opcode
    if one.opcode in ("dynamic-slice", "slice"):
        return 0.0, 2 * out, one.opcode
    if one.opcode == "dynamic-update-slice":
        return 0.0, 2 * _size(body[one.operands[1]].shape), one.opcode
    return 0.0, given + out, one.opcode


def _custom_bytes(one: _Instruction, body: _Computation) -> float:
    """Bytes of a kernel that reads one layer of the stacks that it is given."""
    moved = _size(one.shape)
    for name in one.operands:
        shape = body[name].shape if name in body else ""
        sizes = _dimensions(shape) if shape else []
        stacked = len(sizes) in (3, 5) and sizes[0] > 1 and _size(shape) > 2**24
        moved += _size(shape) / (sizes[0] if stacked else 1)
    return moved


def _fusion_bytes(inner: _Computation) -> float:
    users: dict[str, list[_Instruction]] = {}
    for each in inner.values():
        for name in each.operands:
            users.setdefault(name, []).append(each)

    def read(one: _Instruction) -> float:
        total = 0.0
        for user in users.get(one.name, []):
            first = user.operands[0] == one.name
            if user.opcode in _SLICES and first:
                total += _size(user.shape)
            elif user.opcode in ("dynamic-update-slice", "scatter") and first:
                continue  # in place
            elif user.opcode == "bitcast":
                total += read(user)
            else:
                return _size(one.shape)
        return min(_size(one.shape), total)

    def written(one: _Instruction) -> float:
        while one.opcode == "bitcast":
            one = inner[one.operands[0]]
        if one.opcode in ("dynamic-update-slice", "scatter"):
            return _size(inner[one.operands[1 if one.opcode[0] == "d" else 2]].shape)
        if one.opcode == "tuple":
            return sum(written(inner[name]) for name in one.operands)
        return _size(one.shape)

    root = next(each for each in inner.values() if each.is_root)
    return sum(read(x) for x in inner.values() if x.opcode == "parameter") + written(root)


def _dot_flops(one: _Instruction, body: _Computation) -> float:
    lhs = _dimensions(body[one.operands[0]].shape)
    plain = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
    listed = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.attributes)
    axes = re.findall(r"\d+", plain[1] if plain else listed[1] if listed else "")
    return 2.0 * math.prod(_dimensions(one.shape)) * math.prod(lhs[int(axis)] for axis in axes)


def _dimensions(shape: str) -> list[int]:
    found = _SHAPE.search(shape)
    return [int(size) for size in found[2].split(",") if size] if found else []


def _size(shape: str) -> float:
    """Bytes of all arrays of a shape or a tuple of shapes."""
    return sum(
        _count(sizes) * _BYTES.get(kind, _width(kind)) for kind, sizes in _SHAPE.findall(shape)
    )


def _count(sizes: str) -> int:
    return math.prod(int(size) for size in sizes.split(",") if size)


def _width(kind: str) -> float:
    bits = re.search(r"\d+", kind)
    return int(bits[0]) / 8 if bits else 0
