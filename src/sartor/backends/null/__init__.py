"""The null backend: scheduling and serving without any model."""
