"""A trained model and one question: loading, the predictor, and the adapter for lmms-eval."""
