"""Measurements on real questions, each format beside its control."""
