"""What a reviewer looks at: comparisons, pictures and figures, made from what a run has logged."""
