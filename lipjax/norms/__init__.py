"""Spectral norms of linear operators: estimates (`power`) and bounds (`deterministic`)."""
