"""Counting and cost formulas on plain numbers; nothing here loads torch."""
