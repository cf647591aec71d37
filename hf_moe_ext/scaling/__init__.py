"""Counting, scaling laws and cost formulas on plain numbers; nothing here loads torch.

``shape`` counts a model exactly, ``laws`` ask published scaling laws about it, ``fit`` fits their forms to runs, ``cost`` and
``ders_accounting`` own the formulas of exchanges and of shared bases.
"""
