"""Mixture of Grouped Experts (Pangu Pro MoE, arXiv 2505.21411): a gate, which every system has (``gate: moge``), and no
system of its own. Here is what its claim is judged by."""
