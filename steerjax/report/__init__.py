"""Metrics, tables and plots of predicted ratings; objectives and evaluation suites use them."""
