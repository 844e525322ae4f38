"""How well ratings are predicted: metrics, baselines, report."""
