"""SaRA (arXiv 2409.06633): training a model's smallest weights, one idea a file."""
