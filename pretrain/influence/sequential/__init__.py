"""PRESENCE-Sequential (arXiv 2311.00913, section 3): score a pool of samples with a trained model, drop the highest,
and train afresh on the rest."""
