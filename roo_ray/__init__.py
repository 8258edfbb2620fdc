"""roo_ray: Request-Only Optimization (arXiv 2508.05640) for recommenders, on Ray."""

__version__ = "0.1.0"
