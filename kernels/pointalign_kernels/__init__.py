"""Kernels of the alignment loss and the point ops; `reference.py` holds the same functions in plain PyTorch."""

from pointalign_kernels.alignment import alignment_loss, fused_available
from pointalign_kernels.point_ops import farthest_point_sample, group_points, knn

__all__ = ["alignment_loss", "farthest_point_sample", "fused_available", "group_points", "knn"]
