"""How good generated images are: distances of features, and the evaluator that uses them all."""

from cvjax.evaluation.distances import (
    classifier_score,
    frechet_distance,
    kernel_distance,
    nearest_distances,
    precision_recall_density_coverage,
)

__all__ = [
    "classifier_score",
    "frechet_distance",
    "kernel_distance",
    "nearest_distances",
    "precision_recall_density_coverage",
]
