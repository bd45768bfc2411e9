"""What models have become: differences between units, effective rank, what a run will cost."""
