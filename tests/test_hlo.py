"""Reading optimized HLO: text by hand, and what XLA makes of known programs on the CPU."""

import jax
import jax.numpy as jnp
import pytest

from unifluid_jax import hlo
from unifluid_jax.hlo import Collective

MESH = {"data": 2, "fsdp": 4, "tensor": 1}
TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=8

%cond (p.0: (s32[], bf16[8,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %p.0 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.0 = s32[]{:T(128)} get-tuple-element(%p.0), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.0, %limit), direction=LT
}

%product (a: bf16[8,16], b: bf16[16,16]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[16,16]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %conv = bf16[8,16]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%all-reduce-scatter.1 (g: bf16[16,16]) -> bf16[4,16] {
  %g = bf16[16,16]{1,0} parameter(0)
  %sum = bf16[16,16]{1,0} all-reduce(%g), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %cut = bf16[4,16]{1,0} dynamic-slice(%sum, %g), dynamic_slice_sizes={4,16}
}

%body (p.1: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%p.1), index=1
  %w = bf16[4,16]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %ag = bf16[16,16]{1,0} all-gather(%w), replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=1] {'fsdp'}, dimensions={0}
  %y = bf16[8,16]{1,0} fusion(%x, %ag), kind=kOutput, calls=%product, metadata={op_name="jit(f)/jvp(backbone)/dot"}, backend_config={"window_config":{"estimated_cycles":"100"}}
  %s = bf16[4,16]{1,0} fusion(%ag), kind=kCustom, calls=%all-reduce-scatter.1
  %splash_mha_fwd.7 = bf16[8,16]{1,0} custom-call(%y), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block": 512
}}, metadata={op_name="jit(f)/backbone/splash_mha_fwd"}
  ROOT %t = (s32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%i.1, %y)
}

ENTRY %main (x.2: bf16[8,16]) -> bf16[8,16] {
  %x.2 = bf16[8,16]{1,0} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%zero, %x.2)
  %loop = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) while(%start), condition=%cond, body=%body
  %out = bf16[8,16]{1,0} get-tuple-element(%loop), index=1
  %ars = (bf16[8,16]{1,0}, bf16[8,16]{1,0}) all-reduce-start(%out), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %ard = bf16[8,16]{1,0} all-reduce-done(%ars)
  ROOT %last = bf16[8,16]{1,0} add(%ard, %out), metadata={op_name="jit(f)/head/add"}, backend_config={"window_config":{"estimated_cycles":"7"}}
}
"""  # noqa: E501


def test_a_loop_counts_as_often_as_it_runs():
    cost = hlo.analyse(TEXT, MESH, ("backbone", "logits"))
    assert cost.cycles == {"backbone": 5 * 100, "other": 7}
    assert cost.flops == {"backbone": 5 * 2 * 8 * 16 * 16}
    assert cost.kernels == {"splash_mha_fwd": 5}


def test_collectives_by_kind_axes_and_bytes():
    cost = hlo.analyse(TEXT, MESH, ())
    whole = 16 * 16 * 2
    assert cost.sent == {
        Collective("all-gather", "fsdp", False): 5 * whole * 3 / 4,
        Collective("reduce-scatter", "fsdp", False): 5 * whole * 3 / 4,
        Collective("all-reduce", "data", True): 2 * 8 * 16 * 2 / 2,
    }
    assert sum(cost.calls.values()) == 11


@pytest.mark.parametrize(
    ("kind", "slices", "sent"),
    [
        ("ALL_REDUCE", "{1,2}", 1.0),
        ("ALL_REDUCE", "{1:4}", 1.5),
        ("ALL_GATHER", "{1,2,3:4}", 3.0),
        ("REDUCE_SCATTER", "{1,2}", 0.5),
    ],
)
def test_what_goes_between_slices_is_what_each_device_hands_to_the_hosts(kind, slices, sent):
    about = f'_xla_megascale_target="{slices}x{{0:7}}",_xla_megascale_transfer_type="{kind}"'
    made = "(bf16[18,8,128]{2,1,0}, u32[]{:S(2)}, token[])"
    text = (
        "ENTRY %m (x: bf16[18,8,128]) -> token[] {\n"
        "  %x = bf16[18,8,128]{2,1,0} parameter(0)\n"
        "  %after = token[] after-all()\n"
        f"  %send.1 = {made} send(%x, %after), channel_id=3, frontend_attributes={{{about}}}\n"
        f"  %send.2 = {made} send(%x, %after), channel_id=4\n"  # to a callback on the host
        "  ROOT %done = token[] send-done(%send.1), channel_id=3, "
        f"frontend_attributes={{{about}}}\n}}\n"
    )
    found = Collective(kind.lower().replace("_", "-"), hlo.SLICES, True)
    assert hlo.analyse(text, MESH, ()).sent == {found: sent * 18 * 8 * 128 * 2}


def test_a_loop_without_an_end_is_an_error():
    text = TEXT.replace("constant(5)", "parameter(1)")
    with pytest.raises(ValueError, match="loop has no constant trip count"):
        hlo.analyse(text, MESH, ())


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        # A strided convolution, "same": 4 x 4 places; along each side 3 + 3 + 3 + 2 taps meet.
        (
            "f32[1,4,4,6] convolution(%l, %r), window={size=3x3 stride=2x2 pad=0_1x0_1}, "
            "dim_labels=b01f_01io->b01f",
            2 * 11 * 11 * 3 * 6,
        ),
        ("f32[1,8,8,6] dot(%l, %r), lhs_contracting_dims={3}", 2 * 64 * 6 * 3),
    ],
)
def test_products_of_a_convolution_are_those_that_meet_an_input(line, flops):
    text = (
        "ENTRY %m (l: f32[1,8,8,3], r: f32[3,3,3,6]) -> f32[1,4,4,6] {\n"
        "  %l = f32[1,8,8,3]{3,2,1,0} parameter(0)\n"
        "  %r = f32[3,3,3,6]{3,2,1,0} parameter(1)\n"
        f"  ROOT %c = {line}\n}}\n"
    )
    assert hlo.analyse(text, MESH, ()).flops == {"other": flops}


def test_what_the_cpu_compiler_makes_of_a_known_program():
    """Scanned products on 8 devices: the loops, the products and the sums over the mesh."""
    sizes = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 4, 1), tuple(MESH), sizes)

    def f(x, w):
        y, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, w)
        return y.sum()

    where = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=where)
    w = jax.ShapeDtypeStruct((3, 32, 32), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P()))
    text = jax.jit(f).lower(x, w).compile().as_text()
    cost = hlo.analyse(text, mesh.shape, ())
    assert cost.flops.total() in (3 * 2 * 2 * 32 * 32, 0)  # CPU may call a library instead
    assert {c.axes for c in cost.sent} == {"data,fsdp"}
