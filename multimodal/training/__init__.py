"""Training: what is trained and what is frozen, batches, augmentation, cached features, resume, evaluation."""
