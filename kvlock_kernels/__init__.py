"""Operators of KV-Lock: lerp of key and value rows, locked attention, windowed variance, schedules and packed rows."""

from kvlock_kernels.api import (
    AttentionOutput,
    GuidedVelocity,
    LerpedPair,
    LockSchedule,
    PackedRows,
    guided_velocity,
    kv_lerp_,
    kv_lerp_attention,
    kv_lerp_pair_,
    lock_schedule,
    pack_kv,
    unpack_kv,
    windowed_variance_,
)

__all__ = [
    "AttentionOutput",
    "GuidedVelocity",
    "LerpedPair",
    "LockSchedule",
    "PackedRows",
    "guided_velocity",
    "kv_lerp_",
    "kv_lerp_attention",
    "kv_lerp_pair_",
    "lock_schedule",
    "pack_kv",
    "unpack_kv",
    "windowed_variance_",
]
