"""raysys: one Ray system for the life of a language model."""

__version__ = "0.1.0"
