"""Image classification."""

from nbhd.tasks.classification.predict import Classifier
from nbhd.tasks.classification.results import Classification, Score

__all__ = ["Classification", "Classifier", "Score"]
