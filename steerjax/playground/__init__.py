"""The page of `steerjax play`: a slider for each attribute, two settings side by side, what was asked and predicted."""
