"""Counting, scaling laws and cost formulas on plain numbers; nothing here loads torch.

``shape`` counts a model exactly; ``laws`` ask published scaling laws about it, and ``fit`` fits their forms to runs. What a model
costs: ``layout`` says who holds what, ``memory`` (with ``activations`` and ``precision``) what a training step needs,
``roofline`` how long it takes, ``serving`` both of a served model, ``money`` what that costs; ``hardware`` knows devices and
``calibrate`` fits efficiencies to a measured run. ``exchange`` and ``ders_accounting`` own the formulas of all-to-alls and of
shared bases.
"""
