"""Training in stages around a stock Trainer, and the methods it knows."""
