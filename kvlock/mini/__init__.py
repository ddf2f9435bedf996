"""The embedded miniature: a small trained Wan2.1-VACE pipeline and the one world it knows."""
