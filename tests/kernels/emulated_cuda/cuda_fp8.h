// Nothing: codes come from csrc/pack_kv.h, as on GPUs without instructions for e4m3.
