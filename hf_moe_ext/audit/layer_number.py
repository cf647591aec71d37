"""Layers by number, as people speak of them; the audit itself knows them by their module paths."""


def layer_number(path: str) -> int | None:
    """Number of a layer in a module path: its first part that is one; None without."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)
