"""The only place that knows how Transformers lays out its Mixture-of-Experts models."""
