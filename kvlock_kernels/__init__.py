"""Operators of KV-Lock: the lerp of key and value rows, what surrounds it in attention, and what steers it."""

from kvlock_kernels.api import (
    GuidedVelocity,
    LerpedPair,
    LockSchedule,
    PackedRows,
    guided_velocity,
    kv_lerp_,
    kv_lerp_pair_,
    lock_schedule,
    pack_kv,
    unpack_kv,
    windowed_variance_,
)
from kvlock_kernels.attention import AttentionOutput, kv_lerp_attention, kv_lerp_attention_
from kvlock_kernels.norm_rope import Projections, RecordedRows, qk_norm_rope_kv_lerp_, qk_norm_rope_kv_pack_

__all__ = [
    "AttentionOutput",
    "GuidedVelocity",
    "LerpedPair",
    "LockSchedule",
    "PackedRows",
    "Projections",
    "RecordedRows",
    "guided_velocity",
    "kv_lerp_",
    "kv_lerp_attention",
    "kv_lerp_attention_",
    "kv_lerp_pair_",
    "lock_schedule",
    "pack_kv",
    "qk_norm_rope_kv_lerp_",
    "qk_norm_rope_kv_pack_",
    "unpack_kv",
    "windowed_variance_",
]
