"""Fine-tuning of embedding models for search: data, hard negatives, training and measurement."""
