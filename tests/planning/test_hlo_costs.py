"""Operations, bytes and runs of kernels, from the text of a module that XLA compiled for a GPU."""

import pytest

from benchmarks.hlo_costs import kernels_of

TEXT = """\
HloModule jit_step, is_scheduled=true

%scale (p: bf16[4,64,64], i: s32[]) -> bf16[64,64] {
  %p = bf16[4,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = bf16[1,64,64]{2,1,0} dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={1,64,64}
  ROOT %b = bf16[64,64]{1,0} bitcast(%s)
}

%body (t: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %t = (s32[], f32[8,64]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %x = f32[8,64]{1,0} get-tuple-element(%t), index=1
  %w = bf16[4,64,64]{2,1,0} constant({...})
  %slice = bf16[64,64]{1,0} fusion(%w, %n), kind=kLoop, calls=%scale
  %gemm = (f32[8,64]{1,0}, s8[4096]{0}) custom-call(%x, %slice), \
custom_call_target="__cublas$lt$matmul", \
backend_config={"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}
  %y = f32[8,64]{1,0} get-tuple-element(%gemm), index=0
  ROOT %r = (s32[], f32[8,64]{1,0}) tuple(%n, %y)
}

%condition (t: (s32[], f32[8,64])) -> pred[] {
  %t = (s32[], f32[8,64]{1,0}) parameter(0)
  ROOT %p = pred[] constant(true)
}

ENTRY %main (x: f32[8,64]) -> f32[8,64] {
  %x = f32[8,64]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,64]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[8,64]{1,0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"4"}}
  %y = f32[8,64]{1,0} get-tuple-element(%loop), index=1
  ROOT %a = f32[8,64]{1,0} custom-call(%y), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(step)/window_attention/pallas_call"}, \
backend_config={name = "window_attention"}
}
"""


def test_kernels_of_a_module():
    of_slice, product, attention = kernels_of(TEXT)
    assert (of_slice.opcode, of_slice.times, of_slice.flops) == ("fusion", 4, 0)
    assert of_slice.bytes == 4 + 2 * 2 * 64 * 64  # an index; a slice that is read and written
    assert (product.opcode, product.times) == ("__cublas$lt$matmul", 4)
    assert product.flops == 2 * 8 * 64 * 64
    assert product.bytes == 2 * 4 * 8 * 64 + 2 * 64 * 64  # without the workspace
    assert product.seconds(1e6, 1e12) == pytest.approx(4 * product.flops / 1e6)
    assert product.seconds(1e30, 1e6) == pytest.approx(4 * product.bytes / 1e6)
    assert (attention.opcode, attention.times, attention.is_attention) == (
        *("window_attention", 1),
        True,
    )
    assert not any(kernel.dynamic or kernel.is_collective for kernel in kernels_of(TEXT))


def test_loops_of_unknown_length_count_once_and_are_told():
    of_slice, *_ = kernels_of(TEXT.replace('"known_trip_count":{"n":"4"}', ""))
    assert (of_slice.times, of_slice.dynamic) == (1, True)


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="has no ENTRY"):
        kernels_of("nothing")
