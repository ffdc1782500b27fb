"""Measurements and plots of the repository, each made by one command."""

import os


def cores() -> int | None:
    """CPU cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
