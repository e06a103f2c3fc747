"""Fine-tune embedding models for search: read data, mine hard negatives, train and measure."""
