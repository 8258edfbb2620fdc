"""A cluster before money is spent on it: preflight checks, and how large it should be."""
