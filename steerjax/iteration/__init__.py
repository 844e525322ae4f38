"""SteerLM 2.0 as a pipeline: answers, ratings, log-probabilities, training, and again from what was trained."""
