"""PointAlign: feature-level alignment for 3D vision-language models."""
