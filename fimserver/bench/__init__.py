"""Measure: every number in a document comes from a command here."""
