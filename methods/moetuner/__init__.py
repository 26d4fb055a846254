"""MoETuner (arXiv 2502.06643): experts placed by integer programming, from recorded routing."""
