"""Train and evaluate classifiers on labelled examples."""
