"""Understand and train the advantageous parameters of language models (APEX, arXiv:2505.24241)."""
