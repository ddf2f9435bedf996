"""qk_norm_rope_kv_pack_: QK norm and RoPE in one pass, and the source rows of the lock packed on the way."""

from typing import Any

import torch
import torch.nn.functional as F
from refusals import Bad, assert_refused, bad_inputs
from regimes import STREAMING, each_regime, rows_of
from samples import int32, projections
from tolerance import assert_bit_identical, assert_sums_differ_at_most, assert_within_roundings

from kvlock_kernels import pack_kv, qk_norm_rope_kv_lerp_, qk_norm_rope_kv_pack_, unpack_kv

EACH_IMPLEMENTATION = True

EPS = 1e-6
REGIMES = {
    "tokens": STREAMING["tokens"],
    "dim": (24, 32, 64, 128),
    "heads": (1, 2),
    "share": STREAMING["share"],
    "dtype": STREAMING["dtype"],
    "source": [kind for kind in STREAMING["source"] if not kind[1]],
    "samples": ((1, 1), (2, 2)),
}


@each_regime(REGIMES)
def test_recording_packs_what_pack_kv_packs(regime: dict[str, Any]) -> None:
    n, h, d, dtype = (regime[name] for name in ("tokens", "heads", "dim", "dtype"))
    (b, _), (storage, _), (index, source_row) = regime["samples"], regime["source"], rows_of(n, regime["share"])
    args = projections(b, n, h, d, dtype)
    v, none, nothing = args[2].clone(), torch.full((n,), -1, dtype=torch.int32), torch.empty(1, 0, h, d)
    plain = qk_norm_rope_kv_lerp_(*(x.clone() for x in args), nothing, nothing, none, torch.ones(b), eps=EPS)
    k = F.rms_norm(args[1].double(), (h * d,), args[4].double(), EPS).unflatten(2, (h, d))[:, index.long()]
    recorded = qk_norm_rope_kv_pack_(*args, source_row, len(index), storage, eps=EPS)
    assert_bit_identical(args[2], plain[2])
    for one, other in zip(args[:2], plain[:2], strict=True):
        assert_sums_differ_at_most(one, other)
    data, scale = pack_kv(v.unflatten(2, (h, d)), index, storage)
    assert_bit_identical(recorded.v.data, data)
    if scale is None:
        assert recorded.k.scale is None and recorded.v.scale is None
        error = (recorded.k.data.double() - k).abs()
        assert (error <= torch.finfo(storage).eps * k.abs() + 1e-5).all()
        return
    assert recorded.v.scale is not None and recorded.k.scale is not None
    assert_bit_identical(recorded.v.scale, scale)
    limit = 127.0 if storage == torch.int8 else 448.0
    assert_within_roundings(recorded.k.scale, (k.abs().amax(-1) / limit).float(), 8)
    half_step = 0.5 if storage == torch.int8 else 16.0  # of the largest codes
    error = (unpack_kv(recorded.k.data, recorded.k.scale).double() - k).abs()
    assert (error <= (half_step + 0.01) * recorded.k.scale[..., None]).all()


def test_rows_recorded_from_the_same_projections_give_them_back_at_ratio_one() -> None:
    args, (_, source_row) = projections(1, 21, 3, 24), rows_of(21, 13 / 21)
    v = args[2].clone()
    recorded = qk_norm_rope_kv_pack_(*(x.clone() for x in args), source_row, 13, torch.float32, eps=EPS)
    plain, locked = (
        qk_norm_rope_kv_lerp_(
            *(x.clone() for x in args), recorded.k.data, recorded.v.data, source_row, torch.full((1,), a), eps=EPS
        )
        for a in (0.0, 1.0)
    )
    for one, other in zip(locked, plain, strict=True):
        assert_bit_identical(one, other)
    assert_bit_identical(locked.v, v)


def test_empty_inputs_stay_empty() -> None:
    q, k, v, *rest = projections(2, 5, 2, 4)
    none = torch.full((5,), -1, dtype=torch.int32)
    recorded = qk_norm_rope_kv_pack_(q[:0], k[:0], v[:0], *rest, none, 0, torch.int8, eps=EPS)
    assert recorded.k.data.shape == (0, 0, 2, 4) and recorded.v.scale is not None
    assert qk_norm_rope_kv_pack_(q, k, v, *rest, none, 0, torch.bfloat16, eps=EPS).k.data.shape == (2, 0, 2, 4)


@bad_inputs(
    Bad({"rows": 6}, "rows", "6", "from 0 to N = 5"),
    Bad({"rows": 1.0}, "rows", "1.0", "an int"),
    Bad({"dtype": torch.int16}, "dtype", "torch.int16", "float8_e4m3fn or int8"),
    Bad({"sin": torch.ones(5, 4, device="meta")}, "sin", "device meta", "device cpu"),
)
def test_bad_inputs_are_named(bad: Bad) -> None:
    names = ("q", "k", "v", "q_weight", "k_weight", "cos", "sin")
    good = dict(zip(names, projections(2, 5, 2, 4), strict=True))
    good |= {"source_row": int32(0, -1, 2, 1, -1), "rows": 3, "dtype": torch.bfloat16, "eps": EPS}
    assert_refused(qk_norm_rope_kv_pack_, good, bad)
