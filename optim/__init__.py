"""Muon, AdamW, and the schedule that drives them."""
