"""How many CPU cores there are to share work among."""

from __future__ import annotations


def cores() -> int:
    """The CPU cores that this process may use, by its affinity and by a container's quota."""
    import joblib  # here: it takes its time to import, and worker processes need no count

    return joblib.cpu_count()
