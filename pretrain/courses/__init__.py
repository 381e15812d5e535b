"""MCL, the multi-perspective course learner (arXiv 2305.03981), as far as it is more than objectives: self-correction
and soups."""
