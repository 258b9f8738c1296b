"""What compiled programs send, read from their texts: in the forms of a CPU and of a TPU."""

import pytest

pytest.importorskip("jax.numpy", reason="jax is not installed")

PROGRAM = """
HloModule jit_update

%condition (state: (s32[], f32[8,4])) -> pred[] {
  %constant.1 = s32[] constant(3), metadata={op_name="loop"}
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}

%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %sent = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=1
}

%by_twos (state: (s32[], f32[8,4])) -> pred[] {
  %constant.2 = u32[]{:T(128)} constant(8)
  %i = u32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %below = pred[] compare(%i, %constant.2), direction=LT
}

%two (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %constant.3 = u32[]{:T(128)} constant(2)
  %before = u32[]{:T(128)} get-tuple-element(%state), index=0
  %sent.3 = f32[8,4]{1,0} collective-permute(%x), channel_id=2, source_target_pairs={{0,1}}
  %after = u32[]{:T(128)} add(%before, %constant.3)
  ROOT %pair = (u32[]{:T(128)}, /*index=1*/f32[8,4]{1,0}) tuple(%after, /*index=1*/%sent.3)
}

%known (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %sent.2 = bf16[8,4]{1,0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1}}
}

%all-reduce-scatter.4 (x: f32[8,4]) -> f32[2,4] {
  %all-reduce = f32[8,4]{1,0:T(8,128)} all-reduce(%x), channel_id=9, replica_groups={{0,1,2,3}}
}

%first (x: bf16[2,4]) -> bf16[8,4] {
  %part = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=5, \
replica_groups=mesh['a'=4,'b'=2] {'a'}, frontend_attributes={chain_id="0"}
}

%second (x: bf16[2,4]) -> bf16[8,4] {
  %rest = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=5, \
replica_groups=mesh['a'=4,'b'=2] {'a'}, frontend_attributes={chain_id="0"}
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %loop = (s32[], f32[8,4]{1,0}) while(%init), condition=%condition, body=%body
  %other = (s32[], bf16[8,4]{1,0}) while(%init), condition=%condition, body=%known, \
backend_config={"known_trip_count":{"n":"7"}}
  %third = (u32[], f32[8,4]{1,0}) while(%init), condition=%by_twos, body=%two
  %scattered = f32[2,4]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.4
  %one = bf16[8,4]{1,0} fusion(%p), kind=kCustom, calls=%first
  %two = bf16[8,4]{1,0} fusion(%one), kind=kCustom, calls=%second
  %sum = (f32[], f32[8,4]{1,0}) all-reduce(%a, %b), channel_id=7, replica_groups=[4,2]<=[8]
  ROOT %all = (f32[2,4], f32[8,4]) all-gather-start(%p), replica_groups={{0,1,2,3},{4,5,6,7}}
}
""".replace("\\\n", "")


def test_each_form() -> None:
    """Loops are counted, and a collective that runs in several fusions once."""
    from recurrentgemma.jax.runtime.collectives import collectives, sent_bytes

    whole = 8 * 4 * 4  # bytes in float32
    assert sent_bytes(PROGRAM) == {
        "collective-permute": 3 * whole + 7 * whole // 2 + 4 * whole,
        "reduce-scatter": whole * 3 // 4,
        "all-gather": whole // 2 * 3 // 4 + whole * 3 // 4,
        "all-reduce": 2 * (whole + 4) * 1 // 2,
    }
    gathers = [each.shapes for each in collectives(PROGRAM) if each.kind == "all-gather"]
    assert gathers == [((8, 4),), ((8, 4),)]
