"""Losses as pure functions that return (sum, count) in float32."""
